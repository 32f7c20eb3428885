"""Filtered back-projection, SIRT and CGLS: reconstruction without a prior on how a body looks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..files import InputError
from ..geometry import View, detector_axes, voxel_centres, world_to_detector
from .classical_problem import NON_NEGATIVE, check_bounds, check_iterations, make_problem


def fbp(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    bounds: tuple[float, float] | None = NON_NEGATIVE,
) -> Float[Tensor, "b z y x"]:
    """Filtered back-projection; in cone mode the method of Feldkamp, Davis and Kress (FDK).

    Every detector row is filtered with the ramp |f| (sampled as in Kak & Slaney 1988, Eq. 3.61, which keeps the mean)
    and smeared back: µ(r) = Σ_θ Δθ · (DSO / (DSO - r·n))² · q_θ(v(r), u(r)). In parallel mode the factor is 1. In
    cone mode the rows are first multiplied by the cosine of the ray's angle (Feldkamp et al. 1984, Eq. 28 to 30), and
    lengths are those in the plane of the rotation axis. Δθ is each view's share of the half circle, so opposite
    views share theirs. A cone scan of less than a full turn gets no redundancy (Parker) weights.

    Args:
        xrays: line integrals, dimensionless, float32 or float64.
        views: one per x-ray, parallel or cone.
        volume_shape: (z, y, x) voxels.
        spacing_mm: voxel size, one number or (z, y, x).
        bounds: lowest and highest µ in 1/mm; the result is clipped to it. None does not clip.

    Returns:
        µ in 1/mm. With few views it shows streaks: nothing fills the angles between them.

    Raises:
        InputError: x-rays that do not match the views, or are not finite.
    """
    problem = make_problem(xrays, views, volume_shape, spacing_mm)
    low, high = check_bounds(bounds)
    points = voxel_centres(problem.shape, problem.spacing, torch.float32).to(xrays.device)
    mu = problem.zeros()
    for index, (view, share) in enumerate(zip(problem.views, _angular_shares(problem.views), strict=True)):
        rows = problem.xrays[:, index]
        pitch = view.pixel_mm[1]
        if view.mode == "cone":
            to_axis = view.dso_mm / view.dsd_mm
            v, u = (axis.to(xrays) * to_axis for axis in detector_axes(view))
            rows = rows * (view.dso_mm / torch.sqrt(view.dso_mm**2 + v[:, None] ** 2 + u**2))
            pitch *= to_axis
        smeared = _sample(_ramp(rows, pitch), world_to_detector(points, view))
        if view.mode == "cone":
            depth = view.dso_mm - points @ view.to_source.to(points)
            smeared *= ((view.dso_mm / depth) ** 2).to(smeared)
        mu.add_(smeared, alpha=share)
    return mu.clamp_(low, high)


def _angular_shares(views: Sequence[View]) -> list[float]:
    """Per view half the way to its neighbours on the half circle, in radians: π / N for evenly spaced views."""
    order = sorted(range(len(views)), key=lambda index: views[index].angle_deg % 180.0)
    angles = [math.radians(views[index].angle_deg % 180.0) for index in order]
    gaps = [
        (angles[(k + 1) % len(angles)] - angles[k]) % math.pi if len(angles) > 1 else math.pi
        for k in range(len(angles))
    ]
    # Where all views coincide (modulo a half turn) there is no gap at all; they share the half circle evenly.
    gaps = gaps if sum(gaps) > 0 else [math.pi / len(gaps)] * len(gaps)
    shares = [0.0] * len(views)
    for k, index in enumerate(order):
        shares[index] = 0.5 * (gaps[k - 1] + gaps[k])
    return shares


def _ramp(rows: Float[Tensor, "b v u"], pitch_mm: float) -> Float[Tensor, "b v u"]:
    """Convolve every row with the band-limited ramp, zero-padded so that it does not wrap around. Result in 1/mm."""
    n = rows.shape[-1]
    padded = 2 ** math.ceil(math.log2(max(2 * n, 64)))
    index = torch.arange(padded, dtype=torch.float64)
    index = torch.minimum(index, padded - index)
    kernel = torch.where(index % 2 == 1, -1.0 / (math.pi * index.clamp_min(1) * pitch_mm) ** 2, 0.0)
    kernel[0] = 1.0 / (4.0 * pitch_mm**2)
    response = torch.fft.rfft(kernel).real.to(rows)
    return torch.fft.irfft(torch.fft.rfft(rows, padded) * response, padded)[..., :n] * pitch_mm


def _sample(images: Float[Tensor, "b v u"], positions: Float[Tensor, "z y x 2"]) -> Float[Tensor, "b z y x"]:
    """Images at fractional pixel indices (v, u), linearly interpolated; zero outside."""
    n_v, n_u = images.shape[1:]
    size = torch.tensor([n_v, n_u], device=images.device, dtype=positions.dtype)
    # grid_sample wants (u, v), with -1 and 1 at the outer edges of the first and the last pixel.
    grid = ((2 * positions + 1) / size - 1).flip(-1).to(images)
    z, y, x, _ = grid.shape
    return F.grid_sample(images[None], grid.view(1, z * y, x, 2), align_corners=False)[0].view(-1, z, y, x)


def sirt(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    bounds: tuple[float, float] | None = NON_NEGATIVE,
    iterations: int = 100,
) -> Float[Tensor, "b z y x"]:
    """Simultaneous iterative reconstruction: µ ← P[µ + C Aᵀ R (p - A µ)] from µ = 0.

    R and C hold one over the row and column sums of A (Gregor & Benson 2008, "Computational analysis and improvement
    of SIRT", Eq. 3), P clips to ``bounds``. It minimises the R-weighted residual, coarse structures first, so that
    stopping early smooths.

    Args:
        xrays, views, volume_shape, spacing_mm: as in :func:`fbp`.
        bounds: lowest and highest µ in 1/mm, kept in every iteration; None leaves µ free.
        iterations: number of updates; each costs one projection and one back-projection.

    Returns:
        µ in 1/mm.

    Raises:
        InputError: x-rays that do not match the views, or are not finite; no iteration.
    """
    problem = make_problem(xrays, views, volume_shape, spacing_mm)
    low, high = check_bounds(bounds)
    check_iterations(iterations)
    per_ray, per_voxel = _reciprocal(problem.row_sums()), _reciprocal(problem.column_sums())
    mu = problem.zeros()
    for _ in range(iterations):
        residual = (problem.xrays - problem.forward(mu)).mul_(per_ray)
        mu.addcmul_(problem.adjoint(residual), per_voxel).clamp_(low, high)
    return mu


def _reciprocal(sums: Tensor) -> Tensor:
    """1 / sums, and 0 where a ray misses the volume or no ray sees a voxel."""
    return torch.where(sums > 1e-6 * sums.max(), 1 / sums, torch.zeros_like(sums))


def cgls(
    xrays: Float[Tensor, "b view v u"],
    views: Sequence[View],
    volume_shape: Sequence[int],
    spacing_mm: float | Sequence[float],
    bounds: tuple[float, float] | None = NON_NEGATIVE,
    iterations: int = 30,
) -> Float[Tensor, "b z y x"]:
    """Conjugate gradients on the normal equations AᵀA µ = Aᵀp (Hestenes & Stiefel 1952; Björck 1996, Alg. 7.4.1).

    From µ = 0 it converges to the least-squares solution of minimum norm, in few steps; every patient of the batch
    has its own step lengths. A box constraint would break conjugacy, so ``bounds`` clips the result only.

    Args:
        xrays, views, volume_shape, spacing_mm: as in :func:`fbp`.
        bounds: lowest and highest µ in 1/mm; the result is clipped to it. None does not clip.
        iterations: at most so many steps; a patient that has converged to rounding stays where it is.

    Returns:
        µ in 1/mm.

    Raises:
        InputError: x-rays that do not match the views, or are not finite; no iteration.
    """
    problem = make_problem(xrays, views, volume_shape, spacing_mm)
    low, high = check_bounds(bounds)
    check_iterations(iterations)
    mu, residual = problem.zeros(), problem.xrays.clone()
    gradient = problem.adjoint(residual)
    direction = gradient.clone()
    norm = _square(gradient)
    # Below this the residual is rounding error, and going on would only add noise.
    done_below = norm * torch.finfo(xrays.dtype).eps ** 2
    for _ in range(iterations):
        running = norm > done_below
        if not running.any():
            break
        projected = problem.forward(direction)
        step = torch.where(running, norm / _square(projected), torch.zeros_like(norm))
        mu.addcmul_(step, direction)
        residual.addcmul_(step, projected, value=-1)
        gradient = problem.adjoint(residual)
        new = _square(gradient)
        direction = gradient + torch.where(running, new / norm, torch.zeros_like(norm)) * direction
        norm = torch.where(running, new, norm)
    if not torch.isfinite(mu).all():
        raise InputError("xrays: conjugate gradients overflowed; the line integrals are too large for their data type.")
    return mu.clamp_(low, high)


def _square(x: Tensor) -> Float[Tensor, "b 1 1 1"]:
    return x.square().sum(dim=(1, 2, 3), keepdim=True)
