"""Whole-breast radiotherapy by two opposed tangents (§V-D): target, search for the fields, weights.

The fields come from beam's-eye-view geometry alone: organs and target are projected onto the plane of the iso-centre,
and the gantry angles are those that put least lung and heart into fields that cover the target. Each field is open, and
has subfields from which the thin front of the breast is shielded (field-in-field); their weights make the dose in the
target uniform. Dose: :mod:`.dose`.

Angles are IEC gantry angles of a patient on the back, head first: 0° from in front, 90° from the patient's left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.optimize import nnls

from ..files import InputError
from .structures import NotPlannable, Structures, check_plannable

#: Distance from source to iso-centre, mm: the usual linac.
SAD_MM = 1000.0
#: Height of a row of the collimator in the plane of the iso-centre, mm.
LEAF_MM = 5.0
#: Half of the widest field, mm.
_REACH_MM = 180.0
_SKIN_MM = 5.0  # dose builds up below the skin: the evaluated target begins 5 mm deep, as in breast trials
_MARGIN_MM = 7.0  # penumbra and set-up
_FLASH_MM = 20.0  # beyond the skin, for breathing
#: Share of each leaf row that subfields leave open, from the chest wall forward.
SEGMENTS = (1.0, 0.7, 0.4)


@dataclass(frozen=True)
class Prescription:
    """Total dose in Gy to the target's mean, and number of fractions."""

    total_gy: float
    fractions: int


#: Moderate hypofractionation (START B) and the conventional course.
PRESCRIPTIONS: dict[str, Prescription] = {"40.05/15": Prescription(40.05, 15), "50/25": Prescription(50.0, 25)}


@dataclass(frozen=True)
class Field:
    """One direction of the beam with its subfields.

    Attributes:
        gantry_deg: IEC gantry angle.
        apertures: (segment, row, 2): open from and to, mm along the leaves in the plane of the iso-centre; the row
            is closed where both are equal. +u is the patient's left at gantry 0.
        rows_mm: lower edge of each row, mm above the iso-centre (+ is superior); rows are LEAF_MM high.
        weights: Gy per unit fluence, one a segment.
    """

    gantry_deg: float
    apertures: Float[np.ndarray, "s r 2"]
    rows_mm: Float[np.ndarray, " r"]
    weights: Float[np.ndarray, " s"]


@dataclass(frozen=True)
class TangentPlan:
    """Two tangents with weights: what is delivered, whatever the patient turns out to be.

    Attributes:
        side: of the breast.
        prescription: dose and fractions.
        isocentre_mm: (x, y, z), LPS mm.
        fields: the medial and the lateral one.
        planned_on: name of the CT that it was made from.
    """

    side: str
    prescription: Prescription
    isocentre_mm: Float[np.ndarray, "3"]
    fields: tuple[Field, Field]
    planned_on: str


def get_prescription(name: str) -> Prescription:
    """A preset of :data:`PRESCRIPTIONS`, or an :class:`InputError`."""
    if name not in PRESCRIPTIONS:
        raise InputError(f"prescription: found {name!r}, expected one of {', '.join(PRESCRIPTIONS)}.")
    return PRESCRIPTIONS[name]


def add_target(structures: Structures, side: str) -> Structures:
    """``structures`` with "target": the breast without its outer 5 mm.

    Raises:
        InputError: ``side`` is neither left nor right.
        NotPlannable: breast, lungs or heart are missing, touch or lie outside the body.
    """
    if side not in ("left", "right"):
        raise InputError(f"side: found {side!r}, expected 'left' or 'right'.")
    breast, body = structures[f"breast_{side}"], structures["body"]
    outside = float((breast & ~body).sum() / breast.sum())
    if outside > 0.02:
        raise NotPlannable(f"{structures.source}: {100 * outside:.0f} % of the {side} breast lies outside the body.")
    # Half a voxel: distances run between the centres of voxels.
    depth = ndimage.distance_transform_edt(body, sampling=structures.spacing_mm) - structures.spacing_mm[2] / 2
    target = breast & (depth >= _SKIN_MM)
    masks = {**structures.masks, "target": target}
    result = Structures(masks, structures.affine, structures.source, structures.missing)
    check_plannable(result)
    return result


def points_of(structures: Structures, name: str) -> Float[np.ndarray, "n 3"]:
    """LPS mm (x, y, z) of the voxel centres of a structure."""
    index = np.argwhere(structures[name])[:, ::-1]
    return index * np.diag(structures.affine)[:3] + structures.affine[:3, 3]


def project(
    points: Float[np.ndarray, "n 3"], isocentre: Float[np.ndarray, "3"], gantry_deg: float
) -> Float[np.ndarray, "n 2"]:
    """Beam's-eye view: (u, v) mm in the plane of the iso-centre of LPS points, seen from the source."""
    angle = np.radians(gantry_deg)
    x, y, z = (np.asarray(points, float) - isocentre).T
    across = np.cos(angle) * x + np.sin(angle) * y
    along = -np.sin(angle) * x + np.cos(angle) * y
    scale = SAD_MM / (SAD_MM + along)
    return np.stack([across * scale, z * scale], axis=1)


def fit_aperture(
    target_uv: Float[np.ndarray, "n 2"], front: float, margin_mm: float = _MARGIN_MM
) -> tuple[Float[np.ndarray, "r 2"], Float[np.ndarray, " r"]]:
    """Leaf positions that cover the projected target with a margin, open beyond the skin towards ``front`` (±1)."""
    n = int(_REACH_MM / LEAF_MM)
    rows = LEAF_MM * np.arange(-n, n)
    leaves = np.zeros((len(rows), 2))
    u, v = target_uv[:, 0], target_uv[:, 1]
    for i, low in enumerate(rows):
        near = (v >= low - margin_mm) & (v <= low + LEAF_MM + margin_mm)
        if near.any():
            ends = [u[near].min() - margin_mm, u[near].max() + margin_mm]
            ends[1 if front > 0 else 0] += front * (_FLASH_MM - margin_mm)
            leaves[i] = np.clip(ends, -_REACH_MM, _REACH_MM)
    if not (leaves[:, 1] > leaves[:, 0]).any():
        raise NotPlannable("the target projects outside the largest field; check the contours.")
    return leaves, rows


def in_aperture(
    uv: Float[np.ndarray, "n 2"], leaves: Float[np.ndarray, "r 2"], rows: Float[np.ndarray, " r"]
) -> Bool[np.ndarray, " n"]:
    """Which projected points lie in the open field."""
    row = np.floor((uv[:, 1] - rows[0]) / LEAF_MM).astype(int)
    inside = (row >= 0) & (row < len(rows))
    row = row.clip(0, len(rows) - 1)
    return inside & (uv[:, 0] > leaves[row, 0]) & (uv[:, 0] < leaves[row, 1])


def search_tangents(structures: Structures, side: str) -> tuple[float, float]:
    """Gantry angles (medial, lateral) of the tangents that put least lung, heart and other breast into the fields.

    The medial field is searched in steps of 2° over 30° about the usual angle, the lateral one within 8° of opposite
    (a few degrees off make the edges at the chest wall parallel, in spite of the fields' divergence). Cost of a field:
    % of the lung on that side + twice the % of the heart + half the % of the other breast that lie in it.
    """
    medial = 306.0 if side == "left" else 54.0
    centre = points_of(structures, "target").mean(0)
    organs = [(points_of(structures, f"lung_{side}"), 1.0), (points_of(structures, "heart"), 2.0)]
    if (other := f"breast_{'right' if side == 'left' else 'left'}") in structures:
        organs.append((points_of(structures, other), 0.5))
    target = points_of(structures, "target")

    def cost(angle: float, sense: float) -> float:
        leaves, rows = fit_aperture(project(target, centre, angle), sense)
        return sum(
            100.0 * weight * float(in_aperture(project(points, centre, angle), leaves, rows).mean())
            for points, weight in organs
        )

    sense = _front(side)
    best = min(medial + np.arange(-16.0, 17.0, 2.0), key=lambda a: cost(a, sense))
    back = min(best + 180.0 + np.arange(-8.0, 9.0, 2.0), key=lambda a: cost(a, -sense))
    return float(best % 360.0), float(back % 360.0)


def _front(side: str) -> float:
    """Sign of u that is in front, in the medial field; in the lateral field it is the other one."""
    return 1.0 if side == "left" else -1.0


def make_plan(
    structures: Structures,
    side: str,
    prescription: Prescription,
    unit_doses: Callable[[TangentPlan], Float[np.ndarray, "k z y x"]],
) -> TangentPlan:
    """Search the fields, then weigh their subfields so that the target's dose is uniform, its mean as prescribed.

    Args:
        structures: with "target", see :func:`add_target`.
        side: of the breast.
        prescription: dose and fractions.
        unit_doses: dose per unit weight of every segment, in order: :func:`.dose.segment_doses` on the CT.

    Raises:
        NotPlannable: contours are missing or implausible, or no dose reaches the target.
    """
    check_plannable(structures)
    isocentre = points_of(structures, "target").mean(0)
    target = points_of(structures, "target")
    fields = []
    for angle, sense in zip(search_tangents(structures, side), (1, -1), strict=True):
        front = sense * _front(side)
        leaves, rows = fit_aperture(project(target, isocentre, angle), front)
        apertures = np.stack([_shield_front(leaves, share, front) for share in SEGMENTS])
        fields.append(Field(angle, apertures, rows, np.ones(len(SEGMENTS))))
    plan = TangentPlan(side, prescription, isocentre, (fields[0], fields[1]), structures.source)
    return weigh_segments(plan, unit_doses(plan)[:, structures["target"]])


def _shield_front(leaves: Float[np.ndarray, "r 2"], share: float, front: float) -> Float[np.ndarray, "r 2"]:
    out = leaves.copy()
    width = leaves[:, 1] - leaves[:, 0]
    if front > 0:
        out[:, 1] = leaves[:, 0] + share * width
    else:
        out[:, 0] = leaves[:, 1] - share * width
    return out


def weigh_segments(plan: TangentPlan, in_target: Float[np.ndarray, "k n"]) -> TangentPlan:
    """The plan with non-negative weights whose dose is closest to the prescription in the target's voxels."""
    wanted = plan.prescription.total_gy
    if not np.isfinite(in_target).all() or in_target.max() <= 0:
        raise NotPlannable(f"{plan.planned_on}: no dose reaches the target; check body contour and CT.")
    weights, _ = nnls(in_target.T.astype(float), np.full(in_target.shape[1], wanted))
    weights *= wanted / float((weights @ in_target).mean())
    n = len(plan.fields[0].weights)
    fields = tuple(
        Field(f.gantry_deg, f.apertures, f.rows_mm, weights[i * n : (i + 1) * n]) for i, f in enumerate(plan.fields)
    )
    return TangentPlan(plan.side, plan.prescription, plan.isocentre_mm, fields, plan.planned_on)
