"""The initial network: a first guess straight from the x-rays, for the denoiser to start from. Beyond the paper.

At high noise a denoiser must say where everything is from the x-rays alone, and Eq. 10 makes that hard: the mean over
views holds neither where a point lies along a ray nor which view saw what. INRR3CT answers with coordinates and sine
layers, and learns from hundreds of patients what the denoiser does not from ten thousand. This is that network, asked
for the latent at the points of the latent grid instead of for HU at every voxel, which costs a sixteenth:

    f_v = features of x-ray v on the point's ray,   h = mean over v of sine(f_v, position),   z = W sine(h, z_solver)

with z_solver the encoded volume of a classical solver (:mod:`difr3ct_core.initial`), where the preset has one. It is
trained alone, by least squares, so it gives the mean of the latents that the x-rays allow: a blur. The diffusion model
gets it as a condition and adds what a mean cannot hold.

:class:`difr3ct_core.initial_volume.InitialVolume` is the dearer one, which gives a value for every voxel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .files import InputError
from .fusion import UNet2d, coarsen, features_on_rays
from .geometry import View, voxel_centres
from .implicit import SineLayers, fourier_features
from .initial_volume import InitialVolume, check_images
from .presets import FusionPreset, Preset


class InitialNetwork(nn.Module):
    """See the head of this file. One set of weights serves any number of views.

    Args:
        preset: ``initial`` and the grid of the latents.
    """

    place: Tensor

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        p, (channels, *grid) = preset.initial, preset.latent_shape
        self.factor = 2**preset.vqgan.levels
        self.net = UNet2d(3, FusionPreset(p.widths, p.features), self.factor)
        self.per_view = SineLayers(p.features + 3 + 6 * p.octaves, p.width, p.view_layers, p.omega, first=True)
        extra = 0 if p.solver == "none" else channels
        self.joint = SineLayers(p.width + extra, p.width, p.joint_layers, p.omega, first=False)
        self.head = nn.Linear(p.width, channels)
        points = voxel_centres((grid[0], grid[1], grid[2]), (preset.volume.spacing_mm * self.factor,) * 3).view(-1, 3)
        place = fourier_features(points * (2 / preset.volume.fov_mm), p.octaves)
        self.register_buffer("place", place, persistent=False)

    def forward(
        self,
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        solved: Float[Tensor, "b c z y x"] | None = None,
    ) -> Float[Tensor, "b c z y x"]:
        """The scaled latent that the x-rays suggest.

        Args:
            xrays: line integrals, dimensionless.
            views: one per x-ray.
            solved: the encoded classical volume; None for a preset without a solver.

        Raises:
            InputError: as many x-rays as views are expected, and ``solved`` if and only if the preset has a solver.
        """
        check_images(xrays, views)
        if (solved is None) != (self.preset.initial.solver == "none"):
            raise InputError(
                f"solved: {'missing' if solved is None else 'given'}, but the solver of the preset is "
                f"{self.preset.initial.solver!r}; pass what solved_latent(vqgan, xrays, views, preset) returns."
            )
        # In bf16 omega times a sum would lose the sine's argument, whatever the training around this has chosen.
        with torch.autocast(xrays.device.type, enabled=False):
            return self._latent(xrays.float(), views, solved)

    def _latent(self, xrays: Tensor, views: Sequence[View], solved: Tensor | None) -> Tensor:
        b, n, rows, columns = xrays.shape
        angles = xrays.new_tensor([math.radians(view.angle_deg) for view in views])
        marks = torch.stack([angles.cos(), angles.sin()], dim=1)[None, :, :, None, None].expand(b, n, 2, rows, columns)
        images = torch.cat([xrays[:, :, None] / self.preset.xray.scale, marks], dim=2)
        features = rearrange(self.net(rearrange(images, "b n c v u -> (b n) c v u")), "(b n) k v u -> b n k v u", b=b)
        z, y, x = self.preset.latent_shape[1:]
        coarse = [coarsen(view, self.factor) for view in views]
        at_once = 1 if xrays.device.type == "cpu" else n  # a CPU's cache holds one view; a GPU wants few large steps
        total: Tensor | float = 0.0
        for i in range(0, n, at_once):
            some, spacing = slice(i, i + at_once), self.preset.volume.spacing_mm * self.factor
            seen = features_on_rays(features[:, some], coarse[some], (z, y, x), spacing)
            seen = rearrange(seen, "b n k z y x -> b n (z y x) k")
            place = self.place.expand(*seen.shape[:2], -1, -1)
            total = total + self.per_view(torch.cat([seen, place], dim=-1)).sum(1)
        h = total / n  # type: ignore[operator]
        if solved is not None:
            h = torch.cat([h, rearrange(solved.float(), "b c z y x -> b (z y x) c")], dim=-1)
        return rearrange(self.head(self.joint(h)), "b (z y x) c -> b c z y x", z=z, y=y, x=x)


def build_initial(preset: Preset) -> InitialNetwork | InitialVolume:
    """The network that the preset's ``initial`` describes, with random weights."""
    return InitialVolume(preset) if preset.initial.in_voxels else InitialNetwork(preset)
