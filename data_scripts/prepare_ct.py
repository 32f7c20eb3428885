#!/usr/bin/env python3
"""Turn a folder of real CTs into a cohort that the chapters can train on: data/PRESET-lidc.

    python data_scripts/prepare_ct.py CT_FOLDER                            for preset paper: data/paper-lidc
    python data_scripts/prepare_ct.py CT_FOLDER OUT --preset small --workers 8
    make book PRESET=paper-lidc                                            the book on that cohort

All DICOM series and NIfTI files below CT_FOLDER, at any depth, are put on the preset's cube (1 mm, 320 mm, padded with
air) and x-rayed from its eight views. Several processes share the work. The split is by patient. A CT that cannot be
used is set aside with its reason and the rest goes on; OUT/quality.csv tells for every series what was cropped and
padded, missing slices, odd spacing, compression and rescaling. A killed run goes on where it stopped.

Exit status: 0 all done, 1 some series set aside, 2 the run could not begin or go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from difr3ct_core.files import InputError
from difr3ct_core.preparation import prepare_cohort, summary
from difr3ct_core.presets import PRESETS, REAL_COHORTS, get_preset


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of CTs")
    parser.add_argument("out", type=Path, nargs="?", help="folder of the cohort (default: data/PRESET-lidc)")
    parser.add_argument("--preset", default="paper", help=f"{', '.join(PRESETS)} (default paper)")
    parser.add_argument("--workers", type=int, help="processes; by default one per core")
    parser.add_argument("--patient", metavar="REGEX", help="finds the patient in the path of a NIfTI file")
    options = parser.parse_args(arguments)
    try:
        if options.workers is not None and options.workers < 1:
            raise InputError(f"--workers: found {options.workers}, expected at least 1.")
        name = options.preset if "-" in options.preset else f"{options.preset}-{REAL_COHORTS[0]}"
        preset = get_preset(name)
        out = options.out or Path("data") / preset.cohort_folder
        rows = prepare_cohort(options.folder, out, preset, options.workers, options.patient)
    except InputError as error:
        print(f"prepare_ct: {error}", file=sys.stderr)
        return 2
    aside = [row for row in rows if row["status"] == "set aside"]
    for row in aside:
        print(f"set aside: {row['source']}: {row['reason']}", file=sys.stderr)
    print(summary(out, rows))
    return 1 if aside else 0


if __name__ == "__main__":
    sys.exit(main())
