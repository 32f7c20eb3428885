"""Baselines so small that a test can train them, on the patients of small_models.py (16³)."""

from __future__ import annotations

import torch
from small_models import SMALL
from torch import nn

from difr3ct_core.baselines.presets import Diffusion3DPreset, INRR3CTPreset, NAFPreset, X2CTGANPreset
from difr3ct_core.drr import project
from difr3ct_core.geometry import View, voxel_centres
from difr3ct_core.presets import FusionPreset, TrainPreset, UNetPreset

FAST = TrainPreset(steps=3, batch_size=2, lr=1e-3, warmup_steps=1, precision="fp32")
NAF_SMALL = NAFPreset(
    TrainPreset(steps=150, batch_size=192, lr=1e-2, lr_decay="late_tenth", ema_decay=0.0, precision="fp32"),
    levels=2, base=8, log2_table=11, width=16, samples=24,
)  # fmt: skip
INRR3CT_SMALL = INRR3CTPreset(
    FAST, unet=FusionPreset(widths=(8, 16), out_channels=16, groups=2), width=32, octaves=2, points=1024
)
X2CTGAN_SMALL = X2CTGANPreset(
    FAST, widths=(8, 16, 16), decoder_widths=(8, 16, 16), growth=8, dense_layers=1, critic_channels=16, critic_strides=1
)
DIFFUSION_SMALL = Diffusion3DPreset(
    FAST,
    fusion=FusionPreset(widths=(8, 8), out_channels=8, groups=2),
    unet=UNetPreset(widths=(8, 16), blocks_per_level=1, attention_from_level=1, heads=1, head_channels=8, groups=2),
)

#: World position in mm of an asymmetric landmark, at the centre of the voxel (z, y, x) = (11, 4, 13) of SMALL.
LANDMARK_VOXEL = (11, 4, 13)


def landmark() -> tuple[torch.Tensor, torch.Tensor]:
    """A volume (z, y, x) of one bright voxel, and that voxel's centre (x, y, z) in mm."""
    volume = SMALL.volume
    mu = torch.zeros(volume.shape)
    mu[LANDMARK_VOXEL] = 0.02
    return mu, voxel_centres(volume.shape, volume.spacing_mm)[LANDMARK_VOXEL]


def landmark_xrays(views: tuple[View, ...]) -> torch.Tensor:
    """The projector's x-rays of it, (1, view, v, u), each scaled to a peak of 1."""
    xrays = project(landmark()[0][None, None], views, SMALL.volume.spacing_mm)[:, 0]
    return xrays / xrays.amax(dim=(2, 3), keepdim=True)


def stir(module: nn.Module, seed: int = 0) -> None:
    """Move all weights off the values they start from: layers that begin at zero stop every gradient behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def without_gradient(module: nn.Module) -> list[str]:
    """Names of the parameters that the last backward pass did not reach; what is left by rounding does not count.

    A bias before a normalisation of its own channel is such a case, so the models here have larger groups.
    """
    return [name for name, p in module.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-8]
