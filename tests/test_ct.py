"""CT volumes: orientation, affines, the cube of the network and back."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from difr3ct_core import ct
from difr3ct_core.files import InputError
from difr3ct_core.presets import PRESETS, VolumePreset, get_preset

DATA = Path(__file__).resolve().parents[1] / "data"
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING = np.array([0.8, 1.1, 2.5])  # x, y, z
ORIGIN = np.array([-31.0, 12.5, 107.0])
#: A small cube, so that tests with three axes stay quick; the code is that of 320 mm.
SMALL = VolumePreset(size=16, fov_mm=32.0)
#: For volumes that are no patient, and for cubes that cut on purpose.
IGNORE_CT_WARNINGS = pytest.mark.filterwarnings("ignore::difr3ct_core.ct.CTWarning")


def lps_affine(spacing=SPACING, origin=ORIGIN) -> np.ndarray:
    affine = np.diag(np.append(spacing, 1.0))
    affine[:3, 3] = origin
    return affine


def landmark_volume(shape=(5, 6, 7), seed=0) -> np.ndarray:
    """Nearly every voxel another value, from air to bone, so that no permutation or flip goes unnoticed."""
    values = np.linspace(-1000, 1400, int(np.prod(shape))).astype(np.int16)
    return np.random.default_rng(seed).permutation(values).reshape(shape)


def blob(shape, affine, centre_mm, sigma_mm=6.0, peak=1200.0) -> np.ndarray:
    """A Gaussian of tissue in air, at any affine (voxel indices to LPS mm)."""
    k, j, i = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    points = np.stack([i, j, k, np.ones_like(i)], -1) @ affine.T
    distance2 = ((points[..., :3] - centre_mm) ** 2).sum(-1)
    return (peak * np.exp(-distance2 / (2 * sigma_mm**2)) - 1000).astype(np.float32)


def centroid_mm(hu: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centroid of what is above air, LPS mm (x, y, z)."""
    weight = np.clip(hu.astype(np.float64) + 1000, 0, None)
    k, j, i = np.meshgrid(*(np.arange(n) for n in hu.shape), indexing="ij")
    index = np.array([(weight * a).sum() / weight.sum() for a in (i, j, k)])
    return affine[:3, :3] @ index + affine[:3, 3]


def save(path: Path, array_zyx: np.ndarray, affine_lps: np.ndarray) -> Path:
    """Write with nibabel alone, not with the code under test."""
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array_zyx.transpose(2, 1, 0)), RAS @ affine_lps), path)
    return path


# --- orientation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_all_48_orientations_read_exactly(tmp_path, axes, flips):
    volume, affine = landmark_volume(), lps_affine()
    original = nib.Nifti1Image(volume.transpose(2, 1, 0), RAS @ affine)
    # nibabel moves the array and its affine together: an independent oracle of what must not matter.
    turned = original.as_reoriented(np.array([axes, flips]).T)
    nib.save(turned, tmp_path / "ct.nii")
    read = ct.read_ct(tmp_path / "ct.nii")
    assert torch.equal(read.hu, torch.from_numpy(volume).float())
    np.testing.assert_allclose(read.affine, affine, atol=1e-5)
    assert read.spacing_mm == pytest.approx(tuple(SPACING[::-1]))


def test_axes_point_to_left_posterior_superior(tmp_path):
    """A bright voxel far to the patient's left, back and head has the highest x, y, z index."""
    array = np.full((8, 9, 10), -1000, np.int16)  # (i, j, k) of a file whose axes run to R, A, S, as NIfTI's name says
    array[0, 0, 9] = 500  # RAS: most left, most posterior, most superior
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "ras.nii.gz")
    read = ct.read_ct(tmp_path / "ras.nii.gz")
    assert read.hu.shape == (10, 9, 8)
    assert read.hu[9, 8, 7] == 500
    np.testing.assert_allclose(read.affine @ [7, 8, 9, 1], [0, 0, 18, 1])


def rotation(x, y, z) -> np.ndarray:
    out = np.eye(3)
    for angle, (a, b) in zip(np.deg2rad((x, y, z)), ((1, 2), (2, 0), (0, 1)), strict=True):
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        out = step @ out
    return out


SHEAR = np.array([[1, 0, 0], [0, 1, -0.3], [0, 0, 1.0]])  # a gantry tilt of 17 degrees


@pytest.mark.parametrize("turn", [rotation(10, -7, 20), rotation(-40, 5, 95), SHEAR], ids=["oblique", "far", "tilt"])
def test_oblique_files_keep_landmarks_in_place(tmp_path, turn):
    shape = (30, 44, 50)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(SPACING)
    affine[:3, 3] = ORIGIN
    landmark = (affine @ [31.0, 17.0, 13.0, 1.0])[:3]
    hu = blob(shape, affine, landmark, sigma_mm=3.5)
    hu[hu < -999.5] = -2048  # as scanners pad outside the field of view
    read = ct.read_ct(save(tmp_path / "oblique.nii.gz", hu, affine))
    off_diagonal = read.affine[:3, :3] - np.diag(np.diag(read.affine)[:3])
    assert not off_diagonal.any()
    np.testing.assert_allclose(sorted(read.spacing_mm), sorted(np.linalg.norm(affine[:3, :3], axis=0)), rtol=1e-5)
    found = centroid_mm(read.hu.numpy(), read.affine)
    assert np.abs(found - landmark).max() < 0.1 * SPACING.min()
    peak = np.unravel_index(int(read.hu.argmax()), read.hu.shape)[::-1]
    assert (np.abs((read.affine @ [*peak, 1])[:3] - landmark) <= 0.5 * np.array(read.spacing_mm)[::-1] + 0.3).all()
    assert read.hu[0, 0, 0] == ct.AIR_HU and read.hu.min() == ct.AIR_HU
    # All of the scan is on the new grid: each of its corners lies inside.
    corners = np.array([[i, j, k, 1] for i in (0, 49) for j in (0, 43) for k in (0, 29)]) @ affine.T
    index = corners @ np.linalg.inv(read.affine).T
    assert (index[:, :3] > -0.501).all() and (index[:, :3] < np.array(read.hu.shape[::-1]) - 0.499).all()


def test_rounding_in_the_affine_does_not_blur(tmp_path):
    affine = lps_affine()
    affine[:3, :3] = rotation(0.01, -0.02, 0.01) @ affine[:3, :3]  # degrees: what rounding of direction cosines makes
    read = ct.read_ct(save(tmp_path / "ct.nii", landmark_volume(), affine))
    assert torch.equal(read.hu, torch.from_numpy(landmark_volume()).float())
    np.testing.assert_allclose(read.affine @ [3, 2, 2, 1], affine @ [3, 2, 2, 1], atol=0.01)


def test_padding_outside_the_field_of_view_is_air(tmp_path):
    hu = landmark_volume()
    hu[0] = -2048
    read = ct.read_ct(save(tmp_path / "ct.nii", hu, lps_affine()))
    assert (read.hu[0] == -1024).all()
    assert torch.equal(read.hu[1:], torch.from_numpy(hu[1:]).float())


def test_scale_and_units_of_the_nifti_header_are_applied(tmp_path):
    affine = np.diag([1e-3, 2e-3, 3e-3, 1.0])  # metres
    image = nib.Nifti1Image(landmark_volume().transpose(2, 1, 0), affine)
    image.header.set_slope_inter(0.5, -100)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "ct.nii.gz")
    read = ct.read_ct(tmp_path / "ct.nii.gz")
    assert read.spacing_mm == pytest.approx((3.0, 2.0, 1.0))
    expected = landmark_volume()[:, ::-1, ::-1].astype(np.float32) * 0.5 - 100
    np.testing.assert_allclose(read.hu.numpy(), np.maximum(expected, -1024), atol=1e-3)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_written_nifti_places_a_landmark_where_nibabel_and_itk_find_it(tmp_path, dtype):
    volume = landmark_volume()
    volume[1, 4, 2] = 2000
    path = tmp_path / "out" / "ct.nii.gz"
    ct.write_nifti(path, torch.from_numpy(volume).float() + 0.25, lps_affine(), dtype=dtype)
    expected = ORIGIN + SPACING * (2, 4, 1)

    image = nib.load(path)
    assert image.get_data_dtype() == np.dtype(dtype)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    index = np.unravel_index(np.asarray(image.dataobj).argmax(), image.shape)
    np.testing.assert_allclose((image.affine @ [*index, 1])[:3] * (-1, -1, 1), expected, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)

    itk = sitk.ReadImage(str(path))
    values = sitk.GetArrayFromImage(itk)
    index = np.unravel_index(values.argmax(), values.shape)[::-1]
    np.testing.assert_allclose(itk.TransformIndexToPhysicalPoint([int(v) for v in index]), expected, atol=1e-5)

    read = ct.read_ct(path)
    np.testing.assert_allclose(read.affine, lps_affine(), atol=1e-5)
    np.testing.assert_array_equal(read.hu.numpy(), volume + (0.25 if dtype == "float32" else 0))
    assert list(path.parent.iterdir()) == [path]


def test_writing_refuses_what_the_file_could_not_hold(tmp_path):
    path = tmp_path / "ct.nii.gz"
    good = landmark_volume()
    ct.write_nifti(path, good, lps_affine())
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"ct\.nii\.gz: volume to write holds NaN .*expected finite HU"):
        ct.write_nifti(path, np.where(good == 1400, np.nan, good), lps_affine())
    with pytest.raises(
        InputError, match=r"values run from -1000 to 40000, expected what int16 holds \(-32768 to 32767\); clip"
    ):
        ct.write_nifti(path, np.where(good == 1400, 40000, good.astype(int)), lps_affine())
    with pytest.raises(InputError, match=r"shape \(1, 5, 6, 7\), expected \(z, y, x\)"):
        ct.write_nifti(path, good[None], lps_affine())
    with pytest.raises(InputError, match=r"affine_lps: the affine .* cannot be inverted"):
        ct.write_nifti(path, good, np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    with pytest.raises(InputError, match=r"ct\.npy: expected a name that ends in \.nii"):
        ct.write_nifti(tmp_path / "ct.npy", good, lps_affine())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# --- intensities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume", [*(p.volume for p in PRESETS.values()), VolumePreset(32, hu_min=-1024, hu_max=3071)])
def test_every_whole_hu_in_the_window_comes_back_exactly(volume):
    hu = torch.arange(int(volume.hu_min), int(volume.hu_max) + 1, dtype=torch.int16)
    unit = ct.hu_to_unit(hu, volume)
    assert unit[0] == -1 and unit[-1] == 1 and (unit.diff() > 0).all()
    back = ct.unit_to_hu(unit, volume)
    assert (back - hu).abs().max() < 1e-3
    assert torch.equal(back.round().to(torch.int16), hu)


def test_values_outside_the_window_are_clipped():
    volume = get_preset("tiny").volume
    unit = ct.hu_to_unit(torch.tensor([-2048.0, -1001.0, 250.0, 1501.0, 3071.0]), volume)
    assert unit.tolist() == pytest.approx([-1, -1, 0, 1, 1], abs=1e-6)


def test_attenuation_is_zero_in_vacuum_and_that_of_water_at_zero_hu():
    mu = ct.hu_to_mu(torch.tensor([-2048.0, -1000.0, -500.0, 0.0, 1000.0]), 0.02)
    assert mu.tolist() == pytest.approx([0, 0, 0.01, 0.02, 0.04])
    hu = torch.linspace(-1000, 3000, 97)
    assert torch.allclose(ct.mu_to_hu(ct.hu_to_mu(hu, 0.0193), 0.0193), hu, atol=1e-3)
    with pytest.raises(InputError, match=r"mu_water_per_mm: found -1.*expected a positive number"):
        ct.hu_to_mu(hu, -1)


# --- the cube ------------------------------------------------------------------------------------------------------


def volume_of(hu: np.ndarray, affine: np.ndarray, name="patient") -> ct.CTVolume:
    return ct.CTVolume(torch.from_numpy(np.ascontiguousarray(hu, dtype=np.float32)), affine, name)


@IGNORE_CT_WARNINGS
def test_a_scan_on_the_grid_already_is_not_blurred():
    hu = landmark_volume((40, 36, 33))
    scan = volume_of(hu, lps_affine((1.0, 1.0, 1.0)))
    prepared = ct.prepare_ct(scan, VolumePreset(size=32, fov_mm=32.0), centre="grid")
    assert prepared.unit.shape == (1, 32, 32, 32)
    x, y, z = np.rint(prepared.affine[:3, 3] - ORIGIN).astype(int)
    np.testing.assert_allclose(prepared.affine[:3, 3], ORIGIN + np.array([x, y, z]))
    np.testing.assert_allclose(prepared.hu.numpy(), hu[z : z + 32, y : y + 32, x : x + 32], atol=2e-3)


def test_area_average_equals_block_means():
    hu = np.random.default_rng(1).uniform(-900, 1400, (32, 32, 32))
    prepared = ct.prepare_ct(volume_of(hu, lps_affine((1.0, 1.0, 1.0))), SMALL, centre="grid")
    blocks = hu.reshape(16, 2, 16, 2, 16, 2).mean((1, 3, 5))
    np.testing.assert_allclose(prepared.hu.numpy(), blocks, atol=2e-3)


@pytest.mark.parametrize("spacing", [(0.7, 0.7, 2.5), (1.0, 1.0, 1.0), (0.63, 0.91, 0.8), (1.7, 2.3, 5.0)])
def test_mass_and_centroid_survive_preparing_and_restoring(spacing):
    volume = VolumePreset(size=32, fov_mm=96.0)  # 3 mm voxels
    shape = tuple(int(100 / d) for d in spacing[::-1])
    affine = lps_affine(spacing)
    landmark = ORIGIN + np.array([47.0, 58.0, 52.0])
    sigma = 8.0
    scan = volume_of(blob(shape, affine, landmark, sigma), affine)
    prepared = ct.prepare_ct(scan, volume, centre="grid")
    mass = 1200 * (2 * np.pi * sigma**2) ** 1.5  # closed form of the Gaussian's integral
    assert float((prepared.hu.double() + 1000).sum()) * 3.0**3 == pytest.approx(mass, rel=2e-3)
    np.testing.assert_allclose(centroid_mm(prepared.hu.numpy(), prepared.affine), landmark, atol=0.05)
    # Averaging over voxels of h mm widens a Gaussian's variance by at most about h²/12 for each of the two steps.
    exact = blob(prepared.hu.shape, prepared.affine, landmark, sigma)
    assert np.abs(prepared.hu.numpy() - exact).max() < 1200 * 0.09
    back = ct.restore_ct(prepared, like=scan)
    assert back.hu.shape == scan.hu.shape and np.array_equal(back.affine, scan.affine)
    np.testing.assert_allclose(centroid_mm(back.hu.numpy(), back.affine), landmark, atol=0.1)
    assert float((back.hu - scan.hu).abs().max()) < 1200 * 0.12
    assert float((back.hu.double() + 1000).sum()) * np.prod(spacing) == pytest.approx(mass, rel=5e-3)


@IGNORE_CT_WARNINGS
@pytest.mark.parametrize("period", [1.3, 2.2, 3.1, 4.9])
def test_fine_detail_does_not_alias(period):
    """A wave beyond what 10 mm voxels can hold is damped at least as the area average must (|sinc|)."""
    spacing = 0.5
    affine = lps_affine((spacing, 5.0, 5.0))
    x = ORIGIN[0] + spacing * np.arange(800)
    wave = np.broadcast_to(1000 * np.sin(2 * np.pi * x / period + 0.4), (64, 64, 800)) * 0.9
    prepared = ct.prepare_ct(volume_of(wave, affine), get_preset("tiny").volume, centre="grid")
    kept = float(prepared.hu.abs().max()) / 900
    assert kept < 1 / (np.pi * 10 / period) + 0.02
    assert np.abs(wave[:, :, ::20]).max() / 900 > 0.5  # picking every 20th sample would have kept it


@IGNORE_CT_WARNINGS
def test_report_of_crop_and_pad_is_exact():
    # x: 60 voxels of 0.8 = 48 mm, cropped by 8 mm each side; y: 20 x 1.1 = 22 mm, padded by 5; z: 16 x 2.5 = 40 mm.
    hu = landmark_volume((16, 20, 60))
    volume = dataclasses.replace(SMALL, resample_mm=0.5)  # coarser scans keep their centre to the last digit
    report = ct.prepare_ct(volume_of(hu, lps_affine()), volume, centre="grid").report
    assert report.source_shape == (16, 20, 60)
    assert report.cropped_mm == pytest.approx(
        {"right": 8, "left": 8, "anterior": 0, "posterior": 0, "inferior": 4, "superior": 4}
    )
    assert report.padded_mm == pytest.approx(
        {"right": 0, "left": 0, "anterior": 5, "posterior": 5, "inferior": 0, "superior": 0}
    )
    np.testing.assert_allclose(report.centre_mm, ORIGIN + SPACING * (29.5, 9.5, 7.5))
    text = str(report)
    assert "right 8.0, left 8.0, inferior 4.0, superior 4.0" in text and "anterior 5.0, posterior 5.0" in text
    assert report.to_dict()["cropped_mm"]["right"] == pytest.approx(8)

    off = ct.prepare_ct(
        volume_of(hu, lps_affine()), volume, centre=tuple(np.array(report.centre_mm) + np.array([3, -2, 1]))
    ).report
    assert (off.cropped_mm["right"], off.cropped_mm["left"]) == pytest.approx((11, 5))
    assert (off.padded_mm["anterior"], off.padded_mm["posterior"]) == pytest.approx((7, 3))
    assert (off.cropped_mm["inferior"], off.cropped_mm["superior"]) == pytest.approx((5, 3))


@IGNORE_CT_WARNINGS
def test_padding_is_air_and_nothing_else():
    hu = np.full((6, 8, 10), 40.0)
    hu[0, 0, 0] = 41  # a constant volume is refused
    prepared = ct.prepare_ct(volume_of(hu, lps_affine((2.0, 2.0, 2.0))), SMALL, centre="grid")
    # The scan of 20 x 16 x 12 mm sits in the middle of a cube of 32 mm with 2 mm voxels: all faces coincide.
    inside = prepared.hu[5:11, 4:12, 3:13]
    assert inside.min() > 39.99 and inside.numel() == (prepared.hu > -999.9).sum()
    assert (prepared.hu[prepared.hu < 0] == -1000).all()


def body_scan(centre_mm) -> ct.CTVolume:
    """An elliptic body of water, 180 x 120 mm and as high as the scan, off the centre of a 240 mm field of view."""
    n, d = 60, 4.0
    axis = d * (np.arange(n) - (n - 1) / 2)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    plane = np.full((n, n), -1000.0)
    plane[((x - centre_mm[0]) / 90) ** 2 + ((y - centre_mm[1]) / 60) ** 2 < 1] = 30
    plane[((x - centre_mm[0]) / 40) ** 2 + ((y - centre_mm[1]) / 30) ** 2 < 1] = -850  # lung
    back = np.argmin(np.abs(axis - (centre_mm[1] + 60)))
    plane[back] = 100  # the couch, one row of 4 mm right across; the body lies on it
    return volume_of(np.repeat(plane[None], 50, 0), lps_affine((d, d, d), (axis[0], axis[0], -50.0)))


def test_cube_is_centred_on_the_body_and_not_on_the_field_of_view():
    scan = body_scan((-20.0, -30.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the whole body fits
        report = ct.prepare_ct(scan, VolumePreset(size=32, fov_mm=200.0)).report
    np.testing.assert_allclose(report.centre_mm[:2], (-20, -30), atol=2.0)
    assert report.centre_mm[2] == pytest.approx(-50 + 4 * 49 / 2)
    assert report.body_cropped_share == 0
    grid = ct.prepare_ct(scan, VolumePreset(size=32, fov_mm=240.0), centre="grid").report
    np.testing.assert_allclose(grid.centre_mm, (0, 0, -50 + 4 * 49 / 2), atol=1e-9)


def test_cropped_anatomy_is_warned_of_with_its_share():
    # The body is 180 mm wide and 200 mm high; a cube of 190 mm cuts 5 mm of it at each end and nothing at the sides.
    with pytest.warns(
        ct.CTWarning, match=r"patient: 5\.0 % of the body lies outside .*inferior 5\.0 mm, superior 5\.0"
    ):
        prepared = ct.prepare_ct(body_scan((0.0, 0.0)), VolumePreset(size=32, fov_mm=190.0))
    assert prepared.report.body_cropped_share == pytest.approx(0.05, abs=1e-9)


@IGNORE_CT_WARNINGS
def test_lungs_count_as_body_in_the_share():
    # All of the ellipse beyond x = 40 mm of 90 is cut off; closed form of a segment of the unit circle.
    t = 40 / 90
    expected = (np.arccos(t) - t * np.sqrt(1 - t**2)) / np.pi
    prepared = ct.prepare_ct(body_scan((0.0, 0.0)), VolumePreset(size=32, fov_mm=240.0), centre=(40.0 - 120, 0.0, 48.0))
    assert prepared.report.body_cropped_share == pytest.approx(expected, abs=0.01)  # 0.29 without the lungs


def test_clipped_shares():
    hu = np.full((10, 10, 10), 0.0)
    hu[0, :, :] = 2000  # 10 %
    hu[1:3] = -1024  # 20 %
    report = ct.prepare_ct(volume_of(hu, lps_affine()), SMALL).report
    assert report.clipped_high_share == pytest.approx(0.1) and report.clipped_low_share == pytest.approx(0.2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_preparing_refuses_damaged_values_and_places(value):
    hu = landmark_volume().astype(np.float32)
    hu[2, 3, 4] = value
    with pytest.raises(InputError, match=r"patient: 1 of 210 voxels are NaN or infinite, expected HU; replace"):
        ct.prepare_ct(volume_of(hu, lps_affine()), SMALL)
    scan = volume_of(landmark_volume(), lps_affine())
    with pytest.raises(InputError, match=r"centre \(500, 0, 0\) puts the cube outside the scan, which spans"):
        ct.prepare_ct(scan, SMALL, centre=(500, 0, 0))
    with pytest.raises(InputError, match=r"centre: found 'middle', expected 'body', 'grid'"):
        ct.prepare_ct(scan, SMALL, centre="middle")


def test_a_volume_off_the_lps_axes_is_refused():
    with pytest.raises(InputError, match=r"not on LPS axes; pass it through to_lps"):
        volume_of(landmark_volume(), np.diag([-1.0, 1, 1, 1]))


# --- labels --------------------------------------------------------------------------------------------------------


@IGNORE_CT_WARNINGS
def test_labels_land_on_the_cube_as_itk_places_them(tmp_path):
    rng = np.random.default_rng(3)
    labels = np.kron(rng.integers(0, 118, (5, 7, 8)), np.ones((3, 4, 5), int)).astype(np.uint8)
    affine = lps_affine((0.9, 1.3, 2.1))
    scan = volume_of(rng.uniform(-1000, 500, labels.shape), affine)
    prepared = ct.prepare_ct(scan, SMALL, centre=tuple(ORIGIN + np.array([19.3, 20.7, 11.1])))
    image = nib.Nifti1Image(labels.transpose(2, 1, 0), RAS @ affine).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    nib.save(image, tmp_path / "labels.nii.gz")
    found = ct.prepare_labels(ct.read_labels(tmp_path / "labels.nii.gz"), prepared)

    grid = sitk.Image([16, 16, 16], sitk.sitkUInt8)
    grid.SetSpacing([2.0, 2.0, 2.0])
    grid.SetOrigin(prepared.affine[:3, 3].tolist())
    moving = sitk.ReadImage(str(tmp_path / "labels.nii.gz"))
    expected = sitk.GetArrayFromImage(sitk.Resample(moving, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0))
    assert found.dtype == torch.uint8 and found.shape == (16, 16, 16)
    assert np.count_nonzero(expected) > 1000
    np.testing.assert_array_equal(found.numpy(), expected)


def test_bad_labels(tmp_path):
    path = save(tmp_path / "labels.nii.gz", landmark_volume(), lps_affine())
    with pytest.raises(InputError, match=r"labels\.nii\.gz: values run from -1000 .*expected whole label numbers"):
        ct.read_labels(path)
    path = save(path, np.full((4, 4, 4), 0.5, np.float32), lps_affine())
    with pytest.raises(InputError, match="expected whole label numbers"):
        ct.read_labels(path)
    path = save(path, np.ones((4, 4, 4), np.uint8), lps_affine(origin=ORIGIN + 900))
    prepared = ct.prepare_ct(volume_of(landmark_volume(), lps_affine()), SMALL)
    with pytest.raises(
        InputError, match=r"labels\.nii\.gz: does not overlap patient, expected labels of the same scan"
    ):
        ct.prepare_labels(ct.read_labels(path), prepared)


# --- bad NIfTI -----------------------------------------------------------------------------------------------------


def test_missing_empty_and_truncated_files(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.nii\.gz: no such file, expected a CT as NIfTI; check the path"):
        ct.read_ct(tmp_path / "nothing.nii.gz")
    path = tmp_path / "ct.nii.gz"
    path.touch()
    with pytest.raises(InputError, match=r"ct\.nii\.gz: is empty \(0 bytes\), expected"):
        ct.read_ct(path)
    rng = np.random.default_rng(0)
    for name in ("ct.nii.gz", "ct.nii"):
        path = save(tmp_path / name, rng.integers(-1000, 1000, (20, 20, 20)).astype(np.int16), lps_affine())
        whole = path.read_bytes()
        for part in (0.02, 0.5, 0.999):
            path.write_bytes(whole[: int(len(whole) * part)])
            with pytest.raises(InputError, match=rf"{name}: cannot be read as NIfTI .*expected a CT .*truncated"):
                ct.read_ct(path)
    path = tmp_path / "note.nii.gz"
    path.write_text("This is not an image.\n" * 100)
    with pytest.raises(InputError, match=r"note\.nii\.gz: cannot be read as NIfTI"):
        ct.read_ct(path)
    (tmp_path / "note.nii").write_text("This is not an image.\n" * 100)
    with pytest.raises(InputError, match=r"note\.nii: cannot be read as NIfTI"):
        ct.read_ct(tmp_path / "note.nii")


def test_values_that_are_no_ct(tmp_path):
    hu = landmark_volume().astype(np.float32)
    hu[0, 0, :3] = np.nan
    with pytest.raises(InputError, match=r"ct\.nii: 3 of 210 voxels are NaN or infinite, expected HU; replace"):
        ct.read_ct(save(tmp_path / "ct.nii", hu, lps_affine()))
    with pytest.raises(InputError, match=r"ct\.nii: every voxel is -1000, expected a CT; the file is blank"):
        ct.read_ct(save(tmp_path / "ct.nii", np.full((4, 4, 4), -1000, np.int16), lps_affine()))
    with pytest.warns(ct.CTWarning, match=r"ct\.nii: values run from 24 to 2424, expected HU .*subtract 1024"):
        ct.read_ct(save(tmp_path / "ct.nii", (landmark_volume() + 1024).astype(np.uint16), lps_affine()))
    with pytest.warns(ct.CTWarning, match=r"ct\.nii: values run from -1 to 1, expected HU .*check the scale"):
        ct.read_ct(save(tmp_path / "ct.nii", np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 4, 4), lps_affine()))
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(InputError, match=r"rgb\.nii: data type is .*expected one number per voxel; convert"):
        ct.read_ct(tmp_path / "rgb.nii")


def test_two_and_four_dimensions(tmp_path):
    path = tmp_path / "ct.nii.gz"
    volume = landmark_volume().transpose(2, 1, 0)
    affine = RAS @ lps_affine()
    for wrong in (volume[:, :, 0], volume[:, :, :1], np.stack([volume, volume], -1)):
        nib.save(nib.Nifti1Image(wrong, affine), path)
        shape = str(wrong.shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(InputError, match=rf"ct\.nii\.gz: shape is {shape}, expected a 3D volume .*; choose one"):
            ct.read_ct(path)
    nib.save(nib.Nifti1Image(volume[..., None], affine), path)
    assert torch.equal(ct.read_ct(path).hu, torch.from_numpy(landmark_volume()).float())


def test_bad_affine_and_spacing(tmp_path):
    path = tmp_path / "ct.nii"
    volume = landmark_volume().transpose(2, 1, 0)
    image = nib.Nifti1Image(volume, np.eye(4))
    singular = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    image.header.set_sform(singular, code=1)
    nib.save(nib.Nifti1Image(volume, None, image.header), path)
    with pytest.raises(InputError, match=r"ct\.nii: the affine .* cannot be inverted, expected three independent axes"):
        ct.read_ct(path)
    header = image.header.copy()
    header.set_sform(np.diag([1.0, 0, 1, 1]), code=1)
    nib.save(nib.Nifti1Image(volume, None, header), path)
    with pytest.raises(
        InputError, match=r"ct\.nii: voxel spacing is \[1\.0, 0\.0, 1\.0\] mm, expected 0\.01 to 100 mm"
    ):
        ct.read_ct(path)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    whole = bytearray(path.read_bytes())
    for value in (0.0, -2.0, float("nan")):
        whole[76 + 4 : 76 + 8] = np.float32(value).tobytes()  # pixdim[1] of the NIfTI-1 header
        path.write_bytes(whole)
        with pytest.raises(
            InputError, match=r"ct\.nii: voxel spacing is \[.*\], expected three positive numbers of mm"
        ):
            ct.read_ct(path)


def test_file_without_orientation_is_warned_of(tmp_path):
    image = nib.Nifti1Image(landmark_volume().transpose(2, 1, 0), None)
    image.header.set_zooms((1, 1, 1))
    nib.save(image, tmp_path / "ct.nii")
    with pytest.warns(ct.CTWarning, match=r"ct\.nii: stores no orientation.*left and right may be exchanged"):
        ct.read_ct(tmp_path / "ct.nii")


# --- the real scans ------------------------------------------------------------------------------------------------


def test_samples_that_were_not_fetched_are_none(tmp_path):
    assert ct.sample_ct(tmp_path) is None and ct.sample_labels(tmp_path) is None
    assert ct.sample_ct(tmp_path, "lung_pet_ct_dx_a0001") is None
    with pytest.raises(InputError, match=r"name: found 'other', expected one of lidc_idri_0001, lung_pet_ct_dx_a0001"):
        ct.sample_ct(tmp_path, "other")


@IGNORE_CT_WARNINGS
@pytest.mark.skipif(not (DATA / "sample_ct/lidc_idri_0001").exists(), reason="run data_scripts/fetch_sample_ct.py")
def test_real_patient_lies_the_right_way_round():
    """Heart to the left, liver to the right, spine at the back, sternum in front, and labels on their organs."""
    prepared = ct.prepare_ct(ct.sample_ct(DATA), get_preset("small").volume)
    labels = ct.prepare_labels(ct.sample_labels(DATA), prepared)

    def organ(name):
        mask = torch.isin(labels, torch.tensor(ct.TOTALSEGMENTATOR[name], dtype=labels.dtype))
        z, y, x = (5.0 * (i.float().mean() - 31.5) for i in mask.nonzero(as_tuple=True))
        return float(x), float(y), float(z), float(prepared.hu[mask].mean())

    assert organ("heart")[0] > 15 and organ("liver")[0] < -30
    assert organ("vertebrae")[1] > 40 and organ("sternum")[1] < -60
    assert organ("liver")[2] < organ("heart")[2] < organ("scapulae")[2]
    assert organ("lungs")[3] < -700 and organ("ribs")[3] > 150 and 0 < organ("liver")[3] < 150
    # Each rib at most once on each side: x of right ribs (104 to 115) is negative.
    right = torch.isin(labels, torch.arange(104, 116, dtype=labels.dtype)).nonzero()[:, 2]
    assert (right.float() < 31.5).float().mean() > 0.99


@IGNORE_CT_WARNINGS
@pytest.mark.skipif(not (DATA / "sample_ct/lung_pet_ct_dx_a0001").exists(), reason="fetch_sample_ct.py --second")
def test_real_dicom_series_equals_what_itk_reads():
    folder = DATA / "sample_ct" / ct.SAMPLES["lung_pet_ct_dx_a0001"]
    read = ct.sample_ct(DATA, "lung_pet_ct_dx_a0001")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    np.testing.assert_array_equal(read.hu.numpy(), np.maximum(sitk.GetArrayFromImage(image), -1024))
    np.testing.assert_allclose(read.affine[:3, 3], image.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(read.spacing_mm[::-1], image.GetSpacing(), atol=1e-6)
