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
- ``samples``, of a diffusion model: how many, of which the mean is scored;
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
from pathlib import Path

import numpy as np
from _results import update_results

from difr3ct_core.baselines.__main__ import open_cohort
from difr3ct_core.baselines.registry import METHODS
from difr3ct_core.baselines.tables import compare, is_trained, measure, middle_slices
from difr3ct_core.files import InputError, read_json, read_npz, write_npz
from difr3ct_core.presets import VIEW_SETS
from difr3ct_core.results import device_name
from difr3ct_core.training import TrainingError
from difr3ct_core.vqgan_losses import Perceptual

RESULTS = Path(__file__).parent / "results" / "tables.json"


def main(arguments: list[str] | None = None) -> int:
    """Measure; returns the exit code (2 for bad input)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--cohorts", nargs="+", default=["lung", "thoracic"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--views", nargs="+", default=list(VIEW_SETS))
    parser.add_argument("--patients", type=int, default=32, help="test patients, at most (default 32)")
    parser.add_argument("--samples", type=int, help="whose mean is scored, of a diffusion model (default: preset)")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trained-only", action="store_true", help="skip what would have to be trained")
    parser.add_argument(
        "--shipped", action="store_true", help="DIFR3CT by the weights of pretrained/ where a run has none of its own"
    )
    parser.add_argument("--no-perceptual", action="store_true", help="leave LPIPS out: minutes a row on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python benchmarks/tables.py", *given])
    try:
        for name in options.methods:
            if name not in METHODS:
                raise InputError(f"methods: found {name!r}, expected some of {', '.join(METHODS)}.")
        if options.samples is not None and options.samples < 1:
            raise InputError(f"samples: found {options.samples}, expected at least 1.")
        for cohort in options.cohorts:
            suffix = "" if cohort == "lung" else f"-{cohort}"
            run = options.runs / f"{options.preset}{suffix}"
            chapter = open_cohort(options.preset, cohort, options.data, run, options.seed, options.device)
            chapter.shipped = options.shipped
            if options.samples is not None:
                chapter.preset = chapter.preset.replace(sampling={"n_samples": options.samples})
            look = None
            if chapter.vgg16 is not None and not options.no_perceptual:
                look = Perceptual(chapter.vgg16).to(chapter.device)
            one = chapter.patients("test").take([0])
            truth = middle_slices(one.hu[0])
            for view_set in options.views:
                for name in options.methods:
                    if view_set not in METHODS[name].view_sets:
                        continue
                    if options.trained_only and not is_trained(chapter, name, view_set):
                        print(f"{cohort}/{name}/{view_set}: not trained, left out")
                        continue
                    entry, pictures = measure(chapter, name, view_set, options.patients, look)
                    key = f"{cohort}/{name}/{view_set}"
                    print(f"{key:34s} {entry['value']:6.2f} dB  SSIM {entry['ssim']['mean']:.3f}", flush=True)
                    device = device_name(chapter.device)
                    update_results(options.out, {key: entry}, command, device)
                    shown = options.out.with_name(f"{options.out.stem}_{cohort}.npz")
                    before: dict[str, np.ndarray] = {}
                    with contextlib.suppress(InputError):  # the first of its file
                        before = read_npz(shown)
                    write_npz(shown, **{**before, "truth": truth, f"{name}_{view_set}": pictures})
        content = read_json(options.out)
        of_cohorts = {key: entry for key, entry in content.items() if key.split("/")[0] in options.cohorts}
        if tested := compare(of_cohorts):
            update_results(options.out, tested, command, device_name(chapter.device), measured=False)
    except (InputError, TrainingError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
