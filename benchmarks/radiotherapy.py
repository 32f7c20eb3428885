"""Measured figures of the radiotherapy study → benchmarks/results/rt.json.

    python benchmarks/radiotherapy.py contours            # Dice on the real scan, if it was fetched
    python benchmarks/radiotherapy.py dicom               # what dciodvfy says of an exported study (dicom3tools)
    python benchmarks/radiotherapy.py study --preset small --run runs/small   # from the results that chapter 07 saved

``study`` reads what ``make run CHAPTER=07 PARAMS="n_patients=5 trained_on=thoracic"`` left in RUN/results, so no figure
is typed by hand. Figures of a model of another cohort than ``thoracic`` end in its name.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _results import update_results

from difr3ct_core.ct import prepare_ct, prepare_labels, sample_ct, sample_labels
from difr3ct_core.ct_io import CTVolume, LabelVolume
from difr3ct_core.files import InputError
from difr3ct_core.phantoms import make_phantom
from difr3ct_core.presets import VolumePreset
from difr3ct_core.radiotherapy import (
    PHANTOM,
    TOTALSEGMENTATOR,
    add_target,
    contour_ct,
    dice,
    get_prescription,
    resample_ct,
    resample_structures,
    structures_from_labels,
)
from difr3ct_core.results import load_result

RESULTS = Path(__file__).parent / "results" / "rt.json"


def measure_contours(data: Path, size: int = 64) -> dict[str, dict]:
    """Dice of lungs and heart on LIDC-IDRI-0001 on the planning grid (5 mm at 64³), against TotalSegmentator."""
    scan, labels = sample_ct(data), sample_labels(data)
    if scan is None or labels is None:
        raise InputError(f"{data}: holds no real scan, expected data_scripts/fetch_sample_ct.py to have brought it.")
    prepared = prepare_ct(scan, VolumePreset(size))
    truth = structures_from_labels(
        LabelVolume(prepare_labels(labels, prepared).to(torch.uint8), prepared.affine), TOTALSEGMENTATOR
    )
    drawn = contour_ct(CTVolume(prepared.hu, prepared.affine, "LIDC-IDRI-0001"))
    lungs = dice(drawn["lung_left"] | drawn["lung_right"], truth["lung_left"] | truth["lung_right"])
    return {
        "dice_lungs_real": {"value": lungs, "unit": "1", "grid": f"{size}³ of 320 mm"},
        "dice_heart_real": {"value": dice(drawn["heart"], truth["heart"]), "unit": "1", "grid": f"{size}³ of 320 mm"},
    }


def measure_dicom() -> dict[str, dict]:
    """Errors that dciodvfy finds in RTSTRUCT, RTPLAN and RTDOSE of one planned phantom; an abort is one error."""
    from difr3ct_core.radiotherapy.dicom import write_dicom_rt
    from difr3ct_core.radiotherapy.dose import plan_on

    if shutil.which("dciodvfy") is None:
        raise InputError("dciodvfy: is not installed, expected the Debian package dicom3tools.")
    phantom = make_phantom(70_000, 64, "intact")
    ct = resample_ct(CTVolume(phantom.hu, phantom.affine, "phantom"), 5.0)
    labels = structures_from_labels(LabelVolume(phantom.labels, phantom.affine), PHANTOM)
    structures = resample_structures(labels, ct)
    plan, dose = plan_on(ct, structures, "left", get_prescription("40.05/15"))
    errors = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in write_dicom_rt(folder, plan, add_target(structures, "left"), dose).values():
            done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True)
            lines = (done.stdout + done.stderr).splitlines()
            errors += sum(line.startswith("Error") for line in lines) + (done.returncode < 0)
    return {"dciodvfy_errors": {"value": errors, "unit": "errors"}}


def read_study(run: Path, n_patients: int = 5) -> dict[str, dict]:
    """The table of chapter 07."""
    values = load_result(run / "results", "rt_protocols").values
    if len(values["patients"]) != n_patients:
        raise InputError(
            f"{run}: its study has {len(values['patients'])} patients, expected {n_patients}: "
            f'make run CHAPTER=07 PARAMS="n_patients={n_patients}".'
        )
    # The paper's shift, trained after mastectomy and planned with both breasts, has the plain names.
    cohort = values["cohort"]
    end = "" if cohort == "thoracic" else f"_{cohort}"
    figures = {f"plannable{end}": {"value": values["plannable"], "unit": f"of {n_patients}", "trained_on": cohort}}
    for metric in ("v90", "v20_lung"):
        for key in ("own", "true"):
            value = values[f"{metric}_error_median_{key}"]
            if value is not None:
                figures[f"{metric.removesuffix('_lung')}_error_median_{key}{end}"] = {
                    "value": value,
                    "unit": "percentage points",
                    "trained_on": cohort,
                }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("contours", "dicom", "study"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--preset", default="small", help="of the study, for its default folder")
    parser.add_argument("--run", type=Path, help="folder of the study (default: runs/PRESET)")
    parser.add_argument("--minutes", type=float, help="with `study`: wall time of chapter 07, as `make run` showed it")
    arguments = parser.parse_args()
    try:
        if arguments.what == "contours":
            figures = measure_contours(arguments.data)
        elif arguments.what == "dicom":
            figures = measure_dicom()
        else:
            figures = read_study(arguments.run or Path("runs") / arguments.preset)
            if arguments.minutes is not None:
                figures["chapter_minutes"] = {"value": arguments.minutes, "unit": "min", "preset": arguments.preset}
        update_results(RESULTS, figures, "python benchmarks/radiotherapy.py " + " ".join(sys.argv[1:]))
    except InputError as error:
        print(f"radiotherapy: {error}", file=sys.stderr)
        return 1
    for key, figure in figures.items():
        print(f"{key}: {figure['value']:.3g} {figure['unit']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
