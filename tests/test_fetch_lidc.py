"""data_scripts/fetch_lidc.py with a local source in place of the network: selection, refusals, resume, checksums."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
from ct_folders import chest_hu, write_dicom

from difr3ct_core.ct_series import find_series
from difr3ct_core.files import InputError, read_json, sha256

ROOT = Path(__file__).resolve().parents[1]


def load_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_lidc", ROOT / "data_scripts" / "fetch_lidc.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_lidc"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


lidc = load_script()


class Archive:
    """Three series of two patients in a local folder, an index of them, and a download that can fail."""

    def __init__(self, root: Path) -> None:
        self.root, self.index, self.asked, self.before = root, [], [], lambda: None
        for patient, seed in (("P1", 0), ("P2", 1), ("P2", 2)):
            files = write_dicom(root / f"{patient}-{seed}", chest_hu(seed), patient, seed)
            size = sum(path.stat().st_size for path in files) / 1e6
            uid = find_series(root / f"{patient}-{seed}")[0].uid
            self.index.append(
                lidc.Series(patient, uid, f"s3://bucket/{patient}-{seed}/*", len(files), size, "CC BY 3.0")
            )
        self.index.sort(key=lambda one: (one.patient, one.uid))

    def download(self, series, folder: Path) -> None:
        self.before()
        self.asked.append(series.uid)
        shutil.copytree(self.root / series.url.split("/")[3], folder, dirs_exist_ok=True)

    def run(self, out: Path, *words: str) -> int:
        return lidc.main(["--out", str(out), *words], self.index, self.download)


@pytest.fixture
def archive(tmp_path) -> Archive:
    return Archive(tmp_path / "archive")


def test_the_whole_flow(archive, tmp_path, capsys):
    out = tmp_path / "lidc"
    assert archive.run(out, "--yes") == 0
    printed = capsys.readouterr().out
    megabytes = sum(one.megabytes for one in archive.index)
    assert f"2 patients, 3 CT series, {megabytes / 1e3:.2f} GB" in printed and "CC BY 3.0 (3 series)" in printed
    assert "doi:10.7937/K9/TCIA.2015.LO9QL9SX" in printed
    for one in archive.index:
        folder = out / one.patient / one.uid
        files = read_json(folder / "checksums.json")["files"]
        assert len(files) == one.files
        assert all(sha256(folder / name) == entry["sha256"] for name, entry in files.items())
    assert sorted((s.patient, s.uid) for s in find_series(out)) == sorted((s.patient, s.uid) for s in archive.index)
    assert read_json(out / "SOURCE.json")["licence"] == ["CC BY 3.0"]
    # A second run asks for nothing.
    assert archive.run(out) == 0
    assert len(archive.asked) == 3 and "all of it is there" in capsys.readouterr().out


def test_nothing_is_downloaded_without_a_yes(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: False))
    assert archive.run(tmp_path / "lidc") == 2
    caught = capsys.readouterr()
    assert "no terminal to ask at; add --yes" in caught.err and "Licence: CC BY 3.0" in caught.out
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert archive.run(tmp_path / "lidc") == 2
    assert not archive.asked and not (tmp_path / "lidc").exists()
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert archive.run(tmp_path / "lidc", "--count", "1") == 0
    assert len(archive.asked) == 1


def test_selection(archive):
    assert {one.patient for one in lidc.select(archive.index, count=1)} == {"P1"}
    assert len(lidc.select(archive.index, ["P2"])) == 2, "all series of a patient"
    assert lidc.select(archive.index) == archive.index
    for arguments, words in (
        ((["P3"],), "found P3, expected names from P1 to P2"),
        ((None, 0), "found 0, expected 1 to 2 patients"),
        ((None, 3), "found 3, expected 1 to 2 patients"),
        ((["P1"], 1), "found both"),
    ):
        with pytest.raises(InputError, match=words):
            lidc.select(archive.index, *arguments)


def test_no_room(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert archive.run(tmp_path / "lidc", "--yes") == 2
    assert "has room for 0.00 GB, expected" in capsys.readouterr().err
    assert not archive.asked


def test_no_network(archive, tmp_path, capsys):
    """The first series comes, then the network goes: a clear word, what came is kept, and the next run goes on."""
    out = tmp_path / "lidc"

    def fails_later() -> None:
        if archive.asked:
            raise lidc.Unavailable("Name or service not known")

    archive.before = fails_later
    assert archive.run(out, "--yes") == 3
    assert "cannot be reached (Name or service not known), expected a network" in capsys.readouterr().err
    archive.before = lambda: None
    assert archive.run(out, "--yes") == 0
    assert sorted(archive.asked) == sorted(one.uid for one in archive.index), "none twice"


def test_the_real_download_says_that_there_is_no_network(archive, monkeypatch, tmp_path):
    pytest.importorskip("idc_index")

    def refuse(*_, **__):
        raise lidc.urllib.error.URLError("no route")

    monkeypatch.setattr(lidc.urllib.request, "urlopen", refuse)
    with pytest.raises(lidc.Unavailable, match="no route"):
        lidc.idc_download()(archive.index[0], tmp_path)


def test_what_arrives_is_compared_with_the_index(archive, tmp_path, capsys):
    out = tmp_path / "lidc"
    one, two, three = (archive.root / s.url.split("/")[3] for s in archive.index)
    file = sorted(one.iterdir())[2]
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    sorted(two.iterdir())[0].unlink()
    broken = sorted(three.iterdir())[1]
    broken.write_bytes(b"x" * broken.stat().st_size)
    assert archive.run(out, "--yes") == 1
    complaints = capsys.readouterr().err
    assert "8 files of" in complaints and "7 files of" in complaints and "is not a DICOM image" in complaints
    assert complaints.count("run again") == 3
    assert not [p for p in out.rglob("*.dcm")], "nothing of a series that is not whole"
    file.write_bytes(whole)
    assert archive.run(out, "--yes", "--patients", "P1") == 0


def test_damage_is_found_and_mended(archive, tmp_path, capsys):
    out = tmp_path / "lidc"
    archive.run(out, "--yes")
    first = out / archive.index[0].patient / archive.index[0].uid
    file = sorted(first.glob("*.dcm"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # same length
    assert archive.run(out, "--yes") == 0 and len(archive.asked) == 3
    assert archive.run(out, "--yes", "--verify") == 0 and len(archive.asked) == 4
    assert file.read_bytes() == whole
    file.unlink()
    assert archive.run(out, "--yes") == 0 and len(archive.asked) == 5 and file.exists()


def test_a_kill_in_the_middle_leaves_nothing_that_looks_complete(archive, tmp_path):
    """What a killed download leaves is removed, and the series is fetched anew."""
    out = tmp_path / "lidc"
    pid = os.fork()
    if pid == 0:

        def killed(series, folder: Path) -> None:
            archive.download(series, folder)
            sorted(folder.iterdir())[3].unlink()
            os.kill(os.getpid(), 9)

        lidc.main(["--out", str(out), "--yes"], archive.index, killed)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert list(out.glob(".fetch.*")) and not list(out.glob("P*"))
    assert archive.run(out, "--yes") == 0
    assert not list(out.glob(".fetch.*")) and len(list(out.glob("P*/*"))) == 3


def test_a_name_that_leads_elsewhere_is_refused(archive, tmp_path):
    for name in ("../evil", "..", "/tmp/x", "a/b"):
        with pytest.raises(InputError, match="expected letters, digits, dot and dash"):
            _ = dataclasses.replace(archive.index[0], patient=name).place


def test_the_index_of_the_package():
    """The published numbers of the collection: 1018 series of 1010 patients."""
    pytest.importorskip("idc_index_data")
    index = lidc.read_index()
    assert (len(index), len({one.patient for one in index})) == (1018, 1010)
    assert {one.licence for one in index} == {"CC BY 3.0"}
    assert sum(one.megabytes for one in index) / 1e3 == pytest.approx(128.4, abs=0.1)
    assert index[0].patient == "LIDC-IDRI-0001" and index[0].files == 133
