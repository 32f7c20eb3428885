"""What every classical method starts from: checked x-rays, the projector and its adjoint, and the coarser problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..drr import backproject, project
from ..files import InputError
from ..geometry import View, check_views, spacing_zyx

#: Box constraint µ_min, µ_max in 1/mm: attenuation is never negative, and has no upper limit unless one is given.
NON_NEGATIVE = (0.0, math.inf)


@dataclass(frozen=True)
class Problem:
    """Find µ with A µ = p: x-rays p, views, and the grid of µ. A is the projector, its adjoint is exact.

    Attributes:
        xrays: line integrals, dimensionless.
        views: one per x-ray.
        shape: (z, y, x) voxels of µ.
        spacing: (z, y, x) mm.
    """

    xrays: Float[Tensor, "b view v u"]
    views: tuple[View, ...]
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    def forward(self, mu: Float[Tensor, "b z y x"]) -> Float[Tensor, "b view v u"]:
        """A µ."""
        return project(mu[:, None], self.views, self.spacing)[:, 0]

    def adjoint(self, xrays: Float[Tensor, "b view v u"]) -> Float[Tensor, "b z y x"]:
        """Aᵀ p."""
        return backproject(xrays[:, None], self.views, self.shape, self.spacing)[:, 0]

    def row_sums(self) -> Float[Tensor, "1 view v u"]:
        """Length in mm of every ray inside the volume."""
        return self.forward(self.xrays.new_ones(1, *self.shape))

    def column_sums(self) -> Float[Tensor, "1 z y x"]:
        """Weight in mm with which all rays together see every voxel."""
        return self.adjoint(self.xrays.new_ones(1, *self.xrays.shape[1:]))

    def zeros(self) -> Float[Tensor, "b z y x"]:
        """An empty volume per patient."""
        return self.xrays.new_zeros(self.xrays.shape[0], *self.shape)

    def coarser(self) -> Problem | None:
        """The same problem with voxels and pixels twice as large, or None where a size is odd or already small.

        The mean of four line integrals is the line integral through the pixel of twice the size.
        """
        sizes = (*self.shape, *self.xrays.shape[2:])
        if any(size % 2 for size in sizes) or min(sizes) < 32:
            return None
        views = tuple(
            dataclasses.replace(
                view,
                detector_shape=(view.detector_shape[0] // 2, view.detector_shape[1] // 2),
                pixel_mm=(2 * view.pixel_mm[0], 2 * view.pixel_mm[1]),
            )
            for view in self.views
        )
        z, y, x = self.shape
        return Problem(
            F.avg_pool2d(self.xrays, 2), views, (z // 2, y // 2, x // 2), tuple(2 * edge for edge in self.spacing)
        )


def make_problem(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
) -> Problem:
    """Check the arguments that all classical methods share.

    Raises:
        InputError: the x-rays are not a finite stack that matches the views, or the grid is impossible.
    """
    views = check_views(views)
    if xrays.ndim != 4:
        raise InputError(
            f"xrays: found shape {tuple(xrays.shape)}, expected (patient, view, v, u); add the missing axis with "
            "xrays[None]."
        )
    if xrays.shape[1] != len(views):
        raise InputError(f"xrays: found {xrays.shape[1]} images for {len(views)} views, expected one image per view.")
    if tuple(xrays.shape[2:]) != views[0].detector_shape:
        raise InputError(
            f"xrays: found images of {tuple(xrays.shape[2:])} pixels (v, u), but the views have a detector of "
            f"{views[0].detector_shape}; use the views that the x-rays were taken with."
        )
    if not torch.is_floating_point(xrays):
        raise InputError(f"xrays: found {xrays.dtype}, expected line integrals in floating point.")
    if not torch.isfinite(xrays).all():
        bad = int((~torch.isfinite(xrays)).sum())
        raise InputError(f"xrays: found {bad} pixels that are NaN or infinite, expected finite line integrals.")
    shape = tuple(volume_shape)
    if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise InputError(f"volume_shape: found {shape}, expected three positive whole numbers (z, y, x).")
    # The parameters of a learned prior may want gradients; a classical method never does.
    return Problem(xrays.detach(), views, shape, spacing_zyx(spacing_mm))


def check_bounds(bounds: tuple[float, float] | None) -> tuple[float, float]:
    """The box constraint as (low, high); None means no constraint.

    Raises:
        InputError: not two numbers in rising order.
    """
    if bounds is None:
        return (-math.inf, math.inf)
    if len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise InputError(f"bounds: found {bounds!r}, expected (lowest, highest) attenuation in 1/mm, e.g. (0.0, 0.05).")
    return (float(bounds[0]), float(bounds[1]))


def check_iterations(iterations: int) -> None:
    """Raise an InputError unless ``iterations`` is a positive whole number."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise InputError(f"iterations: found {iterations!r}, expected a whole number of at least 1.")
