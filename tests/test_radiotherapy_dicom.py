"""DICOM-RT: read back, and judged by an independent checker."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from radiotherapy_toys import toy_chest

from difr3ct_core.ct_io import CTVolume
from difr3ct_core.files import InputError
from difr3ct_core.radiotherapy import DoseGrid, Field, Prescription, Structures, TangentPlan, add_target
from difr3ct_core.radiotherapy.dicom import read_rtdose, read_rtstruct, write_dicom_rt
from difr3ct_core.radiotherapy.plan import SEGMENTS, _shield_front, fit_aperture, points_of, project


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Path], TangentPlan, Structures, DoseGrid, CTVolume]:
    ct, structures = toy_chest()
    structures = add_target(structures, "left")
    points = points_of(structures, "target")
    fields = []
    for angle, front in ((306.0, 1.0), (128.0, -1.0)):
        leaves, rows = fit_aperture(project(points, points.mean(0), angle), front)
        apertures = np.stack([_shield_front(leaves, share, front) for share in SEGMENTS])
        fields.append(Field(angle, apertures, rows, np.array([10.0, 0.0, 2.5])))
    plan = TangentPlan("left", Prescription(40.05, 15), points.mean(0), (fields[0], fields[1]), "toy")
    dose = DoseGrid(np.random.default_rng(0).uniform(0, 42, ct.hu.shape) * structures["body"], ct.affine)
    paths = write_dicom_rt(tmp_path_factory.mktemp("rt"), plan, structures, dose, "toy")
    return paths, plan, structures, dose, ct


def test_dose_and_masks_come_back(written) -> None:
    paths, _, structures, dose, ct = written
    read = read_rtdose(paths["RTDOSE"])
    assert np.allclose(read.gy, dose.gy, atol=42 / 2**16) and np.allclose(read.affine, dose.affine)
    masks = read_rtstruct(paths["RTSTRUCT"], ct)
    assert set(masks.masks) == set(structures.masks)
    for name, mask in structures.masks.items():
        assert np.array_equal(masks[name], mask), name
    only = read_rtstruct(paths["RTSTRUCT"], ct, {"heart": "heart"})
    assert set(only.masks) == {"heart"}


def test_plan_holds_what_is_delivered_and_says_what_it_is_not(written) -> None:
    paths, plan, *_ = written
    data = pydicom.dcmread(paths["RTPLAN"])
    assert data.PlanIntent == "RESEARCH" and data.ApprovalStatus == "UNAPPROVED"
    assert "NOT FOR CLINICAL USE" in data.RTPlanDescription
    assert data.FractionGroupSequence[0].NumberOfFractionsPlanned == 15
    struct = pydicom.dcmread(paths["RTSTRUCT"])
    assert data.ReferencedStructureSetSequence[0].ReferencedSOPInstanceUID == struct.SOPInstanceUID
    assert data.FrameOfReferenceUID == struct.FrameOfReferenceUID
    for beam, field in zip(data.BeamSequence, plan.fields, strict=True):
        points = beam.ControlPointSequence
        assert float(points[0].GantryAngle) == field.gantry_deg
        assert np.allclose([float(v) for v in points[0].IsocenterPosition], plan.isocentre_mm, atol=1e-3)
        # Two segments have weight: four control points, the first segment with 10 of 12.5.
        assert [float(p.CumulativeMetersetWeight) for p in points] == [0.0, 0.8, 0.8, 1.0]
        leaves = np.array([float(v) for v in points[0].BeamLimitingDevicePositionSequence[2].LeafJawPositions])
        opened = field.apertures[0][(field.apertures[0][:, 1] > field.apertures[0][:, 0])]
        assert np.allclose(leaves.reshape(2, -1).T, opened, atol=1e-3)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("name", ["RTSTRUCT", "RTPLAN", "RTDOSE"])
def test_dciodvfy_finds_no_error(written, name: str) -> None:
    done = subprocess.run(["dciodvfy", "-new", str(written[0][name])], capture_output=True, text=True, timeout=60)
    report = (done.stdout + done.stderr).splitlines()
    assert name.removeprefix("RT").lower() in "".join(report).lower(), "the checker did not recognise the object"
    found = [line for line in report if line.startswith("Error")]
    assert found == []


def test_other_files_and_grids_are_refused(written, tmp_path: Path) -> None:
    paths, plan, structures, dose, ct = written
    with pytest.raises(InputError, match="is a DICOM RTPLAN, expected RTDOSE"):
        read_rtdose(paths["RTPLAN"])
    (tmp_path / "text.dcm").write_text("no DICOM")
    with pytest.raises(InputError, match="cannot be read as DICOM"):
        read_rtstruct(tmp_path / "text.dcm", ct)
    far = ct.affine.copy()
    far[2, 3] += 1000
    with pytest.raises(InputError, match="no contour lies within"):
        read_rtstruct(paths["RTSTRUCT"], CTVolume(ct.hu, far, "far"))
    with pytest.raises(InputError, match="expected one grid"):
        write_dicom_rt(tmp_path, plan, structures, DoseGrid(dose.gy[1:], dose.affine))
    tilted = pydicom.dcmread(paths["RTDOSE"])
    tilted.ImageOrientationPatient = ["-1", "0", "0", "0", "1", "0"]
    tilted.save_as(tmp_path / "tilted.dcm")
    with pytest.raises(InputError, match="expected LPS axes"):
        read_rtdose(tmp_path / "tilted.dcm")
