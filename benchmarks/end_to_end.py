"""Copy what a finished run of the book measured into ``benchmarks/results/end_to_end.json``.

    python benchmarks/end_to_end.py [--preset tiny] [--run runs/tiny] [--out benchmarks/results/end_to_end.json]

Nothing is computed here: PSNRs come from the saved results of chapters 04 and 05, times and memory from the records of
``make book`` and ``make test``. Each figure keeps the commit, device and moment of its own measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _results import update_results

from difr3ct_core.files import InputError, read_json
from difr3ct_core.results import Result, load_result

ROOT = Path(__file__).resolve().parents[1]
#: Key of the figures file -> saved result of the book that holds it.
SOURCES = {
    **{
        f"psnr_{key}": "end_to_end"
        for key in (
            *("8view", "2view", "1view", "mean_volume"),
            *("classical_8view", "classical_2view", "classical_1view", "wrong_xrays_8view"),
        )
    },
    "psnr_dpm20": "steps_and_quality",
    "psnr_ddpm1000": "steps_and_quality",
}


def quality(run: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """PSNRs of a run with where each is from, and the device.

    Raises:
        InputError: a chapter has not run, or its result lacks a figure.
    """
    results: dict[str, Result] = {name: load_result(run / "results", name) for name in set(SOURCES.values())}
    figures = {}
    for key, name in SOURCES.items():
        result = results[name]
        if key not in result.values:
            raise InputError(f"{run / 'results' / name}.json: lacks {key!r}, expected it there; run its chapter again.")
        origin = result.provenance
        figures[key] = {
            "value": round(float(result.values[key]), 3),
            "unit": "dB",
            "patients": result.values["n_patients"],
            "samples": result.values["n_samples"],
            "measured": {name: origin[name] for name in ("commit", "device", "preset", "seed", "finished", "chapter")},
        }
    return figures, results["end_to_end"].provenance["device"]


def cost(build: Path, preset: str) -> dict[str, dict[str, Any]]:
    """Minutes and memory of the last run from scratch, as far as they were recorded."""
    figures: dict[str, dict[str, Any]] = {}
    state = build / "state.json"
    whole = read_json(state).get(preset, {}).get("whole_run") if state.exists() else None
    if whole:
        figures["book_minutes"] = {"value": whole["minutes"], "unit": "min"}
        figures["peak_gb"] = {"value": whole["peak_gb"], "unit": "GB"}
    if (build / "tests.json").exists():
        figures["test_minutes"] = {"value": read_json(build / "tests.json")["minutes"], "unit": "min"}
    return figures


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--run", type=Path, help="run folder of the book (default: runs/PRESET)")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where make book keeps its records")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "end_to_end.json")
    options = parser.parse_args(arguments)
    try:
        figures, device = quality(options.run or ROOT / "runs" / options.preset)
        figures |= cost(options.build, options.preset)
        update_results(options.out, figures, command="make book && python benchmarks/end_to_end.py", device=device)
    except InputError as error:
        print(f"end_to_end: {error}", file=sys.stderr)
        return 2
    for key, figure in figures.items():
        print(f"{key:24} {figure['value']:8.2f} {figure['unit']}")
    for key in ("book_minutes", "peak_gb", "test_minutes"):
        if key not in figures:
            print(f"{key:24} not recorded: run `make {'test' if key == 'test_minutes' else 'book'}` from scratch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
