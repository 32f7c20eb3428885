"""What a run saves: arrays, tables, and where they came from.

A result is a folder entry of two files, ``NAME.npz`` with arrays and ``NAME.json`` with scalars, tables and
provenance. Figures are drawn from these alone, so that a reviewer can redraw them without a model.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import InputError, read_json, read_npz, sha256, write_json, write_npz

_START = time.monotonic()


@functools.cache
def git_commit() -> str:
    """Commit of the source tree, with "+changes" if the library's files differ from it.

    Outside git, what the variable DIFR3CT_COMMIT says (set it where an image or an archive is made); else "unknown".
    """
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DIFR3CT_COMMIT", "unknown")


def device_name(device: torch.device | str = "cpu") -> str:
    """The device in words: the GPU's name, or the processor with the number of threads in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"CPU {name}, {torch.get_num_threads()} threads"


def peak_memory_gb() -> float:
    """Peak resident memory of this process so far, in GB (10⁹ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def run_id(folder: str | Path) -> str:
    """Name of a run that no other run has: the folder's name and eight digits, made at the first call and kept there.

    Raises:
        InputError: the folder's ``run.json`` is damaged.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        made = {"id": f"{path.parent.name}-{secrets.token_hex(4)}"}
        write_json(path, {**made, "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    found = read_json(path, "the name of a run")  # read back: another process may have been as quick
    if not isinstance(found, dict) or not isinstance(found.get("id"), str):
        raise InputError(f"{path}: holds no id, expected the name of a run; remove the file.")
    return found["id"]


def provenance(
    preset: str, seed: int, device: torch.device | str = "cpu", wall_s: float | None = None, **more: Any
) -> dict[str, Any]:
    """Who made a number: commit, versions, device, seed, wall time, peak memory (of a GPU too), moment.

    Args:
        preset: name of the preset.
        seed: of the run.
        device: on which it ran.
        wall_s: seconds it took; by default since this process began.
        more: anything else that a reviewer needs (data, views, command); JSON types.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "commit": git_commit(),
        "preset": preset,
        "seed": seed,
        "device": device_name(device),
        "wall_s": round(time.monotonic() - _START if wall_s is None else wall_s, 2),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        **({"peak_gpu_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)} if on_gpu else {}),
        "versions": {
            "difr3ct_core": metadata.version("difr3ct-core"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


@dataclass(frozen=True)
class Result:
    """A saved result, read back."""

    name: str
    arrays: dict[str, np.ndarray]
    values: dict[str, Any]
    provenance: dict[str, Any]
    path: Path | None = None  # of its JSON file


def save_result(
    folder: str | Path,
    name: str,
    arrays: Mapping[str, np.ndarray | torch.Tensor],
    values: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Result:
    """Write ``folder/name.npz`` and ``folder/name.json``, each atomically, and give the result back.

    Args:
        arrays: what figures need (float16 and integers keep files small).
        values: scalars and tables, JSON types.
        provenance: from :func:`provenance`.

    Raises:
        ValueError, TypeError: values that are not JSON (NaN too), or arrays of objects; an earlier result is kept.
    """
    folder = Path(folder)
    plain = {
        key: value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for key, value in arrays.items()
    }
    # Values that are no JSON are found before anything is written.
    json.dumps([dict(values), dict(provenance)], allow_nan=False)
    # The JSON is written last and carries the checksum of the arrays: after a kill between the two, it does not fit.
    write_npz(folder / f"{name}.npz", **plain)
    record = {
        "values": dict(values),
        "arrays": sorted(plain),
        "arrays_sha256": sha256(folder / f"{name}.npz"),
        "provenance": dict(provenance),
    }
    write_json(folder / f"{name}.json", record)
    return load_result(folder, name)


def load_result(folder: str | Path, name: str) -> Result:
    """Read a result back.

    Raises:
        InputError: a file is missing, damaged, or does not hold what the other says.
    """
    folder = Path(folder)
    path = folder / f"{name}.json"
    record = read_json(path, f"the saved result {name!r}; run the chapter that makes it")
    if not isinstance(record, dict) or not {"values", "arrays", "arrays_sha256", "provenance"} <= set(record):
        raise InputError(f"{path}: found no values, arrays and provenance, expected a saved result; run its chapter.")
    arrays = read_npz(folder / f"{name}.npz", tuple(record["arrays"]))
    if sha256(folder / f"{name}.npz") != record["arrays_sha256"]:
        raise InputError(f"{folder / name}.npz: is not the file that {path.name} describes; run its chapter again.")
    return Result(name, arrays, record["values"], record["provenance"], path)
