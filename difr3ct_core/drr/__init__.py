"""X-rays from a volume: line integrals of the attenuation µ along the rays of each view, and the adjoint.

:func:`project` and :func:`backproject` are what training and the solvers use: they apply small sparse matrices that
are built once per geometry (parallel.py, cone.py). :func:`project_rays` is the readable definition, differentiable in
the pose as well (rays.py). exact.py holds phantoms whose x-rays are known in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from ..checks import shape as check_shape
from ..files import InputError
from ..geometry import View, check_views, spacing_zyx
from .checks import check_finite, check_geometry, check_memory, check_volume, truncated_share
from .cone import ConeOperator
from .parallel import ParallelOperator
from .rays import project_rays
from .sparse import LinearMap, Operator
from .tigre import project_tigre

__all__ = ["backproject", "clear_cache", "project", "project_rays", "truncated_share"]

BACKENDS = ("torch", "tigre")


def project(
    mu: Float[Tensor, "b c z y x"],
    views: Sequence[View],
    spacing_mm: float | Sequence[float],
    drr_backend: str = "torch",
) -> Float[Tensor, "b c view v u"]:
    """Line integrals of µ along the rays of every view (Beer-Lambert: -log of the transmitted share).

    Args:
        mu: linear attenuation in 1/mm on a grid centred on the origin, float32 or float64 (half precision is widened).
        views: one or more views of the same mode and detector shape.
        spacing_mm: voxel size, one number or (z, y, x).
        drr_backend: "torch", or "tigre" for TIGRE on a CUDA machine; where that cannot run, a warning says why and
            torch goes on. Only torch has gradients.

    Returns:
        dimensionless line integrals; row v rises with z. Differentiable in ``mu``, to any order and in both modes.

    Warns:
        UserWarning: angles that look like radians; part of the volume misses the detector; TIGRE is not usable.

    Raises:
        InputError: no view, impossible geometry, wrong axes or type, NaN, or more memory needed than there is.
    """
    if drr_backend not in BACKENDS:
        raise InputError(f"drr_backend: found {drr_backend!r}, expected one of {', '.join(BACKENDS)}.")
    mu = check_volume("mu", mu)
    views, spacing = check_views(views), spacing_zyx(spacing_mm)
    b, c, *shape = mu.shape
    operator = _operator(views, tuple(shape), spacing, b * c, mu.dtype, mu.device)
    images = project_tigre(mu, views, spacing) if drr_backend == "tigre" else None
    if images is None:
        images = LinearMap.apply(mu.flatten(0, 1), operator, False).unflatten(0, (b, c))
    return check_finite("mu", images, mu)


def backproject(
    projections: Float[Tensor, "b c view v u"],
    views: Sequence[View],
    volume_shape: tuple[int, int, int],
    spacing_mm: float | Sequence[float],
) -> Float[Tensor, "b c z y x"]:
    """The exact adjoint of :func:`project`: smear every pixel back along its ray.

    Args:
        projections: line integrals, or any image of that shape.
        views: one view for each image.
        volume_shape: (z, y, x).
        spacing_mm: voxel size, one number or (z, y, x).

    Returns:
        ``<project(m), p> = <m, backproject(p)>`` holds for all m and p. Differentiable in ``projections``.

    Raises:
        InputError: as for :func:`project`, and if images and views do not match.
    """
    projections = check_volume("projections", projections, "(b, c, view, v, u)")
    views, spacing = check_views(views), spacing_zyx(spacing_mm)
    z, y, x = check_shape("volume_shape", volume_shape, "(z, y, x)")
    b, c, *stack = projections.shape
    expected = [len(views), *views[0].detector_shape]
    if stack != expected:
        raise InputError(
            f"projections: found (view, v, u) = {tuple(stack)}, expected {tuple(expected)} from the views; "
            "give each image its view, rows first."
        )
    check_finite("projections", projections, projections)
    operator = _operator(views, (z, y, x), spacing, b * c, projections.dtype, projections.device)
    return LinearMap.apply(projections.flatten(0, 1), operator, True).unflatten(0, (b, c))


def _operator(
    views: tuple[View, ...],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Operator:
    """The operator of a geometry, from the cache if it was built before."""
    # Small work cannot exhaust memory, and asking the system takes longer than the work.
    if count * shape[0] * shape[1] * shape[2] > 2**26:
        check_memory(views, shape, count, dtype.itemsize, device)
    return _build(views, shape, spacing, dtype, device)


@lru_cache(maxsize=16)
def _build(
    views: tuple[View, ...],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    dtype: torch.dtype,
    device: torch.device,
) -> Operator:
    check_geometry(views, shape, spacing)
    check_memory(views, shape, 1, dtype.itemsize, device)
    kind = ConeOperator if views[0].mode == "cone" else ParallelOperator
    # The matrices outlive this call, so they must be ordinary tensors even if it comes from an inference block.
    with torch.inference_mode(False), torch.no_grad():
        return kind(views, shape, spacing, dtype, device)


def clear_cache() -> None:
    """Forget the matrices of all geometries."""
    _build.cache_clear()
