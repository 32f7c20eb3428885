"""Where a point of the patient falls on the detector (Eq. 10), and where the rays and voxels are.

World coordinates are (x, y, z) in mm: +x patient Left, +y Posterior, +z Superior. A volume is an array
``(z, y, x)`` centred on the origin, so voxel i of n has its centre at (i - (n - 1)/2)·spacing on its axis. What a view
is and how it stands in this world is in views.py. Projector, feature fusion and every baseline get their geometry from
:func:`world_to_detector` and :func:`pixel_rays`; no other file spells out an angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import number, shape
from .files import InputError
from .views import Frame, Pose, View, check_views, standard_views, view_frame, views_from_json, views_to_json

__all__ = [
    "Frame",
    "Pose",
    "View",
    "check_views",
    "detector_axes",
    "pixel_rays",
    "spacing_zyx",
    "standard_views",
    "view_frame",
    "views_from_json",
    "views_to_json",
    "voxel_centres",
    "world_to_detector",
]


def world_to_detector(
    points_mm: Float[Tensor, "*batch 3"], view: View, pose: Pose | None = None
) -> Float[Tensor, "*batch 2"]:
    """Where a point of the patient falls on the detector (Eq. 10).

    With p the point, n towards the source and m = 1 (parallel) or DSD / (DSO - p·n) (cone):
    u = m·p·e_u, v = m·p·e_v in mm, and k = (u - offset)/pixel + (count - 1)/2 in pixels.

    Args:
        points_mm: (x, y, z) in mm.
        view: the view.
        pose: deviation of this view; the result is differentiable in it and in the points.

    Returns:
        fractional pixel index (v, u); 0 is the centre of the first pixel. Points level with the source or behind it
        have no image and give infinity.
    """
    dtype = points_mm.dtype
    frame = view_frame(view, pose, dtype)
    origin, _, to_source, e_u, e_v = (vector.to(points_mm.device) for vector in frame)
    relative = points_mm - origin
    v, u = relative @ e_v, relative @ e_u
    if view.mode == "cone":
        depth = view.dso_mm - relative @ to_source
        seen = depth > 1e-6 * view.dso_mm
        scale = view.dsd_mm / torch.where(seen, depth, torch.ones_like(depth))
        infinite = torch.full_like(depth, math.inf)
        v, u = torch.where(seen, v * scale, infinite), torch.where(seen, u * scale, infinite)
    (n_v, n_u), (d_v, d_u), (o_v, o_u) = view.detector_shape, view.pixel_mm, view.offset_mm
    return torch.stack([(v - o_v) / d_v + (n_v - 1) / 2, (u - o_u) / d_u + (n_u - 1) / 2], dim=-1)


def detector_axes(view: View, dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, " v"], Float[Tensor, " u"]]:
    """Positions in mm of the pixel rows along e_v and of the pixel columns along e_u, offset included."""
    v, u = (
        (torch.arange(count, dtype=dtype) - (count - 1) / 2) * pixel + offset
        for count, pixel, offset in zip(view.detector_shape, view.pixel_mm, view.offset_mm, strict=True)
    )
    return v, u


def pixel_rays(
    view: View, pose: Pose | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "v u 3"], Float[Tensor, "v u 3"]]:
    """The ray of every pixel: a point on it and its unit direction from source to detector, both (x, y, z).

    The points are the source itself (cone), or lie in the plane through ``source_mm`` that faces the detector
    (parallel). Differentiable in ``pose``.
    """
    frame = view_frame(view, pose, dtype)
    v, u = (axis.to(frame.e_u.device) for axis in detector_axes(view, dtype))
    across = v[:, None, None] * frame.e_v + u[None, :, None] * frame.e_u
    if view.mode == "parallel":
        return frame.source + across, (-frame.to_source).expand_as(across)
    direction = across - view.dsd_mm * frame.to_source
    return frame.source.expand_as(across), direction / direction.norm(dim=-1, keepdim=True)


def voxel_centres(
    shape_zyx: Sequence[int], spacing_mm: float | Sequence[float], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "z y x 3"]:
    """World position (x, y, z) in mm of every voxel centre of a volume that is centred on the origin."""
    axes = [
        (torch.arange(count, dtype=dtype) - (count - 1) / 2) * spacing
        for count, spacing in zip(shape("shape_zyx", shape_zyx, "(z, y, x)"), spacing_zyx(spacing_mm), strict=True)
    ]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y, z], dim=-1)


def spacing_zyx(spacing_mm: float | Sequence[float]) -> tuple[float, float, float]:
    """Voxel size (z, y, x) in mm from one number or three.

    Raises:
        InputError: not one or three positive, finite numbers.
    """
    many = hasattr(spacing_mm, "__len__") and not isinstance(spacing_mm, str)
    values = tuple(spacing_mm) if many else (spacing_mm,) * 3
    if len(values) != 3:
        raise InputError(f"spacing_mm: found {len(values)} numbers, expected one, or three in the order (z, y, x).")
    z, y, x = (number("spacing_mm", value, "mm", positive=True) for value in values)
    return z, y, x
