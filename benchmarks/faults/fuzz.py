"""Damaged files of every kind that the project reads: always a clear error or an unharmed result.

    python benchmarks/faults/fuzz.py [--cases 600] [--seed 0]

Each case takes a good file, flips random bits or bytes, overwrites a run of bytes, or cuts it, and reads it by the
function that a user's call ends in. What may come of it:

=============  ==========  ======================================================================================
file           checksum    allowed outcome
=============  ==========  ======================================================================================
safetensors    ours        InputError, or tensors and metadata equal to the undamaged ones
NPZ            zip CRC-32  InputError, or arrays equal to the undamaged ones
NIfTI, gzip    gzip CRC    InputError, or a volume equal to the undamaged one
NIfTI, plain   none        InputError, or a volume of finite HU on a sane grid: a changed voxel cannot be noticed
DICOM          none        the same
JSON           none        InputError, or a value that passed all checks: a changed digit cannot be noticed
=============  ==========  ======================================================================================

Never another exception, a hang (more than 20 s of processor time) or a crash: the cases run in a child process.
Writes ``fuzz_cases`` and ``fuzz_bad_outcomes`` into ``benchmarks/results/faults.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import multiprocessing
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from _results import update_results  # noqa: E402
from ct_folders import chest_hu, edit, write_dicom  # noqa: E402
from pydicom.uid import RLELossless  # noqa: E402

from difr3ct_core import ct  # noqa: E402
from difr3ct_core.datasets import load_patients, preset_views, render_xrays  # noqa: E402
from difr3ct_core.files import (  # noqa: E402
    InputError,
    read_json,
    read_npz,
    read_safetensors,
    write_json,
    write_npz,
    write_safetensors,
)
from difr3ct_core.geometry import views_from_json, views_to_json  # noqa: E402
from difr3ct_core.presets import Preset, get_preset  # noqa: E402
from difr3ct_core.vqgan import VQGAN  # noqa: E402
from difr3ct_core.weights import load_vqgan  # noqa: E402

PRESET = get_preset("tiny").replace(
    volume={"size": 8}, xray={"detector_size": 8}, vqgan={"base_channels": 8, "codebook_size": 16}
)
HANG_S = 20.0
MEMORY_BYTES = 12 << 30


@dataclass(frozen=True)
class Target:
    """A kind of file: where one lies, how it is read, and whether a changed byte must be noticed."""

    path: Path
    read: Callable[[], Any]
    checked: bool


@dataclass(frozen=True)
class Outcome:
    """What came of one case: "refused", "equal", "changed" or, forbidden, "silently wrong", "exception", "hang"."""

    kind: str
    damage: str
    result: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Against the guarantee."""
        return self.result in ("silently wrong", "exception", "hang", "crash")


class Hang(BaseException):
    """Too much processor time; no ``except Exception`` on the way may swallow it."""


def make_targets(folder: Path) -> dict[str, Target]:
    """Good files of all kinds in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = VQGAN(PRESET.vqgan)
    weights = folder / "weights.safetensors"
    write_safetensors(weights, model.state_dict(), {"kind": "vqgan", "preset": PRESET.to_dict(), "step": 3})
    hu = np.clip(chest_hu(0, (8, 8, 8)), -1000, 1500).astype(np.int16)
    views = preset_views(PRESET)
    xrays = render_xrays(torch.from_numpy(hu).float()[None], views, PRESET.volume, PRESET.xray)[0].numpy()
    cohort = folder / "cohort"
    write_json(cohort / "manifest.json", {
        "key": {name: dataclasses.asdict(getattr(PRESET, name)) for name in ("volume", "xray", "cohort")},
        "views": views_to_json(views), "patients": [{"id": "one", "split": "test"}],
    })  # fmt: skip
    scan = cohort / "patients" / "one" / "ct.npz"
    write_npz(scan, hu=hu, labels=(hu > 0).astype(np.uint8))
    write_npz(scan.with_name("xrays.npz"), line_integrals=xrays)
    affine = np.diag([24.0, 20.0, 40.0, 1.0])
    for name in ("ct.nii", "ct.nii.gz"):
        ct.write_nifti(folder / name, hu, affine)
    plain = write_dicom(folder / "dicom", chest_hu(0, (4, 12, 8)), "p")
    packed = write_dicom(folder / "rle", chest_hu(0, (4, 12, 8)), "p")
    for path in packed:
        edit(path, lambda ds: ds.compress(RLELossless, generate_instance_uid=False))
    write_json(folder / "preset.json", PRESET.to_dict())
    write_json(folder / "views.json", views_to_json(views))

    def scan_of(path: Path) -> Callable[[], Any]:
        return lambda: _volume(ct.read_ct(path))

    return {
        "safetensors": Target(weights, lambda: read_safetensors(weights), True),
        "weights": Target(weights, lambda: load_vqgan(weights)[0].state_dict(), True),
        "npz": Target(scan, lambda: read_npz(scan, ("hu", "labels")), True),
        "cohort npz": Target(scan, lambda: _cohort(cohort), True),
        "nifti gz": Target(folder / "ct.nii.gz", scan_of(folder / "ct.nii.gz"), True),
        "nifti": Target(folder / "ct.nii", scan_of(folder / "ct.nii"), False),
        "dicom": Target(plain[1], scan_of(folder / "dicom"), False),
        "dicom file": Target(plain[1], scan_of(plain[1]), False),
        "dicom rle": Target(packed[1], scan_of(folder / "rle"), False),
        "manifest json": Target(cohort / "manifest.json", lambda: _cohort(cohort), False),
        "preset json": Target(folder / "preset.json", lambda: _preset(folder / "preset.json"), False),
        "views json": Target(folder / "views.json", lambda: _views(folder / "views.json"), False),
    }


def _volume(scan: ct.CTVolume) -> dict[str, Any]:
    if not torch.isfinite(scan.hu).all() or not np.isfinite(scan.affine).all() or scan.hu.min() < ct.AIR_HU:
        raise AssertionError(f"a volume of {scan.hu.min()} to {scan.hu.max()} HU passed as sound")
    return {"hu": scan.hu, "affine": scan.affine}


def _cohort(folder: Path) -> dict[str, Any]:
    patients = load_patients(folder, "test")
    return {"hu": patients.hu, "labels": patients.labels, "xrays": patients.xrays}


def _preset(path: Path) -> dict[str, Any]:
    return Preset.from_dict(read_json(path)).to_dict()


def _views(path: Path) -> dict[str, Any]:
    return views_to_json(views_from_json(read_json(path)))


def damage(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Changed bytes, never equal to ``data``, and words for what was done."""
    changed = bytearray(data)
    while bytes(changed) == data:
        # Headers are short and decide the most: half of the time the damage is near the beginning or the end.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 400)
        place = int(rng.integers(reach))
        if rng.random() < 0.25:
            place = len(data) - 1 - place
        how = rng.choice(["bit", "bytes", "run", "cut", "text"])
        if how == "bit":
            changed[place] ^= 1 << int(rng.integers(8))
        elif how == "bytes":
            for at in rng.integers(len(data), size=int(rng.integers(1, 9))):
                changed[at] = int(rng.integers(256))
        elif how == "run":
            length = int(rng.integers(1, 65))
            changed[place : place + length] = bytes([int(rng.choice([0, 255, 48, 57]))]) * len(
                changed[place : place + length]
            )
        elif how == "text":  # what stays JSON more often
            changed[place] = int(rng.choice(list(b'0123456789-.eE"{}[],:tfn')))
        else:
            del changed[place:]
    return f"{how} at {place} of {len(data)}", bytes(changed)


def equal(a: Any, b: Any) -> bool:
    """Whether two results hold the same values, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


def run_case(kind: str, target: Target, expected: Any, rng: np.random.Generator) -> Outcome:
    """Damage one file, read it, put it back."""
    good = target.path.read_bytes()
    what, bad = damage(good, rng)

    def too_long(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, HANG_S)
    try:
        target.path.write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.read()
        signal.setitimer(signal.ITIMER_PROF, 0)
    except InputError as error:
        sentence = str(error)
        return Outcome(kind, what, "exception" if "Traceback" in sentence or not sentence else "refused", sentence)
    except Hang:
        return Outcome(kind, what, "hang")
    except BaseException as error:  # Rust's panics are no Exception
        return Outcome(kind, what, "exception", f"{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.path.write_bytes(good)
    if equal(found, expected):
        return Outcome(kind, what, "equal")
    return Outcome(kind, what, "silently wrong" if target.checked else "changed")


def _child(pipe: Any, folder: str, seed: int, first: int, last: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))  # a damaged size must not take the machine down
    torch.set_num_threads(1)
    targets = make_targets(Path(folder))
    kinds = list(targets)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        expected = {kind: target.read() for kind, target in targets.items()}
        for case in range(first, last):
            kind = kinds[case % len(kinds)]
            pipe.send(run_case(kind, targets[kind], expected[kind], np.random.default_rng([seed, case])))
    pipe.close()


def run_cases(count: int, seed: int, folder: Path) -> list[Outcome]:
    """All cases in a child process; where it dies, that case is a crash and a new child goes on behind it."""
    context = multiprocessing.get_context("fork" if threads_are_safe() else "spawn")
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        receiver, sender = context.Pipe(duplex=False)
        folder_of_child = folder / str(len(outcomes))
        child = context.Process(target=_child, args=(sender, str(folder_of_child), seed, len(outcomes), count))
        child.start()
        sender.close()
        try:
            while True:
                outcomes.append(receiver.recv())
        except EOFError:
            child.join()
        if len(outcomes) < count:
            if child.exitcode == 1:
                raise RuntimeError("the fuzzer itself failed; its error is above")
            outcomes.append(Outcome("?", f"case {len(outcomes)}", "crash", f"exit code {child.exitcode}"))
    return outcomes


def threads_are_safe() -> bool:
    """Forking is quick, and sound while torch has not started its threads."""
    return torch.get_num_threads() == 1


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if an outcome was against the guarantee."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        outcomes = run_cases(options.cases, options.seed, Path(name))
    bad = [outcome for outcome in outcomes if outcome.bad]
    for kind in sorted({outcome.kind for outcome in outcomes}):
        counts = Counter(outcome.result for outcome in outcomes if outcome.kind == kind)
        print(f"{kind:14s} " + ", ".join(f"{n} {result}" for result, n in sorted(counts.items())))
    for outcome in bad:
        print(f"BAD {outcome}")
    update_results(
        options.results,
        {
            "fuzz_cases": {"value": len(outcomes), "unit": "damaged files", "seed": options.seed,
                           "results": dict(Counter(outcome.result for outcome in outcomes))},
            "fuzz_bad_outcomes": {"value": len(bad), "unit": "damaged files"},
        },
        f"python benchmarks/faults/fuzz.py --cases {options.cases} --seed {options.seed}",
    )  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
