#!/usr/bin/env python3
"""Tables I and II: every method, every set of views, both cohorts, one protocol.

    python benchmarks/tables.py --preset small --device cuda
    python benchmarks/tables.py --preset small --cohorts thoracic --methods naf tv --views 2view --trained-only

Trains what is not trained (or skips it, with ``--trained-only``), reconstructs the test patients and writes, into
``results/tables.json``, one entry per cohort, method and views, such as ``lung/difr3ct/8view``. An entry holds, for
each metric, mean and standard deviation over the patients and the patients' own values:

- ``psnr`` (peak: width of the HU window, 2500), ``psnr_4095`` (peak 4095, "12-bit"), ``ssim`` (3D, 11³ Gaussian),
  ``mae_hu``, ``dice_lungs``, ``dice_bone`` (both from HU), ``sharpness`` (gradient energy, share of the truth's),
  ``perceptual`` (LPIPS, where VGG16 is there);
- ``train_minutes``, ``train_peak_gb`` (memory of the GPU if there is one; of the process otherwise), and
  ``sample_seconds`` per patient, from the x-rays to the volume;
- ``against_difr3ct``: mean difference of PSNR and SSIM on the same patients, with p by Wilcoxon's signed-rank test.

``value`` is the mean PSNR again. A run merges into the file: entries that it does not make stay. Slices of the first
patient go to ``results/tables_COHORT.npz`` as int16 HU (axial, coronal, sagittal), so that a figure needs no model.

Every method is prepared as its command line does, ``python -m difr3ct_core.baselines --method ...``. To get honest
peaks of memory on a CPU, where a process counts all that it did before, train that way first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import update_results

from difr3ct_core.baselines.__main__ import open_cohort
from difr3ct_core.baselines.registry import METHODS, Options, get_method, training_cost
from difr3ct_core.chapters import Chapter
from difr3ct_core.ct import unit_to_hu
from difr3ct_core.files import InputError, read_json, read_npz, write_npz
from difr3ct_core.metrics import paired_test, score
from difr3ct_core.presets import VIEW_SETS
from difr3ct_core.results import device_name
from difr3ct_core.training import TrainingError
from difr3ct_core.vqgan_losses import Perceptual

RESULTS = Path(__file__).parent / "results" / "tables.json"


def spread(values: torch.Tensor) -> dict[str, Any]:
    """Mean, standard deviation over patients (of a sample: n - 1), and the values."""
    deviation = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": deviation, "patients": [round(float(v), 4) for v in values]}


def trained(chapter: Chapter, name: str, view_set: str) -> bool:
    """Are all models of this method finished? True for methods without any."""
    paths = [chapter.weights(model) for model in METHODS[name].models(view_set)]
    return all((path if path.suffix else path / "weights.safetensors").exists() for path in paths)


def measure(
    chapter: Chapter, name: str, view_set: str, patients: int, look: Perceptual | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The entry of one method, and three slices of the first patient in HU."""
    method = get_method(name, view_set)
    ready = method.prepare(chapter, view_set, Options())
    test = chapter.patients("test", view_set)
    test = test.take(range(min(len(test), patients)))
    began = time.perf_counter()
    volumes = method.reconstruct(ready, chapter, test)
    seconds = (time.perf_counter() - began) / len(test)
    found = {key: spread(values) for key, values in score(volumes, test.unit(), test.volume, look).items()}
    once = {**training_cost(chapter, name, view_set), "sample_seconds": seconds}
    found |= {key: {"mean": value, "std": 0.0} for key, value in once.items()}
    entry = {"value": found["psnr"]["mean"], "unit": "dB", "n": len(test), "ids": list(test.ids), **found}
    if isinstance(ready, dict):
        entry["tuned"] = ready
    return entry, slices(unit_to_hu(volumes[0, 0], test.volume))


def slices(hu: torch.Tensor) -> np.ndarray:
    """Middle axial, coronal and sagittal slice as (3, n, n) int16."""
    middle = hu.shape[0] // 2
    return torch.stack([hu[middle], hu[:, middle], hu[:, :, middle]]).round().to(torch.int16).numpy()


def compare(content: dict[str, Any], keys: list[str]) -> dict[str, dict[str, Any]]:
    """The entries ``keys`` with their paired test against DIFR3CT's entry on the same patients, where that is known."""
    found = {}
    for key in keys:
        cohort, method, view_set = key.split("/")
        reference = content.get(f"{cohort}/difr3ct/{view_set}")
        if method == "difr3ct" or reference is None or reference["ids"] != content[key]["ids"]:
            continue
        if len(reference["ids"]) < 2:
            continue
        tests = {m: paired_test(content[key][m]["patients"], reference[m]["patients"]) for m in ("psnr", "ssim")}
        found[key] = {**content[key], "against_difr3ct": tests}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit code (2 for bad input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--cohorts", nargs="+", default=["lung", "thoracic"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--views", nargs="+", default=list(VIEW_SETS))
    parser.add_argument("--patients", type=int, default=32, help="test patients, at most (default 32)")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trained-only", action="store_true", help="skip what would have to be trained")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/tables.py", *given])
    try:
        for name in options.methods:
            if name not in METHODS:
                raise InputError(f"methods: found {name!r}, expected some of {', '.join(METHODS)}.")
        for cohort in options.cohorts:
            suffix = "" if cohort == "lung" else f"-{cohort}"
            run = options.runs / f"{options.preset}{suffix}"
            chapter = open_cohort(options.preset, cohort, options.data, run, options.seed, options.device)
            look = Perceptual(chapter.vgg16) if chapter.vgg16 is not None else None
            one = chapter.patients("test").take([0])
            truth = slices(one.hu[0])
            for view_set in options.views:
                for name in options.methods:
                    if view_set not in METHODS[name].view_sets:
                        continue
                    if options.trained_only and not trained(chapter, name, view_set):
                        print(f"{cohort}/{name}/{view_set}: not trained, left out")
                        continue
                    entry, pictures = measure(chapter, name, view_set, options.patients, look)
                    key = f"{cohort}/{name}/{view_set}"
                    print(f"{key:34s} {entry['value']:6.2f} dB  SSIM {entry['ssim']['mean']:.3f}", flush=True)
                    device = device_name(chapter.device)
                    update_results(options.out, {key: {**entry, "preset": options.preset}}, command, device)
                    shown = options.out.with_name(f"{options.out.stem}_{cohort}.npz")
                    before: dict[str, np.ndarray] = {}
                    with contextlib.suppress(InputError):  # the first of its file
                        before = read_npz(shown)
                    write_npz(shown, **{**before, "truth": truth, f"{name}_{view_set}": pictures})
        content = read_json(options.out)
        keys = [key for key in content if key.split("/")[0] in options.cohorts]
        if tested := compare(content, keys):
            update_results(options.out, tested, command, device_name(chapter.device))
    except (InputError, TrainingError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
