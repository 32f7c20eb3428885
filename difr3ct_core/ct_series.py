"""Which CT series lie below a folder, of which patients, and what their headers say about their quality."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from .ct_dicom import CT_IMAGE, ENHANCED_CT_IMAGE, POSITION_TOLERANCE, SUFFIXES, read_header
from .files import InputError, sha256
from .progress import progress

_NIFTI = (".nii.gz", ".nii")
_NOT_A_CT = ("label", "mask", "seg")
_TAGS = ["SOPClassUID", "SeriesInstanceUID", "PatientID", "ImageType"]
#: Slices farther apart than this are called coarse in the report, mm.
_COARSE_MM = 5.0


@dataclass(frozen=True)
class Series:
    """One scan.

    Attributes:
        patient: who; several series may be of one.
        uid: SeriesInstanceUID, or the path of a NIfTI file below the folder that was searched.
        files: its files, sorted.
        labels: a label map that belongs to it (``labels.nii.gz`` beside a NIfTI file), or "".
        problem: why it cannot be used, if that is known already, or "".
    """

    patient: str
    uid: str
    files: tuple[str, ...]
    labels: str = ""
    problem: str = ""

    @property
    def is_nifti(self) -> bool:
        """NIfTI, not DICOM."""
        return len(self.files) == 1 and self.files[0].lower().endswith(_NIFTI)

    @property
    def id(self) -> str:
        """A folder name: the patient's name without what a path could be made of, and a hash of patient and series."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", self.patient).strip("._-")[:60] or "patient"
        digest = hashlib.sha256("\0".join((self.patient, self.uid)).encode()).hexdigest()
        return f"{plain}-{digest[:8]}"


def find_series(folder: str | Path, leave_out: str | Path | None = None, pattern: str | None = None) -> list[Series]:
    """All CT series below a folder, in the order of their ids.

    DICOM files are grouped by PatientID and SeriesInstanceUID, wherever they lie; localisers and other modalities are
    left out. A NIfTI file is a series, unless its name says label, mask or seg. Its patient is the first folder below
    ``folder``, or the file's own name where it lies directly there; so is that of a DICOM file without PatientID.

    Args:
        folder: where to search.
        leave_out: a folder not to be searched, such as that of the results.
        pattern: regular expression for names of patients: what it finds first in the path below ``folder`` (its first
            group, if it has one) is the patient of a NIfTI file.

    Raises:
        InputError: no such folder, no CT in it, or a pattern that is none or fits no part of a path.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with CTs (NIfTI files or DICOM series).")
    try:
        expression = re.compile(pattern) if pattern else None
    except re.error as error:
        raise InputError(f"pattern: found {pattern!r}, expected a regular expression ({error}).") from error
    found: list[Series] = []
    slices: dict[tuple[str, str], list[Path]] = defaultdict(list)
    broken: dict[Path, list[Path]] = defaultdict(list)
    for path in progress(_files(folder, Path(leave_out) if leave_out else None), "looking for CTs"):
        relative = path.relative_to(folder)
        if path.name.lower().endswith(_NIFTI):
            if not any(word in path.name.lower() for word in _NOT_A_CT):
                labels = next((str(p) for s in _NIFTI if (p := path.with_name(f"labels{s}")).exists()), "")
                patient = _patient_of(relative, expression)
                found.append(Series(patient, relative.as_posix(), (str(path),), labels))
            continue
        header = _header(path)
        if header is None:
            if path.suffix.lower() in SUFFIXES:
                broken[path.parent].append(path)
            continue
        uid = str(header.get("SeriesInstanceUID", "") or "")
        if header.get("SOPClassUID") not in (CT_IMAGE, ENHANCED_CT_IMAGE):
            continue
        if "LOCALIZER" in [str(value).upper() for value in header.get("ImageType", None) or []]:
            continue
        patient = str(header.get("PatientID", "") or "").strip() or _patient_of(relative, expression)
        slices[patient, uid].append(path)
    for (patient, uid), paths in slices.items():
        # Whatever a file that cannot be read was, it may have been a slice of this series.
        bad = [path for parent in sorted({path.parent for path in paths}) for path in broken.get(parent, [])]
        found.append(Series(patient, uid, tuple(sorted(map(str, paths))), problem=_unreadable(bad)))
    for parent in broken.keys() - {path.parent for paths in slices.values() for path in paths}:
        bad = broken[parent]
        patient = _patient_of((parent / "x").relative_to(folder), expression)
        place = parent.relative_to(folder).as_posix()
        found.append(Series(patient, place, tuple(sorted(map(str, bad))), problem=_unreadable(bad)))
    if not found:
        raise InputError(
            f"{folder}: holds no CT, expected DICOM series of modality CT or NIfTI files (.nii, .nii.gz) at any depth."
        )
    return sorted(found, key=lambda one: one.id)


def _files(folder: Path, leave_out: Path | None) -> list[Path]:
    skip = leave_out.resolve() if leave_out else None
    files = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and (Path(where) / n).resolve() != skip)
        files += [Path(where) / n for n in sorted(names) if not n.startswith(".") and n.upper() != "DICOMDIR"]
    return files


def _patient_of(relative: Path, expression: re.Pattern[str] | None) -> str:
    if expression is not None:
        hit = expression.search(relative.as_posix())
        if hit is None or not hit[hit.re.groups and 1]:
            raise InputError(
                f"pattern: {expression.pattern!r} finds no patient in {relative}; write it so that it does."
            )
        return hit[hit.re.groups and 1]
    name = relative.parts[0]
    if len(relative.parts) == 1:
        name = next((name[: -len(suffix)] for suffix in _NIFTI if name.lower().endswith(suffix)), name)
    return name


def _header(path: Path) -> pydicom.Dataset | None:
    """The few attributes that say what a file is; None if it is no complete DICOM file."""
    try:
        with open(path, "rb") as handle:
            if handle.read(132)[128:] != b"DICM":
                return None
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
        # A file that ends within its header is read without a word, as far as it goes.
        return header if header.get("SOPClassUID") and header.get("SeriesInstanceUID") else None
    except Exception:  # pydicom raises many types for damaged bytes
        return None


def _unreadable(paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    return (
        f"{paths[0]}: is not a complete DICOM file, as are {len(paths)} of its folder; expected whole slices only, "
        "copy it again or remove it."
    )


def distinct_files(files: Sequence[str]) -> list[str]:
    """``files`` without exact copies (same bytes): a slice that was copied twice is still one slice."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name in files:
        by_size[Path(name).stat().st_size].append(name)
    kept, seen = [], set()
    for names in by_size.values():
        for name in names:
            digest = sha256(name) if len(names) > 1 else name
            if digest not in seen:
                seen.add(digest)
                kept.append(name)
    return sorted(kept)


def series_facts(files: Sequence[str]) -> dict[str, Any]:
    """What the headers of a series say, also of one that cannot be used: the columns of the quality report.

    Slices that are missing are counted by the gaps: a gap of three slice distances lacks two.

    Raises:
        InputError: a header cannot be read.
    """
    headers = [read_header(Path(name), strict=True).header for name in files]
    facts: dict[str, Any] = {"slices": len(headers)}
    syntaxes = sorted(
        {header.file_meta.TransferSyntaxUID for header in headers if "TransferSyntaxUID" in header.file_meta}
    )
    facts["transfer_syntax"] = " ".join(uid.name for uid in syntaxes)
    facts["compressed"] = any(not uid.is_private and uid.is_compressed for uid in syntaxes)
    for name in ("RescaleSlope", "RescaleIntercept"):
        values = sorted({float(header.get(name)) for header in headers if header.get(name) is not None})
        facts["rescale_" + name[7:].lower()] = " ".join(f"{value:g}" for value in values)
    positions = [header.get("ImagePositionPatient") for header in headers]
    orientation, spacing = headers[0].get("ImageOrientationPatient"), headers[0].get("PixelSpacing")
    if any(p is None for p in positions) or orientation is None or spacing is None or len(headers) < 2:
        return facts
    rows, columns = np.asarray(orientation, dtype=float).reshape(2, 3)
    normal = np.cross(rows, columns)
    order = np.argsort(np.asarray(positions, dtype=float) @ normal, kind="stable")
    placed = np.asarray(positions, dtype=float)[order]
    gaps = np.diff(placed @ normal)
    typical = float(np.median(gaps))
    step = placed[-1] - placed[0]
    facts |= {"spacing_x_mm": float(spacing[1]), "spacing_y_mm": float(spacing[0]), "spacing_z_mm": round(typical, 4)}
    if typical <= 0:
        return {**facts, "odd_spacing": "several slices at one place"}
    share = gaps / typical
    facts["missing_slices"] = int(np.maximum(np.rint(share) - 1, 0).sum())
    odd = []
    if (np.abs(share - np.rint(share)) > POSITION_TOLERANCE).any():
        odd.append(f"uneven, {gaps.min():.3f} to {gaps.max():.3f} mm")
    if gaps.min() < 1e-3:
        odd.append("several slices at one place")
    if abs(float(spacing[0]) - float(spacing[1])) > 1e-3 * float(spacing[0]):
        odd.append("pixels are not square")
    if typical > _COARSE_MM:
        odd.append(f"coarse, {typical:g} mm")
    cosine = abs(float(step @ normal)) / (np.linalg.norm(step) * np.linalg.norm(normal))
    facts["gantry_tilt_deg"] = round(float(np.degrees(np.arccos(np.clip(cosine, 0, 1)))), 2)
    return {**facts, "odd_spacing": "; ".join(odd)}
