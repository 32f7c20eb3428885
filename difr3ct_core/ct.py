"""CT volumes: from a patient's scan to the network's cube and exactly back (§V-A).

A scan of any size becomes a cube of ``fov_mm`` (320 mm) with ``size``³ voxels in [-1, 1]:

1. clip to the preset's HU window;
2. resample to 1 mm (area average where the scan is finer, linear where it is coarser);
3. crop, or pad with air, to the cube;
4. average over the area of the final voxels (2.5 mm at 128³, 10 mm at 32³), so that nothing aliases;
5. map the window to [-1, 1].

Steps 2 to 4 are linear and act on each axis by itself, so each axis has one small matrix and the volume is
multiplied by three of them.

**Where the cube sits.** Along z at the middle of the scan: its ends are what the operator chose. In x and y at the
middle of the *body's* bounding box, not of the field of view: a patient lies off-centre by centimetres, and a cube
about the field's centre would cut one arm or breast off and keep air on the other side. ``centre`` overrides it.
:class:`PrepareReport` says what was cropped and padded on each side, and a warning says how much of the body is lost.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .ct_grid import apply_to_axes, axis_weights, find_body, share_outside
from .ct_io import AIR_HU, CTVolume, CTWarning, LabelVolume, check_hu, read_ct, read_labels, to_lps, write_nifti
from .files import InputError
from .presets import VolumePreset

__all__ = [
    "AIR_HU", "SAMPLES", "TOTALSEGMENTATOR", "CTVolume", "CTWarning", "LabelVolume", "PrepareReport", "PreparedCT",
    "hu_to_mu", "hu_to_unit", "mu_to_hu", "prepare_ct", "prepare_labels", "read_ct", "read_labels", "restore_ct",
    "sample_ct", "sample_labels", "to_lps", "unit_to_hu", "write_nifti",
]  # fmt: skip

#: Ends of the axes x, y, z: the side with the lower and the one with the higher coordinate.
SIDES = (("right", "left"), ("anterior", "posterior"), ("inferior", "superior"))
_WARN_BODY_SHARE = 0.001

#: The two real scans that ``data_scripts/fetch_sample_ct.py`` brings: folder and CT, under ``data/sample_ct``.
SAMPLES = {
    "lidc_idri_0001": "lidc_idri_0001/ct.nii.gz",
    "lung_pet_ct_dx_a0001": "lung_pet_ct_dx_a0001/dicom",
}
#: Organ → label numbers of TotalSegmentator version 2, as in the labels of LIDC-IDRI-0001.
TOTALSEGMENTATOR = {
    "lungs": tuple(range(10, 15)),
    "vertebrae": tuple(range(26, 51)),
    "heart": (51,),
    "aorta": (52,),
    "spinal_cord": (79,),
    "ribs": tuple(range(92, 116)),
    "sternum": (116,),
    "liver": (5,),
    "scapulae": (71, 72),
}


def hu_to_unit(hu: Float[Tensor, "*any"], volume: VolumePreset) -> Float[Tensor, "*any"]:
    """HU → [-1, 1] by the preset's window; values outside are clipped to it (§V-A)."""
    hu = hu.to(torch.float32).clamp(volume.hu_min, volume.hu_max)
    return (hu - volume.hu_min) * (2.0 / (volume.hu_max - volume.hu_min)) - 1.0


def unit_to_hu(unit: Float[Tensor, "*any"], volume: VolumePreset) -> Float[Tensor, "*any"]:
    """[-1, 1] → HU: the inverse of :func:`hu_to_unit` (to 0.001 HU, so whole HU come back exactly). Does not clip."""
    return (unit + 1.0) * ((volume.hu_max - volume.hu_min) / 2.0) + volume.hu_min


def hu_to_mu(hu: Float[Tensor, "*any"], mu_water_per_mm: float) -> Float[Tensor, "*any"]:
    """HU → linear attenuation in 1/mm, µ = µ_water (1 + HU/1000), never negative.

    Args:
        hu: Hounsfield units.
        mu_water_per_mm: attenuation of water at the beam's effective energy, about 0.02 at 70 keV (NIST).
    """
    _check_mu_water(mu_water_per_mm)
    return (mu_water_per_mm * (1.0 + hu / 1000.0)).clamp_min(0.0)


def mu_to_hu(mu: Float[Tensor, "*any"], mu_water_per_mm: float) -> Float[Tensor, "*any"]:
    """Linear attenuation in 1/mm → HU; inverse of :func:`hu_to_mu` above -1000 HU."""
    _check_mu_water(mu_water_per_mm)
    return (mu / mu_water_per_mm - 1.0) * 1000.0


def _check_mu_water(value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"mu_water_per_mm: found {value!r}, expected a positive number of 1/mm, about 0.02.")


@dataclass(frozen=True)
class PrepareReport:
    """What :func:`prepare_ct` did to a scan.

    Attributes:
        source_shape: (z, y, x) voxels of the scan on LPS axes.
        source_spacing_mm: (z, y, x).
        centre_mm: (x, y, z), LPS mm of the cube's centre in the patient.
        cropped_mm: per side (right, left, anterior, posterior, inferior, superior), mm of scan that were cut off.
        padded_mm: per side, mm of air that were added.
        body_cropped_share: share of the body's volume that lies outside the cube.
        clipped_low_share: share of the scan's voxels below the HU window.
        clipped_high_share: share above it.
    """

    source_shape: tuple[int, int, int]
    source_spacing_mm: tuple[float, float, float]
    centre_mm: tuple[float, float, float]
    cropped_mm: dict[str, float]
    padded_mm: dict[str, float]
    body_cropped_share: float
    clipped_low_share: float
    clipped_high_share: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        def sides(values: dict[str, float]) -> str:
            return ", ".join(f"{side} {mm:.1f}" for side, mm in values.items() if mm > 0) or "nothing"

        return (
            f"{' x '.join(map(str, self.source_shape))} voxels (z y x) of "
            f"{' x '.join(f'{v:.3f}' for v in self.source_spacing_mm)} mm; cropped (mm): {sides(self.cropped_mm)}; "
            f"padded with air (mm): {sides(self.padded_mm)}; {100 * self.body_cropped_share:.2f} % of the body "
            f"cropped; {100 * self.clipped_high_share:.3f} % of voxels clipped at the top of the window"
        )


@dataclass(frozen=True)
class PreparedCT:
    """A CT on the network's cube. For a sample on the same grid: ``dataclasses.replace(prepared, unit=sample)``.

    Attributes:
        unit: values in [-1, 1].
        affine: (x, y, z, 1) voxel index of the cube → LPS mm in the patient.
        volume: the preset's grid and window.
        report: what was cropped, padded and clipped.
        name: where the CT comes from, for messages.
    """

    unit: Float[Tensor, "1 z y x"]
    affine: Float[np.ndarray, "4 4"]
    volume: VolumePreset
    report: PrepareReport
    name: str = "CT volume"

    @property
    def hu(self) -> Float[Tensor, "z y x"]:
        """Hounsfield units."""
        return unit_to_hu(self.unit[0], self.volume)


def prepare_ct(ct: CTVolume, volume: VolumePreset, centre: str | tuple[float, float, float] = "body") -> PreparedCT:
    """Bring a scan onto the cube of the network (§V-A; the module's text has the steps).

    Args:
        ct: a scan on LPS axes, from :func:`read_ct`.
        volume: grid and HU window, ``get_preset(...).volume``.
        centre: ``"body"`` (see the module), ``"grid"`` (middle of the scan on all axes), or (x, y, z) in LPS mm.

    Returns:
        the cube, its affine in the patient, and the report.

    Raises:
        InputError: NaN or constant values, or a centre so far off that the cube misses the scan.

    Warns:
        CTWarning: part of the body lies outside the cube.
    """
    check_hu(ct.hu.numpy(), ct.name, warn=False)  # reading has warned already
    shape, spacing = np.array(ct.hu.shape[::-1]), np.diag(ct.affine)[:3]
    low, high = ct.low_mm, ct.low_mm + shape * spacing
    body, body_edges = find_body(ct)
    cube_low = _cube_low(ct, volume, centre, body, body_edges)
    cube_high = cube_low + volume.fov_mm
    if (cube_low >= high).any() or (cube_high <= low).any():
        raise InputError(
            f"{ct.name}: centre {centre} puts the cube outside the scan, which spans {low.round(1).tolist()} to "
            f"{high.round(1).tolist()} mm (x, y, z); choose a centre inside."
        )
    window = ct.hu.to(torch.float32).clamp(volume.hu_min, volume.hu_max)
    n_fine = max(1, round(volume.fov_mm / volume.resample_mm))
    operators = []
    for axis in range(3):
        fine = axis_weights(shape[axis], spacing[axis], low[axis], n_fine, volume.fov_mm / n_fine, cube_low[axis])
        coarse = axis_weights(n_fine, volume.fov_mm / n_fine, 0.0, volume.size, volume.spacing_mm, 0.0)
        operators.append(coarse @ fine)
    unit = hu_to_unit(apply_to_axes(window, operators, background=volume.hu_min), volume)

    report = PrepareReport(
        source_shape=tuple(ct.hu.shape),
        source_spacing_mm=ct.spacing_mm,
        centre_mm=tuple(float(v) for v in cube_low + volume.fov_mm / 2),
        cropped_mm=_sides(np.maximum(cube_low - low, 0), np.maximum(high - cube_high, 0)),
        padded_mm=_sides(np.maximum(low - cube_low, 0), np.maximum(cube_high - high, 0)),
        body_cropped_share=share_outside(body, body_edges, cube_low, cube_high),
        clipped_low_share=float((ct.hu < volume.hu_min).float().mean()),
        clipped_high_share=float((ct.hu > volume.hu_max).float().mean()),
    )
    if report.body_cropped_share > _WARN_BODY_SHARE:
        cut = ", ".join(f"{side} {mm:.1f} mm" for side, mm in report.cropped_mm.items() if mm > 0)
        warnings.warn(
            f"{ct.name}: {100 * report.body_cropped_share:.1f} % of the body lies outside the {volume.fov_mm:g} mm "
            f"cube (cut off: {cut}); choose another centre if that part matters.",
            CTWarning,
            stacklevel=2,
        )
    affine = np.diag([volume.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = cube_low + volume.spacing_mm / 2
    return PreparedCT(unit[None], affine, volume, report, ct.name)


def restore_ct(prepared: PreparedCT, like: CTVolume) -> CTVolume:
    """Bring a cube back onto a scan's own grid.

    Interpolates linearly (area average where the scan is the coarser); outside the cube is air. What preparing
    averaged away does not come back, but position and mean do.
    """
    shape, spacing, low = np.array(like.hu.shape[::-1]), np.diag(like.affine)[:3], like.low_mm
    size, edge = prepared.volume.size, prepared.volume.spacing_mm
    cube_low = prepared.affine[:3, 3] - edge / 2
    operators = [axis_weights(size, edge, cube_low[a], shape[a], spacing[a], low[a]) for a in range(3)]
    hu = apply_to_axes(prepared.hu, operators, background=prepared.volume.hu_min)
    return CTVolume(hu, like.affine, prepared.name)


def prepare_labels(labels: LabelVolume, like: PreparedCT) -> Integer[Tensor, "z y x"]:
    """Labels at the voxel centres of a prepared CT, by nearest neighbour; 0 outside the label map.

    Raises:
        InputError: the two do not overlap, so they cannot be of the same patient.
    """
    picks, insides = [], []
    for axis in range(3):
        spacing = labels.affine[axis, axis]
        centres = like.affine[axis, 3] + like.affine[axis, axis] * np.arange(like.volume.size)
        # Halfway between two voxels the upper one is taken: +0.5 and floor, whatever the rounding mode.
        index = np.floor((centres - labels.affine[axis, 3]) / spacing + 0.5).astype(int)
        n = labels.labels.shape[2 - axis]
        insides.append(torch.from_numpy((index >= 0) & (index < n)))
        picks.append(torch.from_numpy(index.clip(0, n - 1)))
    (x, y, z), (in_x, in_y, in_z) = picks, insides
    inside = in_z[:, None, None] & in_y[:, None] & in_x
    if not inside.any():
        raise InputError(
            f"{labels.name}: does not overlap {like.name}, expected labels of the same scan; check the files."
        )
    return labels.labels[z][:, y][:, :, x] * inside.to(labels.labels.dtype)


def sample_ct(root: str | Path = "data", name: str = "lidc_idri_0001") -> CTVolume | None:
    """A real sample scan, or None if ``data_scripts/fetch_sample_ct.py`` has not brought it.

    Args:
        root: the data folder.
        name: ``lidc_idri_0001`` (the test patient, never trained on) or ``lung_pet_ct_dx_a0001``.
    """
    if name not in SAMPLES:
        raise InputError(f"name: found {name!r}, expected one of {', '.join(SAMPLES)}.")
    path = Path(root) / "sample_ct" / SAMPLES[name]
    return read_ct(path) if path.exists() else None


def sample_labels(root: str | Path = "data") -> LabelVolume | None:
    """Organ labels of LIDC-IDRI-0001 (numbers: :data:`TOTALSEGMENTATOR`), or None if they were not fetched."""
    path = Path(root) / "sample_ct" / "lidc_idri_0001" / "labels.nii.gz"
    return read_labels(path) if path.exists() else None


def _cube_low(
    ct: CTVolume,
    volume: VolumePreset,
    centre: str | tuple[float, float, float],
    body: np.ndarray,
    edges: list[np.ndarray],
) -> np.ndarray:
    """LPS mm (x, y, z) of the cube's lower corner."""
    spacing = np.diag(ct.affine)[:3]
    middle = ct.low_mm + spacing * np.array(ct.hu.shape[::-1]) / 2
    if isinstance(centre, str):
        if centre not in ("body", "grid"):
            raise InputError(f"centre: found {centre!r}, expected 'body', 'grid' or (x, y, z) in mm.")
        if centre == "body" and body.any():
            for axis in (0, 1):
                filled = np.flatnonzero(body.any(axis=(0, 1) if axis == 0 else (0, 2)))
                middle[axis] = (edges[axis][filled[0]] + edges[axis][filled[-1] + 1]) / 2
        low = middle - volume.fov_mm / 2
        # On a scan as fine as the 1 mm grid, put the faces of the cube on faces of voxels (a shift of half a voxel
        # at most): a scan that is on the grid already is then not blurred.
        snapped = ct.low_mm + np.rint((low - ct.low_mm) / spacing) * spacing
        return np.where(spacing <= volume.resample_mm * (1 + 1e-6), snapped, low)
    if len(centre) != 3 or not np.isfinite(centre).all():
        raise InputError(f"centre: found {centre!r}, expected three numbers (x, y, z) in mm.")
    return np.asarray(centre, dtype=np.float64) - volume.fov_mm / 2


def _sides(low: np.ndarray, high: np.ndarray) -> dict[str, float]:
    # Rounded to a micrometre: cube edges are sums of floats, and 1e-14 mm is not a crop.
    pairs = zip(SIDES, low, high, strict=True)
    return {side: round(float(mm), 3) for names, a, b in pairs for side, mm in zip(names, (a, b), strict=True)}
