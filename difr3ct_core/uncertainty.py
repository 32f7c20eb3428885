"""What the spread of posterior samples says (§IV-C, §V-F)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from .files import InputError


@dataclass(frozen=True)
class Decomposition:
    """Error of N posterior samples against the truth, split per voxel.

    ``mean_squared_error == squared_bias + variance`` holds to rounding, because the variance is the population
    variance (divided by N, not N - 1).
    """

    mean: Float[Tensor, "*v"]
    variance: Float[Tensor, "*v"]
    squared_bias: Float[Tensor, "*v"]
    mean_squared_error: Float[Tensor, "*v"]


def moments(samples: Float[Tensor, "n *v"]) -> tuple[Float[Tensor, "*v"], Float[Tensor, "*v"]]:
    """Mean and population variance over N >= 2 samples, in double precision.

    Raises:
        InputError: fewer than two samples, or a sample that is not finite.
    """
    if len(samples) < 2:
        raise InputError(f"samples: found {len(samples)}, expected at least 2; a spread needs more than one sample.")
    finite = torch.isfinite(samples).flatten(1).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise InputError(
            f"samples: numbers {bad} of {len(samples)} hold NaN or infinity; draw them again or leave them out."
        )
    values = samples.double()
    return values.mean(0), values.var(0, unbiased=False)


def decompose(samples: Float[Tensor, "n *v"], truth: Float[Tensor, "*v"]) -> Decomposition:
    """Bias-variance decomposition per voxel (§V-F, Fig. 8): mean error² = bias² + variance.

    Args:
        samples: N posterior samples, N >= 2.
        truth: the true volume, in the same unit.

    Raises:
        InputError: see :func:`moments`; or the shapes differ, or the truth is not finite.
    """
    if samples.shape[1:] != truth.shape:
        raise InputError(
            f"truth: found shape {tuple(truth.shape)}, expected {tuple(samples.shape[1:])}, that of a sample."
        )
    if not torch.isfinite(truth).all():
        raise InputError("truth: holds NaN or infinity, expected finite values; check the CT.")
    mean, variance = moments(samples)
    error = samples.double() - truth.double()
    return Decomposition(mean, variance, (mean - truth.double()) ** 2, error.square().mean(0))


@dataclass(frozen=True)
class ConformalIntervals:
    """Error bars in HU whose coverage was measured on patients that trained nothing; made by :func:`fit_conformal`.

    Attributes:
        level: share of voxels that the interval is to hold.
        edges: HU of the posterior mean that divide tissues into groups.
        spread_edges: HU of the standard deviation that divide each tissue further.
        below, above: of each group, by which the spread is multiplied for the way from the mean down and up. Either can
            be negative, where nearly all calibration voxels lay on one side of the mean.
        floor_hu: added to the spread, so that samples which agree exactly still have an error bar.
        asked: share asked of the calibration patients for patients left out to be covered at ``level``.
    """

    level: float
    edges: Float[Tensor, " g"]
    spread_edges: Float[Tensor, "g1 b"]
    below: Float[Tensor, "g1 b1"]
    above: Float[Tensor, "g1 b1"]
    floor_hu: float
    asked: float

    def bounds(
        self, mean: Float[Tensor, "*v"], std: Float[Tensor, "*v"]
    ) -> tuple[Float[Tensor, "*v"], Float[Tensor, "*v"]]:
        """Lower and upper end of every voxel's interval in HU."""
        tissue = torch.bucketize(mean.contiguous(), self.edges)
        group = (tissue, _spread_bin(std, tissue, self.spread_edges))
        scale = std + self.floor_hu
        return mean - self.below[group] * scale, mean + self.above[group] * scale

    def half_width(self, mean: Float[Tensor, "*v"], std: Float[Tensor, "*v"]) -> Float[Tensor, "*v"]:
        """Half the width of every voxel's interval in HU."""
        low, high = self.bounds(mean, std)
        return (high - low) / 2

    def coverage(
        self, mean: Float[Tensor, "*v"], std: Float[Tensor, "*v"], truth: Float[Tensor, "*v"]
    ) -> Float[Tensor, "*v"]:
        """True where the interval holds the truth."""
        low, high = self.bounds(mean, std)
        return (low <= truth) & (truth <= high)


def _spread_bin(std: Float[Tensor, "*v"], tissue: Tensor, edges: Float[Tensor, "g1 b"]) -> Tensor:
    """Number of the group by spread within each voxel's tissue."""
    group = torch.zeros_like(tissue)
    for column in edges.T:
        group += std > column[tissue]
    return group


#: Lung, fat, soft tissue, and bone, by the HU of the posterior mean: what is known where the truth is not.
TISSUE_EDGES_HU = (-500.0, -150.0, -20.0, 150.0)


def fit_conformal(
    mean: Float[Tensor, "*v"],
    std: Float[Tensor, "*v"],
    truth: Float[Tensor, "*v"],
    level: float = 0.9,
    edges_hu: tuple[float, ...] = TISSUE_EDGES_HU,
    floor_hu: float = 5.0,
    spread_bins: int = 6,
    patient: Int[Tensor, "*v"] | None = None,
    weight: Float[Tensor, "*v"] | None = None,
) -> ConformalIntervals:
    """Split-conformal calibration of the spread (Papadopoulos et al. 2002), by groups (Vovk 2012) and each side apart.

    Voxels are grouped by tissue and, within it, by spread. In each group the scores (mean - truth) / (std + floor) and
    (truth - mean) / (std + floor) of the calibration patients are sorted; the ⌈(1 - α/2)(n + 1)⌉-th smallest, with
    α = 1 - level, is the factor of its side (Romano et al. 2019, theorem 2). Errors are skewed: where bone may be, the
    truth lies far above the mean or a little below it, and one factor for both would be wide on both.

    The voxels of one patient err together, so few patients are fewer than their voxels seem, and intervals fitted to
    them hold too little in others. With ``patient`` the share 1 - α asked of the calibration is therefore the one with
    which patients left out in turn (one by one, or in eight parts) are covered at ``level``.

    A voxel of a new patient of the same kind then lies inside with probability ``level``, on the average over patients;
    one patient's share can be several points lower or higher. Of another kind (a real scan) nothing is promised.

    Args:
        mean, std, truth: of voxels of calibration patients, in HU; patients that trained nothing.
        level: 0 to 1.
        edges_hu: of the tissues, by the mean; one without voxels takes the factors of all voxels together.
        floor_hu: see :class:`ConformalIntervals`.
        spread_bins: equally large groups by spread in each tissue; fewer where they would hold too few voxels for the
            rank above to be one of theirs.
        patient: number of the patient of each voxel, of at least 2.
        weight: how much each voxel counts within its group, for structures that are rare there to be held more often;
            needs ``patient``, which keeps the share of all voxels together at ``level``. See :func:`organ_weight`.

    Raises:
        InputError: shapes differ, values are not finite, the level is no share, there are no bins or voxels, only one
            patient, or weights without patients or not positive.
    """
    for name, part in (("truth", truth), ("std", std), ("patient", patient), ("weight", weight)):
        if part is not None and part.shape != mean.shape:
            raise InputError(f"{name}: found shape {tuple(part.shape)}, expected that of mean {tuple(mean.shape)}.")
    if not 0 < level < 1:
        raise InputError(f"level: found {level:g}, expected a share between 0 and 1.")
    if spread_bins < 1:
        raise InputError(f"spread_bins: found {spread_bins}, expected at least 1.")
    if not mean.numel():
        raise InputError("mean: holds no voxel, expected those of calibration patients.")
    if not all(torch.isfinite(part).all() for part in (mean, std, truth)):
        raise InputError("mean, std or truth: hold NaN or infinity, expected finite HU.")
    if weight is not None and (patient is None or not bool(((weight > 0) & torch.isfinite(weight)).all())):
        raise InputError(
            "weight: found one without patient or one not above 0, expected positive ones and the patients."
        )
    edges = torch.tensor(edges_hu, dtype=torch.float32)
    flat, spread = mean.flatten().float(), std.flatten().float()
    score = (truth.flatten().float() - flat) / (spread + floor_hu)
    counts = torch.ones_like(score) if weight is None else weight.flatten().float()
    tissue = torch.bucketize(flat, edges)
    enough = math.ceil(2 / (1 - level)) - 1  # the fewest scores of which the rank is not beyond the largest
    spread_edges = torch.full((len(edges) + 1, spread_bins - 1), math.inf)
    for g in range(len(edges) + 1):
        ordered = spread[tissue == g].sort().values
        bins = max(1, min(spread_bins, len(ordered) // enough))
        spread_edges[g, : bins - 1] = ordered[[len(ordered) * k // bins - 1 for k in range(1, bins)]]
    group = tissue * spread_bins + _spread_bin(spread, tissue, spread_edges)
    shape = (len(edges) + 1, spread_bins)

    tail = (1 - level) / 2
    if patient is not None:
        tail = _tail_for_others(score, group, counts, patient.flatten(), math.prod(shape), level)
    below, above = _Scores(score, group, counts, math.prod(shape)).factors(tail)
    return ConformalIntervals(level, edges, spread_edges, below.view(shape), above.view(shape), floor_hu, 1 - 2 * tail)


class _Scores:
    """Scores sorted within each group, of which weighted quantiles are then cheap."""

    def __init__(self, score: Tensor, group: Tensor, weight: Tensor, n_groups: int) -> None:
        order = score.argsort()
        by_group = order[group[order].argsort(stable=True)]
        sizes = group.bincount(minlength=n_groups).tolist()
        own = zip(score[by_group].split(sizes), weight[by_group].split(sizes), strict=True)
        # The last one is of all voxels together, for groups that have none.
        parts = [*own, (score[order], weight[order])]
        self.parts = [(values, w.double().cumsum(0), w.double().flip(0).cumsum(0)) for values, w in parts]

    def factors(self, tail: float) -> tuple[Tensor, Tensor]:
        """Of each group, the way down and up beyond which a share ``tail`` of one more voxel is expected."""

        def rank(total: Tensor) -> int:
            # The new voxel weighs what the others do on the average; with equal weights this is ⌈(1 - tail)(n + 1)⌉.
            share = (1 - tail) * float(total[-1]) * (1 + 1 / len(total)) * (1 - 1e-12)
            return min(int(torch.searchsorted(total, share)), len(total) - 1)

        used = [part if len(part[0]) else self.parts[-1] for part in self.parts[:-1]]
        down = [-values[len(values) - 1 - rank(fall)] for values, _, fall in used]
        return torch.stack(down), torch.stack([values[rank(rise)] for values, rise, _ in used])


def _tail_for_others(
    score: Tensor, group: Tensor, weight: Tensor, patient: Tensor, n_groups: int, level: float, most: int = 600_000
) -> float:
    """The largest tail with which patients left out are covered at ``level``, each patient counting the same."""
    step = -(-len(score) // most)  # a regular part of very many voxels tells as much
    score, group, weight, patient = (part[::step] for part in (score, group, weight, patient))
    names, patient = patient.unique(return_inverse=True)
    if len(names) < 2:
        raise InputError(f"patient: found {len(names)}, expected voxels of at least 2 patients.")
    fold = patient % min(len(names), 8)
    sets = []
    for k in range(int(fold.max()) + 1):
        out = fold == k
        fitted = _Scores(score[~out], group[~out], weight[~out], n_groups)
        sets.append((fitted, score[out], group[out], patient[out]))

    def covered(tail: float) -> float:
        shares = []
        for fitted, left, of_group, who in sets:
            below, above = fitted.factors(tail)
            inside = ((left >= -below[of_group]) & (left <= above[of_group])).double()
            sums, n = who.bincount(inside, minlength=len(names)), who.bincount(minlength=len(names))
            shares.append(sums[n > 0] / n[n > 0])
        return float(torch.cat(shares).mean())

    low, high = 0.0, 0.5
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if covered(middle) >= level else (low, middle)
    return low


def fit_by_organ(
    mean: Float[Tensor, "*v"],
    std: Float[Tensor, "*v"],
    truth: Float[Tensor, "*v"],
    labels: UInt8[Tensor, "*v"],
    patient: Int[Tensor, "*v"],
    level: float = 0.9,
    spread_bins: int = 6,
) -> dict[int, ConformalIntervals]:
    """:func:`fit_conformal` for each organ by itself (Mondrian groups; Vovk 2012), for voxels whose organ is known.

    Intervals that do not know the organ hold 90 % of the voxels that *look* alike. The few of those that are a clavicle
    are the ones that differ from the rest, and can nearly all lie outside. No interval for all voxels can hold 90 % of
    every organ without being far too wide for the others; one that is told the true organ can.

    Args:
        mean, std, truth, patient, level, spread_bins: as in :func:`fit_conformal`.
        labels: the organ of each voxel.

    Returns:
        label -> intervals, of every organ with voxels of at least 2 patients.
    """
    found = {}
    for label in labels.unique().tolist():
        own = labels == label
        if len(patient[own].unique()) >= 2:
            parts = (part[own] for part in (mean, std, truth))
            found[label] = fit_conformal(*parts, level, spread_bins=spread_bins, patient=patient[own])
    return found


def organ_weight(labels: UInt8[Tensor, "*v"], power: float = 0.5) -> Float[Tensor, "*v"]:
    """Weight of each voxel for :func:`fit_conformal`: (voxels of its organ) ** -power, 1 on the average.

    With 0 every voxel counts the same, with 1 every organ; in between thin bones, which make a small part of the voxels
    that look like theirs, are held more often at little cost in width.
    """
    weight = labels.flatten().long().bincount().double().clamp_min(1)[labels.long()] ** -power
    return (weight / weight.mean()).float()


def rank_correlation(uncertainty: Tensor, error: Tensor) -> float:
    """Spearman's rank correlation of two equally shaped maps: does the spread find the error?"""
    from scipy.stats import spearmanr

    return float(spearmanr(uncertainty.flatten().numpy(), error.flatten().numpy()).statistic)


def roc_curve(normal: Float[Tensor, " n"], altered: Float[Tensor, " m"]) -> tuple[Tensor, Tensor]:
    """Shares of normal and of altered cases at or above every threshold, from (0, 0) to (1, 1).

    Args:
        normal, altered: a score of each case, larger where a case is held to be altered.

    Raises:
        InputError: no cases of a kind, or a score that is not finite.
    """
    for name, scores in (("normal", normal), ("altered", altered)):
        if scores.ndim != 1 or not len(scores) or not torch.isfinite(scores).all():
            raise InputError(f"{name}: found scores of shape {tuple(scores.shape)}, expected one finite number a case.")
    at = torch.cat([normal, altered]).unique().flip(0)[:, None]
    shares = [(scores >= at).double().mean(1) for scores in (normal, altered)]
    false, true = (torch.cat([torch.zeros(1, dtype=torch.float64), share]) for share in shares)
    return false, true


def auroc(normal: Float[Tensor, " n"], altered: Float[Tensor, " m"]) -> float:
    """Area under :func:`roc_curve`: how often an altered case scores above a normal one, ties by half (Mann-Whitney).

    0.5 is a detector that knows nothing. Arguments and errors as there.
    """
    false, true = roc_curve(normal, altered)
    return float(torch.trapezoid(true, false))
