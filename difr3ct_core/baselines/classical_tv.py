"""Total-variation least squares: the strongest reconstruction here that has never seen another patient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..files import InputError
from ..geometry import View, detector_axes
from .classical_problem import NON_NEGATIVE, Problem, check_bounds, check_iterations, make_problem

#: Iterations at the next coarser grids, per iteration at the finest: they cost an eighth each, and save many.
_COARSE_ITERATIONS = (1.0, 1.5, 3.0)


def tv(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    bounds: tuple[float, float] | None = NON_NEGATIVE,
    weight_mm: float | Float[Tensor, " b"] = 0.004,
    iterations: int = 100,
    support: Bool[Tensor, "*b z y x"] | None = None,
    prior: Float[Tensor, "b z y x"] | None = None,
    prior_weight_mm: float | Float[Tensor, "*b z y x"] = 0.0,
) -> Float[Tensor, "b z y x"]:
    """Least squares with isotropic total variation (Rudin, Osher & Fatemi 1992; for CT: Sidky & Pan 2008).

    Minimises over µ within ``bounds``

        ½ mean_views ∫ (A µ - p)² du dv  +  weight · ∫ |∇µ| dV,

    lengths in mm, ∇ by forward differences. Written so, the weight means the same on every grid and for any number of
    views. The solver is the primal-dual method of Chambolle & Pock (2011, Alg. 1) with the diagonal step sizes of
    Pock & Chambolle (2011, Eq. 10, alpha = 1), started from the solution on a grid of half the resolution, and that
    from the next. Where a volume m is known beforehand, it starts there instead, and minimises the same plus

        ½ ∫ prior_weight (µ - m)² dV.

    Args:
        xrays, views, volume_shape, spacing_mm: as in :func:`~difr3ct_core.baselines.classical.fbp`.
        bounds: lowest and highest µ in 1/mm; None leaves µ free.
        weight_mm: weight of the total variation in mm, one or one per patient. The default, chosen on phantoms and one
            real scan (not on LIDC-IDRI-0001), suits x-rays without noise; noise wants more, in proportion to its
            standard deviation.
        iterations: on the finest grid; the coarser ones, which cost little, take more.
        support: where µ may differ from the lower bound (0 without one); see :func:`body_support`.
        prior: m, µ in 1/mm for each patient, such as a posterior sample.
        prior_weight_mm: one number or one per voxel, in mm; large where m is to be believed.

    Returns:
        µ in 1/mm.

    Raises:
        InputError: x-rays that do not match the views, or are not finite; a negative weight; no iteration; a support
            or prior of another shape, or a prior that is not finite.
    """
    problem = make_problem(xrays, views, volume_shape, spacing_mm)
    low, high = check_bounds(bounds)
    check_iterations(iterations)
    weights = torch.as_tensor(weight_mm, dtype=xrays.dtype, device=xrays.device)
    if weights.shape not in ((), (len(xrays),)) or not (torch.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError(
            f"weight_mm: found {weight_mm!r}, expected a weight of the total variation in mm, 0 or more, for all "
            "patients or for each."
        )
    if support is not None:
        if support.dtype != torch.bool or tuple(support.shape[-3:]) != problem.shape or support.ndim not in (3, 4):
            raise InputError(
                f"support: found {support.dtype} of shape {tuple(support.shape)}, expected bool of {problem.shape}."
            )
        support = support.to(xrays.device).expand(xrays.shape[0], *problem.shape)

    if prior is not None:
        expected = (len(problem.xrays), *problem.shape)
        if tuple(prior.shape) != expected or not torch.isfinite(prior).all():
            raise InputError(
                f"prior: found shape {tuple(prior.shape)}, expected finite µ of {expected}, a volume for each patient."
            )
        weight = torch.as_tensor(prior_weight_mm, dtype=xrays.dtype, device=xrays.device)
        if not (torch.isfinite(weight).all() and (weight >= 0).all()):
            raise InputError("prior_weight_mm: found negative, infinite or NaN weights, expected 0 or more, in mm.")
        top = torch.full((), high, dtype=xrays.dtype, device=xrays.device)
        if support is not None:
            top = torch.where(support, top, torch.full_like(top, low if math.isfinite(low) else 0.0))
        pull = weight * _tv_factor(problem, 1.0)
        return _primal_dual(problem, weights, low, top, iterations, prior.to(xrays), pull)

    levels = [problem]
    while len(levels) < len(_COARSE_ITERATIONS) and (coarser := levels[-1].coarser()) is not None:
        levels.append(coarser)
    mu = None
    for level, share in reversed(list(zip(levels, _COARSE_ITERATIONS, strict=False))):
        top = torch.full((), high, dtype=xrays.dtype, device=xrays.device)
        if support is not None:
            factor = problem.shape[0] // level.shape[0]
            inside = F.max_pool3d(support.to(xrays.dtype), factor) > 0
            top = torch.where(inside, top, torch.full_like(top, low if math.isfinite(low) else 0.0))
        if mu is not None:
            mu = F.interpolate(mu[:, None], scale_factor=2, mode="trilinear", align_corners=False)[:, 0]
        mu = _primal_dual(level, weights, low, top, math.ceil(share * iterations), mu)
    return mu


def _primal_dual(
    problem: Problem,
    weight_mm: Tensor,
    low: float,
    top: Tensor,
    iterations: int,
    start: Tensor | None,
    pull: Tensor | None = None,
) -> Float[Tensor, "b z y x"]:
    """Chambolle & Pock's iteration for ½‖Aµ - p‖² + λ Σ |D µ|: the objective of :func:`tv` times views over pixel area.

    p and q are the dual variables of the two terms. D holds differences in units of the mean voxel edge. ``pull`` w
    adds ½ Σ w (µ - start)², whose proximal step is a weighted mean.
    """
    mu = problem.zeros() if start is None else start.clone()
    edge = math.prod(problem.spacing) ** (1 / 3)
    scales = [edge / d for d in problem.spacing]
    # K = [A; balance · D]: the balance makes both blocks equally stiff, which decides the speed and not the result.
    balance = 2.0 * edge
    limit = (weight_mm * _tv_factor(problem, 1.0) / edge / balance).view(-1, 1, 1, 1)
    rows, columns = problem.row_sums(), problem.column_sums()
    step_rays = 1 / rows.clamp_min(1e-3 * edge)
    step_voxels = 1 / (columns + 2 * balance * sum(scales))
    step_edges = [1 / (2 * balance * scale) for scale in scales]
    dual = torch.zeros_like(problem.xrays)
    dual_edges = [torch.zeros_like(mu) for _ in scales]
    ahead = mu.clone()
    for _ in range(iterations):
        residual = problem.forward(ahead).sub_(problem.xrays)
        dual.add_(residual.mul_(step_rays)).div_(1 + step_rays)
        descent = problem.adjoint(dual)
        for axis, scale in enumerate(scales, start=1):
            n = mu.shape[axis] - 1
            q = dual_edges[axis - 1].narrow(axis, 0, n)
            step = step_edges[axis - 1] * balance * scale
            q.add_(ahead.narrow(axis, 1, n), alpha=step).sub_(ahead.narrow(axis, 0, n), alpha=step)
        _project_to_ball(dual_edges, limit)
        for axis, scale in enumerate(scales, start=1):
            n = mu.shape[axis] - 1
            q = dual_edges[axis - 1].narrow(axis, 0, n)
            descent.narrow(axis, 1, n).add_(q, alpha=balance * scale)
            descent.narrow(axis, 0, n).sub_(q, alpha=balance * scale)
        new = torch.addcmul(mu, step_voxels, descent, value=-1)
        if pull is not None:
            force = step_voxels * pull
            new = torch.addcmul(new, force, start).div_(1 + force)
        new = new.clamp_min_(low)
        new = torch.minimum(new, top, out=new)
        ahead = torch.lerp(mu, new, 2.0, out=ahead)
        mu = new
    return mu


def _project_to_ball(vectors: list[Tensor], radius: Float[Tensor, "*b 1 1 1"]) -> None:
    """Shorten, in place, the vectors that are longer than ``radius``; component k of all of them is ``vectors[k]``."""
    radius = radius.clamp_min(torch.finfo(radius.dtype).tiny)  # a ball of radius 0 is a point, and no division by zero
    length = vectors[0] * vectors[0]  # square() would go through pow, three times slower
    for component in vectors[1:]:
        length.addcmul_(component, component)
    length.sqrt_().div_(radius).clamp_min_(1.0).reciprocal_()
    for component in vectors:
        component.mul_(length)


def _tv_factor(problem: Problem, weight_mm: float) -> float:
    """weight · views · voxel volume / pixel area (in the plane of the rotation axis): from integrals to plain sums."""
    view = problem.views[0]
    scale = view.dso_mm / view.dsd_mm if view.mode == "cone" else 1.0
    return weight_mm * len(problem.views) * math.prod(problem.spacing) / (math.prod(view.pixel_mm) * scale**2)


def tv_objective(
    mu: Float[Tensor, "b z y x"],
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    spacing_mm: float | Sequence[float],
    weight_mm: float,
) -> Float[Tensor, " b"]:
    """What :func:`tv` minimises, per patient, times views over pixel area (so dimensionless)."""
    problem = make_problem(xrays, views, mu.shape[1:], spacing_mm)
    square = torch.zeros_like(mu)
    for axis, spacing in enumerate(problem.spacing, start=1):
        n = mu.shape[axis] - 1
        square.narrow(axis, 0, n).add_((mu.diff(dim=axis) / spacing).square())
    misfit = 0.5 * (problem.forward(mu) - problem.xrays).square().sum(dim=(1, 2, 3))
    return misfit + _tv_factor(problem, weight_mm) * square.sqrt().sum(dim=(1, 2, 3))


def body_support(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    threshold: float = 1.0,
    depth_to_width: float = 0.75,
    power: float = 2.5,
) -> Bool[Tensor, "b z y x"]:
    """Where a body can be, from its silhouettes: what a frontal or lateral x-ray says without any training.

    One x-ray leaves the depth of everything open, and least squares smears it over the whole cube, most of which is
    air. But the trunk is close to an ellipse in every axial slice. The frontal silhouette gives its extent from right
    to left, the lateral one its extent from front to back; where one is missing, the ratio of the two stands in and
    the ellipse is centred. Other views are not used: from four views on, non-negative µ already finds the outline.
    The defaults were chosen on phantoms and on one real scan (Lung-PET-CT-Dx A0001).

    Args:
        xrays, views, volume_shape, spacing_mm: as in :func:`tv`; in cone mode silhouettes are scaled to the axis.
        threshold: a line integral above it counts as body; 1 is 50 mm of water (a couch is less).
        depth_to_width: depth over width of the trunk. An extent that is guessed with it is enlarged by a tenth, since
            cutting off body costs more than letting in air.
        power: |x/a|^power + |y/b|^power <= 1; 2 is an ellipse, more is fuller at the corners.

    Returns:
        True inside; True everywhere if no view is frontal or lateral (within 3 degrees).
    """
    problem = make_problem(xrays, views, volume_shape, spacing_mm)
    spans: dict[int, tuple[Tensor, Tensor]] = {}
    z_mm, y_mm, x_mm = (
        (torch.arange(n, dtype=xrays.dtype, device=xrays.device) - (n - 1) / 2) * d
        for n, d in zip(problem.shape, problem.spacing, strict=True)
    )
    for index, view in enumerate(problem.views):
        for axis in (0, 1):
            direction = float(view.e_u[axis])
            if abs(direction) > math.cos(math.radians(3)) and axis not in spans:
                spans[axis] = _silhouette(problem.xrays[:, index], view, direction, z_mm, threshold)
    if not spans:
        return torch.ones(xrays.shape[0], *problem.shape, dtype=torch.bool, device=xrays.device)
    if 0 not in spans:
        spans[0] = (torch.zeros_like(spans[1][0]), 1.1 * spans[1][1] / depth_to_width)
    if 1 not in spans:
        spans[1] = (torch.zeros_like(spans[0][0]), 1.1 * spans[0][1] * depth_to_width)
    total = torch.zeros(xrays.shape[0], *problem.shape, dtype=xrays.dtype, device=xrays.device)
    margins = (problem.spacing[2], problem.spacing[1])
    for axis, coordinate in ((0, x_mm[None, None, None, :]), (1, y_mm[None, None, :, None])):
        centre, half = (value[:, :, None, None] for value in spans[axis])
        total += ((coordinate - centre).abs() / (half + margins[axis])).pow(power)
    return total <= 1


def _silhouette(
    image: Float[Tensor, "b v u"], view: View, direction: float, z_mm: Float[Tensor, " z"], threshold: float
) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
    """Centre and half width in mm of what is above the threshold, per slice, along the world axis of e_u."""
    scale = view.dso_mm / view.dsd_mm if view.mode == "cone" else 1.0
    rows, columns = (axis.to(image) * scale for axis in detector_axes(view))
    position, pixel = columns * direction, view.pixel_mm[1] * scale
    row = ((z_mm - rows[0]) / (view.pixel_mm[0] * scale)).round().long().clamp(0, len(rows) - 1)
    body = image[:, row] > threshold
    infinite = torch.full_like(position, math.inf)
    low = torch.where(body, position, infinite).amin(-1) - pixel / 2
    high = torch.where(body, position, -infinite).amax(-1) + pixel / 2
    empty = ~body.any(-1)  # nothing there: any extent will do, since µ comes out as zero
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    return (low + high) / 2, (high - low) / 2


def tv_body(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    bounds: tuple[float, float] | None = NON_NEGATIVE,
    weight_mm: float = 0.004,
    iterations: int = 100,
) -> Float[Tensor, "b z y x"]:
    """:func:`tv` inside :func:`body_support` for one or two views, and plain :func:`tv` for more.

    Arguments, result and errors as in :func:`tv`. It assumes a trunk that is centred in front of the detector where
    only one view is given, so it is no general method.
    """
    few = len(make_problem(xrays, views, volume_shape, spacing_mm).views) <= 2
    support = body_support(xrays, views, volume_shape, spacing_mm) if few else None
    return tv(xrays, views, volume_shape, spacing_mm, bounds, weight_mm, iterations, support)
