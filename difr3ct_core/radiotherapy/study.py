"""The radiotherapy study (§V-D, §V-G): can a plan be made on a reconstruction, and is it the right one?

Two protocols answer it. **Own** is the paper's: each CT is contoured, planned and scored by itself, and the scores are
compared. **True** is the honest one: the plan made on the reconstruction is delivered to the true patient: its dose is
computed on the true CT and scored with the true contours. A reconstruction that is shifted as a whole passes the first.

What only a posterior gives: a plan is scored on every sample, so its DVH comes with a band and every clinical goal with
the share of samples that meet it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ..ct_io import CTVolume
from ..files import InputError
from .contours import contour_ct
from .dose import calculate_dose, plan_on
from .dvh import DoseGrid, Goal, dvh_band, dvh_curve, finite_samples, goals_met, score
from .plan import Prescription, TangentPlan, add_target
from .structures import NotPlannable, Structures

#: Goals of the kind that breast trials set (the numbers are our choice).
GOALS = (
    Goal("v90", ">=", 90.0), Goal("v95", ">=", 85.0), Goal("v20_lung", "<=", 20.0), Goal("mean_heart", "<=", 4.0),
)  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A CT with contours (and "target"), plan, dose and scores."""

    ct: CTVolume
    structures: Structures
    plan: TangentPlan
    dose: DoseGrid
    metrics: dict[str, float]


@dataclass(frozen=True)
class Case:
    """One patient of the study.

    Attributes:
        name: of the patient.
        truth: planned on the true CT with the true contours; None if not plannable.
        reconstruction: planned on the reconstruction with contours drawn on it; None if not plannable.
        delivered: scores of the reconstruction's plan on the true CT with the true contours.
        delivered_dose: its dose there.
        reason: why the case is not plannable, else "".
    """

    name: str
    truth: Planned | None
    reconstruction: Planned | None
    delivered: dict[str, float] | None = None
    delivered_dose: DoseGrid | None = None
    reason: str = ""

    def errors(self, metric: str) -> dict[str, float] | None:
        """{"own", "true"}: score by either protocol minus that of the plan made on the truth."""
        if self.truth is None or self.reconstruction is None or self.delivered is None:
            return None
        wanted = self.truth.metrics[metric]
        return {"own": self.reconstruction.metrics[metric] - wanted, "true": self.delivered[metric] - wanted}


def plan_ct(ct: CTVolume, side: str, prescription: Prescription, structures: Structures | None = None) -> Planned:
    """Contour (unless ``structures`` are given), plan and score one CT.

    Raises:
        NotPlannable: with the reason.
    """
    structures = structures or contour_ct(ct)
    plan, dose = plan_on(ct, structures, side, prescription)
    structures = add_target(structures, side)
    return Planned(ct, structures, plan, dose, score(dose, structures, side, prescription.total_gy))


def study_case(
    name: str,
    truth: CTVolume,
    contours: Structures | None,
    reconstruction: CTVolume,
    side: str,
    prescription: Prescription,
) -> Case:
    """Both protocols for one patient. A case that cannot be planned is returned with its reason, not raised.

    Args:
        name: of the patient.
        truth: the true CT on the planning grid.
        contours: the true contours, or None: drawn on the true CT by the rules.
        reconstruction: on the same grid.
        side, prescription: what to plan.

    Raises:
        InputError: grids differ, or values are not finite.
    """
    if truth.hu.shape != reconstruction.hu.shape or not np.allclose(truth.affine, reconstruction.affine, atol=1e-3):
        raise InputError(
            f"reconstruction: its grid {tuple(reconstruction.hu.shape)} is not that of the true CT, "
            f"{tuple(truth.hu.shape)}; resample it."
        )
    try:
        planned = plan_ct(truth, side, prescription, contours)
    except NotPlannable as error:
        return Case(name, None, None, reason=f"true CT: {error}")
    try:
        own = plan_ct(reconstruction, side, prescription)
    except NotPlannable as error:
        return Case(name, planned, None, reason=f"reconstruction: {error}")
    dose = calculate_dose(own.plan, truth, planned.structures)
    return Case(name, planned, own, score(dose, planned.structures, side, prescription.total_gy), dose)


def median_errors(cases: Sequence[Case], metric: str) -> dict[str, float]:
    """{"own", "true"}: median over plannable cases of the absolute error of a score. Empty if there is none."""
    errors = [e for case in cases if (e := case.errors(metric)) is not None]
    return {key: float(np.median([abs(e[key]) for e in errors])) for key in ("own", "true")} if errors else {}


@dataclass(frozen=True)
class PosteriorDose:
    """A plan on every posterior sample.

    Attributes:
        gy: doses of the DVH curves.
        curves: structure → (sample, k), % of volume; samples that could not be contoured are left out.
        metrics: of each sample that could be contoured.
        skipped: sample number → why it could not be.
    """

    gy: Float[np.ndarray, " k"]
    curves: dict[str, Float[np.ndarray, "n k"]]
    metrics: list[dict[str, float]]
    skipped: dict[int, str]

    def band(self, name: str, coverage: float = 0.9) -> Float[np.ndarray, "3 k"]:
        """Lower end, median and upper end of a structure's DVH over the samples."""
        return dvh_band(self.curves[name], coverage)

    def goals(self, goals: Sequence[Goal] = GOALS) -> dict[str, float]:
        """Share of the scored samples that meet each goal."""
        return goals_met(self.metrics, goals)


def score_posterior(plan: TangentPlan, samples: Sequence[CTVolume], bins: int = 101) -> PosteriorDose:
    """Deliver one plan to every posterior sample, with the contours drawn on that sample.

    Args:
        plan: what is delivered, usually made on the posterior mean.
        samples: at least 2, on the planning grid.
        bins: points of the DVH curves, from 0 to 115 % of the prescription.

    Raises:
        InputError: fewer than 2 samples, NaN in one, or fewer than 2 could be contoured.
    """
    finite_samples(np.stack([s.hu.numpy() for s in samples]) if samples else np.zeros((0, 1)))
    total = plan.prescription.total_gy
    gy = np.linspace(0.0, 1.15 * total, bins)
    names = ("target", f"lung_{plan.side}", "heart")
    curves: dict[str, list[np.ndarray]] = {name: [] for name in names}
    metrics, skipped = [], {}
    for number, sample in enumerate(samples):
        try:
            structures = add_target(contour_ct(sample), plan.side)
        except NotPlannable as error:
            skipped[number] = str(error)
            continue
        dose = calculate_dose(plan, sample, structures)
        for name in names:
            curves[name].append(dvh_curve(dose.inside(structures, name), gy))
        metrics.append(score(dose, structures, plan.side, total))
    if len(metrics) < 2:
        raise InputError(
            f"samples: {len(metrics)} of {len(samples)} could be contoured, expected at least 2: {skipped}."
        )
    return PosteriorDose(gy, {name: np.stack(values) for name, values in curves.items()}, metrics, skipped)
