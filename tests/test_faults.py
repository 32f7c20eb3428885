"""A share of benchmarks/faults: damaged files of every kind, and runs that must not meet. Big counts are made there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from collections import Counter

import fuzz
import numpy as np
import pytest
import torch
from small_models import SMALL, patients

from difr3ct_core.files import InputError, alone_in, read_npz, read_safetensors, write_npz, write_safetensors
from difr3ct_core.stages import train_vqgan


def test_sixty_damaged_files(tmp_path):
    """The guarantees stand in fuzz.py: where a format has a checksum, a changed result is a failure."""
    outcomes = fuzz.run_cases(60, seed=1, folder=tmp_path)
    assert [outcome for outcome in outcomes if outcome.bad] == []
    assert len(outcomes) == 60 and min(Counter(outcome.kind for outcome in outcomes).values()) == 5
    assert sum(outcome.result == "refused" for outcome in outcomes) > 20, "or the damage would do nothing"


def test_the_fuzzer_sees_what_it_must_not_pass(tmp_path, monkeypatch):
    """Negative controls: a reader that looks away, one that breaks, one that never comes back."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    random = np.random.default_rng(0)

    def case(read, checked=True):
        return fuzz.run_case("x", fuzz.Target(path, read, checked), path.read_bytes(), random).result

    assert case(path.read_bytes) == "silently wrong"
    assert case(path.read_bytes, checked=False) == "changed"
    assert case(lambda: {}["deep inside"]) == "exception"
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)
    assert case(lambda: [None for _ in iter(int, 1)]) == "hang"
    assert path.read_bytes() == bytes(range(200)), "the good file is back"


def test_every_single_flipped_bit_of_weights_is_noticed(tmp_path):
    """safetensors itself has no checksum; ours covers names, types, shapes, values and metadata."""
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.arange(3.0), "b": torch.tensor([True, False]), "n": torch.tensor(7, dtype=torch.bfloat16)}
    write_safetensors(path, tensors, {"step": 1234})
    good, expected = path.read_bytes(), read_safetensors(path)
    assert fuzz.equal(expected, (tensors, {"step": 1234}))
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with contextlib.suppress(InputError):
            assert fuzz.equal(read_safetensors(path), expected), f"byte {place} was read as another value"


def test_a_smaller_array_than_was_stored_is_noticed(tmp_path):
    """The header of an array says less than the archive holds: NumPy stops reading before the archive's checksum."""
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(1000.0))  # not compressed, so that the header lies open
    data = path.read_bytes()
    assert data.count(b"(1000,)") == 1
    path.write_bytes(data.replace(b"(1000,)", b"(100,) "))
    with pytest.raises(InputError, match="CRC"):
        read_npz(path)


def test_a_second_training_in_one_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    train_vqgan(patients(), SMALL, folder, stop_after=1)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = (folder / "checkpoint.safetensors").read_bytes()
    try:
        with pytest.raises(InputError, match=r"run: another process is at work there.*wait until the other training"):
            train_vqgan(patients(), SMALL, folder)
        changed = SMALL.replace(train_vqgan={"lr": 1e-4})
        with pytest.raises(InputError, match="another process is at work there"):
            train_vqgan(patients(), changed, folder)  # would set the folder aside
    finally:
        os.close(handle)
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    train_vqgan(patients(), SMALL, folder)
    assert (folder / "weights.safetensors").exists()


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import os, sys; from difr3ct_core.files import alone_in\n"
        "with alone_in(sys.argv[1], 'x'): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")]).returncode == -9
    with alone_in(tmp_path / "f", "the other run"):
        pass
    assert list((tmp_path / "f").iterdir()) == []


def test_a_folder_without_locks_still_works(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with alone_in(tmp_path, "the other run"):
        write_npz(tmp_path / "a.npz", a=np.arange(3))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be used .*expected a folder for the other run"):
        alone_in(tmp_path / "file", "the other run").__enter__()


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path):
    code = (
        "import resource, sys; import numpy as np; from difr3ct_core.files import InputError, write_npz\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_npz(sys.argv[1], a=np.random.default_rng(0).random(10000))\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.npz")], capture_output=True, text=True)
    assert "no space left on the device; nothing was changed" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
