"""DICOM series written by the test with pydicom: same volume as NIfTI, and a clear word about every bad folder."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, RLELossless, generate_uid

from difr3ct_core import ct
from difr3ct_core.files import InputError

SHAPE = (6, 9, 8)  # slices, rows, columns
ROW_MM, COLUMN_MM, SLICE_MM = 1.1, 0.8, 2.5
ORIGIN = np.array([-31.0, 12.5, 107.0])
AXIAL = np.array([[1.0, 0, 0], [0, 1.0, 0]])
SLOPE, INTERCEPT = 2.0, -1024.0


def stored_values(seed=5) -> np.ndarray:
    """Raw pixel values; HU = SLOPE * value + INTERCEPT runs from -1024 to about 1400."""
    return (
        np.random.default_rng(seed)
        .permutation(np.linspace(0, 1212, int(np.prod(SHAPE))).astype(np.uint16))
        .reshape(SHAPE)
    )


def write_series(folder: Path, raw=None, directions=AXIAL, step=None, seed=0, **attributes) -> list[Path]:
    """One file per slice under names in random order. ``step``: LPS mm from slice to slice."""
    raw = stored_values() if raw is None else raw
    folder.mkdir(parents=True, exist_ok=True)
    step = np.cross(*directions) * SLICE_MM if step is None else np.asarray(step)
    series, study = generate_uid(), generate_uid()
    names = np.random.default_rng(seed).permutation(len(raw))
    paths = []
    for k, plane in enumerate(raw):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.SeriesInstanceUID, ds.StudyInstanceUID = series, study
        ds.Modality, ds.ImageType, ds.SeriesDescription = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "chest 2.5"
        ds.ImagePositionPatient = [float(v) for v in ORIGIN + k * step]
        ds.ImageOrientationPatient = [float(v) for v in np.ravel(directions)]
        ds.PixelSpacing = [ROW_MM, COLUMN_MM]
        ds.Rows, ds.Columns = plane.shape
        ds.RescaleSlope, ds.RescaleIntercept = SLOPE, INTERCEPT
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        for name, value in attributes.items():
            setattr(ds, name, value)
        ds.PixelData = plane.astype("<u2").tobytes()
        path = folder / f"IM{names[k]:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def edit(path: Path, **attributes) -> None:
    """Change attributes of a written slice; None deletes."""
    ds = pydicom.dcmread(path)
    for name, value in attributes.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.save_as(path)


@pytest.mark.parametrize(
    "directions",
    [AXIAL, -AXIAL, AXIAL * [[-1], [1]], AXIAL[::-1], [[0, 1.0, 0], [0, 0, -1.0]], [[1.0, 0, 0], [0, 0, -1.0]]],
    ids=["axial", "prone", "feet first", "transposed", "sagittal", "coronal"],
)
def test_series_equals_nifti_of_the_same_volume(tmp_path, directions):
    directions = np.asarray(directions)
    paths = write_series(tmp_path / "dicom", directions=directions)
    assert [p.name for p in paths] != sorted(p.name for p in paths)  # names do not give the order away
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = directions[0] * COLUMN_MM, directions[1] * ROW_MM
    affine[:3, 2], affine[:3, 3] = np.cross(*directions) * SLICE_MM, ORIGIN
    hu = stored_values().astype(np.float32) * SLOPE + INTERCEPT
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "ct.nii")

    dicom, nifti = ct.read_ct(tmp_path / "dicom"), ct.read_ct(tmp_path / "ct.nii")
    assert torch.equal(dicom.hu, nifti.hu)
    np.testing.assert_allclose(dicom.affine, nifti.affine, atol=1e-4)
    one_file = ct.read_ct(paths[3])
    assert torch.equal(one_file.hu, dicom.hu)
    if directions is AXIAL:
        assert torch.equal(dicom.hu, torch.from_numpy(hu))
        np.testing.assert_allclose(dicom.affine[:3, 3], ORIGIN)


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG", "RLE"])
def test_compressed_slices_in_nested_folders(tmp_path, compressor):
    paths = write_series(tmp_path / "patient" / "study" / "series")
    plain = ct.read_ct(tmp_path)
    for path in paths:
        ds = pydicom.dcmread(path)
        if compressor == "RLE":
            ds.compress(RLELossless, generate_instance_uid=False)
            ds.save_as(path)
            continue
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(path))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(ds.pixel_array))
        # Take ITK's compressed bytes, under the header of the series.
        packed = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
        ds.PixelData = packed.PixelData
        ds["PixelData"].is_undefined_length = True
        ds.save_as(path)
        assert ds.file_meta.TransferSyntaxUID.is_compressed
    (tmp_path / "README.txt").write_text("notes beside the series")
    assert torch.equal(ct.read_ct(tmp_path).hu, plain.hu)


def test_slope_of_each_slice_is_its_own(tmp_path):
    paths = write_series(tmp_path)
    edit(paths[2], RescaleSlope=1.0, RescaleIntercept=-1000.0)
    read = ct.read_ct(tmp_path).hu.numpy()
    np.testing.assert_array_equal(read[2], stored_values()[2] - 1000.0)
    np.testing.assert_array_equal(read[3], stored_values()[3] * SLOPE + INTERCEPT)


def test_padding_value_becomes_air(tmp_path):
    raw = stored_values()
    raw[:, 0, :] = 60000
    write_series(tmp_path, raw, PixelPaddingValue=60000)
    read = ct.read_ct(tmp_path).hu
    assert (read[:, 0] == ct.AIR_HU).all() and read.max() < 1500


def test_tilted_gantry_is_resampled_in_place(tmp_path):
    """Slices shifted along y: what is upright in the patient leans in the raw stack, and is upright after reading."""
    n, d = 24, 1.0
    tilt = np.deg2rad(15)
    directions = np.array([[1.0, 0, 0], [0, np.cos(tilt), np.sin(tilt)]])
    step = np.array([0, 0, 2.0])  # the couch moves along z, the planes are tilted
    landmark = ORIGIN + np.array([12.0, 14.0, 26.0])
    j, i = np.meshgrid(np.arange(32) * d, np.arange(24) * d, indexing="ij")
    raw = []
    for k in range(n):
        points = ORIGIN + k * step + i[..., None] * directions[0] + j[..., None] * directions[1]
        raw.append(1200 * np.exp(-((points - landmark) ** 2).sum(-1) / (2 * 4.0**2)))
    write_series(tmp_path, np.array(raw), directions, step, PixelSpacing=[d, d])
    read = ct.read_ct(tmp_path)
    weight = (read.hu.double() - read.hu.min()).numpy() ** 2
    index = [(weight * a).sum() / weight.sum() for a in np.meshgrid(*map(np.arange, weight.shape), indexing="ij")[::-1]]
    np.testing.assert_allclose((read.affine @ [*index, 1])[:3], landmark, atol=0.15)


def test_localisers_are_left_out(tmp_path):
    write_series(tmp_path)
    expected = ct.read_ct(tmp_path).hu
    write_series(
        tmp_path / "scout", stored_values()[:1], AXIAL[:, [1, 2, 0]], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]
    )
    assert torch.equal(ct.read_ct(tmp_path).hu, expected)
    with pytest.raises(
        InputError, match=r"scout: holds only 1 localiser image\(s\), expected the slices of a CT series"
    ):
        ct.read_ct(tmp_path / "scout")


def test_several_series_are_named_and_can_be_chosen(tmp_path):
    lung = write_series(tmp_path / "a", SeriesDescription="lung kernel")
    soft = write_series(tmp_path / "b", stored_values(9), SeriesDescription="soft kernel")
    uid = str(pydicom.dcmread(soft[0]).SeriesInstanceUID)
    with pytest.raises(InputError) as caught:
        ct.read_ct(tmp_path)
    message = str(caught.value)
    for part in ("holds 2 CT series, expected one", uid, "6 slices", "lung kernel", "soft kernel", "Give series_uid"):
        assert part in message
    np.testing.assert_array_equal(ct.read_ct(tmp_path, uid).hu.numpy(), stored_values(9) * SLOPE + INTERCEPT)
    np.testing.assert_array_equal(ct.read_ct(lung[4]).hu.numpy(), stored_values() * SLOPE + INTERCEPT)
    with pytest.raises(InputError, match=r"has no CT series '1\.2\.3', expected one of: .*lung kernel"):
        ct.read_ct(tmp_path, "1.2.3")


def test_missing_and_uneven_slices(tmp_path):
    paths = write_series(tmp_path)
    paths[3].unlink()
    with pytest.raises(
        InputError, match=rf"gap between {paths[2].name} and {paths[4].name} is 5\.000 mm, expected 2\.500 mm"
    ):
        ct.read_ct(tmp_path)
    write_series(tmp_path / "uneven", step=[0, 0, 2.5])
    for path in (tmp_path / "uneven").iterdir():
        z = float(pydicom.dcmread(path).ImagePositionPatient[2])
        if z > ORIGIN[2] + 6:
            edit(path, ImagePositionPatient=[*ORIGIN[:2], z + 0.6])
    with pytest.raises(InputError, match=r"is 3\.100 mm, expected 2\.500 mm .*missing or unevenly spaced, copy"):
        ct.read_ct(tmp_path / "uneven")


def test_a_slice_twice(tmp_path):
    paths = write_series(tmp_path)
    (tmp_path / "copy.dcm").write_bytes(paths[1].read_bytes())
    with pytest.raises(
        InputError, match=r"lie at the same place \(109\.50 mm\), expected each slice once; remove copies"
    ):
        ct.read_ct(tmp_path)


def test_truncated_files(tmp_path):
    paths = write_series(tmp_path)
    whole = paths[2].read_bytes()
    for length in (len(whole) - 1, len(whole) - 60):
        paths[2].write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"{paths[2].name}: its pixels cannot be read .*truncated, copy it again"):
            ct.read_ct(tmp_path)
    for length in (0, 100, 140, 300):
        paths[2].write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"{paths[2].name}: .*expected"):
            ct.read_ct(tmp_path)
    paths[2].write_text("not DICOM at all, though it is named so")
    with pytest.raises(
        InputError, match=rf"{paths[2].name}: is not a complete DICOM file .*copy it again or remove it"
    ):
        ct.read_ct(tmp_path)


def test_folders_without_a_ct(tmp_path):
    with pytest.raises(
        InputError, match=r"holds 0 files and no DICOM file, expected a folder with one CT series; check"
    ):
        ct.read_ct(tmp_path)
    with pytest.raises(InputError, match=r"nowhere: no such file, expected a CT as NIfTI .* or DICOM; check the path"):
        ct.read_ct(tmp_path / "nowhere")
    write_series(tmp_path, Modality="MR", SOPClassUID=MRImageStorage)
    with pytest.raises(InputError, match=r"found modality 6 x MR, expected CT; only CT values are Hounsfield units"):
        ct.read_ct(tmp_path)


def test_series_that_are_not_complete_ct_images(tmp_path):
    paths = write_series(tmp_path / "slope")
    edit(paths[0], RescaleSlope=None)
    with pytest.raises(InputError, match=rf"{paths[0].name}: lacks RescaleSlope, expected a complete CT image; export"):
        ct.read_ct(tmp_path / "slope")
    paths = write_series(tmp_path / "kind", RescaleType="Z_EFF")
    with pytest.raises(InputError, match=r"values are of type Z_EFF, expected HU; choose a series in Hounsfield units"):
        ct.read_ct(tmp_path / "kind")
    write_series(tmp_path / "single", stored_values()[:1])
    with pytest.raises(
        InputError, match=r"is the only slice of its series, expected at least 2; copy the whole series"
    ):
        ct.read_ct(tmp_path / "single")
    paths = write_series(tmp_path / "turned")
    edit(paths[5], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(InputError, match=r"orientation .* differs from .*expected one orientation in a series"):
        ct.read_ct(tmp_path / "turned")
    paths = write_series(tmp_path / "size")
    edit(paths[5], PixelSpacing=[2, 2])
    with pytest.raises(InputError, match=rf"{paths[5].name}: is \(9, 8\) pixels of \(2\.0, 2\.0\) mm, expected"):
        ct.read_ct(tmp_path / "size")
    write_series(tmp_path / "frames", SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    with pytest.raises(
        InputError, match=r"is an Enhanced \(multi-frame\) CT image, expected one file per slice; convert"
    ):
        ct.read_ct(tmp_path / "frames")
