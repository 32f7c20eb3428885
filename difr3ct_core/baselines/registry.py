"""One table of methods: the name in a table -> how to get it ready and how to reconstruct with it.

Everything that the tables compare goes through here, on the same patients, views and grid::

    method = METHODS["inrr3ct"]
    ready = method.prepare(chapter, "2view", None)                  # load or train; nothing for what does not learn
    volumes = method.reconstruct(ready, chapter, patients)          # [-1, 1], patients with those views

:mod:`difr3ct_core.baselines.__main__` is the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import ct
from ..chapters import Chapter
from ..consistency import correct
from ..datasets import Patients
from ..files import InputError, read_safetensors
from ..metrics import psnr
from ..presets import VIEW_SETS
from ..reconstruct import posterior_samples
from ..weights import load_ldm, state_digest, training_history
from .classical import METHODS as CLASSICAL
from .diffusion3d import VoxelDiffusion
from .floors import MeanVolume, NearestPatient
from .inrr3ct import INRR3CT
from .naf import reconstruct_naf
from .network import Baseline, train_network
from .presets import get_baselines, with_training
from .x2ctgan import X2CTGAN

#: Parameters that classical methods are tuned over, on the validation patients: name -> candidates.
CANDIDATES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "sirt": ("iterations", (25, 50, 100, 200)),
    "cgls": ("iterations", (5, 10, 20, 40)),
    "tv": ("weight_mm", (0.001, 0.002, 0.004, 0.008)),
    "tv_body": ("weight_mm", (0.001, 0.002, 0.004, 0.008)),
}
#: Validation patients that the tuning looks at.
TUNING_PATIENTS = 4


@dataclass(frozen=True)
class Options:
    """What a command may change about a training."""

    stop_after: int | None = None  # steps of this call
    changes: Sequence[str] = ()  # fields of the training, such as ``steps=100``
    start: Path | None = None  # run folder or weights of the same method to begin with


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        title: as printed.
        prepare: (chapter, name of a set of views, options) -> what ``reconstruct`` needs.
        reconstruct: (that, chapter, patients with those views) -> volumes (b, 1, z, y, x) in [-1, 1] on the CPU.
        view_sets: for which it exists.
        models: run folders of its models, by name of the set of views; empty for what is not trained.
        draws: scores the mean of as many posterior samples as the preset says.
        reuses: takes the samples of another row where that was just made, so that its time means nothing.
    """

    title: str
    prepare: Callable[[Chapter, str, Options], Any]
    reconstruct: Callable[[Any, Chapter, Patients], Float[Tensor, "b 1 z y x"]]
    view_sets: tuple[str, ...] = tuple(VIEW_SETS)
    models: Callable[[str], tuple[str, ...]] = field(default=lambda view_set: ())
    draws: bool = False
    reuses: bool = False


def _network(kind: type[Baseline], title: str, view_sets: Sequence[str] = tuple(VIEW_SETS)) -> Method:
    def prepare(chapter: Chapter, view_set: str, options: Options) -> Baseline:
        settings = with_training(getattr(get_baselines(chapter.preset.name), kind.kind), options.changes)
        return train_network(
            kind, chapter.patients("train", view_set), chapter.preset, settings,
            chapter.run / f"{kind.kind}-{view_set}", chapter.seed, chapter.device, options.stop_after, options.start,
        )  # fmt: skip

    def reconstruct(model: Baseline, chapter: Chapter, patients: Patients) -> Tensor:
        return model.reconstruct(patients.xrays, chapter.seed)

    draws = kind is VoxelDiffusion
    return Method(title, prepare, reconstruct, tuple(view_sets), lambda view_set: (f"{kind.kind}-{view_set}",), draws)


#: The samples drawn last: the two rows of DIFR3CT are of the same ones.
_last_drawn: dict[tuple[Any, ...], Tensor] = {}


def _latent_diffusion(title: str = "DIFR3CT", way: str = "none") -> Method:
    """The paper's method: mean of posterior samples, as drawn or each corrected by its x-rays."""

    def prepare(chapter: Chapter, view_set: str, options: Options) -> Any:
        if options.changes:
            raise InputError("training: DIFR3CT's own is changed with python -m difr3ct_core.training --set ...")
        chapter.ldm(view_set, options.stop_after, options.start)
        if options.stop_after is not None:
            return None  # unfinished: nothing to load
        return load_ldm(chapter.weights(f"ldm-{view_set}"), chapter.device)[:2]

    def reconstruct(models: Any, chapter: Chapter, patients: Patients) -> Tensor:
        (ldm, vqgan), device = models, chapter.device
        key = (state_digest(ldm), patients.ids, patients.views, chapter.preset.sampling.n_samples, chapter.seed)
        if key not in _last_drawn:
            _last_drawn.clear()
            _last_drawn[key] = posterior_samples(ldm, vqgan, patients.xrays, patients.views, *key[-2:])
        drawn = _last_drawn[key]
        if way != "none":
            pairs = zip(drawn, patients.xrays, strict=True)
            moved = [correct(s.to(device), p.to(device), patients.views, chapter.preset, way) for s, p in pairs]
            drawn = torch.stack(moved).cpu()
        return drawn.mean(1, keepdim=True)

    return Method(
        title, prepare, reconstruct, models=lambda view_set: ("vqgan", f"ldm-{view_set}"), draws=True,
        reuses=way != "none",
    )  # fmt: skip


def _naf() -> Method:
    def prepare(chapter: Chapter, view_set: str, options: Options) -> Any:
        return with_training(get_baselines(chapter.preset.name).naf, options.changes)

    def reconstruct(settings: Any, chapter: Chapter, patients: Patients) -> Tensor:
        xrays, views = patients.xrays, patients.views
        return reconstruct_naf(xrays, views, settings, chapter.preset, chapter.seed, chapter.device)

    return Method("NAF", prepare, reconstruct)


def classical_volumes(
    name: str, chapter: Chapter, patients: Patients, arguments: Mapping[str, Any]
) -> Float[Tensor, "b 1 z y x"]:
    """Volumes in [-1, 1] by a method of :data:`difr3ct_core.baselines.classical.METHODS`, µ bounded by the window."""
    volume, water = chapter.preset.volume, chapter.preset.xray.mu_water_per_mm
    bounds = tuple(float(ct.hu_to_mu(torch.tensor(hu), water)) for hu in (volume.hu_min, volume.hu_max))
    xrays = patients.xrays.to(chapter.device)
    grid = (patients.views, volume.shape, volume.spacing_mm, bounds)
    parts = [CLASSICAL[name](part, *grid, **arguments) for part in xrays.split(8)]
    return ct.hu_to_unit(ct.mu_to_hu(torch.cat(parts).cpu(), water), volume)[:, None]


def _classical(name: str, title: str) -> Method:
    def prepare(chapter: Chapter, view_set: str, options: Options) -> dict[str, Any]:
        """The candidate of best mean PSNR on validation patients."""
        if name not in CANDIDATES:
            return {}
        parameter, candidates = CANDIDATES[name]
        patients = chapter.patients("val", view_set)
        patients = patients.take(range(min(len(patients), TUNING_PATIENTS)))
        truth = patients.unit()

        def quality(value: Any) -> float:
            return float(psnr(classical_volumes(name, chapter, patients, {parameter: value}), truth, 2.0).mean())

        return {parameter: max(candidates, key=quality)}

    def reconstruct(arguments: dict[str, Any], chapter: Chapter, patients: Patients) -> Tensor:
        return classical_volumes(name, chapter, patients, arguments)

    return Method(title, prepare, reconstruct)


def _floor(kind: type[MeanVolume] | type[NearestPatient], title: str) -> Method:
    def prepare(chapter: Chapter, view_set: str, options: Options) -> Any:
        return kind(chapter.patients("train", view_set))

    def reconstruct(floor: Any, chapter: Chapter, patients: Patients) -> Tensor:
        return floor.reconstruct(patients.xrays)

    return Method(title, prepare, reconstruct)


#: Name -> method, in the order of the tables: the paper's, then classical ones, then the floors.
METHODS: dict[str, Method] = {
    "difr3ct": _latent_diffusion(),
    "difr3ct_tv": _latent_diffusion("DIFR3CT, corrected", "tv"),
    "diffusion3d": _network(VoxelDiffusion, "3D Diffusion"),
    "inrr3ct": _network(INRR3CT, "INRR3CT", [name for name, angles in VIEW_SETS.items() if len(angles) <= 4]),
    "x2ctgan": _network(X2CTGAN, "X2CT-GAN", [name for name, angles in VIEW_SETS.items() if len(angles) <= 2]),
    "naf": _naf(),
    "fbp": _classical("fbp", "FBP"),
    "sirt": _classical("sirt", "SIRT"),
    "cgls": _classical("cgls", "CGLS"),
    "tv": _classical("tv", "TV"),
    "tv_body": _classical("tv_body", "TV, elliptic trunk"),
    "nearest_patient": _floor(NearestPatient, "Nearest patient"),
    "mean_volume": _floor(MeanVolume, "Mean volume"),
}


def get_method(name: str, view_set: str) -> Method:
    """The method called ``name``, if it exists for these views.

    Raises:
        InputError: no such method, no such set of views, or a method that has none for them.
    """
    if name not in METHODS:
        raise InputError(f"method: found {name!r}, expected one of {', '.join(METHODS)}.")
    if view_set not in VIEW_SETS:
        raise InputError(f"views: found {view_set!r}, expected one of {', '.join(VIEW_SETS)}.")
    method = METHODS[name]
    if view_set not in method.view_sets:
        raise InputError(
            f"views: found {view_set!r}, expected one of {', '.join(method.view_sets)} for {method.title}."
        )
    return method


def training_cost(chapter: Chapter, name: str, view_set: str) -> dict[str, float]:
    """Minutes, peak memory (GB; of the GPU if there is one) and patients seen of a method's trainings, by their files.

    Methods without a training took none: an empty dictionary. Minutes (of all starts of a training) and patients
    (steps times batch; not the autoencoder's, which sees no x-ray) are summed over the models, memory is the largest.
    A fine-tuned model counts all that it began from, and its initial network.
    """
    minutes, peak, seen = [], [], 0
    for model in get_method(name, view_set).models(view_set):
        path: Path = chapter.weights(model)
        path = path if path.suffix else path / "weights.safetensors"
        metadata = read_safetensors(path)[1]
        for training in training_history(metadata):
            minutes.append(training["wall_s"] / 60)
            seen += 0 if model == "vqgan" else training["steps"] * training["batch_size"]
            peak.append(training["peak_memory_gb"])
    if not minutes:
        return {}
    return {"train_minutes": sum(minutes), "train_peak_gb": max(peak), "patients_seen": float(seen)}
