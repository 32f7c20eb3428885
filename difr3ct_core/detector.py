"""What a real detector adds to an ideal x-ray: scatter, blur, gain and photon noise. And views that stand a little off.

Off by default: the paper's x-rays are exact line integrals p (§V-B). A detector counts photons. With I0 photons per
pixel in the open beam, I0·exp(-p) arrive (Beer-Lambert), scatter adds a haze, the scintillator blurs, counting is
Poisson, and electronics multiply by a gain. A reader of the image takes -log(counts / open beam) and is back at line
integrals, now with errors. :func:`detect` goes all the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import number
from .files import InputError
from .geometry import Pose, View, check_views

#: Above this mean, torch's Poisson sampler in float32 would round counts; it works in float64 throughout instead.
_LARGEST_I0 = 1e12


@dataclass(frozen=True)
class Detector:
    """A detector and its dose. Every default means "ideal", so that ``Detector()`` changes nothing.

    Attributes:
        i0: photons per pixel in the open beam; infinity means no noise. A chest radiograph has of the order of 1e5
            photons per square mm there, so 1e5 to 1e6 per pixel of 2.5 mm; behind the spine e⁻⁵ of them are left.
        blur_mm: standard deviation of the Gaussian point spread function on the detector, mm. Caesium iodide panels
            have about 0.1 to 0.2 mm; 0 means none.
        scatter_to_primary: scattered over primary photons (SPR), averaged over each image. 0.5 to 2 in chest
            radiography with a grid, more without (Boone & Seibert 1988 give the order).
        scatter_mm: standard deviation in mm with which the haze spreads; infinity, the default, makes it the same
            everywhere in an image, "a scatter offset".
        gain: counts per photon. It scales image and open beam alike, unless they differ by ``gain_error``.
        gain_error: relative error of the gain that the reader assumes: 0.02 shifts all line integrals by -log(1.02).
        electronic_noise: standard deviation of the read-out, in photons.

    Raises:
        InputError: a number is out of range.
    """

    i0: float = math.inf
    blur_mm: float = 0.0
    scatter_to_primary: float = 0.0
    scatter_mm: float = math.inf
    gain: float = 1.0
    gain_error: float = 0.0
    electronic_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("i0", "scatter_mm"):
            value = getattr(self, name)
            if value != math.inf:
                object.__setattr__(self, name, number(f"detector.{name}", value, "photons or mm", positive=True))
        if self.i0 != math.inf and self.i0 > _LARGEST_I0:
            raise InputError(
                f"detector.i0: found {self.i0:g} photons, expected at most 1e12, or infinity for no noise."
            )
        object.__setattr__(self, "gain", number("detector.gain", self.gain, "counts per photon", positive=True))
        for name in ("blur_mm", "scatter_to_primary", "electronic_noise"):
            value = number(f"detector.{name}", getattr(self, name), "its unit")
            if value < 0:
                raise InputError(f"detector.{name}: found {value:g}, expected 0 or more.")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "gain_error", number("detector.gain_error", self.gain_error, "a share"))
        if self.gain_error <= -1:
            raise InputError(f"detector.gain_error: found {self.gain_error:g}, expected more than -1.")
        if self.electronic_noise > 0 and self.i0 == math.inf:
            raise InputError(
                "detector.electronic_noise: is in photons and needs i0; give the dose as photons per pixel."
            )

    @property
    def ideal(self) -> bool:
        """Whether it returns line integrals as they are."""
        return not (
            self.i0 != math.inf or self.blur_mm or self.scatter_to_primary or self.gain_error or self.electronic_noise
        )


@dataclass(frozen=True)
class DetectorRange:
    """Detectors to train on: of each number of :class:`Detector` the limits, between which it is drawn evenly.

    ``i0`` is drawn evenly on a logarithmic scale.
    """

    i0: tuple[float, float] = (1e3, 1e6)
    blur_mm: tuple[float, float] = (0.0, 3.0)
    scatter_to_primary: tuple[float, float] = (0.0, 0.2)
    gain_error: tuple[float, float] = (-0.05, 0.05)


def draw_detector(generator: torch.Generator, limits: DetectorRange | None = None) -> Detector:
    """A detector from a range; by default :class:`DetectorRange`'s, our choice of what a ward may have."""
    limits = limits or DetectorRange()
    shares = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    low, high = (math.log(limit) for limit in limits.i0)
    blur, scatter, gain = (
        a + (b - a) * share
        for (a, b), share in zip(
            (limits.blur_mm, limits.scatter_to_primary, limits.gain_error), shares[1:], strict=True
        )
    )
    i0 = math.exp(low + (high - low) * shares[0])
    return Detector(i0=i0, blur_mm=blur, scatter_to_primary=scatter, gain_error=gain)


def detect(
    line_integrals: Float[Tensor, "*batch view v u"],
    views: Sequence[View],
    detector: Detector,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch view v u"]:
    """Line integrals as a reader of this detector's images would find them.

    T = exp(-p), plus scatter, blurred: the expected share of the open beam. Counts N ~ Poisson(I0·T), plus read-out.
    The result is -log(max(N, ½) / I0 / (1 + gain error)): a starved pixel, which counted nothing, is read as half a
    photon, the finest that a count can tell, and so stays finite.

    Args:
        line_integrals: exact p, dimensionless.
        views: for the pixel size, one per x-ray.
        detector: what it adds.
        generator: of the noise; needed if there is any, on the device of the x-rays.

    Returns:
        line integrals; the same tensor if the detector is ideal. To first order their variance is exp(p) / I0.

    Raises:
        InputError: x-rays and views do not match, values are not finite, or noise was asked for without a generator.
    """
    if detector.ideal:
        return line_integrals
    counts = expected_transmission(line_integrals, views, detector)
    if detector.i0 != math.inf:
        counts = count_photons(counts, detector, generator) / (detector.gain * detector.i0)
        counts = counts.clamp_min(0.5 / detector.i0)
    return (-torch.log(counts.clamp_min(1e-300)) - math.log1p(detector.gain_error)).to(line_integrals.dtype)


def expected_transmission(
    line_integrals: Float[Tensor, "*batch view v u"], views: Sequence[View], detector: Detector
) -> Float[Tensor, "*batch view v u"]:
    """Share of the open beam that each pixel expects, scatter and blur included (float64); may exceed 1 by scatter."""
    views = check_views(views)
    if line_integrals.ndim < 3 or line_integrals.shape[-3] != len(views):
        raise InputError(
            f"line_integrals: found shape {tuple(line_integrals.shape)}, expected (..., {len(views)}, v, u), one image "
            "per view."
        )
    if tuple(line_integrals.shape[-2:]) != views[0].detector_shape:
        raise InputError(
            f"line_integrals: found images of {tuple(line_integrals.shape[-2:])} pixels, but the views have a detector "
            f"of {views[0].detector_shape}."
        )
    if not torch.isfinite(line_integrals).all():
        raise InputError("line_integrals: found NaN or infinity, expected finite line integrals.")
    primary = torch.exp(-line_integrals.double())
    if detector.scatter_to_primary:
        if detector.scatter_mm == math.inf:
            haze = primary.mean(dim=(-2, -1), keepdim=True)
        else:
            haze = _blur(primary, views, detector.scatter_mm)
        primary = primary + detector.scatter_to_primary * haze
    return _blur(primary, views, detector.blur_mm) if detector.blur_mm else primary


def count_photons(
    transmission: Float[Tensor, "*batch view v u"], detector: Detector, generator: torch.Generator | None
) -> Float[Tensor, "*batch view v u"]:
    """The raw image: gain · (Poisson(I0 · transmission) + read-out noise), float64. See :func:`detect`."""
    if generator is None:
        raise InputError(
            "generator: found None, expected a torch.Generator, since noise needs a seed to be repeatable."
        )
    photons = torch.poisson(detector.i0 * transmission.double(), generator=generator)
    if detector.electronic_noise:
        noise = torch.empty_like(photons).normal_(generator=generator)
        photons = photons + detector.electronic_noise * noise
    return detector.gain * photons


def _blur(images: Float[Tensor, "*batch view v u"], views: Sequence[View], sigma_mm: float) -> Tensor:
    """Gaussian blur, view by view since pixels may differ.

    The kernel holds the Gaussian's integral over each pixel. What would leave the image at an edge is mirrored back
    in, so that the sum is kept.
    """
    blurred = []
    for index, view in enumerate(views):
        image = images[..., index, :, :]
        for axis, pixel in zip((-2, -1), view.pixel_mm, strict=True):
            image = image.transpose(axis, -1) @ _blur_matrix(image.shape[axis], sigma_mm / pixel).to(image)
            image = image.transpose(axis, -1)
        blurred.append(image)
    return torch.stack(blurred, dim=-3)


def _blur_matrix(n: int, sigma: float) -> Float[Tensor, "n n"]:
    """Row-stochastic and symmetric: pixel i gives share [i, j] of its signal to pixel j, edges mirrored."""
    reach = min(math.ceil(5 * sigma), 4 * n)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    edges = torch.cat([offsets - 0.5, offsets[-1:] + 0.5]) / (sigma * math.sqrt(2.0))
    kernel = torch.erf(edges).diff()
    kernel = kernel / kernel.sum()
    target = torch.arange(n)[:, None] + offsets.long()[None]
    # Mirror at the outer edges of the first and last pixel: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...
    target = target.remainder(2 * n)
    target = torch.where(target < n, target, 2 * n - 1 - target)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, target, kernel.expand(n, -1).contiguous())


def draw_pose(n_views: int, angle_sd_deg: float, shift_sd_mm: float, generator: torch.Generator) -> Pose:
    """Deviations of a gantry: independent normal errors of angle (degrees) and of position (mm on each axis), per view.

    Give the result to :func:`~difr3ct_core.drr.project_rays`, which moves source and detector together.

    Raises:
        InputError: a standard deviation is negative or not finite.
    """
    _check_spread(angle_deg=angle_sd_deg, shift_mm=shift_sd_mm)
    angle = torch.empty(n_views, dtype=torch.float64).normal_(generator=generator)
    shift = torch.empty(n_views, 3, dtype=torch.float64).normal_(generator=generator)
    return Pose(angle_sd_deg * angle, shift_sd_mm * shift)


def jitter_views(
    views: Sequence[View], angle_deg: float, shift_mm: float, generator: torch.Generator
) -> tuple[View, ...]:
    """The same views a little off: each angle by up to ±``angle_deg``, each detector's centre by up to ±``shift_mm``.

    Errors are uniform and independent. A shift of the detector in its plane (v and u) is what a shift of the patient
    amounts to in parallel mode. Project with the jittered views and reconstruct with the true ones to see what an
    uncertain pose costs.

    Args:
        views: where the views should be.
        angle_deg: largest error of angle, degrees.
        shift_mm: largest error of position in each of v and u, mm.
        generator: of the errors.

    Raises:
        InputError: a limit is negative or not finite.
    """
    _check_spread(angle_deg=angle_deg, shift_mm=shift_mm)
    draws = (2 * torch.rand(len(views), 3, generator=generator, dtype=torch.float64) - 1).tolist()
    return tuple(
        dataclasses.replace(
            view,
            angle_deg=view.angle_deg + angle_deg * a,
            offset_mm=(view.offset_mm[0] + shift_mm * v, view.offset_mm[1] + shift_mm * u),
        )
        for view, (a, v, u) in zip(views, draws, strict=True)
    )


def _check_spread(**spreads: float) -> None:
    for name, value in spreads.items():
        if number(name, value, "its unit") < 0:
            raise InputError(f"{name}: found {value:g}, expected 0 or more.")
