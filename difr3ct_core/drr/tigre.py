"""The same x-rays by TIGRE (Biguri et al. 2016), a CT toolbox for CUDA, as an independent second opinion.

TIGRE shares this project's conventions: volumes (z, y, x), images (angle, v, u) with rows rising with z, the source
counter-clockwise about +z. Its own arrays are ordered (z, y, x) and (v, u) and its angles are radians in float32.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..files import InputError
from ..geometry import View

HOW_TO_GET_IT = (
    "The one that is meant is TIGRE, the GPU toolbox for tomography (GitHub: CERN/TIGRE), which the package index "
    "does not hold: `conda install -c ccpi tigre`, or clone its repository and `pip install .` there (needs nvcc)."
)


def find_tigre() -> tuple[ModuleType | None, str]:
    """TIGRE, if it can be used here; otherwise None and one sentence that says why, and how to get it."""
    try:
        tigre = importlib.import_module("tigre")
    except ImportError as error:
        return None, f"no package `tigre` can be imported ({error}). {HOW_TO_GET_IT}"
    except Exception as error:  # a binary that does not match the CUDA driver fails in many ways
        return None, f"the package `tigre` fails on import ({type(error).__name__}: {error}). {HOW_TO_GET_IT}"
    if not (hasattr(tigre, "Ax") and hasattr(tigre, "geometry")):
        return None, (
            "the installed package `tigre` is another program of that name (it extracts intergenic regions): "
            f"uninstall it. {HOW_TO_GET_IT}"
        )
    try:
        # Without a GPU, TIGRE's parallel projector ends the whole process: ask before the first call.
        names = importlib.import_module("tigre.utilities.gpu").getGpuNames()
    except Exception as error:
        return None, f"TIGRE cannot list the GPUs of this machine ({type(error).__name__}: {error})."
    if not names:
        return None, "TIGRE finds no CUDA GPU on this machine."
    return tigre, ""


def project_tigre(
    mu: Float[Tensor, "b c z y x"], views: Sequence[View], spacing: tuple[float, float, float]
) -> Float[Tensor, "b c view v u"] | None:
    """Line integrals by ``tigre.Ax``, or None with a warning where TIGRE cannot run.

    Raises:
        InputError: a gradient is wanted, which this backend has not.
    """
    if mu.requires_grad and torch.is_grad_enabled():
        raise InputError(
            'drr_backend: "tigre" has no gradient; use drr_backend="torch", or project under torch.no_grad().'
        )
    tigre, reason = find_tigre()
    if tigre is None:
        warnings.warn(f'drr_backend="tigre": {reason} The x-rays are made by the torch backend instead.', stacklevel=3)
        return None
    volumes = np.ascontiguousarray(mu.detach().flatten(0, 1).cpu().numpy(), dtype=np.float32)
    parts = []
    for _, group in groupby(views, key=_alike):
        members = list(group)
        geometry = tigre_geometry(tigre, members[0], tuple(mu.shape[-3:]), spacing)
        angles = np.array([math.radians(view.angle_deg) for view in members], dtype=np.float32)
        images = [tigre.Ax(volume, geometry, angles, projection_type="interpolated") for volume in volumes]
        parts.append(torch.from_numpy(np.stack(images)))
    return torch.cat(parts, dim=1).to(mu).unflatten(0, mu.shape[:2])


def tigre_geometry(tigre: Any, view: View, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Any:
    """TIGRE's geometry object for one view (or for several that :func:`_alike` holds for alike)."""
    geometry = tigre.geometry()
    geometry.mode = view.mode
    geometry.DSO, geometry.DSD = view.dso_mm, view.dsd_mm
    geometry.nDetector = np.array(view.detector_shape)
    geometry.dDetector = np.array(view.pixel_mm)
    geometry.sDetector = geometry.nDetector * geometry.dDetector
    geometry.nVoxel = np.array(shape)
    geometry.dVoxel = np.array(spacing)
    geometry.sVoxel = geometry.nVoxel * geometry.dVoxel
    geometry.offOrigin = np.zeros(3)
    geometry.offDetector = np.array(view.offset_mm)
    geometry.accuracy = 0.5  # samples every half voxel
    if view.mode == "parallel":
        # The distances only set where sampling starts and ends; both must clear the volume's half diagonal.
        diagonal = float(np.linalg.norm(geometry.sVoxel))
        geometry.DSO, geometry.DSD = diagonal, 2 * diagonal
        # A shifted detector tilts TIGRE's parallel rays, so the volume is shifted the other way instead.
        shift = -(view.offset_mm[1] * view.e_u + view.offset_mm[0] * view.e_v).numpy()
        geometry.offOrigin = shift[::-1].copy()
        geometry.offDetector = np.zeros(2)
    return geometry


def _alike(view: View) -> tuple[Any, ...]:
    """Views with equal keys share one geometry object: all but the angle, which a parallel offset depends on."""
    shifted = view.mode == "parallel" and any(view.offset_mm)
    return (view.dso_mm, view.dsd_mm, view.pixel_mm, view.offset_mm, view.angle_deg if shifted else None)
