"""Measurement consistency: samples that the x-rays could really have come from. Beyond the paper.

A latent diffusion model is told of the x-rays, but nothing makes its samples obey them: projected again, a sample
misses its own x-rays by what the autoencoder and the denoiser lost. The projector A is known exactly, so a sample
µ_s can be moved to a volume that explains the x-rays p and differs from µ_s no more than it must. Three ways:

| name | correction | cost for each sample |
|---|---|---|
| ``lsq`` | the smallest change, ‖µ - µ_s‖², that gives A µ = p | about 30 projections |
| ``spread`` | the same, but a voxel may change in proportion to its posterior variance | the same |
| ``tv`` | total-variation least squares, started from µ_s and held near it, most where samples agree | about 80 |

The last one trusts the samples less where they miss the x-rays by more than their own spread explains, as those of a
patient unlike any of the training do (:func:`overconfidence`): then the x-rays are nearly all that is to be believed.

All of them work on the samples after decoding, so that any model's samples can be corrected;
:func:`proximal_model` moves them during the sampling instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from . import ct
from .baselines.classical import tv
from .baselines.classical_problem import make_problem
from .drr import project
from .files import InputError
from .geometry import View
from .presets import Preset

METHODS = ("none", "lsq", "spread", "tv")
Model = Callable[[Tensor, int], Tensor]


def to_mu(unit: Float[Tensor, "*any"], preset: Preset) -> Float[Tensor, "*any"]:
    """[-1, 1] -> linear attenuation in 1/mm."""
    return ct.hu_to_mu(ct.unit_to_hu(unit, preset.volume), preset.xray.mu_water_per_mm)


def to_unit(mu: Float[Tensor, "*any"], preset: Preset) -> Float[Tensor, "*any"]:
    """Linear attenuation in 1/mm -> [-1, 1], clipped to the window."""
    return ct.hu_to_unit(ct.mu_to_hu(mu, preset.xray.mu_water_per_mm), preset.volume)


def projected(volumes: Float[Tensor, "b z y x"], views: Sequence[View], preset: Preset) -> Float[Tensor, "b n v u"]:
    """Line integrals of volumes in [-1, 1]."""
    return project(to_mu(volumes, preset)[:, None], views, preset.volume.spacing_mm)[:, 0]


def residual(
    samples: Float[Tensor, "s z y x"], xrays: Float[Tensor, "*s n v u"], views: Sequence[View], preset: Preset
) -> Float[Tensor, " s"]:
    """Re-projection error of every sample, ‖A µ - p‖ / ‖p‖.

    Args:
        samples: volumes in [-1, 1].
        xrays: line integrals of the patient, or of a patient for each volume.
        views: one per x-ray.
    """
    again = projected(samples, views, preset)
    return (again - xrays).flatten(1).norm(dim=1) / xrays.flatten(-3).norm(dim=-1)


def noise_deviation(images: Float[Tensor, "*b n v u"]) -> Float[Tensor, " *b"]:
    """Standard deviation of the white noise in x-rays, estimated from the images alone, over all n of them.

    A mask that takes away what is linear along rows or columns leaves white noise as strong as it was (Immerkær 1996).
    Edges are left as well, but few: in blocks of 8 x 8 pixels the median of what is left gives the deviation (Donoho &
    Johnstone 1994), each block its own, for photons are few behind bone and many beside the patient. Best asked about
    the *difference* of an x-ray and a projection like it. Noise that a blur has spread is not seen; images of fewer
    than 3 pixels a side have none.
    """
    if min(images.shape[-2:]) < 3:
        return images.new_zeros(images.shape[:-3])
    mask = images.new_tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6  # its squares add up to 1
    left = F.conv2d(images.flatten(0, -3)[:, None], mask[None, None]).abs()
    rows, columns = (math.ceil(edge / 8) for edge in left.shape[-2:])
    blocks = [block for strip in left.tensor_split(rows, -2) for block in strip.tensor_split(columns, -1)]
    variance = torch.stack([(block.flatten(1).median(1).values / 0.6745).square() for block in blocks]).mean(0)
    return variance.unflatten(0, images.shape[:-2]).mean(-1).sqrt()


def misfit(
    volumes: Float[Tensor, "b z y x"], xrays: Float[Tensor, "b n v u"], views: Sequence[View], preset: Preset
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """:func:`residual`, parted into what white noise explains and the rest, by squares: (rest, noise).

    A volume may be right and miss noisy x-rays; the rest alone says that it is wrong.
    """
    again = projected(volumes, views, preset)
    size = _size(xrays)
    noise = noise_deviation(again - xrays)
    rest = ((again - xrays).square().mean((1, 2, 3)) - noise.square()).clamp_min(0).sqrt()
    return rest / size, noise / size


def _size(xrays: Float[Tensor, "*b n v u"]) -> Float[Tensor, " *b"]:
    """Root mean square, and no zero for blank ones."""
    return xrays.square().mean((-3, -2, -1)).sqrt().clamp_min(1e-6)


#: The largest noise, as a share of the x-rays, that is taken for none. Exact x-rays look like 0.0035 to 0.006 beside
#: INRR3CT's volume at 64³, up to 0.009 where that is put out of shape; 1e5 photons a pixel like 0.008, 1e4 like 0.02,
#: 1e3 like 0.06.
QUIET = 0.007


def graininess(noise: Float[Tensor, " *b"]) -> Float[Tensor, " *b"]:
    """How many times less x-rays count than quiet ones, 1 or more: the cube of their noise over :data:`QUIET`.

    By the squares (a Gaussian's precision) validation phantoms at 1e3 photons, moved to eight x-rays, came out 0.8 dB
    worse (with an earlier estimate of the noise): what a volume takes over of noise is far from white.
    """
    return _loudness(noise) ** 3


def most_variation(noise: Float[Tensor, " *b"]) -> Float[Tensor, " *b"]:
    """The largest weight of the total variation in mm: that of a solver which has nothing else to go by.

    In proportion to the noise, as :func:`difr3ct_core.baselines.classical.tv` says.
    """
    return 0.004 * _loudness(noise)


def _loudness(noise: Float[Tensor, " *b"]) -> Float[Tensor, " *b"]:
    """Noise over :data:`QUIET`, 1 or more; beyond 100 x-rays are nothing but noise, and weights stay finite."""
    return (noise / QUIET).clamp(1.0, 100.0)


def unexplained_noise(again: Float[Tensor, "s n v u"], xrays: Float[Tensor, "n v u"]) -> Float[Tensor, ""]:
    """Standard deviation of the noise in x-rays, told from samples' projections: what their spread does not explain.

    Truth and samples are draws from one posterior of variance V, so the mean of s samples misses quiet x-rays by
    (1 + 1/s) V. A single sample has no spread to tell by, so its x-rays are taken for quiet.
    """
    s = len(again)
    if s < 2:
        return again.new_zeros(())
    centre = again.mean(0)
    spread = noise_deviation(again - centre).square().mean() * (s / (s - 1))
    return (noise_deviation(centre - xrays).square() - (1 + 1 / s) * spread).clamp_min(0).sqrt()


def overconfidence(
    samples: Float[Tensor, "s z y x"], xrays: Float[Tensor, "n v u"], views: Sequence[View], preset: Preset
) -> float:
    """How many times farther samples miss their x-rays than their spread explains: (‖A µ_s - p‖² - σ²) / 2 Var(A µ).

    Means over pixels and samples; σ is :func:`unexplained_noise`. Truth and sample are two draws from the posterior if
    the model is right, so their projections differ by twice its variance: 1. A patient unlike those of the training
    shows as a larger number, without the truth being known, unless what is wrong looks like white noise in the x-rays.

    Raises:
        InputError: fewer than two samples, which have no spread.
    """
    if len(samples) < 2:
        raise InputError("overconfidence: found 1 sample, expected at least 2, which have a spread; draw more.")
    again = projected(samples, views, preset)
    variance = again.var(0).mean().clamp_min(torch.finfo(again.dtype).tiny)
    missed = (again - xrays).square().mean() - unexplained_noise(again, xrays).square()
    return float(missed.clamp_min(0) / (2 * variance))


#: The overconfidence from which on the prior's weight falls: phantoms of the training's kind have 0.7 to 3.5.
USUAL_OVERCONFIDENCE = 2.0


#: Weight of the total variation in mm for each HU of the samples' mean deviation, and the largest.
TV_PER_HU, TV_WEIGHT_MM = 1e-5, 0.0005


def correct(
    samples: Float[Tensor, "s z y x"],
    xrays: Float[Tensor, "n v u"],
    views: Sequence[View],
    preset: Preset,
    method: str = "tv",
    iterations: int | None = None,
    tv_weight_mm: float | None = None,
    prior_weight_mm: float = 0.1,
    batch: int = 8,
) -> Float[Tensor, "s z y x"]:
    """Samples moved to agree with their x-rays.

    Args:
        samples: posterior samples of one patient in [-1, 1].
        xrays: its line integrals; those of the samples themselves are compared with them.
        views: one per x-ray, parallel or cone.
        preset: grid, window and attenuation of water.
        method: one of :data:`METHODS`, see the table above; "spread" takes the variance over these samples.
        iterations: by default 15 for "lsq" and "spread", 40 for "tv".
        tv_weight_mm, prior_weight_mm: of :func:`difr3ct_core.baselines.classical.tv`, chosen on validation phantoms at
            64³. The first is by default :data:`TV_PER_HU` times the samples' mean deviation, for in a sum of squares
            and of absolute differences the latter has to grow with the size of the errors; at most an eighth of what
            suits the solver alone, for a sample is no blank page. The other is the weight of a voxel of average
            variance; from two samples on, others have it in inverse proportion to their variance, as the precision of
            a Gaussian prior has, and all of them fall as :func:`overconfidence` rises above what is usual: a prior that
            is shown to be wrong has the larger variance, and the total variation rises with the deviation. With "tv",
            and two samples or more, noisy x-rays count for less: both weights rise with :func:`graininess`, that of the
            total variation up to :func:`most_variation`.
        batch: samples corrected together.

    Returns:
        volumes in [-1, 1].

    Raises:
        InputError: unknown method, or "spread" with fewer than two samples.
    """
    if method not in METHODS:
        raise InputError(f"consistency: found {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "none":
        return samples
    mu = to_mu(samples, preset)
    if method == "spread" and len(samples) < 2:
        raise InputError(f"consistency: 'spread' needs at least 2 samples, found {len(samples)}; draw more.")
    deviation = mu.std(0, unbiased=False)
    if tv_weight_mm is None:
        spread_hu = 1000 * float(deviation.mean()) / preset.xray.mu_water_per_mm
        tv_weight_mm = min(TV_WEIGHT_MM, TV_PER_HU * spread_hu) if len(samples) > 1 else TV_WEIGHT_MM / 2
    scale = deviation + 0.1 * deviation.mean() if method == "spread" else None  # no voxel is quite certain
    hold: float | Tensor = prior_weight_mm
    if method == "tv":
        again = projected(samples, views, preset)
        noise = unexplained_noise(again, xrays.to(again)) / _size(xrays.to(again))
        grain = float(graininess(noise))
        tv_weight_mm, prior_weight_mm = grain * tv_weight_mm, grain * prior_weight_mm
        hold, most = prior_weight_mm, float(most_variation(noise))
    if len(samples) > 1:
        variance = deviation.square()
        hold = prior_weight_mm * variance.mean() / (variance + 0.1 * variance.mean())
        if method == "tv":
            doubt = max(1.0, overconfidence(samples, xrays, views, preset) / USUAL_OVERCONFIDENCE)
            hold, tv_weight_mm = hold / doubt, tv_weight_mm * math.sqrt(doubt)
    parts = []
    for some in mu.split(batch):
        images = xrays.to(some).expand(len(some), -1, -1, -1)
        if method == "tv":
            moved = tv(
                images, views, preset.volume.shape, preset.volume.spacing_mm, weight_mm=min(tv_weight_mm, most),
                iterations=iterations or 40, prior=some, prior_weight_mm=hold,
            )  # fmt: skip
        else:
            moved = some + smallest_change(some, images, views, preset, iterations or 15, scale)
        parts.append(to_unit(moved, preset))
    return torch.cat(parts)


def smallest_change(
    mu: Float[Tensor, "b z y x"],
    xrays: Float[Tensor, "b n v u"],
    views: Sequence[View],
    preset: Preset,
    iterations: int,
    scale: Float[Tensor, "*b z y x"] | None = None,
) -> Float[Tensor, "b z y x"]:
    """δ of least ‖δ / scale‖ with A (µ + δ) = p, by conjugate gradients on y = δ / scale from y = 0 (CGLS).

    Stopped early it leaves a part of the misfit, the finest and least certain.
    """
    problem = make_problem(xrays, views, preset.volume.shape, preset.volume.spacing_mm)
    weight = torch.ones_like(mu[0]) if scale is None else scale / scale.mean()
    rest = problem.xrays - problem.forward(mu)
    change = torch.zeros_like(mu)
    gradient = weight * problem.adjoint(rest)
    direction, norm = gradient.clone(), gradient.flatten(1).square().sum(1)
    floor = norm * torch.finfo(mu.dtype).eps ** 2
    for _ in range(iterations):
        going = norm > floor
        if not going.any():
            break
        projected = problem.forward(weight * direction)
        step = torch.where(going, norm / projected.flatten(1).square().sum(1), 0)[:, None, None, None]
        change += step * direction
        rest -= step * projected
        gradient = weight * problem.adjoint(rest)
        new = gradient.flatten(1).square().sum(1)
        direction = gradient + torch.where(going, new / norm, 0)[:, None, None, None] * direction
        norm = torch.where(going, new, norm)
    return weight * change


def proximal_model(
    model: Model,
    move: Callable[[Float[Tensor, "b 1 z y x"]], Float[Tensor, "b 1 z y x"]],
    decode: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    below: int,
) -> Model:
    """A model of ẑ_0 whose answers, at steps below ``below``, are decoded, corrected and encoded again.

    Args:
        model: of :func:`difr3ct_core.sampling.guided`.
        move: volumes in [-1, 1] -> the same, nearer to the x-rays, for example by :func:`correct`.
        decode, encode: of the autoencoder.
        below: step t; above it ẑ_0 is still a blur that no correction helps.
    """

    def corrected(z: Tensor, t: int) -> Tensor:
        x0 = model(z, t)
        return encode(move(decode(x0))) if t < below else x0

    return corrected
