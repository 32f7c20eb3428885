"""The one training loop of the project: any module, any loss.

:func:`fit` trains any module on any loss. Batches and noise are pure functions of (seed, step), so a resumed run
continues bit for bit on a CPU: the checkpoint holds the weights, their moving average, the optimiser's state and
the step, nothing else matters. A run's folder::

    checkpoint.safetensors   to resume from; replaced atomically every few seconds
    log.csv                  one row every ``log_every`` steps

The models themselves, and "load or train", are in :mod:`difr3ct_core.stages`.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import InputError, atomic_path, read_safetensors, write_safetensors
from .presets import TrainPreset
from .progress import progress

#: (step, generator) -> (loss, values to log)
LossOfStep = Callable[[int, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


def learning_rate(settings: TrainPreset, step: int) -> float:
    """Rate at a step: linear warm-up, then constant or a half cosine to zero."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return rate


def fit(
    module: nn.Module,
    loss_of_step: LossOfStep,
    settings: TrainPreset,
    folder: str | Path,
    fingerprint: dict[str, Any],
    label: str,
    seed: int,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    stop_after: int | None = None,
) -> nn.Module:
    """Train ``module`` in ``folder``, from its checkpoint if there is one.

    Args:
        module: on its device; changed in place.
        loss_of_step: the loss of one step, from the step's number and a generator seeded for it.
        settings: steps, rates, averaging, clipping.
        folder: for checkpoint and log.
        fingerprint: everything that decides the result, JSON types; a checkpoint made with another is refused.
        label: shown at the progress bar.
        seed: of batches and noise.
        validate: called with the averaged model every ``validate_every`` steps; its values go to the log.
        stop_after: leave after this many steps in this call (a checkpoint is written), for jobs with a time limit.

    Returns:
        the moving average of the weights as a module in evaluation mode (``module`` itself without averaging).

    Raises:
        TrainingError: the loss or its gradient is not finite.
        InputError: the checkpoint is damaged or was made with other numbers.
    """
    folder = Path(folder)
    device = next(module.parameters()).device
    optimiser = torch.optim.Adam(module.parameters(), lr=settings.lr, betas=settings.betas)
    average = copy.deepcopy(module) if settings.ema_decay > 0 else module
    log = _Log(folder / "log.csv")
    start = 0
    if (folder / "checkpoint.safetensors").exists():
        start = _resume(folder / "checkpoint.safetensors", module, average, optimiser, fingerprint)
    log.keep_before(start)
    board = _tensorboard(folder)
    end = settings.steps if stop_after is None else min(settings.steps, start + stop_after)
    saved = time.monotonic()
    generator = torch.Generator()
    # fp16 overflows in the VQGAN; bf16 has the range of fp32.
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    module.train()
    for step in progress(range(start, end), label, settings.steps, initial=start):
        generator.manual_seed(seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step)
        with torch.autocast("cuda", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss, values = loss_of_step(step, generator)
        value = float(loss.detach())
        _require_finite(folder, "loss", value, settings, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip))
        # A finite loss can have an infinite gradient; one such step and the next checkpoint would hold NaN for ever.
        _require_finite(folder, "gradient", norm, settings, step)
        optimiser.step()
        if average is not module:
            _update_average(average, module, settings.ema_decay, step)
        done = step + 1
        row: dict[str, float] = {}
        if step % settings.log_every == 0 or done == settings.steps:
            row = {"loss": value, "grad_norm": norm, **{k: float(v) for k, v in values.items()}}
        if validate and (done == settings.steps or (settings.validate_every and done % settings.validate_every == 0)):
            row |= validate(average.eval())
            module.train()
        if row:
            log.add(step, row)
            if board:
                for key, number in row.items():
                    board.add_scalar(key, number, step)
        if done == end or time.monotonic() - saved > settings.checkpoint_every_s:
            log.write()
            _save(folder / "checkpoint.safetensors", module, average, optimiser, done, fingerprint)
            saved = time.monotonic()
    if board:
        board.close()
    return average.eval()


def _require_finite(folder: Path, what: str, value: float, settings: TrainPreset, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"{folder}: the {what} of step {step} is {value}, expected a finite number; the last good checkpoint is "
            f"kept. Lower the learning rate (now {learning_rate(settings, step):.1e}) or check the data for NaN."
        )


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # a short memory at first, or the random start would linger
    for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for slow, fast in zip(average.buffers(), module.buffers(), strict=True):
        slow.copy_(fast)


def _save(
    path: Path, module: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, step: int, fingerprint: dict
) -> None:
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    if average is not module:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    write_safetensors(path, tensors, {"step": step, "fingerprint": fingerprint})


def _resume(
    path: Path, module: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, fingerprint: dict
) -> int:
    """Restore everything from a checkpoint; return the next step."""
    tensors, metadata = read_safetensors(path)
    if metadata.get("fingerprint") != json.loads(json.dumps(fingerprint)):
        raise InputError(
            f"{path}: was made with other numbers ({differences(metadata.get('fingerprint'), fingerprint)}); "
            "choose another run folder or remove this one."
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    load_state(module, part("model."), path)
    if average is not module:
        load_state(average, part("average."), path)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part("optimiser.").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"])


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


class _Log:
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
    """Steps and values of one column of a run's log.

    Raises:
        InputError: no log there, or no such column.
    """
    path = Path(folder) / "log.csv"
    if not path.exists():
        raise InputError(f"{path}: no such file, expected the log of a training run; train it first.")
    rows = [row for row in read_log_rows(path) if row.get(column)]
    if not rows:
        raise InputError(f"{path}: has no values in column {column!r}.")
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def _tensorboard(folder: Path) -> Any:
    """A TensorBoard writer when TensorBoard is installed and wanted: ``DIFR3CT_TENSORBOARD=1``."""
    if not os.environ.get("DIFR3CT_TENSORBOARD"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
