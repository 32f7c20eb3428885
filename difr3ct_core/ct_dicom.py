"""One CT series of DICOM slices → an array in HU and its affine.

Every assumption about the slices is checked and has its own message: which series, which modality, one
orientation, one distance, no slice twice, none missing. Reorientation to LPS axes is left to :mod:`.ct_io`, so a
tilted gantry is nothing special here: the affine's third column is the true step from slice to slice.
Source of all attribute meanings: DICOM PS3.3, C.7.6.2 (image plane), C.8.2.1 (CT image).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Float
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import RLELossless

from .files import InputError, require_file
from .progress import progress

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2.1"
SUFFIXES = (".dcm", ".dicom", ".ima")
_NEEDED = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "RescaleSlope",
    "RescaleIntercept",
)
_LENGTHS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
_USED = (*_NEEDED, "SeriesInstanceUID", "SeriesDescription", "ImageType", "Modality", "RescaleType")
#: A slice may be off its place by this share of the slice distance; a missing slice is off by a whole one.
POSITION_TOLERANCE = 0.1


@dataclass(frozen=True)
class _Slice:
    path: Path
    header: Dataset

    @property
    def position(self) -> np.ndarray:
        return np.asarray(self.header.ImagePositionPatient, dtype=np.float64)

    @property
    def orientation(self) -> np.ndarray:
        """(2, 3): direction of increasing column index, direction of increasing row index."""
        return np.asarray(self.header.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)


def read_dicom_series(
    path: str | Path, series_uid: str | None = None, files: Sequence[str | Path] | None = None
) -> tuple[Float[np.ndarray, "slice row column"], Float[np.ndarray, "4 4"]]:
    """Read a CT series.

    Args:
        path: a folder (searched with its subfolders), or one file of the series (its folder is searched).
        series_uid: SeriesInstanceUID to take when there are several CT series.
        files: the files to read; the folder is not searched then.

    Returns:
        HU as float32, and the affine (column, row, slice index, 1) → LPS mm.

    Raises:
        InputError: no CT, several series and no choice, missing, double or uneven slices, mixed orientations,
            missing attributes, damaged file.
    """
    path = Path(path)
    if files is not None:
        headers = _read_headers(path, [Path(name) for name in files])
    elif path.is_dir():
        headers = _read_headers(path, sorted(p for p in path.rglob("*") if p.is_file()))
    else:
        require_file(path, "a DICOM file of a CT series")
        first = read_header(path, strict=True)
        series_uid = series_uid or str(getattr(first.header, "SeriesInstanceUID", ""))
        path = path.parent
        headers = _read_headers(path, sorted(p for p in path.iterdir() if p.is_file()))
    slices = _choose_series(path, headers, series_uid)
    affine = _sort_and_place(path, slices)
    with_progress = progress(slices, "reading CT slices")
    return np.stack([_read_hu(item) for item in with_progress]), affine


def read_header(path: Path, strict: bool) -> _Slice | None:
    """The header of one file; None if it is not DICOM and that is allowed (not ``strict``).

    Raises:
        InputError: not a complete DICOM file, or an attribute that cannot be what it should be.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=strict)
        if "SOPClassUID" not in header:
            raise InvalidDicomError("no SOPClassUID")
        for name in _USED:  # pydicom converts when asked: damaged values show here, not somewhere later
            getattr(header, name, None)
        for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            values = [float(value) for value in getattr(header, name, None) or []]
            if values and (len(values) != _LENGTHS[name] or not np.isfinite(values).all()):
                raise ValueError(f"{name} is {values}, expected {_LENGTHS[name]} finite numbers")
        return _Slice(path, header)
    except Exception as error:  # pydicom raises many types for damaged bytes
        if not strict:
            return None
        raise InputError(
            f"{path}: is not a complete DICOM file ({' '.join(str(error).split()) or type(error).__name__}), expected "
            "a CT slice; copy it again or remove it."
        ) from error


def _read_headers(folder: Path, files: list[Path]) -> list[_Slice]:
    # Other files may lie about (notes, checksums); one that is named DICOM must be DICOM.
    found = [read_header(p, strict=p.suffix.lower() in SUFFIXES) for p in files if p.name.upper() != "DICOMDIR"]
    headers = [item for item in found if item is not None]
    if not headers:
        raise InputError(
            f"{folder}: holds {len(files)} files and no DICOM file, expected a folder with one CT series; "
            "check the path."
        )
    return headers


def _choose_series(folder: Path, headers: list[_Slice], series_uid: str | None) -> list[_Slice]:
    """The slices of the one CT series that is meant; localisers and other modalities are left out."""
    images, localisers = {}, 0
    for item in headers:
        uid = str(getattr(item.header, "SeriesInstanceUID", ""))
        if item.header.SOPClassUID == ENHANCED_CT_IMAGE:
            raise InputError(
                f"{item.path}: is an Enhanced (multi-frame) CT image, expected one file per slice; "
                "convert it to NIfTI first, for example with dcm2niix."
            )
        if item.header.SOPClassUID != CT_IMAGE:
            continue
        if "LOCALIZER" in [str(value).upper() for value in getattr(item.header, "ImageType", None) or []]:
            localisers += 1
            continue
        images.setdefault(uid, []).append(item)
    if not images:
        if localisers:
            raise InputError(
                f"{folder}: holds only {localisers} localiser image(s), expected the slices of a CT series."
            )
        modalities = Counter(str(getattr(item.header, "Modality", "?")) for item in headers)
        found = ", ".join(f"{n} x {name}" for name, n in modalities.items())
        raise InputError(f"{folder}: found modality {found}, expected CT; only CT values are Hounsfield units.")
    listing = "; ".join(f"{uid} ({len(s)} slices, {_description(s[0])})" for uid, s in sorted(images.items()))
    if series_uid:
        if series_uid not in images:
            raise InputError(f"{folder}: has no CT series {series_uid!r}, expected one of: {listing}.")
        return images[series_uid]
    if len(images) > 1:
        raise InputError(
            f"{folder}: holds {len(images)} CT series, expected one: {listing}. "
            "Give series_uid, or one file of the series."
        )
    return next(iter(images.values()))


def _description(item: _Slice) -> str:
    return str(getattr(item.header, "SeriesDescription", "") or "no description")


def _sort_and_place(folder: Path, slices: list[_Slice]) -> np.ndarray:
    """Sort in place along the slice normal, check the geometry, return the affine."""
    for item in slices:
        if missing := [name for name in _NEEDED if getattr(item.header, name, None) in (None, "")]:
            raise InputError(f"{item.path}: lacks {', '.join(missing)}, expected a complete CT image; export it again.")
        kind = str(getattr(item.header, "RescaleType", "HU") or "HU").upper()
        if kind not in ("HU", "US"):
            raise InputError(
                f"{item.path}: values are of type {kind}, expected HU; choose a series in Hounsfield units."
            )
    if len(slices) < 2:
        raise InputError(
            f"{slices[0].path}: is the only slice of its series, expected at least 2; copy the whole series."
        )
    first = slices[0]
    for item in slices:
        if not np.allclose(item.orientation, first.orientation, atol=1e-4):
            raise InputError(
                f"{item.path}: orientation {item.orientation.round(4).tolist()} differs from "
                f"{first.orientation.round(4).tolist()} of {first.path.name}, expected one orientation in a series; "
                "it may be a localiser, remove it."
            )
        shape, spacing = _in_plane(item)
        if shape != _in_plane(first)[0] or not np.allclose(spacing, _in_plane(first)[1], rtol=1e-3):
            raise InputError(
                f"{item.path}: is {shape} pixels of {spacing} mm, expected {_in_plane(first)[0]} of "
                f"{_in_plane(first)[1]} mm as in {first.path.name}."
            )
    column_direction, row_direction = first.orientation
    normal = np.cross(column_direction, row_direction)
    if abs(np.linalg.norm(normal) - 1) > 1e-2:
        raise InputError(
            f"{first.path}: ImageOrientationPatient is {first.orientation.tolist()}, expected two unit vectors at "
            "right angles; export the series again."
        )
    slices.sort(key=lambda item: float(item.position @ normal))
    depth = np.array([item.position @ normal for item in slices])
    gaps = np.diff(depth)
    if (double := int(gaps.argmin())) >= 0 and gaps[double] < 1e-3:
        raise InputError(
            f"{folder}: {slices[double].path.name} and {slices[double + 1].path.name} lie at the same place "
            f"({depth[double]:.2f} mm), expected each slice once; remove copies, or separate phases of a 4D series."
        )
    typical = float(np.median(gaps))
    worst = int(np.abs(gaps - typical).argmax())
    if abs(gaps[worst] - typical) > POSITION_TOLERANCE * typical:
        raise InputError(
            f"{folder}: the gap between {slices[worst].path.name} and {slices[worst + 1].path.name} is "
            f"{gaps[worst]:.3f} mm, expected {typical:.3f} mm as elsewhere; slices are missing or unevenly spaced, "
            "copy the whole series or export it evenly spaced."
        )
    row_spacing, column_spacing = _in_plane(first)[1]
    affine = np.eye(4)
    affine[:3, 0] = column_direction * column_spacing
    affine[:3, 1] = row_direction * row_spacing
    affine[:3, 2] = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    affine[:3, 3] = slices[0].position
    return affine


def _in_plane(item: _Slice) -> tuple[tuple[int, int], tuple[float, float]]:
    """((rows, columns), (row spacing, column spacing) in mm)."""
    rows, columns = (float(value) for value in item.header.PixelSpacing)
    return (int(item.header.Rows), int(item.header.Columns)), (rows, columns)


def _read_hu(item: _Slice) -> np.ndarray:
    """Pixel values in HU, float32; padding outside the field of view becomes at most -1024."""
    try:
        image = pydicom.dcmread(item.path, force=True)
        slope, intercept = float(image.RescaleSlope), float(image.RescaleIntercept)
        syntax = image.file_meta.TransferSyntaxUID
        if syntax.is_compressed and syntax != RLELossless:
            # ITK brings decoders for JPEG, JPEG-LS and JPEG 2000, and applies slope and intercept.
            hu = sitk.GetArrayFromImage(sitk.ReadImage(str(item.path)))[0].astype(np.float32)
        else:
            # pydicom checks the length of the pixel data, ITK fills what is missing without a word.
            hu = image.pixel_array.astype(np.float32) * slope + intercept
    except Exception as error:  # pydicom and ITK raise many types for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{item.path}: its pixels cannot be read ({reason}), expected a complete CT slice; "
            "the file may be truncated, copy it again."
        ) from error
    padding = getattr(image, "PixelPaddingValue", None)
    if padding is not None:
        value = float(padding) * slope + intercept
        if not -900 < value < 3000:  # some writers declare an ordinary tissue value as padding
            hu[hu == value] = -1024
    return hu
