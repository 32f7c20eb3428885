"""Phantoms whose line integrals are known in closed form: what every projector is judged against.

Points and vectors are (x, y, z) in mm. The rays come from :func:`~difr3ct_core.geometry.pixel_rays`, so the images
hold for parallel and cone beams alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..geometry import View, pixel_rays, spacing_zyx, voxel_centres


@dataclass(frozen=True)
class Blob:
    """A Gaussian: value·exp(-|p - centre|² / (2·sigma²)). Smooth, so that only the projector's own error is left."""

    centre_mm: tuple[float, float, float]
    sigma_mm: float
    value: float = 1.0

    def sample(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
        """The phantom's value at points."""
        squared = ((points - torch.tensor(self.centre_mm, dtype=points.dtype)) ** 2).sum(-1)
        return self.value * torch.exp(-squared / (2 * self.sigma_mm**2))

    def integral(
        self, origin: Float[Tensor, "*batch 3"], direction: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, "*batch"]:
        """Integral along whole lines: value·sigma·sqrt(2π)·exp(-d²/(2·sigma²)) at distance d from the centre."""
        to_centre = torch.tensor(self.centre_mm, dtype=origin.dtype) - origin
        along = (to_centre * direction).sum(-1, keepdim=True)
        squared = ((to_centre - along * direction) ** 2).sum(-1)
        return self.value * self.sigma_mm * math.sqrt(2 * math.pi) * torch.exp(-squared / (2 * self.sigma_mm**2))


@dataclass(frozen=True)
class Ellipsoid:
    """A solid ellipsoid of one value, turned by ``turn_deg`` about +z."""

    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    turn_deg: float = 0.0
    value: float = 1.0

    def _to_sphere(self, vectors: Tensor) -> Tensor:
        """Turn and scale so that the ellipsoid becomes the unit sphere."""
        cos, sin = math.cos(math.radians(self.turn_deg)), math.sin(math.radians(self.turn_deg))
        turn = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=vectors.dtype)
        return vectors @ turn.T / torch.tensor(self.radii_mm, dtype=vectors.dtype)

    def sample(self, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
        """The phantom's value at points."""
        inside = self._to_sphere(points - torch.tensor(self.centre_mm, dtype=points.dtype)).norm(dim=-1) <= 1
        return self.value * inside.to(points.dtype)

    def integral(
        self, origin: Float[Tensor, "*batch 3"], direction: Float[Tensor, "*batch 3"]
    ) -> Float[Tensor, "*batch"]:
        """Value times chord: with o, d on the unit sphere's scale, 2·sqrt((o·d)² - d²(o² - 1)) / d²."""
        o = self._to_sphere(origin - torch.tensor(self.centre_mm, dtype=origin.dtype))
        d = self._to_sphere(direction)
        dd = (d * d).sum(-1)
        root = ((o * d).sum(-1) ** 2 - dd * ((o * o).sum(-1) - 1)).clamp(min=0).sqrt()
        return self.value * 2 * root / dd


Shape = Blob | Ellipsoid


def exact_projection(shapes: Sequence[Shape], views: Sequence[View]) -> Float[Tensor, "view v u"]:
    """The exact x-rays of the sum of ``shapes``, float64."""
    rays = [pixel_rays(view) for view in views]
    return torch.stack([sum(shape.integral(*ray) for shape in shapes) for ray in rays])


def sample_phantom(
    shapes: Sequence[Shape],
    shape_zyx: tuple[int, int, int],
    spacing_mm: float | tuple[float, float, float],
    supersample: int = 1,
) -> Float[Tensor, "z y x"]:
    """The sum of ``shapes`` on a voxel grid, each voxel the mean of ``supersample``³ points, float64."""
    points = voxel_centres(shape_zyx, spacing_mm, torch.float64)
    spacing = torch.tensor(spacing_zyx(spacing_mm), dtype=torch.float64).flip(0)
    if supersample == 1:
        return sum(shape.sample(points) for shape in shapes)
    # Where a voxel and all its neighbours have one value at centre and corners, nothing changes inside of it.
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64)] * 3)
    volume = sum(shape.sample(points) for shape in shapes)
    varies = torch.zeros(volume.shape, dtype=torch.bool)
    for corner in corners:
        varies |= sum(shape.sample(points + corner * spacing) for shape in shapes) != volume
    varies = F.max_pool3d(varies[None, None].float(), 3, stride=1, padding=1)[0, 0] > 0
    steps = (torch.arange(supersample, dtype=torch.float64) + 0.5) / supersample - 0.5
    places = points[varies]
    mean = torch.zeros(len(places), dtype=torch.float64)
    for step in torch.cartesian_prod(steps, steps, steps):
        mean += sum(shape.sample(places + step * spacing) for shape in shapes)
    volume[varies] = mean / supersample**3
    return volume
