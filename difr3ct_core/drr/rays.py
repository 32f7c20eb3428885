"""The projector as it is defined: walk along every ray, interpolate the volume, add up.

Slow, short and general. Each ray is sampled where it crosses planes that are parallel to the detector; the volume is
interpolated trilinearly between voxel centres and fades to zero over one voxel outside. :func:`project_rays` is
differentiable in the volume and in the pose; the fast forms are tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..checks import number
from ..files import InputError
from ..geometry import Pose, View, check_views, pixel_rays, spacing_zyx, view_frame
from .checks import check_finite, check_geometry, check_volume

#: Planes that are sampled at once: bounds the memory for sample positions.
PLANES_AT_ONCE = 16


def project_rays(
    mu: Float[Tensor, "b c z y x"],
    views: Sequence[View],
    spacing_mm: float | Sequence[float],
    pose: Pose | None = None,
    step_mm: float | None = None,
) -> Float[Tensor, "b c view v u"]:
    """Line integrals of µ by ray marching (midpoint rule).

    Args:
        mu: linear attenuation in 1/mm on a grid centred on the origin.
        views: one or more views of the same mode and detector shape.
        spacing_mm: voxel size, one number or (z, y, x).
        pose: how far each view stands from where it should: ``angle_deg`` (view), ``shift_mm`` (view, 3).
        step_mm: distance between sampled planes; half the smallest voxel edge if not given.

    Returns:
        dimensionless line integrals, differentiable in ``mu`` and ``pose``; row v rises with z.

    Raises:
        InputError: impossible geometry, wrong shapes, or a volume with NaN.
    """
    views, spacing = check_views(views), spacing_zyx(spacing_mm)
    mu = check_volume("mu", mu)
    shape = tuple(mu.shape[-3:])
    check_geometry(views, shape, spacing)
    step = number("step_mm", min(spacing) / 2 if step_mm is None else step_mm, "mm", positive=True)
    if pose is not None and (pose.angle_deg.shape != (len(views),) or pose.shift_mm.shape != (len(views), 3)):
        raise InputError(
            f"pose: found angle_deg {tuple(pose.angle_deg.shape)} and shift_mm {tuple(pose.shift_mm.shape)}, "
            f"expected ({len(views)},) and ({len(views)}, 3): one row a view."
        )
    reach = math.hypot(*(n * s for n, s in zip(shape[1:], spacing[1:], strict=True))) / 2 + max(spacing)
    if pose is not None:
        reach += float(pose.shift_mm.detach().norm(dim=-1).max())
    # Planes stand at fixed multiples of the step, so that moving the pose a little moves the planes with it
    # and does nothing else.
    count = math.ceil(reach / step)
    offsets = (torch.arange(-count, count, dtype=mu.dtype, device=mu.device) + 0.5) * step
    images = [
        _one_view(mu, view, spacing, None if pose is None else pose[i], offsets, step) for i, view in enumerate(views)
    ]
    return check_finite("mu", torch.stack(images, dim=2), mu)


def _one_view(
    mu: Tensor,
    view: View,
    spacing: tuple[float, float, float],
    pose: Pose | None,
    offsets: Float[Tensor, " plane"],
    step: float,
) -> Float[Tensor, "b c v u"]:
    """One image; ``offsets`` are the planes' distances from the rotation axis along the central ray."""
    origin, direction = (part.to(mu.device) for part in pixel_rays(view, pose, mu.dtype))
    to_source = view_frame(view, pose, mu.dtype).to_source.to(mu.device)
    slant = -1 / (direction @ to_source)  # ray length per unit of depth
    depths = view.dso_mm + offsets
    depths = depths[depths > 0]  # nothing is seen from behind the source
    # grid_sample counts from -1 at the volume's first face to 1 at its last.
    half = torch.tensor([n * s / 2 for n, s in zip(mu.shape[-3:], spacing, strict=True)], dtype=mu.dtype).flip(0)
    volume = mu.flatten(0, 1)[None]
    image = mu.new_zeros(mu.shape[0] * mu.shape[1], *view.detector_shape)
    for some in depths.split(PLANES_AT_ONCE):
        points = origin + (some[:, None, None] * slant)[..., None] * direction
        samples = F.grid_sample(volume, (points / half.to(mu.device))[None], padding_mode="zeros", align_corners=False)
        image = image + samples[0].sum(dim=1)
    return (image * slant * step).unflatten(0, mu.shape[:2])
