"""Folders of CT scans for tests: DICOM series and NIfTI files of small blocks, written with pydicom and nibabel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (40.0, 20.0, 24.0)  # (z, y, x) mm: coarse, so that a whole chest is a few thousand voxels


def chest_hu(seed: int, shape: tuple[int, int, int] = (8, 18, 14)) -> np.ndarray:
    """Whole HU: air, a body with texture, and a dense landmark in one corner of it."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000)
    z, y, x = shape
    hu[:, 3 : y - 3, 2 : x - 2] = rng.integers(-200, 200, (z, y - 6, x - 4))
    hu[z // 4 : z // 2, 4:7, 3:6] = 900
    return hu


def write_dicom(
    folder: Path, hu: np.ndarray, patient: str, seed: int = 0, slope: float = 1.0, prefix: str = "IM", **attributes
) -> list[Path]:
    """One series under names in random order; same ``seed``, same bytes. Returns the paths from the feet upwards."""
    folder.mkdir(parents=True, exist_ok=True)
    z, y, x = SPACING
    series, study = (generate_uid(entropy_srcs=[patient, str(seed), what]) for what in ("series", "study"))
    names = np.random.default_rng(seed).permutation(len(hu))
    paths = []
    for k, plane in enumerate(hu):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        uid = generate_uid(entropy_srcs=[patient, str(seed), str(k)])
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
        ds.PatientID, ds.SeriesInstanceUID, ds.StudyInstanceUID = patient, series, study
        ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient = [-x * hu.shape[2] / 2, -y * hu.shape[1] / 2, k * z]
        ds.ImageOrientationPatient = [1.0, 0, 0, 0, 1.0, 0]
        ds.PixelSpacing = [y, x]
        ds.Rows, ds.Columns = plane.shape
        ds.RescaleSlope, ds.RescaleIntercept = slope, -1024.0
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        for name, value in attributes.items():
            setattr(ds, name, value)
        ds.PixelData = np.rint((plane + 1024) / slope).astype("<u2").tobytes()
        path = folder / f"{prefix}{names[k]:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def edit(path: Path, change) -> None:
    """Apply ``change(dataset)`` to a written slice."""
    ds = pydicom.dcmread(path)
    change(ds)
    ds.save_as(path)
