"""One row of the paper's Tables I and II: a method, prepared, run on the test patients, and scored by every metric.

``benchmarks/tables.py`` fills a file with such entries, chapter 08 makes and draws them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from ..chapters import Chapter
from ..ct import unit_to_hu
from ..files import InputError, read_json, read_npz
from ..metrics import paired_test, score
from ..progress import progress
from ..vqgan_losses import Perceptual
from .registry import METHODS, Options, get_method, training_cost


def spread(values: Float[Tensor, " b"]) -> dict[str, Any]:
    """Mean, standard deviation over patients (of a sample: n - 1), and the values."""
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": deviation, "patients": [round(float(v), 4) for v in values]}


def is_trained(chapter: Chapter, name: str, view_set: str) -> bool:
    """Are all models of this method finished? True for methods without any."""
    paths = [chapter.weights(model) for model in METHODS[name].models(view_set)]
    return all((path if path.suffix else path / "weights.safetensors").exists() for path in paths)


def middle_slices(hu: Float[Tensor, "n n n"]) -> Int16[np.ndarray, "3 n n"]:
    """Middle axial, coronal and sagittal slice, in HU."""
    middle = hu.shape[0] // 2
    return torch.stack([hu[middle], hu[:, middle], hu[:, :, middle]]).round().to(torch.int16).numpy()


def measure(
    chapter: Chapter,
    name: str,
    view_set: str,
    patients: int,
    look: Perceptual | None = None,
    options: Options | None = None,
) -> tuple[dict[str, Any], Int16[np.ndarray, "3 n n"]]:
    """The entry of one method, trained or loaded here, and three slices of the first test patient in HU.

    Args:
        chapter: data and run folder.
        name: of :data:`difr3ct_core.baselines.registry.METHODS`.
        view_set: name of the x-rays.
        patients: at most so many of the test split.
        look: VGG16, for ``perceptual``.
        options: of the training, where it is not the preset's.

    Returns:
        ``{"value": mean PSNR, "unit": "dB", "n", "ids", METRIC: {"mean", "std", "patients"}, ...}`` with the metrics
        of :data:`difr3ct_core.metrics.SCORES`, those of :func:`.registry.training_cost` where something was trained,
        ``sample_seconds`` per patient from the x-rays to the volume, where the method does all of that, and
        ``samples``, of how many the mean is scored, where it draws any; and the slices.

    Raises:
        InputError: no such method, or not for these views.
    """
    method = get_method(name, view_set)
    ready = method.prepare(chapter, view_set, options or Options())
    test = chapter.patients("test", view_set)
    test = test.take(range(min(len(test), patients)))
    began = time.perf_counter()
    volumes = method.reconstruct(ready, chapter, test)
    seconds = (time.perf_counter() - began) / len(test)
    found = {key: spread(values) for key, values in score(volumes, test.unit(), test.volume, look).items()}
    once = training_cost(chapter, name, view_set) | ({} if method.reuses else {"sample_seconds": seconds})
    found |= {key: {"mean": value, "std": 0.0} for key, value in once.items()}
    entry = {"value": found["psnr"]["mean"], "unit": "dB", "n": len(test), "ids": list(test.ids), **found}
    entry["preset"] = chapter.preset.name
    if method.draws:
        entry["samples"] = chapter.preset.sampling.n_samples
    if isinstance(ready, dict):
        entry["tuned"] = ready
    return entry, middle_slices(unit_to_hu(volumes[0, 0], test.volume))


def compare(entries: dict[str, dict[str, Any]], reference: str = "difr3ct") -> dict[str, dict[str, Any]]:
    """Entries with ``against_REFERENCE``: a paired test against that method on the same patients, where there is one.

    Args:
        entries: ``COHORT/METHOD/VIEWS`` → entry of :func:`measure`.
        reference: a method.
    """
    found = {}
    for key, entry in entries.items():
        cohort, method, view_set = key.split("/")
        other = entries.get(f"{cohort}/{reference}/{view_set}")
        if method == reference or other is None or other["ids"] != entry["ids"] or len(other["ids"]) < 2:
            continue
        tests = {m: paired_test(entry[m]["patients"], other[m]["patients"]) for m in ("psnr", "ssim")}
        found[key] = {**entry, f"against_{reference}": tests}
    return found


def gather(
    chapter: Chapter, names: Sequence[str], view_sets: Sequence[str], patients: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Int16[np.ndarray, "3 n n"]]]:
    """Entries and pictures of several methods on the chapter's cohort, every method where it exists.

    Args:
        chapter, patients: as for :func:`measure`.
        names: methods.
        view_sets: names of the x-rays.

    Returns:
        ``COHORT/METHOD/VIEWS`` → entry; ``truth`` and ``METHOD_VIEWS`` → slices of the first test patient.
    """
    cohort = chapter.preset.cohort.cohort
    look = Perceptual(chapter.vgg16).to(chapter.device) if chapter.vgg16 is not None else None
    jobs = [(name, view_set) for view_set in view_sets for name in names if view_set in METHODS[name].view_sets]
    if not jobs:
        raise InputError(f"methods: none of {', '.join(names)} takes {', '.join(view_sets)}; choose other views.")
    pictures = {"truth": middle_slices(chapter.patients("test").hu[0].float())}
    entries = {}
    for name, view_set in progress(jobs, "methods"):
        key = f"{cohort}/{name}/{view_set}"
        entries[key], pictures[f"{name}_{view_set}"] = measure(chapter, name, view_set, patients, look)
    return {**entries, **compare(entries)}, pictures


def shipped_tables(
    folder: str | Path, preset: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Int16[np.ndarray, "3 n n"]], dict[str, str]] | None:
    """What ``benchmarks/tables.py`` measured at a preset and left in ``folder``, or None where it did not.

    Returns:
        entries of all cohorts, pictures of the cohort ``lung``, and where they are from (``command``, ``device``).
    """
    path = Path(folder) / "tables.json"
    if not path.exists():
        return None
    content = read_json(path)
    origin = content.pop("provenance")
    entries = {key: entry for key, entry in content.items() if entry["preset"].partition("-")[0] == preset}
    if not any(key.startswith("lung/") for key in entries):
        return None
    keys = origin.get("keys", {})
    devices = dict.fromkeys(keys[key]["device"] for key in entries if key in keys) or [origin["device"]]
    measured = {"command": "python benchmarks/tables.py", "device": " and ".join(devices)}
    return entries, read_npz(Path(folder) / "tables_lung.npz"), measured
