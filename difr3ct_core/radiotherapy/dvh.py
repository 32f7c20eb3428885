"""Dose-volume histograms on dose grids: the numbers by which plans are judged.

A structure and a dose share one grid; each voxel has one dose and counts with its whole volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..files import InputError
from .structures import Structures


@dataclass(frozen=True)
class DoseGrid:
    """A dose distribution.

    Attributes:
        gy: total dose of all fractions in Gy, (z, y, x).
        affine: 4x4, voxel index (x, y, z, 1) → LPS mm, diagonal and positive.
    """

    gy: Float[np.ndarray, "z y x"]
    affine: Float[np.ndarray, "4 4"]

    def __post_init__(self) -> None:
        if np.ndim(self.gy) != 3:
            raise InputError(f"dose: found shape {np.shape(self.gy)}, expected (z, y, x).")
        if not np.isfinite(self.gy).all():
            raise InputError(
                f"dose: {int((~np.isfinite(self.gy)).sum())} voxels are NaN or infinite; compute it again."
            )
        if self.gy.min() < 0:
            raise InputError(
                f"dose: the lowest value is {self.gy.min():g} Gy, expected none below 0; compute it again."
            )

    def inside(self, structures: Structures, name: str) -> Float[np.ndarray, " n"]:
        """Doses in Gy of the voxels of a structure.

        Raises:
            InputError: the grids differ.
            NotPlannable: the structure is missing or empty.
        """
        mask = structures[name]
        if mask.shape != self.gy.shape or not np.allclose(structures.affine, self.affine, atol=1e-3):
            raise InputError(
                f"dose: its grid has shape {self.gy.shape} and origin {self.affine[:3, 3].round(2).tolist()} mm, "
                f"that of {structures.source} has {mask.shape} and {structures.affine[:3, 3].round(2).tolist()} mm; "
                "expected one grid, resample one onto the other."
            )
        return self.gy[mask].astype(np.float64)


def volume_at_dose(doses: Float[np.ndarray, " n"], gy: float) -> float:
    """V_D: the share in % of a structure that receives at least ``gy``."""
    return 100.0 * float(np.mean(doses >= gy))


def dose_at_volume(doses: Float[np.ndarray, " n"], percent: float) -> float:
    """D_V: the dose in Gy that the hottest ``percent`` % of a structure receive at least."""
    if not 0 <= percent <= 100:
        raise InputError(f"percent: found {percent!r}, expected 0 to 100.")
    return float(np.quantile(doses, 1 - percent / 100.0))


def dvh_curve(doses: Float[np.ndarray, " n"], gy: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Cumulative DVH: % of the structure's volume with at least each dose of ``gy``."""
    return 100.0 * (1.0 - np.searchsorted(np.sort(doses), gy, side="left") / len(doses))


@dataclass(frozen=True)
class Goal:
    """A clinical goal: ``metric`` must be at least (``sense`` ">=") or at most ("<=") ``limit``."""

    metric: str
    sense: str
    limit: float

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether metrics from :func:`score` meet the goal."""
        value = metrics[self.metric]
        return value >= self.limit if self.sense == ">=" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.metric} {self.sense} {self.limit:g}"


def score(dose: DoseGrid, structures: Structures, side: str, prescription_gy: float) -> dict[str, float]:
    """The paper's and the usual numbers of a breast plan.

    Args:
        dose, structures: on one grid; the structures hold "target".
        side: "left" or "right": which lung is the ipsilateral one.
        prescription_gy: what V90% and V95% are relative to.

    Returns:
        ``v90``, ``v95``, ``v107`` of the target, ``v20_lung`` (ipsilateral), ``v20_lungs`` (both), ``v20_heart`` in %;
        ``mean_target``, ``mean_lung``, ``mean_heart``, ``d2_target`` in Gy; ``target_cm3``.
    """
    target, heart = dose.inside(structures, "target"), dose.inside(structures, "heart")
    lung = dose.inside(structures, f"lung_{side}")
    other = dose.inside(structures, f"lung_{'right' if side == 'left' else 'left'}")
    return {
        "v90": volume_at_dose(target, 0.90 * prescription_gy),
        "v95": volume_at_dose(target, 0.95 * prescription_gy),
        "v107": volume_at_dose(target, 1.07 * prescription_gy),
        "v20_lung": volume_at_dose(lung, 20.0),
        "v20_lungs": volume_at_dose(np.concatenate([lung, other]), 20.0),
        "v20_heart": volume_at_dose(heart, 20.0),
        "mean_target": float(target.mean()),
        "mean_lung": float(lung.mean()),
        "mean_heart": float(heart.mean()),
        "d2_target": dose_at_volume(target, 2.0),
        "target_cm3": structures.volume_cm3("target"),
    }


def dvh_band(curves: Float[np.ndarray, "n k"], coverage: float = 0.9) -> Float[np.ndarray, "3 k"]:
    """Lower end, median and upper end of DVHs over samples.

    Raises:
        InputError: fewer than 2 samples, or NaN in one (its number is named).
    """
    curves = finite_samples(curves, "curves")
    tail = (1.0 - coverage) / 2.0
    return np.quantile(curves, [tail, 0.5, 1.0 - tail], axis=0)


def goals_met(metrics: Sequence[Mapping[str, float]], goals: Sequence[Goal]) -> dict[str, float]:
    """Share of samples in which each clinical goal is met.

    Args:
        metrics: of each sample, from :func:`score`.
        goals: what to ask.

    Raises:
        InputError: fewer than 2 samples, or NaN in one.
    """
    shares = {}
    for goal in goals:
        finite_samples(np.array([[m[goal.metric]] for m in metrics]).reshape(-1, 1), f"metrics, {goal.metric}")
        shares[str(goal)] = float(np.mean([goal.met(m) for m in metrics]))
    return shares


def finite_samples(values: Float[np.ndarray, "n *v"], name: str = "samples") -> Float[np.ndarray, "n *v"]:
    """``values`` if there are at least two samples and all are finite, else an :class:`InputError`."""
    values = np.asarray(values)
    if values.ndim < 1 or len(values) < 2:
        raise InputError(f"{name}: found {len(values)}, expected at least 2; a spread needs more than one sample.")
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1)).tolist()
    if bad:
        raise InputError(
            f"{name}: numbers {bad} of {len(values)} hold NaN or infinity; draw them again or leave them out."
        )
    return values
