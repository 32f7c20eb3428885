"""Image quality, with every convention spelled out.

A PSNR is meaningless without its peak, an SSIM without its data range and window: none has a default here that
depends on the data. The two peaks in use are the width of the HU window (2500) and 4095, the "12-bit" peak of
X2CT-GAN which the paper most likely follows; against a window of 2500 HU the second adds 20·log10(4095/2500) =
4.29 dB. All functions are means over the whole volume, not over slices.

:func:`score` is the row of a table, all of them for each patient; :func:`paired_test` compares two methods on the same
patients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy import ndimage
from scipy.stats import wilcoxon
from torch import Tensor

from .files import InputError
from .presets import VolumePreset
from .vqgan_losses import Perceptual, sharpness

#: Peak of "12-bit" PSNR in HU, as in X2CT-GAN.
PEAK_12_BIT = 4095.0
#: Below this is gas or lung, in HU: half way between lung (-850) and soft tissue (40), rounded.
LUNG_BELOW_HU = -400.0
#: Above this is bone, in HU: over any soft tissue without contrast agent, below trabecular bone.
BONE_ABOVE_HU = 200.0
#: Name -> unit of what :func:`score` measures.
SCORES = {
    "psnr": "dB",
    "psnr_4095": "dB",
    "ssim": "of 1",
    "mae_hu": "HU",
    "dice_lungs": "of 1",
    "dice_bone": "of 1",
    "sharpness": "of the truth's",
    "perceptual": "LPIPS",
}


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

    The luminance term compares means with zero, so where zero lies is part of the convention: the same pair of volumes
    scored 0.79 in [-1, 1] and 0.72 in HU. The project's numbers are all of [-1, 1].

    Args:
        estimate, truth: in the same unit; for the project's convention in [-1, 1] with data_range 2.
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


def lungs(hu: Float[Tensor, "b z y x"], below_hu: float = LUNG_BELOW_HU) -> Bool[Tensor, "b z y x"]:
    """Lungs and airways by their HU: dark regions of an axial slice that do not reach its edge.

    Slice by slice, because a volume cut at the neck or the abdomen opens the lungs at its end. A gap in the chest wall
    loses the lung of that slice: what a threshold finds is itself a test of the wall.

    Args:
        hu: volumes.
        below_hu: the threshold.
    """
    within_slices = np.zeros((3, 3, 3), dtype=bool)
    within_slices[1] = ndimage.generate_binary_structure(2, 1)
    found = []
    for dark in (hu < below_hu).cpu().numpy():
        regions, _ = ndimage.label(dark, within_slices)
        edge = [regions[:, 0], regions[:, -1], regions[:, :, 0], regions[:, :, -1]]
        outside = np.unique(np.concatenate([side.ravel() for side in edge]))
        found.append(torch.from_numpy(dark & ~np.isin(regions, outside)))
    return torch.stack(found)


def bone(hu: Float[Tensor, "b z y x"], above_hu: float = BONE_ABOVE_HU) -> Bool[Tensor, "b z y x"]:
    """Bone by its HU; with coarse voxels, what is left of it after averaging."""
    return (hu > above_hu).cpu()


@torch.no_grad()
def perceptual_distance(
    estimate: Float[Tensor, "b 1 z y x"], truth: Float[Tensor, "b 1 z y x"], judge: Perceptual
) -> Float[Tensor, " b"]:
    """LPIPS of the slices of a volume, mean over all slices along the three axes; intensities in [-1, 1]."""
    _check_shapes(estimate, truth)
    found = []
    for one, other in zip(estimate.float(), truth.float(), strict=True):
        stacks = [(one[0].movedim(axis, 0)[:, None], other[0].movedim(axis, 0)[:, None]) for axis in range(3)]
        parts = [judge(a, b) * len(a) for s in stacks for a, b in zip(s[0].split(16), s[1].split(16), strict=True)]
        found.append(torch.stack(parts).sum() / sum(truth.shape[-3:]))
    return torch.stack(found).double().cpu()


def score(
    estimate: Float[Tensor, "b 1 z y x"],
    truth: Float[Tensor, "b 1 z y x"],
    volume: VolumePreset,
    perceptual: Perceptual | None = None,
) -> dict[str, Float[Tensor, " b"]]:
    """Every metric of the project's tables, for each patient.

    Args:
        estimate, truth: volumes in [-1, 1] by the window of ``volume``.
        volume: the window, whose width is the peak of ``psnr`` and the data range of ``ssim``.
        perceptual: frozen VGG16; without it there is no ``perceptual``.

    Returns:
        name -> value per patient; names and units in :data:`SCORES`. ``sharpness`` is the gradient energy as a share
        of the truth's: below 1 is blurred, above 1 noisy.

    Raises:
        InputError: shapes that differ, or an estimate that is not finite.
    """
    _check_shapes(estimate, truth)
    if not torch.isfinite(estimate).all():
        raise InputError("estimate: holds NaN or infinity, expected a finite volume in [-1, 1]; reconstruct again.")
    window = volume.hu_max - volume.hu_min
    hu, true_hu = ((x.double() + 1) * (window / 2) + volume.hu_min for x in (estimate, truth))
    values = {
        "psnr": psnr(hu, true_hu, window),
        "psnr_4095": psnr(hu, true_hu, PEAK_12_BIT),
        "ssim": ssim(estimate, truth, 2.0),  # of [-1, 1], as everywhere in the project: see ssim()
        "mae_hu": mae(hu, true_hu),
        "dice_lungs": dice(lungs(hu[:, 0]), lungs(true_hu[:, 0])),
        "dice_bone": dice(bone(hu[:, 0]), bone(true_hu[:, 0])),
        "sharpness": sharpness(hu, true_hu),
    }
    if perceptual is not None:
        values["perceptual"] = perceptual_distance(estimate, truth, perceptual)
    return values


def paired_test(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Do two methods differ on the same patients? Wilcoxon's signed-rank test, two-sided, which needs no normality.

    Args:
        a, b: one value per patient, in the same order.

    Returns:
        ``difference``, the mean of a - b, and ``p``. Methods that agree on every patient give p = 1.

    Raises:
        InputError: not the same number of patients, fewer than two, or a value that is not finite.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise InputError(
            f"b: found {second.shape} values against {first.shape}, expected one for each of the same two or more "
            "patients."
        )
    difference = first - second
    if not np.isfinite(difference).all():
        raise InputError("a, b: hold NaN or infinity, expected finite values.")
    p = 1.0 if not difference.any() else float(wilcoxon(difference).pvalue)
    return {"difference": float(difference.mean()), "p": p}
