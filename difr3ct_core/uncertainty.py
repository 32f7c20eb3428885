"""What the spread of posterior samples says (§IV-C, §V-F)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
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
    """

    level: float
    edges: Float[Tensor, " g"]
    spread_edges: Float[Tensor, "g1 b"]
    below: Float[Tensor, "g1 b1"]
    above: Float[Tensor, "g1 b1"]
    floor_hu: float

    def bounds(
        self, mean: Float[Tensor, "*v"], std: Float[Tensor, "*v"]
    ) -> tuple[Float[Tensor, "*v"], Float[Tensor, "*v"]]:
        """Lower and upper end of every voxel's interval in HU."""
        tissue = torch.bucketize(mean, self.edges)
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
) -> ConformalIntervals:
    """Split-conformal calibration of the spread (Papadopoulos et al. 2002), by groups (Vovk 2012) and each side apart.

    Voxels are grouped by tissue and, within it, by spread. In each group the scores (mean - truth) / (std + floor) and
    (truth - mean) / (std + floor) of the calibration patients are sorted; the ⌈(1 - α/2)(n + 1)⌉-th smallest, with
    α = 1 - level, is the factor of its side (Romano et al. 2019, theorem 2). Errors are skewed: where bone may be, the
    truth lies far above the mean or a little below it, and one factor for both would be wide on both.

    A voxel of a new patient of the same kind then lies inside with probability ``level``, on the average over patients,
    whatever the distributions are. The voxels of one patient err together, so that one patient's share can be several
    points lower or higher; take many patients. Of another kind (a real scan) nothing is promised.

    Args:
        mean, std, truth: of voxels of calibration patients, in HU; patients that trained nothing.
        level: 0 to 1.
        edges_hu: of the tissues, by the mean; one without voxels takes the factors of all voxels together.
        floor_hu: see :class:`ConformalIntervals`.
        spread_bins: equally large groups by spread in each tissue; fewer where they would hold too few voxels for the
            rank above to be one of theirs.

    Raises:
        InputError: shapes differ, values are not finite, the level is no share, or there are no bins.
    """
    if mean.shape != truth.shape or std.shape != truth.shape:
        raise InputError(
            f"truth: found shape {tuple(truth.shape)}, expected that of mean {tuple(mean.shape)} and std "
            f"{tuple(std.shape)}."
        )
    if not 0 < level < 1:
        raise InputError(f"level: found {level:g}, expected a share between 0 and 1.")
    if spread_bins < 1:
        raise InputError(f"spread_bins: found {spread_bins}, expected at least 1.")
    if not mean.numel():
        raise InputError("mean: holds no voxel, expected those of calibration patients.")
    if not all(torch.isfinite(part).all() for part in (mean, std, truth)):
        raise InputError("mean, std or truth: hold NaN or infinity, expected finite HU.")
    edges = torch.tensor(edges_hu, dtype=torch.float32)
    flat, spread = mean.flatten().float(), std.flatten().float()
    score = (truth.flatten().float() - flat) / (spread + floor_hu)
    tail = (1 - level) / 2
    enough = math.ceil(1 / tail) - 1  # the fewest scores of which the rank is not beyond the largest

    def both_sides(some: Tensor) -> Tensor:
        rank = min(math.ceil((1 - tail) * (len(some) + 1)), len(some))
        return torch.stack([side.kthvalue(rank).values for side in (-some, some)])

    factors = both_sides(score)[:, None, None].repeat(1, len(edges) + 1, spread_bins)
    spread_edges = torch.full((len(edges) + 1, spread_bins - 1), math.inf)
    tissue = torch.bucketize(flat, edges)
    for g in range(len(edges) + 1):
        own, of_own = score[tissue == g], spread[tissue == g]
        if not len(own):
            continue
        ordered, bins = of_own.sort().values, max(1, min(spread_bins, len(own) // enough))
        spread_edges[g, : bins - 1] = ordered[[len(own) * k // bins - 1 for k in range(1, bins)]]
        group = _spread_bin(of_own, torch.zeros_like(of_own, dtype=torch.long), spread_edges[g : g + 1])
        for k in group.unique().tolist():  # where spreads are equal, fewer than there are bins
            factors[:, g, k] = both_sides(own[group == k])
    return ConformalIntervals(level, edges, spread_edges, *factors, floor_hu)


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
