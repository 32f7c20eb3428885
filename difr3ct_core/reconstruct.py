"""From x-rays to CT: N posterior samples, their mean and their standard deviation. The public entry point.

>>> from difr3ct_core import reconstruct
>>> result = reconstruct(xrays, views, "runs/tiny/ldm-2view", n_samples=8)      # doctest: +SKIP
>>> result.mean.shape, result.std.max()                                         # doctest: +SKIP
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from . import ct
from .checks import pick_device
from .consistency import METHODS, correct, residual
from .diffusion import LatentDiffusion
from .files import InputError, write_json
from .geometry import View, views_from_json, views_to_json
from .initial import first_guess
from .presets import Preset, VolumePreset
from .progress import progress
from .results import provenance
from .sampling import draw
from .vqgan import VQGAN
from .weights import load_ldm


@dataclass(frozen=True)
class Reconstruction:
    """Posterior samples of a CT in HU, on the grid that ``affine`` places in the patient.

    ``mean`` and ``std`` (population standard deviation, 0 for a single sample) are per voxel, in HU.
    ``affine`` maps (x, y, z) voxel indices to LPS mm.
    """

    samples: Float[Tensor, "n z y x"]
    mean: Float[Tensor, "z y x"]
    std: Float[Tensor, "z y x"]
    affine: np.ndarray
    provenance: dict[str, Any]

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``sample_000.nii.gz`` ... (int16), ``mean.nii.gz``, ``std.nii.gz`` (float32), ``reconstruction.json``.

        All in HU. The JSON is written last: it is there only if everything else is. An earlier reconstruction in the
        folder is removed first.
        """
        folder = Path(folder)
        written: list[Path] = []
        _clear(folder)
        for i, sample in enumerate(self.samples):
            written.append(folder / f"sample_{i:03d}.nii.gz")
            ct.write_nifti(written[-1], sample, self.affine)
        for name, volume in (("mean", self.mean), ("std", self.std)):
            written.append(folder / f"{name}.nii.gz")
            ct.write_nifti(written[-1], volume, self.affine, "float32")  # a spread below 1 HU is not nothing
        record = {"files": [path.name for path in written], "unit": "HU", "affine_lps": self.affine.tolist()}
        write_json(folder / "reconstruction.json", {**record, "provenance": self.provenance})
        return [*written, folder / "reconstruction.json"]


def _clear(folder: Path) -> None:
    """Remove an earlier reconstruction, its JSON first: two of them must not be mixed, nor half of one look whole."""
    old = [folder / "reconstruction.json", *sorted(folder.glob("sample_*.nii.gz"))]
    try:
        for path in old:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: the earlier reconstruction cannot be removed ({error.strerror}); choose another folder."
        ) from error


def centred_affine(volume: VolumePreset) -> np.ndarray:
    """(x, y, z) voxel index -> LPS mm for a cube centred on the origin, which is where the views look."""
    affine = np.diag([volume.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = -(volume.size - 1) / 2 * volume.spacing_mm
    return affine


def check_xrays(
    xrays: Tensor, views: Sequence[View], trained: Sequence[View], where: str, any_view_most: int = 0
) -> None:
    """Do x-rays, their views and the views of the weights fit together?

    Args:
        xrays, views: what was given.
        trained: the views of the weights.
        where: the weights, for the message.
        any_view_most: of an any-view model, the largest number of views; 0 for a model of fixed views.

    Raises:
        InputError: they do not; the message says which differs and how.
    """
    if xrays.ndim != 3:
        raise InputError(f"xrays: found shape {tuple(xrays.shape)}, expected (view, v, u), one image per view.")
    if len(xrays) != len(views):
        raise InputError(f"xrays: found {len(xrays)} images, expected {len(views)}, one per view.")
    if not torch.isfinite(xrays).all():
        raise InputError("xrays: found NaN or infinity, expected line integrals; check the images.")
    for i, image in enumerate(xrays):
        if image.numel() and float(image.amax()) == float(image.amin()):
            raise InputError(f"xrays: every pixel of image {i} is {float(image.amax()):g}, expected one of a patient.")
    angles, expected = [v.angle_deg for v in views], [v.angle_deg for v in trained]
    if any_view_most:
        if not 1 <= len(views) <= any_view_most:
            raise InputError(
                f"views: found {len(views)}, expected 1 to {any_view_most}, for which {where} was trained; "
                "choose some of the x-rays."
            )
        # A beam from behind is the mirrored image of one from the front, which training never showed.
        if wrong := [angle for angle in angles if not 0 <= angle < 180]:
            raise InputError(
                f"views: found angles {wrong}°, expected 0° to below 180°, for which {where} was trained; "
                "mirror these x-rays left to right and subtract 180°."
            )
        trained = [trained[0]] * len(views)  # all have the same beam and detector
    elif len(views) != len(trained) or any(abs(a - b) > 0.5 for a, b in zip(angles, expected, strict=True)):
        raise InputError(
            f"views: found angles {angles}°, expected {expected}°, for which {where} was trained; "
            "take these x-rays, or weights trained for these views."
        )
    for view, other in zip(views, trained, strict=True):
        if view.mode != other.mode:
            raise InputError(f"views: found {view.mode} beam, expected {other.mode}, for which {where} was trained.")
        lengths = [(*v.offset_mm, *((v.dso_mm, v.dsd_mm) if v.mode == "cone" else ())) for v in (view, other)]
        if any(abs(a - b) > 1.0 for a, b in zip(*lengths, strict=True)):
            raise InputError(
                f"views: found offset {view.offset_mm}, DSO {view.dso_mm:g} and DSD {view.dsd_mm:g} mm, expected "
                f"{other.offset_mm}, {other.dso_mm:g} and {other.dsd_mm:g} mm, for which {where} was trained."
            )
        if tuple(view.detector_shape) != tuple(other.detector_shape) or not all(
            math.isclose(a, b, rel_tol=0.01) for a, b in zip(view.pixel_mm, other.pixel_mm, strict=True)
        ):
            raise InputError(
                f"views: found a detector of {view.detector_shape} pixels of {view.pixel_mm} mm, expected "
                f"{other.detector_shape} pixels of {other.pixel_mm} mm; resample the x-rays, or take other weights."
            )
    for image, view in zip(xrays, views, strict=True):
        if tuple(image.shape) != tuple(view.detector_shape):
            raise InputError(
                f"xrays: found images of {tuple(image.shape)} pixels, expected {tuple(view.detector_shape)}, "
                f"the detector of the view at {view.angle_deg}°."
            )


#: What libraries and their work space take beside the arrays, measured on a CPU.
_OVERHEAD_BYTES = 200_000_000


def sample_bytes(preset: Preset) -> int:
    """Memory that one more sample in a batch takes at its peak, in bytes: measured, rounded up.

    Eight feature maps of the decoder at half resolution, eight of the denoiser at the latent's, and the volume twice.
    """
    decoder = 2 * preset.vqgan.base_channels * (preset.volume.size // 2) ** 3
    denoiser = preset.unet.widths[0] * math.prod(preset.latent_shape[1:])
    return 4 * (8 * decoder + 8 * denoiser + 2 * preset.volume.size**3)


def batch_within(memory_gb: float, preset: Preset, n_volumes: int) -> int:
    """The largest batch of samples that stays below ``memory_gb``, the ``n_volumes`` results included.

    Raises:
        InputError: not even one sample at a time does.
    """
    fixed = _OVERHEAD_BYTES + 4 * n_volumes * preset.volume.size**3
    each = sample_bytes(preset)
    batch = int((memory_gb * 1e9 - fixed) // each) if math.isfinite(memory_gb) else n_volumes
    if batch < 1:
        raise InputError(
            f"memory_gb: found {memory_gb:g}, expected at least {math.ceil((fixed + each) / 1e7) / 100:g} for "
            f"{n_volumes} samples of {preset.volume.size}³; give more, or draw fewer samples at a time."
        )
    return min(batch, n_volumes)


def posterior_samples(
    ldm: LatentDiffusion,
    vqgan: VQGAN,
    xrays: Float[Tensor, "b n v u"],
    views: Sequence[View],
    n_samples: int,
    seed: int = 0,
    solver: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int = 32,
    memory_gb: float | None = None,
) -> Float[Tensor, "b s z y x"]:
    """Samples in [-1, 1] for several patients at once: condition, draw, quantise, decode (§IV-B).

    Args:
        ldm, vqgan: trained models on one device.
        xrays: line integrals of b patients.
        views: as trained; any of its range for an any-view model.
        n_samples: per patient.
        seed: of the noise; the same seed gives the same samples, whatever ``batch`` is.
        solver, steps, guidance: by default the preset's.
        batch: samples in memory at a time.
        memory_gb: instead of ``batch``, a limit in GB that the whole call keeps (:func:`batch_within`).

    With ``sampling.anchor`` of the preset, all samples of a patient are then moved together (:func:`anchored`).

    Returns:
        volumes on the CPU.
    """
    preset, p = ldm.preset, ldm.preset.sampling
    device = next(ldm.parameters()).device
    b = len(xrays)
    if memory_gb is not None:
        batch = batch_within(memory_gb, preset, b * n_samples)
    volumes = torch.empty(b * n_samples, *preset.volume.shape)
    with torch.inference_mode():
        guess = first_guess(ldm, vqgan, xrays.to(device), views)
        condition = ldm.condition(xrays.to(device), views, guess.latent)
        starts = range(0, b * n_samples, batch)
        for start in progress(starts, "posterior samples") if len(starts) > 1 else starts:
            # Sample i belongs to patient i // n_samples; all conditions at once would fill a GPU.
            rows = torch.arange(start, min(start + batch, b * n_samples), device=device) // n_samples
            part = condition[rows]
            # One generator a sample, so that a sample does not depend on what else is in its batch.
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
            latent = draw(
                ldm.unet,
                ldm.schedule,
                part,
                (len(part), *preset.latent_shape),
                solver=solver or p.solver,
                steps=p.steps if steps is None else steps,
                guidance=p.guidance if guidance is None else guidance,
                generator=generators,
                device=device,
            )
            decoded = vqgan.decode(latent, min(batch, 8))
            if guess.lost is not None:
                decoded = (decoded + guess.lost[rows]).clamp(-1, 1)
            volumes[start : start + batch] = decoded[:, 0].cpu()
        drawn = volumes.view(b, n_samples, *preset.volume.shape)
        if guess.latent is None or p.anchor == p.usual_misfit == 0:
            return drawn
        for i, latent in enumerate(guess.latent):  # one by one: a volume of each patient at once may not fit
            mean = vqgan.decode(latent[None])
            mean = mean if guess.lost is None else mean + guess.lost[i]
            wider = 1.0
            if guess.misfit is not None and p.usual_misfit > 0:
                wider = max(1.0, float(guess.misfit[i]) / (UNUSUAL * p.usual_misfit))
            drawn[i] = anchored(drawn[i], mean[0, 0].clamp(-1, 1).cpu(), p.anchor, wider)
    return drawn


#: How many times the usual misfit of a first guess is unusual: phantoms of the training's kind have 0.8 to 1.3.
UNUSUAL = 1.3


def anchored(
    samples: Float[Tensor, "n z y x"], mean: Float[Tensor, "z y x"], share: float = 1.0, wider: float = 1.0
) -> Float[Tensor, "n z y x"]:
    """Samples moved together, so that their mean comes nearer to a better one. Beyond the paper.

    The first guess was trained for the mean and nothing else, a denoiser for everything at once: after minutes of
    training the guess is the better mean, and the denoiser knows what spreads about it. The shift is
    share · (1 - 1/n) · (mean - mean of the samples): a single sample stays where it is, because it says nothing of
    where the mean of all would be.

    The denoiser knows how patients of the training's kind spread. One whose guess misses its x-rays by more than theirs
    is of another kind, and its samples are moved apart, about their mean, by as much as that.

    Args:
        samples: in [-1, 1].
        mean: the first guess.
        share: 0 leaves all where it is.
        wider: times the spread, from 1 on; less in voxels where a sample would leave the window and move their mean.
    """
    n, centre = len(samples), samples.mean(0)
    apart = samples - centre
    moved = centre + share * (1 - 1 / n) * (mean - centre)
    if wider > 1:
        room = torch.where(apart > 0, 1 - moved, 1 + moved) / apart.abs().clamp_min(torch.finfo(apart.dtype).tiny)
        apart = apart * room.amin(0).clamp(1, wider)
    return (moved + apart).clamp(-1, 1)


def reconstruct(
    xrays: Float[Tensor, "n v u"] | np.ndarray,
    views: Sequence[View],
    weights: str | Path,
    n_samples: int = 8,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str | None = None,
    device: str | torch.device = "cpu",
    batch: int = 32,
    affine: np.ndarray | None = None,
    memory_gb: float | None = None,
    consistency: str = "none",
) -> Reconstruction:
    """Reconstruct a distribution of CTs from planar x-rays.

    Args:
        xrays: line integrals of µ (dimensionless), rows rising with z; see :mod:`difr3ct_core.xrays` for files.
        views: angle, mode and detector of each x-ray.
        weights: run folder or ``weights.safetensors`` of a diffusion model trained for these views.
        n_samples: N >= 1 posterior samples.
        seed: the same seed gives the same samples on the same device.
        steps, guidance, solver: by default the preset's (20 steps of DPM-Solver++).
        device: "cpu", "cuda", ..., or "auto".
        batch: samples in memory at a time.
        affine: where the cube lies in the patient; by default it is centred on the origin.
        memory_gb: instead of ``batch``, a limit on the memory that sampling takes, in GB.
        consistency: "none", or a way to move every sample until it explains its x-rays (beyond the paper): "tv", the
            best in chapter 09, "lsq", "spread"; see :mod:`difr3ct_core.consistency`.

    Returns:
        samples, mean and standard deviation in HU. Their provenance holds the re-projection error
        ‖A µ - p‖ / ‖p‖, the mean over the samples.

    Raises:
        InputError: x-rays, views and weights do not fit together, or a file is damaged.
    """
    for name, value in (("n_samples", n_samples), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}: found {value}, expected at least 1.")
    if consistency not in METHODS:
        raise InputError(f"consistency: found {consistency!r}, expected one of {', '.join(METHODS)}.")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: found {seed}, expected a whole number from 0 to {2**32 - 1}.")
    if guidance is not None and not math.isfinite(guidance):
        raise InputError(f"guidance: found {guidance}, expected a finite number.")
    began = time.monotonic()
    device = pick_device(device)
    ldm, vqgan, preset, metadata = load_ldm(weights, device)
    images = torch.as_tensor(np.asarray(xrays) if not isinstance(xrays, Tensor) else xrays).float()
    trained = views_from_json(metadata["views"], f"views of {weights}")
    check_xrays(images, views, trained, str(weights), int(metadata.get("any_view_most", 0)))
    unit = posterior_samples(
        ldm, vqgan, images[None], views, n_samples, seed, solver, steps, guidance, batch, memory_gb
    )[0]  # fmt: skip
    unit = correct(unit, images, views, preset, consistency)
    misfit = float(residual(unit, images, views, preset).mean())
    samples = ct.unit_to_hu(unit, preset.volume)
    return Reconstruction(
        samples=samples,
        mean=samples.mean(0),
        std=samples.std(0, unbiased=False),
        affine=centred_affine(preset.volume) if affine is None else np.asarray(affine, dtype=np.float64),
        provenance=_provenance(
            preset,
            metadata,
            weights,
            views,
            n_samples,
            seed,
            steps,
            guidance,
            solver,
            device,
            began,
            consistency=consistency,
            reprojection_error=misfit,
        ),
    )


def _provenance(
    preset: Preset, metadata: dict, weights: Any, views: Sequence[View], n: int, seed: int,
    steps: int | None, guidance: float | None, solver: str | None, device: Any, began: float, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    p = preset.sampling
    return provenance(
        preset.name,
        seed,
        device,
        time.monotonic() - began,
        weights=str(weights),
        views=views_to_json(views),
        n_samples=n,
        solver=solver or p.solver,
        steps=p.steps if steps is None else steps,
        guidance=p.guidance if guidance is None else guidance,
        anchor=p.anchor if preset.has_initial else 0.0,
        hu_window=[preset.volume.hu_min, preset.volume.hu_max],
        training=metadata.get("provenance", {}),
        **more,
    )
