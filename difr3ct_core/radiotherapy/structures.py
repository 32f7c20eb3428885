"""What planning works on: named masks on the grid of a CT, and why a case cannot be planned.

Structures are boolean arrays ``(z, y, x)`` on LPS axes with one affine. :data:`TOTALSEGMENTATOR` and
:data:`PHANTOM` say which label numbers make which structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..ct import TOTALSEGMENTATOR as _TS
from ..ct_grid import apply_to_axes, axis_weights
from ..ct_io import AIR_HU, CTVolume, LabelVolume
from ..files import InputError
from ..phantoms import LABELS

#: Names that this package gives to structures; a plan needs BODY, one breast, both lungs and the heart.
NAMES = ("body", "lung_left", "lung_right", "heart", "breast_left", "breast_right", "spine")

#: Structure → label numbers of TotalSegmentator version 2 (it has no breasts and no body).
TOTALSEGMENTATOR: dict[str, tuple[int, ...]] = {
    "lung_left": (10, 11),
    "lung_right": (12, 13, 14),
    "heart": _TS["heart"],
    "spine": _TS["vertebrae"] + _TS["spinal_cord"],
}
#: Structure → organs of a phantom's label map.
PHANTOM: dict[str, tuple[int, ...]] = {
    "body": tuple(number for name, number in LABELS.items() if name != "air"),
    "lung_left": (LABELS["lung_left"],),
    "lung_right": (LABELS["lung_right"],),
    "heart": (LABELS["heart"],),
    "breast_left": (LABELS["breast_left"],),
    "breast_right": (LABELS["breast_right"],),
    "spine": (LABELS["vertebrae"], LABELS["discs"], LABELS["spinal_canal"]),
}


class NotPlannable(Exception):
    """A case that cannot be planned; ``str(error)`` is the reason, one sentence, which a report shows."""


@dataclass(frozen=True)
class Structures:
    """Named masks on one grid.

    Attributes:
        masks: name → boolean (z, y, x).
        affine: 4x4, voxel index (x, y, z, 1) → LPS mm, diagonal and positive.
        source: who drew them, for messages and files.
        missing: name → why a structure could not be made.
    """

    masks: Mapping[str, Bool[np.ndarray, "z y x"]]
    affine: Float[np.ndarray, "4 4"]
    source: str = "structures"
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {name: np.shape(mask) for name, mask in self.masks.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
            raise InputError(f"{self.source}: found masks of shapes {shapes}, expected one shape (z, y, x).")
        for name, mask in self.masks.items():
            if np.asarray(mask).dtype != bool:
                raise InputError(f"{self.source}: {name} is {np.asarray(mask).dtype}, expected boolean; compare first.")

    def __getitem__(self, name: str) -> Bool[np.ndarray, "z y x"]:
        """The mask called ``name``.

        Raises:
            NotPlannable: it could not be made, or is empty.
        """
        if name not in self.masks:
            reason = self.missing.get(name, f"it is not among {sorted(self.masks)}")
            raise NotPlannable(f"{self.source}: no contour of {name}: {reason}.")
        if not self.masks[name].any():
            raise NotPlannable(f"{self.source}: the contour of {name} is empty.")
        return self.masks[name]

    def __contains__(self, name: str) -> bool:
        return name in self.masks and bool(self.masks[name].any())

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edges (z, y, x) in mm."""
        return tuple(float(v) for v in np.diag(self.affine)[2::-1])

    def volume_cm3(self, name: str) -> float:
        """Volume of a structure in cm³."""
        return float(self[name].sum() * np.prod(self.spacing_mm) / 1000.0)

    def require_grid(self, ct: CTVolume) -> None:
        """Raise :class:`InputError` unless the structures lie on the grid of ``ct``."""
        shape = next(iter(self.masks.values())).shape if self.masks else tuple(ct.hu.shape)
        if shape != tuple(ct.hu.shape) or not np.allclose(self.affine, ct.affine, atol=1e-3):
            raise InputError(
                f"{self.source}: the masks have shape {shape} and origin {self.affine[:3, 3].round(2).tolist()} mm, "
                f"expected those of {ct.name}, {tuple(ct.hu.shape)} and {ct.affine[:3, 3].round(2).tolist()} mm; "
                "resample one onto the other."
            )


def structures_from_labels(
    labels: LabelVolume, numbers: Mapping[str, tuple[int, ...]], source: str | None = None
) -> Structures:
    """Structures from a label map, with ``numbers`` as :data:`TOTALSEGMENTATOR` or :data:`PHANTOM`."""
    array = labels.labels.numpy()
    masks = {name: np.isin(array, values) for name, values in numbers.items()}
    missing = {name: "the label map does not hold it" for name, mask in masks.items() if not mask.any()}
    kept = {name: mask for name, mask in masks.items() if mask.any()}
    return Structures(kept, labels.affine, source or labels.name, missing)


def planning_grid(ct: CTVolume, spacing_mm: float = 5.0) -> tuple[tuple[int, int, int], Float[np.ndarray, "4 4"]]:
    """Shape (z, y, x) and affine of the isotropic grid with faces where those of ``ct`` are (to a voxel)."""
    size = np.diag(ct.affine)[:3] * np.array(ct.hu.shape[::-1])
    count = np.maximum(2, np.rint(size / spacing_mm)).astype(int)
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = ct.low_mm + spacing_mm / 2
    return tuple(int(n) for n in count[::-1]), affine


def _operators(source: np.ndarray, n_in: tuple[int, ...], target: np.ndarray, n_out: tuple[int, ...]) -> list:
    rows = []
    for axis in range(3):
        d_in, d_out = source[axis, axis], target[axis, axis]
        low_in, low_out = source[axis, 3] - d_in / 2, target[axis, 3] - d_out / 2
        rows.append(axis_weights(n_in[2 - axis], d_in, low_in, n_out[2 - axis], d_out, low_out))
    return rows


def resample_ct(ct: CTVolume, spacing_mm: float = 5.0) -> CTVolume:
    """``ct`` on its planning grid: area average where that is coarser, linear where finer; air outside."""
    shape, affine = planning_grid(ct, spacing_mm)
    hu = apply_to_axes(ct.hu, _operators(ct.affine, tuple(ct.hu.shape), affine, shape), background=AIR_HU)
    return CTVolume(hu, affine, ct.name)


def resample_structures(structures: Structures, like: CTVolume) -> Structures:
    """Structures on the grid of ``like``: a voxel belongs to one that fills at least half of it."""
    masks = {}
    for name, mask in structures.masks.items():
        values = torch.from_numpy(mask.astype(np.float32))
        rows = _operators(structures.affine, mask.shape, like.affine, tuple(like.hu.shape))
        masks[name] = (apply_to_axes(values, rows, background=0.0) >= 0.5).numpy()
    return Structures(masks, like.affine, structures.source, dict(structures.missing))


def dice(a: Bool[np.ndarray, "z y x"], b: Bool[np.ndarray, "z y x"]) -> float:
    """Dice overlap of two masks of one grid; 1 where both are empty."""
    if a.shape != b.shape:
        raise InputError(f"masks: found shapes {a.shape} and {b.shape}, expected the same grid.")
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2.0 * int((a & b).sum()) / total


def check_plannable(structures: Structures) -> None:
    """Raise :class:`NotPlannable` unless target, lungs and heart are there, apart, and in the body."""
    body = structures["body"]
    names = [n for n in ("target", "lung_left", "lung_right", "heart") if structures[n].any()]
    for name in names:
        outside = float((structures[name] & ~body).sum() / structures[name].sum())
        if outside > 0.02:
            raise NotPlannable(
                f"{structures.source}: {100 * outside:.0f} % of {name} lies outside the body, expected none; "
                "the contours are of another scan or another grid."
            )
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = float((structures[a] & structures[b]).sum() / min(structures[a].sum(), structures[b].sum()))
            if shared > 0.02:
                raise NotPlannable(f"{structures.source}: {a} and {b} share {100 * shared:.0f} % of their voxels.")
