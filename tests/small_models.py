"""Models and patients so small that a test can train them: 16³ voxels, latents 4³, three steps."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from difr3ct_core.datasets import Patients, preset_views, render_xrays
from difr3ct_core.presets import Preset, get_preset
from difr3ct_core.stages import train_ldm, train_vqgan

SMALL: Preset = get_preset("tiny").replace(
    volume={"size": 16},
    xray={"detector_size": 16},
    cohort={"n_train": 4, "n_val": 1, "n_test": 1, "draw_size": 16},
    vqgan={"base_channels": 8, "codebook_size": 64},
    fusion={"widths": (8, 8), "out_channels": 8},
    unet={"widths": (8, 16), "heads": 2, "head_channels": 4},
    train_vqgan={"steps": 3, "batch_size": 2, "warmup_steps": 1},
    train_ldm={"steps": 3, "batch_size": 2, "warmup_steps": 1},
    sampling={"steps": 6},
)


def patients(count: int = 4, seed: int = 0, preset: Preset = SMALL) -> Patients:
    """Random blobs in HU with their x-rays; nothing anatomical."""
    generator = torch.Generator().manual_seed(seed)
    size = preset.volume.size
    coarse = torch.randn(count, 1, 3, 4, 5, generator=generator)
    hu = F.interpolate(coarse, size=(size,) * 3, mode="trilinear")[:, 0].mul(500).sub(200)
    hu = hu.clamp(preset.volume.hu_min, preset.volume.hu_max).round()
    views = preset_views(preset)
    xrays = render_xrays(hu, views, preset.volume, preset.xray)
    ids = tuple(f"blob-{seed}-{i}" for i in range(count))
    return Patients(ids, hu.to(torch.int16), (hu > 0).to(torch.uint8), xrays, views, preset.volume)


def trained(folder: Path, view_set: str = "2view", preset: Preset = SMALL) -> Path:
    """Run folder of a diffusion model whose autoencoder lies beside it in ``vqgan``."""
    train = patients(preset=preset)
    vqgan = train_vqgan(train, preset, folder / "vqgan")
    train_ldm(train.with_views(view_set), vqgan, preset, folder / view_set)
    return folder / view_set


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Have two modules the same weights, bit for bit?"""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
