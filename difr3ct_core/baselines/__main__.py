"""Train a method, or load it if it is trained, and score it on held-out patients.

python -m difr3ct_core.baselines --method inrr3ct --views 2view --preset tiny
python -m difr3ct_core.baselines --method x2ctgan --views 2view --preset small --device cuda --score test
accelerate launch -m difr3ct_core.baselines --method diffusion3d --views 8view --preset paper --set accumulate=4
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .. import processes
from ..chapters import Chapter
from ..checks import pick_device
from ..files import InputError
from ..metrics import SCORES, score
from ..presets import VIEW_SETS, get_preset
from ..training import TrainingError
from .registry import METHODS, Options, get_method, training_cost


def open_cohort(preset_name: str, cohort: str, data: Path, run: Path | None, seed: int, device: str) -> Chapter:
    """Data and models of one cohort of a preset: runs/PRESET for ``lung``, runs/PRESET-COHORT for another.

    Raises:
        InputError: unknown preset, cohort or device.
    """
    if cohort not in ("lung", "thoracic"):
        raise InputError(f"cohort: found {cohort!r}, expected 'lung' or 'thoracic'.")
    # The cohort is part of the preset's name, so that the weights of one cohort are never taken for another.
    preset = get_preset(preset_name if cohort == "lung" else f"{preset_name}-{cohort}")
    chapter = Chapter("baselines", preset, data, run or Path("runs") / preset.name, seed, pick_device(device))
    chapter.shipped = False  # weights that ship may have seen other patients than these data hold
    return chapter


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (2 for bad input)."""
    parser = argparse.ArgumentParser(
        prog="python -m difr3ct_core.baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", required=True, help=", ".join(METHODS))
    parser.add_argument("--views", default="2view", help=f"{', '.join(VIEW_SETS)} (default 2view)")
    parser.add_argument("--preset", default="tiny", help="tiny (default), small or paper")
    parser.add_argument("--cohort", default="lung", help="lung (default) or thoracic")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the cohorts")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/PRESET, or runs/PRESET-COHORT)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--stop-after", type=int, help="leave after so many steps; the next call goes on")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the training")
    parser.add_argument("--weights", type=Path, help="run folder or weights of the same method to begin with")
    parser.add_argument("--score", choices=("none", "val", "test"), default="val", help="patients (default val)")
    parser.add_argument("--patients", type=int, default=16, help="at most so many (default 16)")
    options = parser.parse_args(arguments)
    try:
        method = get_method(options.method, options.views)
        if options.patients < 1:
            raise InputError(f"patients: found {options.patients}, expected 1 or more.")
        processes.connect()
        device = str(processes.own_device(pick_device(options.device)))
        chapter = open_cohort(options.preset, options.cohort, options.data, options.run, options.seed, device)
        ready = method.prepare(chapter, options.views, Options(options.stop_after, options.set, options.weights))
        if options.score == "none" or options.stop_after is not None or processes.rank() > 0:
            return 0
        patients = chapter.patients(options.score, options.views)
        patients = patients.take(range(min(len(patients), options.patients)))
        began = time.monotonic()
        volumes = method.reconstruct(ready, chapter, patients)
        seconds = (time.monotonic() - began) / len(patients)
        print(f"{method.title}, {options.views}, {len(patients)} {options.score} patients, {seconds:.2f} s each:")
        for name, values in score(volumes, patients.unit(), chapter.preset.volume).items():
            spread = float(values.std()) if len(values) > 1 else 0.0
            print(f"  {name:12s} {float(values.mean()):9.3f} ± {spread:.3f} {SCORES[name]}")
        for name, value in training_cost(chapter, options.method, options.views).items():
            print(f"  {name:12s} {value:9.3f}")
    except (InputError, TrainingError) as error:
        if processes.rank() == 0:
            print(f"baselines: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
