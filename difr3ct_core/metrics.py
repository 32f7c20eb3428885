"""Image quality, with every convention spelled out.

A PSNR is meaningless without its peak, an SSIM without its data range and window: none has a default here that
depends on the data. The two peaks in use are the width of the HU window (2500) and 4095, the "12-bit" peak of
X2CT-GAN which the paper most likely follows; against a window of 2500 HU the second adds 20·log10(4095/2500) =
4.29 dB. All functions are means over the whole volume, not over slices.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .files import InputError

#: Peak of "12-bit" PSNR in HU, as in X2CT-GAN.
PEAK_12_BIT = 4095.0


def _check_shapes(estimate: Tensor, truth: Tensor) -> None:
    """As many axes, the same volume, and batch axes equal or 1.

    Plain broadcasting of (b, 1, z, y, x) against (b, z, y, x) would silently compare every patient with every other.
    """
    fits = estimate.ndim == truth.ndim and estimate.shape[-3:] == truth.shape[-3:]
    if not fits or any(a != b and 1 not in (a, b) for a, b in zip(estimate.shape, truth.shape, strict=True)):
        raise InputError(f"truth: found shape {tuple(truth.shape)}, expected {tuple(estimate.shape)}, as the estimate.")


def mse(estimate: Float[Tensor, "*b c z y x"], truth: Float[Tensor, "*b c z y x"]) -> Float[Tensor, " *b"]:
    """Mean squared error per volume, in the square of the input's unit."""
    _check_shapes(estimate, truth)
    return (estimate.double() - truth.double()).square().flatten(-4).mean(-1)


def psnr(
    estimate: Float[Tensor, "*b c z y x"], truth: Float[Tensor, "*b c z y x"], data_range: float
) -> Float[Tensor, " *b"]:
    """Peak signal-to-noise ratio in dB, 10·log10(data_range² / mse), per volume.

    Args:
        estimate, truth: in the same unit.
        data_range: the peak in that unit: 2 for volumes in [-1, 1], 2500 for HU in the window, or 4095.
    """
    return 10 * torch.log10(data_range**2 / mse(estimate, truth))


def to_12_bit(psnr_window: float, window_hu: float) -> float:
    """The same error as PSNR with peak 4095 HU: adds 20·log10(4095 / window)."""
    return psnr_window + 20 * float(np.log10(PEAK_12_BIT / window_hu))


def ssim(
    estimate: Float[Tensor, "b 1 z y x"],
    truth: Float[Tensor, "b 1 z y x"],
    data_range: float,
    window: int = 11,
    sigma: float = 1.5,
) -> Float[Tensor, " b"]:
    """3D structural similarity with a Gaussian window (Wang et al. 2004: K1 0.01, K2 0.03), per volume.

    Population covariances, and the mean over windows that lie wholly inside, which is what scikit-image computes
    with ``gaussian_weights=True, use_sample_covariance=False``.

    Args:
        estimate, truth: in the same unit.
        data_range: see :func:`psnr`.
        window: edge of the Gaussian window in voxels (odd).
        sigma: its standard deviation in voxels.
    """
    _check_shapes(estimate, truth)
    if min(truth.shape[-3:]) < window:
        raise InputError(
            f"truth: found {tuple(truth.shape[-3:])} voxels, expected at least {window}, the window, on each axis."
        )
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(estimate.device)

    def smooth(x: Tensor) -> Tensor:
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = window
            x = F.conv3d(x, kernel.view(shape))
        return x

    x, y = estimate.double(), truth.double()
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = smooth(x * x) - mean_x**2
    var_y = smooth(y * y) - mean_y**2
    cov = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1)


def mae(estimate: Float[Tensor, "*b c z y x"], truth: Float[Tensor, "*b c z y x"]) -> Float[Tensor, " *b"]:
    """Mean absolute error per volume, in the input's unit (HU when both are in HU)."""
    _check_shapes(estimate, truth)
    return (estimate.double() - truth.double()).abs().flatten(-4).mean(-1)


def dice(a: Bool[Tensor, "*b z y x"], b: Bool[Tensor, "*b z y x"]) -> Float[Tensor, " *b"]:
    """Dice overlap 2|A ∩ B| / (|A| + |B|) per volume; 1 where both are empty."""
    intersection = (a & b).flatten(-3).sum(-1).double()
    size = a.flatten(-3).sum(-1).double() + b.flatten(-3).sum(-1).double()
    return torch.where(size > 0, 2 * intersection / size.clamp_min(1), torch.ones_like(size))
