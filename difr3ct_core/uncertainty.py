"""What the spread of posterior samples says (§IV-C, §V-F)."""

from __future__ import annotations

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


def rank_correlation(uncertainty: Tensor, error: Tensor) -> float:
    """Spearman's rank correlation of two equally shaped maps: does the spread find the error?"""
    from scipy.stats import spearmanr

    return float(spearmanr(uncertainty.flatten().numpy(), error.flatten().numpy()).statistic)
