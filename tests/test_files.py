"""Nothing half-written, and nothing damaged read: atomic writes, full devices, killed writers, damaged files."""

from __future__ import annotations

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difr3ct_core.files import (
    InputError,
    atomic_path,
    read_json,
    read_npz,
    read_safetensors,
    require_file,
    sha256,
    write_json,
    write_npz,
    write_safetensors,
)

MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ARRAY = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
TENSORS = {"weight": torch.arange(24.0).view(2, 3, 4), "flag": torch.tensor(True)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing ---------------------------------------------------------------------------------------------------


def test_atomic_path_replaces_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b" / "volume.nii.gz"
    for text in ("first", "second"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent  # another device could not be renamed from
            assert temporary.name.endswith(".nii.gz")  # writers choose the format by the ending
            temporary.write_text(text)
        assert target.read_text() == text
        assert names(target.parent) == ["volume.nii.gz"]


def test_atomic_path_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "result.json"
    write_json(target, {"old": 1})
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:
        temporary.write_text("{")
        raise RuntimeError("half way")
    assert read_json(target) == {"old": 1}
    assert names(tmp_path) == ["result.json"]


def test_written_files_have_the_users_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match=r"runs.*a\.json.*folder"):
        write_json(tmp_path / "runs" / "a.json", 1)


@pytest.mark.parametrize("writer", ["json", "npz", "safetensors"])
def test_unserialisable_values_leave_the_old_file(tmp_path, writer):
    path = tmp_path / "old"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError)):
        if writer == "json":
            write_json(path, {"x": float("nan")})
        elif writer == "npz":
            write_npz(path, a=np.array([{"python": "object"}], dtype=object))
        else:
            write_safetensors(path, {"a": torch.zeros(2)}, {"bad": object()})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["old"]


WRITER_FOR_EVER = """
import sys, numpy as np
from difr3ct_core.files import write_npz
print("ready", flush=True)
n = 0
while True:
    n += 1
    write_npz(sys.argv[1], number=np.full((60, 70, 80), n % 250, dtype=np.uint8), noise=np.random.rand(40, 50, 60))
"""


def test_kill_9_in_the_middle_of_writing(tmp_path):
    """Writing takes nearly all of the child's time, so most moments fall into a write."""
    path = tmp_path / "volume.npz"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout.readline().strip() == "ready"
            while not path.exists():
                assert child.poll() is None
                time.sleep(0.005)
            interrupted = 0
            for delay in range(200):
                time.sleep(0.003 + 0.0007 * delay)
                # Stopped, the folder is what a kill at this moment would leave.
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(0.002)
                arrays = read_npz(path, ("number", "noise"))
                assert arrays["number"].shape == (60, 70, 80)
                assert (arrays["number"] == arrays["number"][0, 0, 0]).all()
                interrupted += len(names(tmp_path)) == 2
                if interrupted == 3:
                    break
                os.kill(child.pid, signal.SIGCONT)
            else:
                pytest.fail("never stopped in the middle of a write")
        finally:
            child.kill()
    left = names(tmp_path)
    assert len(left) == 2  # the temporary file of the write that was killed
    assert read_npz(path)["noise"].shape == (40, 50, 60)
    write_npz(path, number=ARRAY)  # the next write tidies up
    assert names(tmp_path) == ["volume.npz"]


def test_two_writers_of_one_file_do_not_remove_each_others_work(tmp_path):
    path = tmp_path / "a.json"
    with atomic_path(path) as first:
        first.write_text("1")
        write_json(path, 2)
        assert first.exists()
    assert read_json(path) == 1


# --- a full device ----------------------------------------------------------------------------------------------


@pytest.fixture
def full_device(tmp_path):
    """A folder on a device of 256 kB; needs root."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed writer may be open still


def _write(kind: str, path: Path, large: bool) -> None:
    count = 2**17 if large else 8
    noise = np.random.default_rng(0).standard_normal(count).astype(np.float32)  # does not compress
    if kind == "json":
        write_json(path, noise.tolist())
    elif kind == "npz":
        write_npz(path, noise=noise)
    elif kind == "safetensors":
        write_safetensors(path, {"noise": torch.from_numpy(noise)}, {"step": 1})
    else:
        from difr3ct_core.ct import write_nifti

        write_nifti(path, noise.reshape(2, 4 if not large else 256, -1), np.eye(4), "float32")


@pytest.mark.parametrize(
    ("kind", "name"), [("json", "a.json"), ("npz", "a.npz"), ("safetensors", "a.safetensors"), ("nifti", "a.nii.gz")]
)
def test_a_full_device_is_named_and_the_old_file_stays(full_device, kind, name):
    path = full_device / name
    _write(kind, path, large=False)
    before = path.read_bytes()
    with pytest.raises(InputError, match=rf"{name}: no space left on the device") as caught:
        _write(kind, path, large=True)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert names(full_device) == [name]


def test_a_full_device_at_the_last_moment(tmp_path, monkeypatch):
    """Delayed allocation: the write succeeds and fsync reports the full device (also where nothing can be mounted)."""
    path = tmp_path / "a.json"
    write_json(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a\.json: no space left on the device"):
        write_json(path, "new")
    monkeypatch.undo()
    assert read_json(path) == "old"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission_is_said_plainly(tmp_path, monkeypatch, code):
    import tempfile

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(InputError, match=r"a\.json: cannot be written .*choose a folder"):
        write_json(tmp_path / "a.json", 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_on_a_real_folder(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"locked.*cannot be written"):
        write_json(locked / "a.json", 1)


# --- reading ----------------------------------------------------------------------------------------------------


def test_round_trips(tmp_path):
    write_json(tmp_path / "a.json", {"µ": [1, 2.5, None, "HU"]})
    assert read_json(tmp_path / "a.json") == {"µ": [1, 2.5, None, "HU"]}
    write_npz(tmp_path / "a.npz", volume=ARRAY, mask=ARRAY > 3)
    arrays = read_npz(tmp_path / "a.npz", ("volume", "mask"))
    np.testing.assert_array_equal(arrays["volume"], ARRAY)
    assert arrays["mask"].dtype == bool
    turned = torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)  # not contiguous
    write_safetensors(tmp_path / "a.safetensors", {"t": turned}, {"step": 3, "preset": {"name": "tiny"}})
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["t"], turned)
    assert metadata == {"step": 3, "preset": {"name": "tiny"}}


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


READERS = {"json": read_json, "npz": read_npz, "safetensors": read_safetensors}


@pytest.mark.parametrize("kind", READERS)
def test_missing_empty_and_folder(tmp_path, kind):
    missing, empty = tmp_path / f"missing.{kind}", tmp_path / f"empty.{kind}"
    empty.touch()
    with pytest.raises(InputError, match=rf"missing\.{kind}: no such file, expected"):
        READERS[kind](missing)
    with pytest.raises(InputError, match=rf"empty\.{kind}: is empty"):
        READERS[kind](empty)
    with pytest.raises(InputError, match=r"is a folder, expected"):
        READERS[kind](tmp_path)


def test_require_file_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="expected a CT"):
        require_file(tmp_path / "ct.nii.gz", "a CT")


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    write_json(folder / "json", {"values": {"psnr": [30.25, 1e-9]}, "text": "µ", "flag": True})
    write_npz(folder / "npz", volume=ARRAY, labels=np.arange(7, dtype=np.uint8))
    write_safetensors(folder / "safetensors", TENSORS, {"kind": "vqgan", "step": 12})
    return {kind: (folder / kind).read_bytes() for kind in READERS}


@pytest.mark.parametrize("kind", READERS)
def test_every_truncation_is_refused(tmp_path, good_files, kind):
    content = good_files[kind]
    path = tmp_path / f"cut.{kind}"
    # JSON ends in a newline, and nothing is lost with it.
    for length in range(1, len(content) - (kind == "json")):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"cut\.{kind}"):
            READERS[kind](path)


@pytest.mark.parametrize("kind", READERS)
@MANY
@given(data=st.data())
def test_flipped_bytes_never_crash(tmp_path, good_files, kind, data):
    """A damaged file either reads as a well-formed one or raises InputError with its name; NPZ has check sums."""
    content = bytearray(good_files[kind])
    places = data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4, unique=True))
    for place in places:
        content[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path / f"flipped.{kind}"
    path.write_bytes(content)
    try:
        value = READERS[kind](path)
    except InputError as error:
        assert f"flipped.{kind}" in str(error)
        return
    if kind == "npz":
        for name, array in value.items():
            assert array.dtype in (np.float32, np.uint8), name
        if "volume" in value:
            np.testing.assert_array_equal(value["volume"].ravel(), ARRAY.ravel())


@pytest.mark.parametrize("kind", READERS)
@MANY
@given(content=st.binary(min_size=1, max_size=300))
def test_any_bytes_at_all(tmp_path, kind, content):
    path = tmp_path / f"noise.{kind}"
    path.write_bytes(content)
    try:
        READERS[kind](path)
    except InputError as error:
        assert f"noise.{kind}" in str(error)
    else:
        assert kind == "json"  # "1" is valid JSON


class Bomb:
    """Unpickling one of these makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickles_are_never_loaded(tmp_path):
    exploded = tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # the bomb works
    exploded.unlink()

    held = io.BytesIO()
    np.save(held, np.array([Bomb(exploded)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "object.npz", "w") as archive:
        archive.writestr("volume.npy", held.getvalue())
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Bomb(exploded)))
    torch.save({"a": Bomb(exploded)}, tmp_path / "weights.pt")
    for path, reader in (("object.npz", read_npz), ("plain.npz", read_npz), ("weights.pt", read_safetensors)):
        with pytest.raises(InputError, match=path):
            reader(tmp_path / path)
    assert not exploded.exists()


def test_a_single_array_and_missing_names(tmp_path):
    np.save(tmp_path / "single.npy", ARRAY)
    with pytest.raises(InputError, match=r"single\.npy.*single array"):
        read_npz(tmp_path / "single.npy")
    write_npz(tmp_path / "a.npz", volume=ARRAY)
    with pytest.raises(InputError, match=r"a\.npz: holds \['volume'\].*missing \['labels'\]"):
        read_npz(tmp_path / "a.npz", ("volume", "labels"))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, '{"a": NaN}', '{"a": Infinity}', "\ufeff{", b"\xff\xfe1"])
def test_odd_json(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=r"odd\.json: is not valid JSON"):
        read_json(path)
