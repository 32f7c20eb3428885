"""Saved results: what was saved comes back, damage is noticed, and provenance is complete."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core import results
from difr3ct_core.files import InputError
from difr3ct_core.results import device_name, load_result, peak_memory_gb, provenance, save_result

ARRAYS = {
    "volume": torch.arange(3 * 4 * 5, dtype=torch.float16).view(3, 4, 5),
    "labels": np.arange(6, dtype=np.uint8),
    "psnr": 30.5,
}
VALUES = {"psnr": {"8view": 30.25, "2view": None}, "table": [[1, 2], [3, 4]], "name": "µ"}


def save(folder: Path, **changes):
    given = {"arrays": ARRAYS, "values": VALUES, "provenance": provenance("tiny", 3), **changes}
    return save_result(folder, "psnr", **given)


def test_round_trip(tmp_path):
    saved = save(tmp_path / "a" / "b")
    loaded = load_result(tmp_path / "a" / "b", "psnr")
    for result in (saved, loaded):
        assert result.values == VALUES and result.name == "psnr"
        assert set(result.arrays) == set(ARRAYS)
        np.testing.assert_array_equal(result.arrays["volume"], ARRAYS["volume"].numpy())
        assert result.arrays["volume"].dtype == np.float16 and result.arrays["labels"].dtype == np.uint8
        assert float(result.arrays["psnr"]) == 30.5
        assert result.provenance["seed"] == 3


def test_only_what_is_saved_is_returned(tmp_path):
    """What a chapter shows is what a reviewer will redraw: tuples are lists already."""
    assert save(tmp_path, values={"pair": (1, 2)}).values == {"pair": [1, 2]}


def test_saving_again_replaces(tmp_path):
    save(tmp_path)
    save(tmp_path, arrays={"other": np.ones(2)}, values={"x": 1})
    again = load_result(tmp_path, "psnr")
    assert set(again.arrays) == {"other"} and again.values == {"x": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["psnr.json", "psnr.npz"]


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": np.float32(1.0)}, {"x": torch.ones(1)}])
def test_values_that_are_not_json_leave_the_old_result(tmp_path, bad):
    save(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path, arrays={"other": np.ones(2)}, values=bad)
    assert load_result(tmp_path, "psnr").values == VALUES


def test_objects_leave_the_old_result(tmp_path):
    save(tmp_path)
    with pytest.raises(TypeError, match="'bad'"):
        save(tmp_path, arrays={"bad": np.array([{}], dtype=object)})
    assert load_result(tmp_path, "psnr").values == VALUES


def test_missing_and_damaged(tmp_path):
    with pytest.raises(InputError, match=r"psnr\.json: no such file, expected the saved result 'psnr'; run"):
        load_result(tmp_path, "psnr")
    save(tmp_path)
    table, arrays = tmp_path / "psnr.json", tmp_path / "psnr.npz"
    good = {path: path.read_bytes() for path in (table, arrays)}
    for path in good:
        path.write_bytes(good[path][:-40])
        with pytest.raises(InputError, match=path.name):
            load_result(tmp_path, "psnr")
        path.unlink()
        with pytest.raises(InputError, match=rf"{path.name}: no such file"):
            load_result(tmp_path, "psnr")
        path.write_bytes(good[path])
    table.write_text("[1]")
    with pytest.raises(InputError, match=r"psnr\.json: found no values"):
        load_result(tmp_path, "psnr")


def test_arrays_of_another_run_are_noticed(tmp_path):
    """Killed between the two writes: new arrays beside the old table."""
    save(tmp_path)
    save(tmp_path / "new", arrays={**ARRAYS, "psnr": 31.0})
    (tmp_path / "psnr.npz").write_bytes((tmp_path / "new" / "psnr.npz").read_bytes())
    with pytest.raises(InputError, match=r"psnr\.npz: is not the file that psnr\.json describes"):
        load_result(tmp_path, "psnr")


def test_provenance():
    found = provenance("tiny", 5, "cpu", wall_s=1.234, command="make book", views=[0.0, 90.0])
    assert json.loads(json.dumps(found)) == found
    assert found["preset"] == "tiny" and found["seed"] == 5 and found["wall_s"] == 1.23
    assert found["command"] == "make book" and found["views"] == [0.0, 90.0]
    assert found["versions"]["torch"] == torch.__version__ and set(found["versions"]) >= {"python", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["finished"])
    assert f"{torch.get_num_threads()} threads" in found["device"]
    assert 0.05 < found["peak_memory_gb"] < 100
    assert provenance("tiny", 5)["wall_s"] > 0  # since the start


def test_peak_memory_only_grows():
    before = peak_memory_gb()
    block = np.ones(40_000_000)  # 0.32 GB
    after = peak_memory_gb()
    assert after >= before and after > block.nbytes / 1e9
    del block
    assert peak_memory_gb() >= after


def test_device_name():
    assert device_name("cpu").startswith("CPU ") and device_name(torch.device("cpu")) == device_name()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with a library folder, which results takes for its own."""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    (tmp_path / "library").mkdir()
    module = tmp_path / "library" / "results.py"
    module.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(results, "__file__", str(module))
    results.git_commit.cache_clear()
    yield tmp_path
    results.git_commit.cache_clear()


def test_the_commit_says_whether_the_library_was_changed(repository):
    head = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    clean = results.git_commit()
    assert len(clean) == 12 and head.startswith(clean)
    (repository / "notes.txt").write_text("beside the library")
    results.git_commit.cache_clear()
    assert results.git_commit() == clean
    (repository / "library" / "results.py").write_text("2")
    results.git_commit.cache_clear()
    assert results.git_commit() == clean + "+changes"


def test_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    results.git_commit.cache_clear()
    try:
        assert results.git_commit() == "unknown"
    finally:
        results.git_commit.cache_clear()
