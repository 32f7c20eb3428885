"""From x-rays to a 3D condition: 2D features, carried back along their rays (§III-A, Eq. 10).

A 2D U-Net turns each x-ray into a feature image. Eq. 10 then gives every point of the latent grid, for every
view, the feature at the detector point which its ray hits,

    f_3D(x) = mean over views v of  f_2D,v(π_v(x)),

with π_v the projection of :func:`difr3ct_core.geometry.world_to_detector`, parallel or cone. The mean makes the
result independent of the order and, in shape, of the number of views.

The feature images are made at the resolution of the latent grid (the network's last layer folds blocks of
pixels), because sampling a finer image at the few latent points would alias. Beyond the paper, each x-ray comes
with two constant channels, sin and cos of its angle, because the mean would otherwise lose which view was which.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .files import InputError
from .geometry import View, voxel_centres, world_to_detector
from .presets import FusionPreset


class ResidualBlock2d(nn.Module):
    """Twice (GroupNorm, SiLU, 3² convolution), added to the input."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(groups, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Float[Tensor, "b ci v u"]) -> Float[Tensor, "b co v u"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet2d(nn.Module):
    """Feature image of an x-ray, ``factor`` times coarser than the x-ray."""

    def __init__(self, channels_in: int, preset: FusionPreset, factor: int) -> None:
        super().__init__()
        widths, groups = preset.widths, preset.groups
        self.factor = factor
        self.stem = nn.Conv2d(channels_in * factor**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock2d(widths[max(i - 1, 0)], width, groups) for i, width in enumerate(widths)
        )
        self.up = nn.ModuleList(
            ResidualBlock2d(widths[i] + widths[i + 1], widths[i], groups) for i in range(len(widths) - 2, -1, -1)
        )
        self.head = nn.Sequential(
            nn.GroupNorm(groups, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], preset.out_channels, 1)
        )

    def forward(self, xray: Float[Tensor, "b c V U"]) -> Float[Tensor, "b k v u"]:
        h = self.stem(F.pixel_unshuffle(xray, self.factor))
        skips = []
        for i, block in enumerate(self.down):
            h = block(h if i == 0 else F.avg_pool2d(h, 2))
            skips.append(h)
        for block, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            h = block(torch.cat([F.interpolate(h, scale_factor=2.0, mode="bilinear"), skip], dim=1))
        return self.head(h)


def coarsen(view: View, factor: int) -> View:
    """The same detector with pixels ``factor`` times larger: the geometry of a feature image."""
    rows, columns = view.detector_shape
    return dataclasses.replace(
        view,
        detector_shape=(rows // factor, columns // factor),
        pixel_mm=(view.pixel_mm[0] * factor, view.pixel_mm[1] * factor),
    )


@lru_cache(maxsize=64)
def _sampling_grid(view: View, shape: tuple[int, int, int], spacing_mm: float, device: torch.device) -> Tensor:
    """Where each grid point lands on the detector, in grid_sample's coordinates: (1, z, y·x, 2)."""
    # It is cached, and a tensor made in inference mode could not serve a training step later.
    with torch.inference_mode(False), torch.no_grad():
        vu = world_to_detector(voxel_centres(shape, (spacing_mm,) * 3), view)
        rows, columns = view.detector_shape
        normalised = torch.stack([(2 * vu[..., 1] + 1) / columns - 1, (2 * vu[..., 0] + 1) / rows - 1], dim=-1)
        return rearrange(normalised, "z y x two -> 1 z (y x) two").float().to(device)


def features_on_rays(
    features: Float[Tensor, "b n k v u"], views: Sequence[View], shape: tuple[int, int, int], spacing_mm: float
) -> Float[Tensor, "b n k z y x"]:
    """What each view's feature image holds on each point's ray; zero where a ray misses the detector.

    Args:
        features: one feature image per view.
        views: geometry of those images (see :func:`coarsen`).
        shape: of the 3D grid (z, y, x), centred on the origin.
        spacing_mm: of the 3D grid.
    """
    return torch.stack([_on_rays(features[:, i], view, shape, spacing_mm) for i, view in enumerate(views)], dim=1)


def _on_rays(image: Tensor, view: View, shape: tuple[int, int, int], spacing_mm: float) -> Tensor:
    """(b, k, v, u) -> (b, k, z, y, x)."""
    grid = _sampling_grid(view, shape, spacing_mm, image.device).to(image.dtype).expand(len(image), -1, -1, -1)
    found = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return rearrange(found, "b k z (y x) -> b k z y x", y=shape[1])


def resample_along_rays(
    features: Float[Tensor, "b n k v u"], views: Sequence[View], shape: tuple[int, int, int], spacing_mm: float
) -> Float[Tensor, "b k z y x"]:
    """Eq. 10: the mean over views of :func:`features_on_rays`, summed one by one because eight are large."""
    total: Tensor | float = 0.0
    for i, view in enumerate(views):
        total = total + _on_rays(features[:, i], view, shape, spacing_mm)
    return total / len(views)  # type: ignore[return-value]


class Fusion(nn.Module):
    """X-rays and their views -> condition on the latent grid.

    Args:
        preset: widths and channels of the 2D U-Net.
        latent_shape: (z, y, x) of the latent grid.
        latent_spacing_mm: its spacing.
        factor: voxels per latent voxel along an axis (4 in the paper).
    """

    def __init__(
        self, preset: FusionPreset, latent_shape: tuple[int, int, int], latent_spacing_mm: float, factor: int
    ) -> None:
        super().__init__()
        self.latent_shape, self.latent_spacing_mm, self.factor = latent_shape, latent_spacing_mm, factor
        self.net = UNet2d(3, preset, factor)

    def forward(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b k z y x"]:
        """Condition for the denoiser.

        Args:
            xrays: line integrals, divided by the preset's ``xray.scale``.
            views: one per x-ray.

        Raises:
            InputError: number or size of the x-rays does not match the views.
        """
        b, n, rows, columns = xrays.shape
        if n != len(views) or n == 0:
            raise InputError(f"xrays: found {n} images, expected {len(views)}, one per view.")
        for view in views:
            if tuple(view.detector_shape) != (rows, columns):
                raise InputError(
                    f"xrays: found images of {rows} x {columns} pixels, expected {view.detector_shape[0]} x "
                    f"{view.detector_shape[1]}, the detector of the view at {view.angle_deg}°."
                )
        multiple = self.factor * 2 ** (len(self.net.down) - 1)
        if rows % multiple or columns % multiple:
            raise InputError(f"xrays: found images of {rows} x {columns} pixels, expected multiples of {multiple}.")
        angles = torch.tensor([math.radians(view.angle_deg) for view in views], device=xrays.device, dtype=xrays.dtype)
        marks = torch.stack([angles.cos(), angles.sin()], dim=1)[None, :, :, None, None].expand(
            b, -1, -1, rows, columns
        )
        images = torch.cat([xrays[:, :, None], marks], dim=2)
        features = self.net(rearrange(images, "b n c v u -> (b n) c v u"))
        features = rearrange(features, "(b n) k v u -> b n k v u", b=b)
        coarse = [coarsen(view, self.factor) for view in views]
        return resample_along_rays(features, coarse, self.latent_shape, self.latent_spacing_mm)
