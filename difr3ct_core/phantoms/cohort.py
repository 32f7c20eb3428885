"""A synthetic thorax cohort: unlimited patients from a seed, in HU, with an organ label map.

Anatomy is drawn from implicit shapes in mm (:mod:`difr3ct_core.phantoms.anatomy`) for a patient whose size,
shape, pose and tissue are drawn from :data:`DISTRIBUTION`. All draws are made in mm and are independent of
the grid, so one seed is the same patient at every resolution. The phantoms are meant to teach and to test:
they resemble chest CT, and models trained on them are of no use for real patients.

    >>> phantom = make_phantom(seed=7, size=32)
    >>> phantom.hu.shape, sorted(phantom.parameters)[:2]
    (torch.Size([32, 32, 32]), ['aorta_radius_mm', 'arch_z_mm'])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..files import InputError
from .anatomy import LABELS, Thorax
from .canvas import LATTICE_MM, Canvas, resample_lattice, rotation_xyz
from .chest import (
    draw_airways,
    draw_heart,
    draw_lung_vessels,
    draw_lungs,
    draw_mediastinum,
    draw_nodules,
)
from .skeleton import draw_girdle, draw_ribs, draw_spine
from .trunk import draw_abdomen, draw_wall

__all__ = ["COHORTS", "DISTRIBUTION", "LABELS", "Phantom", "Spread", "make_phantom"]

#: Who is in a cohort. "lung": 55 % men, as among the patients of lung screening and LIDC (our choice of number);
#: "thoracic": women after mastectomy on one side; "intact": women with both breasts.
COHORTS: tuple[str, ...] = ("lung", "thoracic", "intact")


@dataclass(frozen=True)
class Spread:
    """A normal distribution, clipped: mean, standard deviation, lowest and highest value, unit and where it is from."""

    mean: float
    sd: float
    low: float
    high: float
    unit: str
    source: str

    def draw(self, rng: np.random.Generator) -> float:
        return float(np.clip(rng.normal(self.mean, self.sd), self.low, self.high))


_OURS = "our choice"
#: Every parameter of a patient, in the order in which it is drawn. Women are scaled by 0.94 in all directions and
#: carry 1.25 times the fat; `fat_mm` is log-normal, all others are clipped normals.
DISTRIBUTION: dict[str, Spread] = {
    "scale_x": Spread(1.0, 0.055, 0.86, 1.14, "1", "inner chest width 24 to 28 cm, anthropometry; sd our choice"),
    "scale_y": Spread(1.0, 0.06, 0.85, 1.16, "1", "AP depth of the chest 20 to 24 cm; sd our choice"),
    "scale_z": Spread(1.0, 0.05, 0.88, 1.12, "1", "T1 to T12 about 27 cm in adults; sd our choice"),
    "shift_x_mm": Spread(0, 5, -12, 12, "mm", "centring on the table, " + _OURS),
    "shift_y_mm": Spread(0, 6, -14, 14, "mm", "centring on the table, " + _OURS),
    "shift_z_mm": Spread(0, 9, -20, 20, "mm", "scan range, " + _OURS),
    "tilt_x_deg": Spread(0, 2.0, -5, 5, "deg", _OURS),
    "tilt_y_deg": Spread(0, 1.5, -4, 4, "deg", _OURS),
    "tilt_z_deg": Spread(0, 2.5, -6, 6, "deg", _OURS),
    "fat_mm": Spread(14, 0.35, 5, 34, "mm", "log-normal (sd of the logarithm), subcutaneous fat, " + _OURS),
    "muscle_mm": Spread(0, 2, -4, 5, "mm", "thickness of the wall beyond the mean, " + _OURS),
    "muscle_fat": Spread(0.02, 0.05, -0.08, 0.15, "1", "fat streaks in muscle, " + _OURS),
    "outline_exponent": Spread(2.35, 0.12, 2.1, 2.65, "1", "2 is an ellipse, more is boxier, " + _OURS),
    "dome_right_z_mm": Spread(-72, 9, -92, -50, "mm", "depth of inspiration: about T9 (-62) to T10 (-85)"),
    "dome_drop_left_mm": Spread(10, 4, 1, 20, "mm", "left dome lower by half an interspace, textbook"),
    "mediastinum_scale": Spread(1.0, 0.08, 0.82, 1.2, "1", _OURS),
    "heart_scale": Spread(0.95, 0.06, 0.82, 1.1, "1", "cardio-thoracic ratio 0.42 to 0.55, textbook"),
    "heart_x_mm": Spread(0, 4, -9, 9, "mm", _OURS),
    "heart_y_mm": Spread(0, 3, -7, 7, "mm", _OURS),
    "heart_axis_deg": Spread(38, 7, 22, 54, "deg", "long axis against the frontal plane, textbook 30 to 45"),
    "heart_fat_mm": Spread(5, 1.8, 2, 10, "mm", "epicardial fat 3 to 8 mm"),
    "aorta_radius_mm": Spread(12.8, 1.3, 10, 16.5, "mm", "descending aorta 21 to 30 mm wide"),
    "arch_z_mm": Spread(63, 4, 54, 72, "mm", "aortic arch at T3/4"),
    "trachea_radius_mm": Spread(8.5, 0.9, 6.5, 10.5, "mm", "trachea 15 to 20 mm wide"),
    "scoliosis_mm": Spread(0, 3, -8, 8, "mm", _OURS),
    "rib_slope": Spread(1.0, 0.1, 0.78, 1.22, "1", _OURS),
    "scapula_turn_mm": Spread(18, 8, 0, 36, "mm", "arms raised, " + _OURS),
    "vessel_leaf_mm": Spread(0.95, 0.08, 0.75, 1.15, "mm", "radius of the last branches drawn, " + _OURS),
    "stomach_scale": Spread(0.9, 0.13, 0.6, 1.15, "1", _OURS),
    "stomach_level_mm": Spread(8, 12, -16, 26, "mm", "fluid level before the centre of the stomach, " + _OURS),
    "liver_left_mm": Spread(0, 8, -16, 18, "mm", "reach of the left lobe, " + _OURS),
    "lung_hu": Spread(-835, 22, -885, -775, "HU", "full inspiration, mean lung density -850 to -800"),
    "lung_gradient_hu": Spread(35, 12, 10, 65, "HU", "front to back half depth, gravity"),
    "lung_texture_hu": Spread(22, 5, 12, 35, "HU", _OURS),
    "fat_hu": Spread(-102, 4, -112, -92, "HU", "textbook -120 to -90"),
    "muscle_hu": Spread(52, 5, 40, 64, "HU", "textbook 40 to 60"),
    "blood_hu": Spread(42, 4, 33, 52, "HU", "unenhanced, textbook 35 to 50"),
    "myocardium_hu": Spread(47, 4, 38, 57, "HU", "unenhanced"),
    "liver_hu": Spread(58, 7, 40, 72, "HU", "textbook 50 to 65"),
    "spleen_hu": Spread(49, 4, 40, 58, "HU", "textbook 45 to 55"),
    "gland_hu": Spread(30, 8, 12, 48, "HU", "fibroglandular tissue"),
    "cortical_hu": Spread(640, 75, 450, 850, "HU", "at CT resolution"),
    "trabecular_hu": Spread(185, 35, 110, 270, "HU", "thoracic vertebrae, falls with age"),
    "disc_hu": Spread(85, 10, 60, 110, "HU", "textbook 60 to 110"),
    "cartilage_hu": Spread(115, 25, 75, 200, "HU", "calcifies with age"),
    "noise_hu": Spread(14, 3, 8, 22, "HU", "in voxels of 2.5 mm, half of it at 5 mm; " + _OURS),
    "breast_radius_mm": Spread(62, 7, 46, 78, "mm", "women only, " + _OURS),
    "breast_depth_mm": Spread(34, 9, 16, 58, "mm", "women only, lying on the back, " + _OURS),
    "breast_density": Spread(0.3, 0.14, 0.05, 0.65, "1", "share of gland"),
    "breast_asymmetry": Spread(0, 1, -2, 2, "1", "4 % of the radius each, " + _OURS),
    "breast_z_mm": Spread(0, 6, -14, 14, "mm", _OURS),
}
WARP_SD_MM = 2.2  # displacement of a lattice of 6³ nodes over the cube: asymmetry without a name; our choice


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient.

    Attributes:
        hu: Hounsfield units, float32.
        labels: organ of each voxel, see ``LABELS``.
        parameters: what was drawn for this patient, with units in ``DISTRIBUTION``, and sex, side and nodules.
        affine: 4x4, voxel index (x, y, z) to LPS mm; the cube is centred on the origin.
    """

    hu: Float[Tensor, "z y x"]
    labels: UInt8[Tensor, "z y x"]
    parameters: dict[str, float]
    affine: np.ndarray


def draw_patient(seed: int, cohort: str) -> dict[str, float]:
    """Draw the parameters of one patient (see ``DISTRIBUTION``)."""
    rng = np.random.default_rng([seed, 0])
    male, side, n_nodules = rng.uniform(), rng.uniform(), rng.poisson(0.7)
    p = {name: spread.draw(rng) for name, spread in DISTRIBUTION.items() if name != "fat_mm"}
    fat = DISTRIBUTION["fat_mm"]
    p["fat_mm"] = float(np.clip(fat.mean * np.exp(rng.normal(0, fat.sd)), fat.low, fat.high))
    p["male"] = float(cohort == "lung" and male < 0.55)
    p["mastectomy_side"] = 0.0
    p["nodules"] = float(n_nodules) if cohort == "lung" else 0.0
    if cohort == "thoracic":
        p["mastectomy_side"] = 1.0 if side < 0.5 else -1.0
    if p["male"]:
        p["breast_radius_mm"] = p["breast_depth_mm"] = p["breast_density"] = 0.0
    else:
        p["fat_mm"] = min(p["fat_mm"] * 1.25, fat.high)
        for axis in "xyz":
            p[f"scale_{axis}"] *= 0.94
    return p


def make_phantom(
    seed: int, size: int = 64, cohort: str = "lung", fov_mm: float = 320.0, *, nodules: int | None = None
) -> Phantom:
    """Draw one synthetic thorax.

    Args:
        seed: the patient; a whole number from 0. The same seed is the same patient at every ``size``.
        size: voxels per edge, 16 to 512.
        cohort: one of ``COHORTS``.
        fov_mm: edge of the cube in mm (§V-A crops to 320 mm).
        nodules: how many lung nodules; None draws the number (Poisson, mean 0.7, in cohort "lung" only).

    Returns:
        HU, labels, parameters and affine; the volume is in (z, y, x), +x Left, +y Posterior, +z Superior.

    Raises:
        InputError: unknown cohort, or a seed, size, field of view or number of nodules out of range.
    """
    if cohort not in COHORTS:
        raise InputError(f"cohort: found {cohort!r}, expected one of {list(COHORTS)}.")
    limits = (("seed", seed, 0, 2**63 - 1), ("size", size, 16, 512), ("nodules", nodules or 0, 0, 50))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise InputError(f"{name}: found {value!r}, expected a whole number from {low} to {high}.")
    if not isinstance(fov_mm, (int, float)) or not 100 <= fov_mm <= 1000:
        raise InputError(f"fov_mm: found {fov_mm!r}, expected a length from 100 to 1000 mm.")
    p = draw_patient(int(seed), cohort)
    if nodules is not None:
        p["nodules"] = float(nodules)
    shape_rng = np.random.default_rng([int(seed), 1])
    warp = np.clip(shape_rng.normal(0, WARP_SD_MM, (3, 6, 6, 6)), -2.5 * WARP_SD_MM, 2.5 * WARP_SD_MM)
    canvas = Canvas(
        size, fov_mm, (p["scale_x"], p["scale_y"], p["scale_z"]),
        rotation_xyz((p["tilt_x_deg"], p["tilt_y_deg"], p["tilt_z_deg"])),
        (p["shift_x_mm"], p["shift_y_mm"], p["shift_z_mm"]), warp,
    )  # fmt: skip
    body = Thorax(canvas, p, int(seed), *_texture(int(seed), size, fov_mm))
    draw_wall(body)
    draw_abdomen(body)
    draw_lungs(body)
    draw_lung_vessels(body)
    draw_heart(body)
    draw_mediastinum(body)
    draw_airways(body)
    draw_spine(body)
    draw_ribs(body)
    draw_girdle(body)
    draw_nodules(body, int(p["nodules"]))
    noise = _noise(int(seed), size, fov_mm, p["noise_hu"])
    noise *= np.where(canvas.hu < -950, 0.4, 1).astype(np.float32)  # few photons are lost in air
    hu = np.clip(canvas.hu + noise, -1024, 3071).astype(np.float32)
    spacing = fov_mm / size
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -fov_mm / 2 + spacing / 2
    return Phantom(torch.from_numpy(hu), torch.from_numpy(canvas.labels), p, affine)


def _texture(seed: int, size: int, fov_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Two random fields of about unit variance: blotches of 10 to 40 mm, and grain of 5 mm."""
    rng, ratio = np.random.default_rng([seed, 2]), fov_mm / LATTICE_MM
    blotches = np.zeros((size,) * 3, dtype=np.float32)
    for n, weight in ((8, 0.7), (16, 0.8), (32, 0.9)):
        blotches += weight * resample_lattice(rng.standard_normal((n,) * 3, dtype=np.float32), size, ratio)
    return blotches, resample_lattice(rng.standard_normal((64,) * 3, dtype=np.float32), size, ratio)


def _noise(seed: int, size: int, fov_mm: float, sd: float) -> np.ndarray:
    """CT noise: correlated over 5 mm, and white in voxels of 2.5 mm; ``sd`` HU where voxels are 2.5 mm.

    The white part is left out on grids that would average it away (5 mm and coarser).
    """
    rng, ratio = np.random.default_rng([seed, 3]), fov_mm / LATTICE_MM
    noise = 0.5 * sd * resample_lattice(rng.standard_normal((64,) * 3, dtype=np.float32), size, ratio)
    if fov_mm / size < LATTICE_MM / 64:
        noise += 0.95 * sd * resample_lattice(rng.standard_normal((128,) * 3, dtype=np.float32), size, ratio)
    return noise
