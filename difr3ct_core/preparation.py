"""A folder of real CTs → a cohort: found, checked, split by patient, put on the preset's cube, x-rayed.

A prepared cohort is read by :func:`difr3ct_core.datasets.load_patients` like one of phantoms::

    preparation.json            the numbers it is made with, and the split of every patient; written first
    patients/ID/ct.npz          hu int16 (z, y, x), labels uint8 (z, y, x): zeros where none came with the CT
    patients/ID/xrays.npz       line_integrals float32 (view, v, u), the eight views of the preset
    patients/ID/quality.json    what was found and done; written last, so it says that the scan is finished
    quality.csv                 the same for all series, one a row, those that were set aside with their reason
    manifest.json               the scans that can be used, with patient and split; written at the very end

Each scan depends on its own files only and is computed by one thread, so a run that was killed and goes on, or runs on
more cores, ends in the same bytes.

**Splits.** A *patient* falls into a split, never a scan: several scans of one person stay together. The shares are
those of the preset (868 : 50 : 100 at `paper`, §V-A), the order is a hash of the patient's name. Whoever was assigned
once keeps the split when patients are added later. LIDC-IDRI-0001, the test patient of the book, is always tested.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import multiprocessing
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import ct
from .ct_io import nifti_facts
from .ct_series import Series, distinct_files, find_series, series_facts
from .datasets import SPLITS, preset_views, render_xrays
from .files import InputError, alone_in, atomic_path, read_json, write_json, write_npz
from .geometry import views_to_json
from .presets import REAL_COHORTS, CohortPreset, Preset
from .progress import progress
from .workers import run_jobs

STATE, QUALITY = "preparation.json", "quality.csv"
#: Patients that are never trained on, whatever the draw.
TEST_PATIENTS = ("LIDC-IDRI-0001",)
#: Columns of the quality report, in this order.
COLUMNS = (
    "id", "patient", "split", "source", "series", "status", "reason", "slices", "missing_slices", "copies_left_out",
    "spacing_x_mm", "spacing_y_mm", "spacing_z_mm", "odd_spacing", "gantry_tilt_deg", "transfer_syntax", "compressed",
    "rescale_slope", "rescale_intercept",
    *(f"{what}_{side}_mm" for what in ("cropped", "padded") for sides in ct.SIDES for side in sides),
    "body_cropped_share", "clipped_high_share", "warnings",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One series to prepare."""

    series: Series
    split: str
    source: Path
    out: Path
    preset: Preset

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.out / "patients" / self.series.id


def assign_splits(
    patients: Iterable[str], cohort: CohortPreset, known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A split for every patient.

    Args:
        patients: their names; the order does not matter.
        cohort: shares of the splits and the seed.
        known: earlier assignments, which stay.

    Returns:
        patient → "train", "val" or "test". With three patients or more, none of them is empty.
    """
    splits = dict(known or {})
    names = sorted(set(patients) | set(splits))
    whole = cohort.n_train + cohort.n_val + cohort.n_test
    wanted = {
        "test": max(1, round(len(names) * cohort.n_test / whole)) if len(names) > 1 else 0,
        "val": max(1, round(len(names) * cohort.n_val / whole)) if len(names) > 2 else 0,
    }
    found = Counter(splits.values())

    def order(name: str) -> tuple[bool, str]:
        return name not in TEST_PATIENTS, hashlib.sha256(f"{cohort.seed}/{name}".encode()).hexdigest()

    for name in sorted(set(names) - set(splits), key=order):
        short = [split for split in ("test", "val") if found[split] < wanted[split]]
        splits[name] = "test" if name in TEST_PATIENTS else short[0] if short else "train"
        found[splits[name]] += 1
    return dict(sorted(splits.items()))


def cohort_key(preset: Preset) -> dict[str, Any]:
    """What decides the content of a prepared cohort's files."""
    return {
        "volume": dataclasses.asdict(preset.volume),
        "xray": dataclasses.asdict(preset.xray),
        "cohort": {"cohort": preset.cohort.cohort, "seed": preset.cohort.seed},
    }


def prepare_cohort(
    source: str | Path, out: str | Path, preset: Preset, workers: int | None = None, patient_pattern: str | None = None
) -> list[dict[str, Any]]:
    """Prepare every CT below a folder, or complete what an earlier call began.

    Args:
        source: folder with DICOM series and NIfTI files, at any depth; see :func:`difr3ct_core.ct_series.find_series`.
        out: folder of the cohort.
        preset: grid, window, x-rays, shares of the splits; its cohort is one of
            :data:`difr3ct_core.presets.REAL_COHORTS`.
        workers: processes; None for one per core.
        patient_pattern: see :func:`difr3ct_core.ct_series.find_series`.

    Returns:
        the rows of the quality report; ``status`` is "made", "kept" or "set aside".

    Raises:
        InputError: no CT there, ``out`` holds another cohort or is in use, or there is no room.
    """
    source, out = Path(source), Path(out)
    if preset.cohort.cohort not in REAL_COHORTS:
        raise InputError(f"cohort: found {preset.cohort.cohort!r}, expected one of {', '.join(REAL_COHORTS)}.")
    series = find_series(source, out, patient_pattern)
    with alone_in(out, "the other preparation"):
        splits = _begin(out, preset, series)
        jobs = [Job(one, splits[one.patient], source, out, preset) for one in series]
        rows: dict[str, dict[str, Any]] = {}
        for job in jobs:
            if (row := _finished(job)) is not None:
                rows[job.series.id] = {**row, "status": "kept"}
        missing = [job for job in jobs if job.series.id not in rows]
        _require_room(out, preset, len(missing))
        done = run_jobs(_prepare, missing, workers or multiprocessing.cpu_count())
        for job, outcome in progress(done, "preparing CTs", len(jobs), len(rows)):
            row, fatal = outcome or (_set_aside(job, "the process was killed; is there enough memory?"), None)
            if fatal is not None:
                raise InputError(fatal)
            rows[job.series.id] = row
        ordered = [rows[job.series.id] for job in jobs]
        _write_report(out, ordered)
        usable = [row for row in ordered if row["status"] != "set aside"]
        manifest = {
            "source": f"CTs prepared by difr3ct_core.preparation, cohort {preset.cohort.cohort}",
            "key": cohort_key(preset),
            "views": views_to_json(preset_views(preset)),
            "patients": [{name: row[name] for name in ("id", "patient", "split")} for row in usable],
        }
        write_json(out / "manifest.json", manifest)
    return ordered


def _begin(out: Path, preset: Preset, series: list[Series]) -> dict[str, str]:
    """Check that the folder is ours, and note the splits before any scan is written."""
    state, known, key = out / STATE, {}, cohort_key(preset)
    if state.exists():
        found = read_json(state, "the state of a preparation")
        if not isinstance(found, dict) or found.get("key") != key or not isinstance(found.get("splits"), dict):
            raise InputError(
                f"{out}: holds a cohort made with other numbers than preset {preset.name!r} has; choose another folder "
                "or remove this one."
            )
        known = found["splits"]
    elif (out / "manifest.json").exists():
        raise InputError(f"{out}: holds another cohort, expected an empty folder or a prepared one; choose another.")
    splits = assign_splits((one.patient for one in series), preset.cohort, known)
    write_json(state, {"key": key, "splits": splits})
    return splits


def _require_room(out: Path, preset: Preset, count: int) -> None:
    pixels = len(preset_views(preset)) * preset.xray.detector_size**2
    need = count * (3 * preset.volume.size**3 + 4 * pixels)  # as if nothing could be compressed
    free = shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"{out}: has room for {free / 1e9:.1f} GB, expected {need / 1e9:.1f} GB for {count} scans; free some space "
            "or choose another folder."
        )


def fingerprint(job: Job) -> dict[str, Any]:
    """What changes when a series is replaced: number, size and age of its files."""
    stats = [Path(name).stat() for name in job.series.files]
    return {
        "files": len(stats),
        "bytes": sum(s.st_size for s in stats),
        "newest_ns": max((s.st_mtime_ns for s in stats), default=0),
    }


def _finished(job: Job) -> dict[str, Any] | None:
    """The row of a series that is prepared already; None if it is not, or its files have changed since."""
    if job.series.problem or not all((job.folder / n).exists() for n in ("ct.npz", "xrays.npz", "quality.json")):
        return None
    try:
        record = read_json(job.folder / "quality.json")
        same = record["fingerprint"] == fingerprint(job) and set(record["row"]) <= set(COLUMNS)
        return {**record["row"], "split": job.split} if same else None
    except (InputError, KeyError, TypeError):
        return None


def _row(job: Job) -> dict[str, Any]:
    first = Path(job.series.files[0]) if job.series.files else job.source
    place = first if len(job.series.files) == 1 else first.parent
    relative = place.relative_to(job.source) if place.is_relative_to(job.source) else place
    names = {"id": job.series.id, "patient": job.series.patient, "split": job.split}
    return {**names, "source": str(relative), "series": job.series.uid, "status": "made", "reason": ""}


def _set_aside(job: Job, reason: str, **facts: Any) -> dict[str, Any]:
    return {**_row(job), **facts, "status": "set aside", "reason": reason}


def _prepare(job: Job) -> tuple[dict[str, Any], str | None]:
    """The row of one series, and why the whole run must end (nothing can be written), if so."""
    facts: dict[str, Any] = {}
    try:
        # One bar is enough: that of reading slices would run through it.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = fingerprint(job)
            hu, labels, xrays = _compute(job, facts)
    except InputError as error:
        return _set_aside(job, str(error), **facts), None
    except Exception as error:  # one CT must not end the run of a thousand
        return _set_aside(job, f"{type(error).__name__}: {error}", **facts), None
    facts["warnings"] = " | ".join(sorted({str(w.message) for w in caught if issubclass(w.category, ct.CTWarning)}))
    row = {**_row(job), **facts}
    try:
        (job.folder / "quality.json").unlink(missing_ok=True)  # of an earlier version of this series
        write_npz(job.folder / "ct.npz", hu=hu, labels=labels)
        write_npz(job.folder / "xrays.npz", line_integrals=xrays)
        write_json(job.folder / "quality.json", {"fingerprint": source, "row": row})
    except (InputError, OSError) as error:
        return row, str(error)
    return row, None


def _compute(job: Job, facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU, labels and x-rays; ``facts`` is filled on the way, so that it is known also where a later step fails."""
    preset, series = job.preset, job.series
    if series.problem:
        raise InputError(series.problem)
    if series.is_nifti:
        facts |= nifti_facts(series.files[0])
        scan = ct.read_ct(series.files[0])
    else:
        files = distinct_files(series.files)
        facts |= {**series_facts(files), "copies_left_out": len(series.files) - len(files)}
        scan = ct.read_ct(Path(files[0]).parent, series.uid, files)
    prepared = ct.prepare_ct(scan, preset.volume)
    report = prepared.report
    facts |= {f"cropped_{side}_mm": mm for side, mm in report.cropped_mm.items()}
    facts |= {f"padded_{side}_mm": mm for side, mm in report.padded_mm.items()}
    facts |= {name: round(getattr(report, name), 6) for name in ("body_cropped_share", "clipped_high_share")}
    hu = prepared.hu.clamp(preset.volume.hu_min, preset.volume.hu_max).round().to(torch.int16)
    labels = torch.zeros(preset.volume.shape, dtype=torch.uint8)
    if series.labels:
        found = ct.prepare_labels(ct.read_labels(series.labels), prepared)
        if found.max() > 255:
            raise InputError(
                f"{series.labels}: holds label {int(found.max())}, expected 0 to 255; renumber the organs."
            )
        labels = found.to(torch.uint8)
    xrays = render_xrays(hu.float()[None], preset_views(preset), preset.volume, preset.xray)[0]
    return hu.numpy(), labels.numpy(), xrays.numpy().astype(np.float32)


def _write_report(out: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    # Whether a scan was made in this call or before says nothing about its quality.
    writer.writerows({**row, "status": "set aside" if row["status"] == "set aside" else "ok"} for row in rows)
    with atomic_path(out / QUALITY) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def summary(out: str | Path, rows: list[dict[str, Any]]) -> str:
    """One line on a preparation."""
    count = Counter(row["status"] for row in rows)
    usable = [row for row in rows if row["status"] != "set aside"]
    persons = {split: len({row["patient"] for row in usable if row["split"] == split}) for split in SPLITS}
    return (
        f"{out}: {len(rows)} series: {count['made']} prepared, {count['kept']} kept from before, "
        f"{count['set aside']} set aside ({QUALITY}); {sum(persons.values())} patients: "
        + ", ".join(f"{number} {split}" for split, number in persons.items())
        + "."
    )
