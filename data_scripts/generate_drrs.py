#!/usr/bin/env python3
"""Turn a folder of CTs into x-rays: one folder per CT, with PNG (16 bit) or NPZ and a views.json beside them.

    python data_scripts/generate_drrs.py CT_FOLDER OUT --preset small --views 2view
    python data_scripts/generate_drrs.py CT_FOLDER OUT --views 0,30,60,90 --mode cone --i0 1e5 --blur-mm 0.5

A CT is a NIfTI file, or a folder of DICOM slices, at any depth; labels (names with "label", "mask" or "seg") are left
out. Several processes share the work. A killed run goes on where it stopped: what is finished is kept, and done again
only if its CT has changed. A CT that cannot be used is set aside with its reason in OUT/report.json, and the run goes
on. Exit status: 0 all done, 1 some CT set aside, 2 nothing was started because the arguments do not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from difr3ct_core.ct import hu_to_mu, prepare_ct, read_ct
from difr3ct_core.detector import Detector, detect, jitter_views
from difr3ct_core.drr import project
from difr3ct_core.files import InputError, read_json, write_json
from difr3ct_core.geometry import View, standard_views, views_to_json
from difr3ct_core.presets import PRESETS, VIEW_SETS, Preset, get_preset
from difr3ct_core.progress import progress
from difr3ct_core.results import provenance
from difr3ct_core.views import DSD_MM, DSO_MM
from difr3ct_core.workers import run_jobs
from difr3ct_core.xrays import VIEWS_FILE, write_xrays

_NOT_A_CT = ("label", "mask", "seg")
_SUFFIXES = (".nii.gz", ".nii")
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """All that decides how the x-rays look."""

    preset: Preset
    views: tuple[View, ...]
    detector: Detector
    jitter_angle_deg: float
    jitter_shift_mm: float
    centre: str
    backend: str
    file_format: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """As JSON types; infinity, which JSON does not know, as null."""
        detector = {name: None if value == math.inf else value for name, value in asdict(self.detector).items()}
        values = {
            "preset": self.preset.name,
            "volume": asdict(self.preset.volume),
            "mu_water_per_mm": self.preset.xray.mu_water_per_mm,
            "views": views_to_json(self.views),
            "detector": detector,
            "jitter": {"angle_deg": self.jitter_angle_deg, "shift_mm": self.jitter_shift_mm},
            "centre": self.centre,
            "backend": self.backend,
            "format": self.file_format,
            "seed": self.seed,
        }
        return json.loads(json.dumps(values))  # tuples as lists, so that it compares with what was read back


@dataclass(frozen=True)
class Job:
    """One CT to project."""

    name: str
    source: Path
    out: Path
    settings: Settings


def find_cts(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every CT below ``folder``: NIfTI files, and folders that hold DICOM slices themselves."""
    if _holds_dicom(folder):
        yield folder.name, folder
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if _holds_dicom(path):
                yield path.name, path
            else:
                yield from ((f"{path.name}__{name}", found) for name, found in find_cts(path))
            continue
        suffix = next((s for s in _SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix and not any(word in path.name.lower() for word in _NOT_A_CT):
            yield path.name[: -len(suffix)], path


def _holds_dicom(folder: Path) -> bool:
    """Whether a file in the folder itself has the DICOM mark. A few files tell; a slice may be damaged."""
    plain = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    candidates = [p for p in plain if not p.name.lower().endswith((*_SUFFIXES, ".json", ".csv", ".png", ".txt"))]
    for path in candidates[:5]:
        with open(path, "rb") as handle:
            if handle.read(132)[128:] == b"DICM":
                return True
    return False


def fingerprint(source: Path) -> dict[str, Any]:
    """What changes when a CT is replaced: number, size and age of its files."""
    files = [p for p in source.rglob("*") if p.is_file()] if source.is_dir() else [source]
    stats = [p.stat() for p in files]
    return {
        "path": str(source),
        "files": len(files),
        "bytes": sum(s.st_size for s in stats),
        "newest_ns": max(s.st_mtime_ns for s in stats),
    }


def is_finished(job: Job) -> bool:
    """Whether the x-rays of this CT are all there. The JSON is written last, so it decides."""
    path = job.out / VIEWS_FILE
    if not path.exists():
        return False
    try:
        record = read_json(path)
        return record["source"] == fingerprint(job.source) and all(
            (job.out / name).exists() for name in record["files"]
        )
    except (InputError, KeyError, TypeError):
        return False


def make_xrays(job: Job) -> list[str]:
    """CT → x-rays on disk. Returns the warnings that came up.

    Raises:
        InputError: the CT cannot be used.
    """
    s, volume = job.settings, job.settings.preset.volume
    source = fingerprint(job.source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepared = prepare_ct(read_ct(job.source), volume, s.centre)
        # A seed of its own for every CT, so that the order of the work does not matter.
        digest = hashlib.sha256(f"{s.seed}/{job.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        true_views = jitter_views(s.views, s.jitter_angle_deg, s.jitter_shift_mm, generator)
        mu = hu_to_mu(prepared.hu, s.preset.xray.mu_water_per_mm)[None, None]
        images = project(mu, true_views, volume.spacing_mm, drr_backend=s.backend)
        images = detect(images, true_views, s.detector, generator)[0, 0]
    notes = sorted(
        {str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, ResourceWarning))}
    )
    meta = {
        "patient": job.name,
        "source": source,
        "settings": s.to_json(),
        "affine_lps": prepared.affine.tolist(),
        "prepared": prepared.report.to_dict(),
        "warnings": notes,
    }
    if true_views != s.views:
        meta["true_views"] = views_to_json(true_views)["views"]
    write_xrays(job.out, images, s.views, s.file_format, meta)
    return notes


def _try(job: Job) -> tuple[list[str], str | None]:
    """Warnings and, if the CT had to be set aside, the reason."""
    try:
        # One bar is enough: that of reading slices would run through it.
        with contextlib.redirect_stderr(io.StringIO()):
            return make_xrays(job), None
    except InputError as error:
        return [], str(error)
    except Exception as error:  # one CT must not end the run of a thousand
        return [], f"{type(error).__name__}: {error}"


def parse_views(options: argparse.Namespace, preset: Preset) -> tuple[View, ...]:
    """The views from ``--views``: the name of a set, or angles in degrees."""
    angles: str | list[float] = options.views
    if angles not in VIEW_SETS:
        try:
            angles = [float(angle) for angle in options.views.split(",")]
        except ValueError:
            raise InputError(
                f"--views: found {options.views!r}, expected one of {', '.join(VIEW_SETS)}, or angles in degrees such "
                "as 0,45,90."
            ) from None
    size = options.detector_size or preset.xray.detector_size
    mode = options.mode or preset.xray.mode
    return standard_views(angles, size, preset.volume.fov_mm, mode, options.dso_mm, options.dsd_mm)


def generate(folder: Path, out: Path, settings: Settings, workers: int) -> dict[str, Any]:
    """Project all CTs below ``folder``; returns what is written to ``report.json``.

    Raises:
        InputError: no CT, two of one name, or ``out`` holds x-rays made with other settings.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with CTs (NIfTI files or folders of DICOM slices).")
    jobs = [Job(name, source, out / name, settings) for name, source in find_cts(folder)]
    if not jobs:
        raise InputError(f"{folder}: holds no CT, expected NIfTI files (.nii, .nii.gz) or folders of DICOM slices.")
    seen: dict[str, Path] = {}
    for job in jobs:
        if job.name in seen:
            raise InputError(f"{folder}: {seen[job.name]} and {job.source} would both become {job.out}; rename one.")
        seen[job.name] = job.source
    if (out / _SETTINGS).exists() and read_json(out / _SETTINGS) != settings.to_json():
        raise InputError(
            f"{out}: holds x-rays made with other settings (see {_SETTINGS}); choose another folder for these."
        )
    write_json(out / _SETTINGS, settings.to_json())

    began = time.monotonic()
    missing = [job for job in jobs if not is_finished(job)]
    report: dict[str, Any] = {"kept": len(jobs) - len(missing), "made": [], "set_aside": [], "warnings": {}}
    done = run_jobs(_try, missing, workers)
    for job, outcome in progress(done, "x-rays", len(jobs), len(jobs) - len(missing)):
        notes, reason = outcome or ([], "the process that projected it was killed; is there enough memory?")
        if reason is None:
            report["made"].append(job.name)
        else:
            report["set_aside"].append({"name": job.name, "source": str(job.source), "reason": reason})
        if notes:
            report["warnings"][job.name] = notes
    report["made"].sort()
    report["set_aside"].sort(key=lambda item: item["name"])
    report["provenance"] = provenance(settings.preset.name, settings.seed, wall_s=time.monotonic() - began)
    write_json(out / "report.json", report)
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of CTs")
    parser.add_argument("out", type=Path, help="folder for the x-rays")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="grid and HU window (default small)")
    parser.add_argument("--views", default="8view", help=f"{', '.join(VIEW_SETS)}, or angles in degrees: 0,45,90")
    parser.add_argument("--mode", choices=["parallel", "cone"], help="by default the preset's")
    parser.add_argument("--dso-mm", type=float, default=DSO_MM, help="cone: source to axis (default %(default)s)")
    parser.add_argument("--dsd-mm", type=float, default=DSD_MM, help="cone: source to detector (default %(default)s)")
    parser.add_argument("--detector-size", type=int, help="pixels per edge; by default the preset's")
    parser.add_argument(
        "--centre", default="body", choices=["body", "grid"], help="middle of the cube (see prepare_ct)"
    )
    parser.add_argument("--format", default="png", choices=["png", "npz"], dest="file_format")
    parser.add_argument("--backend", default="torch", choices=["torch", "tigre"])
    parser.add_argument("--i0", type=float, default=math.inf, help="photons per pixel; by default no noise")
    parser.add_argument("--blur-mm", type=float, default=0.0, help="standard deviation of the detector's blur")
    parser.add_argument("--scatter", type=float, default=0.0, help="scatter-to-primary ratio")
    parser.add_argument(
        "--scatter-mm", type=float, default=math.inf, help="spread of the scatter; by default an offset"
    )
    parser.add_argument("--gain-error", type=float, default=0.0, help="relative error of the assumed gain")
    parser.add_argument("--electronic-noise", type=float, default=0.0, help="read-out noise in photons")
    parser.add_argument("--jitter-deg", type=float, default=0.0, help="pose error: angle, up to ±")
    parser.add_argument("--jitter-mm", type=float, default=0.0, help="pose error: detector position, up to ±")
    parser.add_argument("--seed", type=int, default=0, help="of noise and pose errors")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes (default: cores)")
    options = parser.parse_args(arguments)
    try:
        if options.workers < 1:
            raise InputError(f"--workers: found {options.workers}, expected at least 1.")
        preset = get_preset(options.preset)
        detector = Detector(
            i0=options.i0,
            blur_mm=options.blur_mm,
            scatter_to_primary=options.scatter,
            scatter_mm=options.scatter_mm,
            gain_error=options.gain_error,
            electronic_noise=options.electronic_noise,
        )
        views = parse_views(options, preset)
        jitter_views(views, options.jitter_deg, options.jitter_mm, torch.Generator())
        settings = Settings(
            preset,
            views,
            detector,
            options.jitter_deg,
            options.jitter_mm,
            options.centre,
            options.backend,
            options.file_format,
            options.seed,
        )
        report = generate(options.folder, options.out, settings, options.workers)
    except InputError as error:
        print(f"generate_drrs: {error}", file=sys.stderr)
        return 2
    for item in report["set_aside"]:
        print(f"set aside: {item['source']}: {item['reason']}", file=sys.stderr)
    print(
        f"{options.out}: x-rays of {len(report['made'])} CTs made, {report['kept']} kept from before, "
        f"{len(report['set_aside'])} set aside (report.json)."
    )
    return 1 if report["set_aside"] else 0


if __name__ == "__main__":
    sys.exit(main())
