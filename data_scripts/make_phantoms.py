#!/usr/bin/env python3
"""Make the synthetic phantom cohort of a preset: CTs, organ labels and x-rays, split by patient.

    python data_scripts/make_phantoms.py --preset tiny --out data/tiny-lung

A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from difr3ct_core.datasets import make_cohort
from difr3ct_core.files import InputError
from difr3ct_core.presets import PRESETS, REAL_COHORTS, get_preset


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help=f"{', '.join(PRESETS)}, NAME-COHORT, or a JSON file")
    parser.add_argument("--cohort", choices=["lung", "thoracic", "intact"], help="by default the preset's")
    parser.add_argument("--out", type=Path, help="by default data/PRESET-COHORT")
    parser.add_argument("--first", type=int, help="number of the first training phantom (default 0)")
    parser.add_argument("--workers", type=int, help="processes; by default one per core")
    options = parser.parse_args(arguments)
    try:
        preset = get_preset(options.preset)
        if options.cohort:
            preset = preset.replace(cohort={"cohort": options.cohort})
        folder = make_cohort(options.out or Path("data") / preset.cohort_folder, preset, options.workers, options.first)
    except InputError as error:
        print(f"make_phantoms: {error}", file=sys.stderr)
        return 2
    c = preset.cohort
    if c.cohort in REAL_COHORTS:
        print(f"{folder}: real scans, prepared before.")
        return 0
    print(f"{folder}: {c.n_train} training, {c.n_val} validation and {c.n_test} test phantoms, {preset.volume.size}³.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
