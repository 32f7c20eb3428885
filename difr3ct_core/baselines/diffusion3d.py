"""3D Diffusion, the paper's ablation: DIFR3CT's diffusion in voxels instead of latents.

Schedule, loss, guidance, samplers, denoiser and fusion are those of the latent model; only the grid differs, and the
attention, which has fewer heads and begins at a coarser level, because a volume has 64 times as many cells as its
latent. What that costs is the point of the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..diffusion import Schedule, diffusion_loss
from ..fusion import Fusion
from ..geometry import View
from ..presets import Preset
from ..progress import progress
from ..sampling import draw
from ..unet import UNet3d
from .network import Baseline
from .presets import Diffusion3DPreset


class VoxelDiffusion(Baseline):
    """Fusion and denoiser on the grid of the volume, in [-1, 1]. For any number of views."""

    kind = "diffusion3d"
    settings_class = Diffusion3DPreset
    preset_sections = ("volume", "xray", "diffusion")

    def __init__(self, preset: Preset, settings: Diffusion3DPreset, views: Sequence[View]) -> None:
        super().__init__(preset, settings, views)
        self.schedule = Schedule(preset.diffusion)
        self.fusion = Fusion(settings.fusion, preset.volume.shape, preset.volume.spacing_mm, factor=1)
        self.unet = UNet3d(1, settings.fusion.out_channels, settings.unet)
        self.unet.checkpointing = settings.training.checkpointing

    def condition(self, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, "b k z y x"]:
        """Line integrals -> condition on the grid of the volume."""
        self.check(xrays)
        return self.fusion(xrays / self.preset.xray.scale, self.views)

    def loss(
        self,
        truth: Float[Tensor, "b 1 z y x"],
        xrays: Float[Tensor, "b n v u"],
        generator: torch.Generator,
        part: slice,
        batch: int,
        critic: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 15 on voxels; see :meth:`Baseline.loss`."""
        dropout = self.preset.diffusion.condition_dropout
        condition = self.condition(xrays)
        return diffusion_loss(self.unet, self.schedule, truth, condition, dropout, generator, part, batch), {}

    @torch.inference_mode()
    def samples(self, xrays: Float[Tensor, "b n v u"], n_samples: int, seed: int = 0) -> Float[Tensor, "b s z y x"]:
        """Posterior samples in [-1, 1] on the CPU, with the preset's solver; the same whatever the batch is."""
        p, size = self.preset.sampling, self.settings.sample_batch
        condition = torch.cat([self.condition(images[None].to(self.device)) for images in xrays])
        found = []
        for start in progress(range(0, len(xrays) * n_samples, size), "samples of 3D Diffusion"):
            index = range(start, min(start + size, len(xrays) * n_samples))
            volume = draw(
                self.unet,
                self.schedule,
                condition[[i // n_samples for i in index]],
                (len(index), 1, *self.preset.volume.shape),
                solver=p.solver,
                steps=p.steps,
                guidance=p.guidance,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i in index],
                device=self.device,
            )
            found.append(volume[:, 0].clamp(-1, 1).cpu())
        return torch.cat(found).view(len(xrays), n_samples, *self.preset.volume.shape)

    def reconstruct(self, xrays: Float[Tensor, "b n v u"], seed: int = 0) -> Float[Tensor, "b 1 z y x"]:
        """The mean of the preset's number of posterior samples; see :meth:`Baseline.reconstruct`."""
        return self.samples(xrays, self.preset.sampling.n_samples, seed).mean(1, keepdim=True)
