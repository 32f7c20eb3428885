"""Findings that no phantom of a cohort has: to test whether a model that never saw them shows that it is lost.

Each function takes HU and labels of a phantom on any grid and returns changed HU and the mask of the changed voxels.
They are drawn with as much anatomy as a test of detectors needs: a pneumothorax here pushes nothing aside, and a chest
without one lung keeps its mediastinum in the middle. Sizes are in mm and our choice unless said otherwise.

    >>> from difr3ct_core.phantoms import make_phantom
    >>> phantom = make_phantom(seed=7, size=32)
    >>> hu, mask = mass(phantom.hu, phantom.labels, seed=0, spacing_mm=10.0)
    >>> bool(hu[mask].mean() > phantom.hu[mask].mean() + 500)
    True
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from scipy import ndimage
from torch import Tensor

from ..files import InputError
from ..presets import VolumePreset
from .anatomy import LABELS

#: HU of what is drawn. Metal has far more in truth; a prepared volume ends at the top of its window.
AIR, FLUID, TUMOUR, METAL = -995.0, 12.0, 40.0, VolumePreset.hu_max
_SIDES = ("lung_left", "lung_right")
#: What a lung holds beside its parenchyma.
_INNER = [LABELS[name] for name in ("lung_vessels", "airways", "nodule")]

Volume = Float[Tensor, "z y x"] | Integer[Tensor, "z y x"]
Altered = tuple[Volume, Bool[Tensor, "z y x"]]


def pneumothorax(hu: Volume, labels: UInt8[Tensor, "z y x"], seed: int = 0, spacing_mm: float = 5.0) -> Altered:
    """Air between one lung and the chest wall: the lung shrinks towards its hilum to 60 to 80 % of its length.

    What is left of the lung is denser by the third power, so that parenchyma keeps its tissue and loses air only; no
    denser than soft tissue, so that vessels shrink with it.

    Args:
        hu: Hounsfield units, float, or integer as cohorts store them.
        labels: organ of each voxel, see ``LABELS``.
        seed: of side and size; a whole number from 0.
        spacing_mm: edge of a voxel.

    Returns:
        HU of the same type, and the mask of the voxels that changed.

    Raises:
        InputError: shapes differ, HU are not finite, an argument is out of range, or the labels hold no lung.
    """
    before, rng = _open(hu, labels, seed, spacing_mm)
    lung, _ = _one_lung(labels.numpy(), rng)
    scale = rng.uniform(0.6, 0.8)
    points = np.argwhere(lung)
    hilum = points.mean(0)
    # The hilum lies where the lung is nearest to the middle of the body, at half its height and depth.
    hilum[2] = np.percentile(points[:, 2], 5 if hilum[2] > lung.shape[2] / 2 else 95)
    source = (hilum + (points - hilum) / scale).T
    # Mass in units of water, of the lung alone: outside of it there is nothing to shrink.
    tissue = np.where(lung, before / 1000 + 1, 0)
    inside = ndimage.map_coordinates(lung.astype(np.float32), source, order=1)
    density = ndimage.map_coordinates(tissue, source, order=1) / scale**3
    after = before.copy()
    after[lung] = 1000 * np.clip(density + (1 - inside) * (AIR / 1000 + 1), 0, 1.05) - 1000
    return _close(hu, before, after)


def mass(hu: Volume, labels: UInt8[Tensor, "z y x"], seed: int = 0, spacing_mm: float = 5.0) -> Altered:
    """A solid sphere 50 to 80 mm wide in one lung; phantoms have nodules of at most 25 mm. The chest wall cuts it.

    Arguments, returns and errors as for :func:`pneumothorax`.
    """
    before, rng = _open(hu, labels, seed, spacing_mm)
    lung, _ = _one_lung(labels.numpy(), rng)
    radius = rng.uniform(25, 40)
    depth = ndimage.distance_transform_edt(lung, sampling=spacing_mm)
    deep = np.argwhere(depth >= min(radius, 0.8 * depth.max()))  # a narrow lung holds no whole sphere
    centre = deep[rng.integers(len(deep))]
    grid = np.indices(lung.shape).reshape(3, -1).T
    distance = np.linalg.norm((grid - centre) * spacing_mm, axis=1).reshape(lung.shape)
    # A soft edge of one voxel, as everything that phantoms draw.
    share = np.clip(0.5 + (radius - distance) / spacing_mm, 0, 1) * lung
    after = before + share * (TUMOUR + rng.normal(0, 8, lung.shape) - before)
    return _close(hu, before, np.where(share > 0, np.maximum(before, after), before))


def missing_lung(hu: Volume, labels: UInt8[Tensor, "z y x"], seed: int = 0, spacing_mm: float = 5.0) -> Altered:
    """One lung taken out, its place filled with fluid, as months after a pneumonectomy.

    Voxels that share lung and wall and are labelled as wall stay as they are: a thin darker line.

    Arguments, returns and errors as for :func:`pneumothorax`.
    """
    before, rng = _open(hu, labels, seed, spacing_mm)
    lung, _ = _one_lung(labels.numpy(), rng)
    fluid = FLUID + rng.normal(0, 8, lung.shape)
    return _close(hu, before, np.where(lung, fluid, before))


def metal(hu: Volume, labels: UInt8[Tensor, "z y x"], seed: int = 0, spacing_mm: float = 5.0) -> Altered:
    """A rod beside the spinal canal, 10 mm wide and 100 to 180 mm long, at the top of the HU window.

    Arguments, returns and errors as for :func:`pneumothorax`, where the labels must hold the spinal canal.
    """
    before, rng = _open(hu, labels, seed, spacing_mm)
    canal = labels.numpy() == LABELS["spinal_canal"]
    levels = np.flatnonzero(canal.any((1, 2)))
    if len(levels) < 2:
        raise InputError(f"labels: found the spinal canal in {len(levels)} slices, expected 2 or more to follow.")
    side, length = rng.choice((-1, 1)), min(rng.uniform(100, 180) / spacing_mm, len(levels))
    first = levels[0] + rng.integers(int(len(levels) - length) + 1)
    middle = np.array([np.argwhere(canal[z]).mean(0) for z in levels])
    # A straight line through the canal's middle, 18 mm to the side and 8 mm behind, among the transverse processes.
    slope = np.polynomial.polynomial.polyfit(levels, middle, 1)
    z, y, x = np.indices(canal.shape)
    line = slope[0] + np.arange(canal.shape[0])[:, None] * slope[1] + np.array([8, 18 * side]) / spacing_mm
    distance = np.hypot(y - line[:, :1, None], x - line[:, 1:, None]) * spacing_mm
    rod = (z >= first) & (z < first + length) & (distance <= max(5, 0.71 * spacing_mm))  # a voxel a slice at least
    return _close(hu, before, np.where(rod, METAL, before))


ANOMALIES: dict[str, Callable[..., Altered]] = {
    "pneumothorax": pneumothorax,
    "mass": mass,
    "missing_lung": missing_lung,
    "metal": metal,
}


def _open(hu: Tensor, labels: Tensor, seed: int, spacing_mm: float) -> tuple[np.ndarray, np.random.Generator]:
    """Checked HU as float64, and the random numbers of one finding."""
    if hu.ndim != 3 or hu.shape != labels.shape:
        raise InputError(
            f"labels: found shape {tuple(labels.shape)} for HU of {tuple(hu.shape)}, expected the same (z, y, x)."
        )
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError(f"seed: found {seed!r}, expected a whole number from 0.")
    if not 0 < spacing_mm <= 20:
        raise InputError(f"spacing_mm: found {spacing_mm!r}, expected the edge of a voxel, up to 20 mm.")
    before = hu.double().numpy()
    if not np.isfinite(before).all():
        raise InputError("hu: holds NaN or infinity, expected finite Hounsfield units.")
    return before, np.random.default_rng([int(seed), 8])


def _one_lung(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The place of one lung with its vessels and airways, and its name."""
    name = _SIDES[rng.integers(2)]
    parenchyma = labels == LABELS[name]
    if not parenchyma.any():
        raise InputError(f"labels: found no voxel of {name} ({LABELS[name]}), expected a phantom with both lungs.")
    whole = ndimage.binary_closing(np.pad(parenchyma, 3), iterations=3)[3:-3, 3:-3, 3:-3]
    return parenchyma | (whole & np.isin(labels, _INNER)), name


def _close(hu: Tensor, before: np.ndarray, after: np.ndarray) -> Altered:
    """HU in the type they came in, whole numbers if that is an integer, and where they differ."""
    rounded = after if hu.is_floating_point() else np.round(after)
    return torch.from_numpy(rounded).to(hu.dtype), torch.from_numpy(rounded != before)
