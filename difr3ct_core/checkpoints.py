"""What a training run keeps: its checkpoint, its log, and words for how two runs differ."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import InputError, atomic_path, read_safetensors, write_safetensors


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, torch.optim.Optimizer],
    step: int,
    fingerprint: dict[str, Any],
    seconds: float,
) -> None:
    """Write weights, states of the optimisers, the number of steps done and the time they took, atomically."""
    tensors = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimiser in optimisers.items():
        for i, state in optimiser.state_dict()["state"].items():
            tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    write_safetensors(path, tensors, {"step": step, "fingerprint": fingerprint, "seconds": round(seconds, 2)})


def load_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimisers: Mapping[str, torch.optim.Optimizer],
    fingerprint: dict[str, Any],
) -> int:
    """Restore everything that :func:`save_checkpoint` wrote; return the next step.

    Raises:
        InputError: the file is damaged, or was made with other numbers.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("fingerprint") != json.loads(json.dumps(fingerprint)):
        raise InputError(
            f"{path}: was made with other numbers ({differences(metadata.get('fingerprint'), fingerprint)}); "
            "choose another run folder or remove this one."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    for name, module in modules.items():
        load_state(module, part(f"{name}."), path)
    for name, optimiser in optimisers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"{name}.").items():
            index, _, field = key.partition(".")
            state.setdefault(int(index), {})[field] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"])


def seconds_trained(folder: str | Path) -> float:
    """Wall time of the training in ``folder`` up to its last checkpoint, over all its starts.

    Raises:
        InputError: no checkpoint, or a damaged one.
    """
    return float(read_safetensors(Path(folder) / "checkpoint.safetensors")[1].get("seconds", 0.0))


def load_state(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Strict ``load_state_dict`` whose error names the file."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(
            f"{path}: the weights do not fit {type(module).__name__} ({str(error).splitlines()[-1].strip()}); "
            "they are of another preset or version, train again."
        ) from error


def differences(found: Any, expected: Any, where: str = "") -> str:
    """The first few leaves in which two JSON values differ, as words."""
    expected = json.loads(json.dumps(expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        parts = [
            differences(found.get(key), expected.get(key), f"{where}.{key}".strip("."))
            for key in sorted(set(found) | set(expected))
            if found.get(key) != expected.get(key)
        ]
        return ", ".join(parts[:3])
    return f"{where}: found {found!r}, now {expected!r}"


class Log:
    """Rows of ``log.csv``; held in memory, written atomically with each checkpoint, so that the two always agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = list(read_log_rows(path)) if path.exists() else []

    def keep_before(self, step: int) -> None:
        self.rows = [row for row in self.rows if int(row["step"]) < step]

    def add(self, step: int, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def write(self) -> None:
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        with atomic_path(self.path) as temporary:
            temporary.write_text(text.getvalue())


def read_log_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a ``log.csv`` as dictionaries of text."""
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def read_log(folder: str | Path, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a run's log, given by its folder or its CSV file.

    Raises:
        InputError: no log there, or no such column.
    """
    path = Path(folder) if Path(folder).suffix == ".csv" else Path(folder) / "log.csv"
    if not path.exists():
        raise InputError(f"{path}: no such file, expected the log of a training run; train it first.")
    rows = [row for row in read_log_rows(path) if row.get(column)]
    if not rows:
        raise InputError(f"{path}: has no values in column {column!r}.")
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def tensorboard(folder: Path) -> Any:
    """A TensorBoard writer when TensorBoard is installed and wanted: ``DIFR3CT_TENSORBOARD=1``."""
    if not os.environ.get("DIFR3CT_TENSORBOARD"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
