"""data_scripts/prepare_ct.py on folders of CTs as they come: what is right, what is set aside, what resumes."""

from __future__ import annotations

import csv
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import run_chapters
import torch
from ct_folders import SPACING, chest_hu, edit, write_dicom
from pydicom.uid import RLELossless

from difr3ct_core import ct
from difr3ct_core.chapters import Chapter
from difr3ct_core.ct_series import find_series
from difr3ct_core.datasets import SPLITS, load_patients, render_xrays
from difr3ct_core.files import InputError, read_json, read_npz
from difr3ct_core.preparation import assign_splits, prepare_cohort, summary
from difr3ct_core.presets import CohortPreset, get_preset

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data_scripts" / "prepare_ct.py"
PRESET = get_preset("tiny-lidc")
pytestmark = pytest.mark.filterwarnings("ignore::difr3ct_core.ct.CTWarning")


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    """Rows of the quality report by source folder."""
    with open(out / "quality.csv", newline="") as handle:
        return {row["source"]: row for row in csv.DictReader(handle)}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """A folder with everything that goes wrong in practice, and the cohort that came of it."""
    source = tmp_path_factory.mktemp("messy") / "cts"
    out = source.parent / "tiny-lidc"
    write_dicom(source / "good", chest_hu(1), "good")
    write_dicom(source / "mixed", chest_hu(2), "two", 1, prefix="A")  # two series in one folder, of one patient
    write_dicom(source / "mixed", chest_hu(3), "two", 2, prefix="B")
    write_dicom(source / "slope", chest_hu(1) // 2 * 2, "slope", slope=2.0)
    for path in write_dicom(source / "rle", chest_hu(1), "rle"):
        edit(path, lambda ds: ds.compress(RLELossless, generate_instance_uid=False))
    write_dicom(source / "gap", chest_hu(4), "gap")[3].unlink()
    cut = write_dicom(source / "cut", chest_hu(5), "cut")[2]
    cut.write_bytes(cut.read_bytes()[:-40])
    stump = write_dicom(source / "stump", chest_hu(5), "stump")[-1]  # the last: no gap would give it away
    stump.write_bytes(stump.read_bytes()[:200])
    copied = write_dicom(source / "copied", chest_hu(6), "copied")
    shutil.copy(copied[1], copied[1].with_name("copy of a slice.dcm"))
    double = write_dicom(source / "double", chest_hu(7), "double")
    shutil.copy(double[1], double[1].with_name("other.dcm"))
    edit(double[1].with_name("other.dcm"), lambda ds: setattr(ds, "PixelData", ds.PixelData[::-1]))
    write_dicom(source / "evil", chest_hu(8), "../../evil")
    (source / "notes.txt").write_text("no CT")
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1])
    (source / "nifti").mkdir()
    nib.save(nib.Nifti1Image(chest_hu(1).transpose(2, 1, 0).astype(np.int16), affine), source / "nifti" / "ct.nii.gz")
    organs = (chest_hu(1) == 900).astype(np.uint8) * 51
    nib.save(nib.Nifti1Image(organs.transpose(2, 1, 0), affine), source / "nifti" / "labels.nii.gz")
    rows = prepare_cohort(source, out, PRESET, workers=1)
    return source, out, rows


def test_what_can_be_used_is_and_what_cannot_is_set_aside(messy):
    _, out, rows = messy
    report = rows_of(out)
    aside = {name: row["reason"] for name, row in report.items() if row["status"] == "set aside"}
    assert set(aside) == {"gap", "cut", "stump", "double"}
    assert "slices are missing or unevenly spaced" in aside["gap"]
    assert "its pixels cannot be read" in aside["cut"]
    assert "is not a complete DICOM file" in aside["stump"]
    assert "lie at the same place" in aside["double"]
    listed = {patient["id"] for patient in read_json(out / "manifest.json")["patients"]}
    assert listed == {path.name for path in (out / "patients").iterdir()}
    assert len(listed) == 8 and "12 series: 8 prepared, 0 kept from before, 4 set aside" in summary(out, rows)


def test_the_quality_report_tells_what_was_found(messy):
    _, out, _ = messy
    report = rows_of(out)
    assert report["gap"]["missing_slices"] == "1" and report["gap"]["slices"] == "7"
    assert report["good"]["missing_slices"] == "0"
    assert report["copied"]["copies_left_out"] == "1"
    assert (report["rle"]["compressed"], report["good"]["compressed"]) == ("True", "False")
    assert report["rle"]["transfer_syntax"] == "RLE Lossless"
    assert (report["slope"]["rescale_slope"], report["good"]["rescale_slope"]) == ("2", "1")
    spacing = [float(report["good"][f"spacing_{axis}_mm"]) for axis in "zyx"]
    assert spacing == list(SPACING)
    assert "pixels are not square" in report["good"]["odd_spacing"] and "coarse" in report["good"]["odd_spacing"]
    # 8 slices of 40 mm are the cube; 18 rows of 20 mm are 40 mm more than it; 14 columns of 24 mm 16 mm more.
    total = {axis: sum(float(report["good"][f"cropped_{side}_mm"]) for side in ct.SIDES[i])
             - sum(float(report["good"][f"padded_{side}_mm"]) for side in ct.SIDES[i])
             for i, axis in enumerate("xyz")}  # fmt: skip
    assert total == pytest.approx({"x": 16, "y": 40, "z": 0}, abs=1e-2)


def test_a_prepared_scan_is_what_the_library_makes_of_the_numbers(messy):
    """Against the volume that the test wrote, not against the reader: order of files, offset and signs are in it."""
    _, out, _ = messy
    report = rows_of(out)
    affine = np.diag([SPACING[2], SPACING[1], SPACING[0], 1.0])
    volume = ct.CTVolume(torch.from_numpy(chest_hu(1)).float(), affine)
    expected = ct.prepare_ct(volume, PRESET.volume).hu.round()
    for name in ("good", "rle", "nifti/ct.nii.gz"):
        scan = read_npz(out / "patients" / report[name]["id"] / "ct.npz")
        assert (torch.from_numpy(scan["hu"]).float() - expected).abs().max() <= 1, name
    even = ct.CTVolume(torch.from_numpy(chest_hu(1) // 2 * 2).float(), affine)
    scan = read_npz(out / "patients" / report["slope"]["id"] / "ct.npz")
    assert (torch.from_numpy(scan["hu"]).float() - ct.prepare_ct(even, PRESET.volume).hu.round()).abs().max() <= 1
    assert not scan["labels"].any()
    found = read_npz(out / "patients" / report["nifti/ct.nii.gz"]["id"] / "ct.npz")
    assert set(np.unique(found["labels"])) == {0, 51}
    inside = found["labels"] == 51  # its faces are mixed with what lies around it
    assert found["hu"][inside].min() > 100 and found["hu"][inside].mean() > 350 > 200 > found["hu"][~inside].mean()


def test_chapters_can_use_it(messy):
    _, out, _ = messy
    chapter = Chapter("x", PRESET, out.parent, out.parent / "run", 0, torch.device("cpu"))
    parts = {split: chapter.patients(split) for split in SPLITS}
    assert sum(len(part) for part in parts.values()) == 8
    one = parts["train"].with_views("2view")
    hu = one.hu[:1].float()
    torch.testing.assert_close(one.xrays[:1], render_xrays(hu, one.views, one.volume, PRESET.xray), atol=1e-5, rtol=0)


def test_the_book_finds_it():
    book = run_chapters.Book(ROOT, "paper-lidc")
    assert book.fill("{data}/{cohort} {run}") == "data/paper-lidc runs/paper-lidc"
    assert run_chapters.Book(ROOT, "tiny").fill("{data}/{cohort}") == "data/tiny-lung"
    assert get_preset("paper-lidc").volume == get_preset("paper").volume
    for name in ("paper-", "lidc", "paper-lidc-lidc"):
        with pytest.raises(InputError, match=r"expected one of tiny, small, paper, with or without one of -lung"):
            get_preset(name)


def test_a_cohort_that_is_not_prepared_names_the_command(messy, tmp_path):
    chapter = Chapter("x", PRESET, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"tiny-lidc.manifest\.json: no such file.*prepare_ct\.py CT_FOLDER .*--preset"
    ):
        chapter.patients("train")
    shutil.copytree(messy[1], tmp_path / "small-lidc")
    with pytest.raises(InputError, match=r"made with other numbers than preset 'small-lidc'"):
        Chapter("x", get_preset("small-lidc"), tmp_path, tmp_path, 0, torch.device("cpu")).patients("train")


def test_scans_of_one_patient_are_in_one_split(messy):
    manifest = read_json(messy[1] / "manifest.json")
    assert len([p for p in manifest["patients"] if p["patient"] == "two"]) == 2
    for split in SPLITS:
        assert load_patients(messy[1], split).ids
    by_patient: dict[str, set[str]] = {}
    for patient in manifest["patients"]:
        by_patient.setdefault(patient["patient"], set()).add(patient["split"])
    assert all(len(splits) == 1 for splits in by_patient.values())


def test_names_of_patients_stay_inside(messy):
    _, out, _ = messy
    folder = out / "patients" / rows_of(out)["evil"]["id"]
    assert folder.resolve().parent == (out / "patients").resolve() and (folder / "ct.npz").exists()
    assert folder.name.startswith("evil-")
    assert not list(out.parent.parent.glob("evil*")) and not list(out.parent.glob("evil*"))


# --- splits ----------------------------------------------------------------------------------------------------


def test_splits_have_the_papers_sizes_and_stay():
    cohort = CohortPreset(868, 50, 100, 128, "lidc")
    names = [f"LIDC-IDRI-{i:04d}" for i in range(1, 1019)]
    splits = assign_splits(names, cohort)
    sizes = {split: sum(s == split for s in splits.values()) for split in SPLITS}
    assert sizes == {"train": 868, "val": 50, "test": 100}
    assert splits["LIDC-IDRI-0001"] == "test"
    assert assign_splits(names[::-1], cohort) == splits
    first = assign_splits(names[:30], cohort)
    later = assign_splits(names, cohort, first)
    assert all(later[name] == split for name, split in first.items())
    assert {split: sum(s == split for s in later.values()) for split in SPLITS} == sizes
    # Not by number: the test patients lie all over the list.
    tested = [int(name[-4:]) for name, split in splits.items() if split == "test"]
    assert 350 < np.mean(tested) < 670
    assert set(assign_splits("abc", cohort).values()) == set(SPLITS)


def test_the_draw_differs_with_the_seed():
    names = [f"p{i}" for i in range(200)]
    one, two = (assign_splits(names, CohortPreset(80, 10, 10, 32, "lidc", seed)) for seed in (1, 2))
    assert one != two


# --- what else may lie there -------------------------------------------------------------------------------------


def test_patients_of_nifti_files(tmp_path):
    for name in ("a/x/scan1.nii", "a/scan2.nii", "b.nii.gz", "a/mask.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"any")
    assert sorted((s.patient, s.uid) for s in find_series(tmp_path)) == [
        ("a", "a/scan2.nii"), ("a", "a/x/scan1.nii"), ("b", "b.nii.gz")
    ]  # fmt: skip
    assert {s.patient for s in find_series(tmp_path, pattern=r"(scan\d|b)\.nii")} == {"scan1", "scan2", "b"}
    with pytest.raises(InputError, match=r"finds no patient in a/scan2\.nii"):
        find_series(tmp_path, pattern="x/|b")
    with pytest.raises(InputError, match="expected a regular expression"):
        find_series(tmp_path, pattern="(")


def test_folders_that_do_not_fit(tmp_path, messy):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no CT, expected DICOM series"):
        prepare_cohort(tmp_path / "empty", tmp_path / "out", PRESET)
    with pytest.raises(InputError, match="no such folder"):
        prepare_cohort(tmp_path / "nowhere", tmp_path / "out", PRESET)
    with pytest.raises(InputError, match="cohort: found 'lung', expected one of lidc"):
        prepare_cohort(messy[0], tmp_path / "out", get_preset("tiny"))
    with pytest.raises(InputError, match="made with other numbers than preset 'small-lidc'"):
        prepare_cohort(messy[0], messy[1], get_preset("small-lidc"))
    (tmp_path / "phantoms").mkdir()
    (tmp_path / "phantoms" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="holds another cohort"):
        prepare_cohort(messy[0], tmp_path / "phantoms", PRESET)


def test_two_preparations_into_one_folder(messy):
    handle = os.open(messy[1], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(InputError, match=r"another process is at work there.*wait until the other preparation"):
            prepare_cohort(messy[0], messy[1], PRESET)
    finally:
        os.close(handle)


def test_no_room(messy, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"has room for 0\.0 GB, expected 0\.0 GB for 12 scans; free some space"):
        prepare_cohort(messy[0], tmp_path / "out", PRESET)
    assert not (tmp_path / "out" / "patients").exists()


# --- kill and resume ---------------------------------------------------------------------------------------------


def script(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, arguments), "--preset", "tiny"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_kill_9_and_resume_end_in_the_same_bytes(messy, tmp_path):
    """Killed when some scans are done; the second run keeps those, and all files equal those of a run at once."""
    source, straight, _ = messy
    out = tmp_path / "tiny-lidc"
    process = script(source, out, "--workers", 1)
    deadline = time.monotonic() + 250
    while len(done := list(out.glob("patients/*/quality.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "manifest.json").exists(), "half a cohort cannot be mistaken for a whole one"
    before = {path: path.stat().st_mtime_ns for path in done}
    process = script(source, out)
    printed, complaints = process.communicate(timeout=280)
    assert process.returncode == 1 and "4 set aside (quality.csv)" in printed, complaints
    assert "Traceback" not in complaints
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert tree(out) == tree(straight)


def test_only_what_changed_is_done_again(tmp_path):
    source, out = tmp_path / "cts", tmp_path / "out"
    write_dicom(source / "a", chest_hu(1), "a")
    paths = write_dicom(source / "b", chest_hu(2), "b")
    kept = paths[4].read_bytes()
    paths[4].write_bytes(kept[:-30])
    assert [r["status"] for r in prepare_cohort(source, out, PRESET, 1)] == ["made", "set aside"]
    paths[4].write_bytes(kept)
    assert [r["status"] for r in prepare_cohort(source, out, PRESET, 1)] == ["kept", "made"]
    assert [r["status"] for r in prepare_cohort(source, out, PRESET, 1)] == ["kept", "kept"]


# --- the real scan -------------------------------------------------------------------------------------------------


def test_the_real_scan_as_dicom(tmp_path):
    """LIDC-IDRI-0001 written as DICOM, prepared, against the same scan prepared from its NIfTI file."""
    scan = ct.sample_ct(ROOT / "data")
    if scan is None:
        pytest.skip("data/sample_ct is not there; data_scripts/fetch_sample_ct.py brings it")
    hu = scan.hu.numpy().round()
    z, y, x = scan.spacing_mm
    paths = write_dicom(tmp_path / "cts", hu, "LIDC-IDRI-0001", PixelSpacing=[y, x])
    for k, path in enumerate(paths):
        position = (scan.affine[:3, 3] + [0, 0, k * z]).tolist()
        edit(path, lambda ds, position=position: setattr(ds, "ImagePositionPatient", [f"{v:.6f}" for v in position]))
    rows = prepare_cohort(tmp_path / "cts", tmp_path / "out", PRESET, 1)
    assert [row["status"] for row in rows] == ["made"] and rows[0]["split"] == "test"
    found = load_patients(tmp_path / "out", "test").hu[0].float()
    assert (found - ct.prepare_ct(scan, PRESET.volume).hu.round()).abs().max() <= 1


def test_the_command_line_says_what_is_wrong(capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("prepare_ct", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([str(tmp_path), "--preset", "huge"]) == 2
    assert "preset: found 'huge-lidc', expected one of tiny, small, paper" in capsys.readouterr().err
    assert module.main([str(tmp_path), "--workers", "0"]) == 2
    assert "--workers: found 0, expected at least 1" in capsys.readouterr().err
