"""The one training loop of the project: any module, any loss, one or many processes.

:func:`fit` trains any module on any loss. Batches and noise are pure functions of (seed, step), so a resumed run
continues bit for bit on a CPU: the checkpoint holds the weights, their moving average, the optimisers' states and
the step, nothing else matters. A run's folder::

    checkpoint.safetensors   to resume from; replaced atomically every few seconds
    log.csv                  one row every ``log_every`` steps

A step is defined by its *global* batch. Processes and micro-batches each compute a part of its rows, with the noise
that those rows have in the whole, so that one process, eight GPUs and gradient accumulation give the same curve.

The models themselves, and "load or train", are in :mod:`difr3ct_core.stages`; the command line of a training is
``accelerate launch -m difr3ct_core.training --stage ldm --preset paper`` and calls the same functions.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .checkpoints import Log, load_checkpoint, save_checkpoint, seconds_trained, tensorboard
from .files import InputError, alone_in
from .presets import TrainPreset
from .progress import progress

#: (step, generator, part) -> (loss, values to log), for the rows ``part`` of the step's global batch.
LossOfStep = Callable[[int, torch.Generator, slice], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Opponent:
    """What is trained against the model: the discriminators of a GAN.

    ``loss()`` is called right after the backward pass of each loss of the model, and computes from what that left
    behind. While the model's loss runs, the opponent's weights take no gradient.
    """

    module: nn.Module
    loss: Callable[[], tuple[Tensor, dict[str, Tensor]]]


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


def learning_rate(settings: TrainPreset, step: int) -> float:
    """Rate at a step: linear warm-up, then constant, a half cosine to zero, or what a baseline's paper used:
    constant and then linear to zero ("late_linear"), or a tenth from halfway on ("late_tenth")."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.lr_decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    elif settings.lr_decay == "late_linear":
        rate *= min(1.0, 2 - 2 * step / settings.steps)
    elif settings.lr_decay == "late_tenth":
        rate *= 0.1 if 2 * step >= settings.steps else 1.0
    return rate


def own_parts(settings: TrainPreset) -> list[slice]:
    """The rows of the global batch that this process computes, one slice for each micro-batch.

    Raises:
        InputError: the batch cannot be shared out evenly.
    """
    shares = processes.count() * settings.accumulate
    if settings.accumulate < 1 or settings.batch_size % shares:
        raise InputError(
            f"batch_size: found {settings.batch_size}, expected a multiple of {shares} = {processes.count()} "
            f"processes x {settings.accumulate} micro-batches; change the batch, the processes or `accumulate`."
        )
    rows = settings.batch_size // shares
    first = processes.rank() * settings.accumulate
    return [slice(i * rows, (i + 1) * rows) for i in range(first, first + settings.accumulate)]


def mixed_precision(settings: TrainPreset, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """The autocast of a step. Never fp16, which overflows in the VQGAN; bf16 has the range of fp32.

    Raises:
        InputError: unknown ``precision``.
    """
    if settings.precision not in ("auto", "bf16", "fp32"):
        raise InputError(f"precision: found {settings.precision!r}, expected 'auto', 'bf16' or 'fp32'.")
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if settings.precision == "bf16" or (settings.precision == "auto" and able):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


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
    opponent: Opponent | None = None,
) -> nn.Module:
    """Train ``module`` in ``folder``, from its checkpoint if there is one.

    Args:
        module: on its device; changed in place.
        loss_of_step: the mean loss of some rows of one step's batch, from the step's number, a generator seeded for
            the step, and the rows. It draws noise for the whole batch and uses that of its rows.
        settings: steps, rates, averaging, clipping.
        folder: for checkpoint and log.
        fingerprint: everything that decides the result, JSON types; a checkpoint made with another is refused.
        label: shown at the progress bar.
        seed: of batches and noise.
        validate: called with the averaged model every ``validate_every`` steps; its values go to the log.
        stop_after: leave after this many steps in this call (a checkpoint is written), for jobs with a time limit.
        opponent: discriminators, trained at the same rates by an optimiser of their own.

    Returns:
        the moving average of the weights as a module in evaluation mode (``module`` itself without averaging).

    Raises:
        TrainingError: the loss or its gradient is not finite, or the GPU's memory does not suffice.
        InputError: the checkpoint is damaged or was made with other numbers, or another run is at work in ``folder``.
    """
    with alone_in(folder, "the other training") if processes.rank() == 0 else contextlib.nullcontext():
        return _fit(
            module, loss_of_step, settings, Path(folder), fingerprint, label, seed, validate, stop_after, opponent
        )


def _fit(
    module: nn.Module,
    loss_of_step: LossOfStep,
    settings: TrainPreset,
    folder: Path,
    fingerprint: dict[str, Any],
    label: str,
    seed: int,
    validate: Callable[[nn.Module], dict[str, float]] | None,
    stop_after: int | None,
    opponent: Opponent | None,
) -> nn.Module:
    device = next(module.parameters()).device
    average = copy.deepcopy(module) if settings.ema_decay > 0 else module
    modules: dict[str, nn.Module] = {"model": module}
    if average is not module:
        modules["average"] = average
    trained = {"optimiser": module}
    if opponent:
        modules["opponent"] = trained["opponent_optimiser"] = opponent.module
    optimisers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam(one.parameters(), lr=settings.lr, betas=settings.betas) for name, one in trained.items()
    }
    log, writes = Log(folder / "log.csv"), processes.rank() == 0
    start, earlier, began = 0, 0.0, time.monotonic()
    if (folder / "checkpoint.safetensors").exists():
        earlier = seconds_trained(folder)
        start = load_checkpoint(folder / "checkpoint.safetensors", modules, optimisers, fingerprint)
    log.keep_before(start)
    board = tensorboard(folder) if writes else None
    end = settings.steps if stop_after is None else min(settings.steps, start + stop_after)
    saved = time.monotonic()
    generator = torch.Generator()
    parts, precision = own_parts(settings), mixed_precision(settings, device)
    module.train()
    steps: Any = range(start, end)
    for step in progress(steps, label, end, initial=start) if writes else steps:
        for optimiser in optimisers.values():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings, step)
        value, values = 0.0, {}
        for part in parts:
            generator.manual_seed(seed * 1_000_003 + step)  # anew for every part: each draws the whole batch's noise
            with _memory_in_words(folder, device):
                loss, found = _backward(loss_of_step, step, generator, part, opponent, precision, len(parts))
            value += loss / len(parts)
            for key, number in found.items():
                values[key] = values.get(key, 0.0) + float(number) / len(parts)
        if step == start and device.type == "cuda" and writes:
            _report_memory(label, device)
        value = processes.mean_over_processes(value, device)
        _require_finite(folder, "loss", value, settings, step)
        norms = {}
        for name, one in trained.items():
            processes.average_gradients(one.parameters())
            norms[name] = float(nn.utils.clip_grad_norm_(one.parameters(), settings.grad_clip))
            # A finite loss can have an infinite gradient; one such step and the next checkpoint would hold NaN forever.
            _require_finite(folder, "gradient", norms[name], settings, step)
        for optimiser in optimisers.values():
            optimiser.step()
        if average is not module:
            _update_average(average, module, settings.ema_decay, step)
        done = step + 1
        row: dict[str, float] = {}
        if step % settings.log_every == 0 or done == settings.steps:
            row = {"loss": value, "grad_norm": norms["optimiser"], **values}
        if validate and (done == settings.steps or (settings.validate_every and done % settings.validate_every == 0)):
            row |= validate(average.eval())
            module.train()
        if row:
            log.add(step, row)
            if board:
                for key, number in row.items():
                    board.add_scalar(key, number, step)
        if writes and (done == end or time.monotonic() - saved > settings.checkpoint_every_s):
            log.write()
            seconds = earlier + time.monotonic() - began
            save_checkpoint(folder / "checkpoint.safetensors", modules, optimisers, done, fingerprint, seconds)
            saved = time.monotonic()
    if board:
        board.close()
    processes.barrier()
    return average.eval()


def _backward(
    loss_of_step: LossOfStep,
    step: int,
    generator: torch.Generator,
    part: slice,
    opponent: Opponent | None,
    precision: Callable[[], contextlib.AbstractContextManager],
    shares: int,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of some rows; the gradients add to what is there, weighted by one share."""
    if opponent:
        opponent.module.requires_grad_(False)
    with precision():
        loss, values = loss_of_step(step, generator, part)
    (loss / shares).backward()
    if opponent:
        opponent.module.requires_grad_(True)
        with precision():
            against, more = opponent.loss()
        if against.requires_grad:  # before the discriminators switch on there is nothing to learn
            (against / shares).backward()
        values = {**values, **more}
    return float(loss.detach()), values


def _report_memory(label: str, device: torch.device) -> None:
    """One line after the first step, long before a night's run fails."""
    peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    print(f"{label}: a step needs {peak / 1e9:.1f} of the GPU's {total / 1e9:.1f} GB.", file=sys.stderr)


@contextlib.contextmanager
def _memory_in_words(folder: Path, device: torch.device) -> Any:
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else 0.0
        raise TrainingError(
            f"{folder}: a step needs more than the GPU's {total:.1f} GB. Set `accumulate` to 2 or more (smaller "
            "micro-batches of the same batch) or `checkpointing` in the preset's training section."
        ) from error


def _require_finite(folder: Path, what: str, value: float, settings: TrainPreset, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"{folder}: the {what} of step {step} is {value}, expected a finite number; the last good checkpoint is "
            f"kept. Lower the learning rate (now {learning_rate(settings, step):.1e}) or check the data for NaN."
        )


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (1 + step) / (10 + step))  # a short memory at first, or the random start would linger
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)  # one call, not hundreds
    # The buffers are copied: the codes are moving averages already, and their use is counted, not learned.
    for slow, fast in zip(average.buffers(), module.buffers(), strict=True):
        slow.copy_(fast)


def main(arguments: list[str] | None = None) -> int:
    """Train one stage of a preset from the command line; returns the exit code.

    accelerate launch -m difr3ct_core.training --stage vqgan --preset paper
    accelerate launch -m difr3ct_core.training --stage ldm --views 8view --preset paper --set accumulate=4
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m difr3ct_core.training ...       (without a GPU)
    """
    import argparse

    from . import stages
    from .chapters import Chapter
    from .checks import pick_device
    from .presets import get_preset

    parser = argparse.ArgumentParser(prog="python -m difr3ct_core.training", description=main.__doc__.split(";")[0])
    parser.add_argument(
        "--stage",
        choices=("vqgan", "decoder", "initial", "ldm"),
        required=True,
        help="a stage trains those before it if need be",
    )
    parser.add_argument("--preset", default="paper", help="tiny, small or paper (default)")
    parser.add_argument("--views", default="8view", help="set of views (8view, 2view, ...), or any")
    parser.add_argument("--weights", type=Path, help="to begin with: of an LDM; for the decoder, of a VQGAN")
    parser.add_argument(
        "--network",
        type=Path,
        help="initial, LDM: an initial network trained elsewhere, or an INRR3CT: its run or weights",
    )
    parser.add_argument(
        "--scan", type=Path, help="decoder, refinement: a real CT; deformed copies of it join the training"
    )
    parser.add_argument(
        "--detectors", action="store_true", help="initial, LDM: x-rays of simulated imperfect detectors"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the cohorts")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/PRESET)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--stop-after", type=int, help="leave after so many steps; the next call goes on")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="settings of this stage's training; SECTION.NAME=VALUE for any other number of the preset",
    )
    options = parser.parse_args(arguments)
    try:
        processes.connect()
        device = processes.own_device(pick_device(options.device))
        preset = stages.with_settings(get_preset(options.preset), f"train_{options.stage}", options.set)
        chapter = Chapter(
            "training", preset, options.data, options.run or Path("runs") / preset.name, options.seed, device
        )
        chapter.shipped = False
        chapter.detectors = options.detectors
        if options.scan and options.stage not in ("decoder", "initial"):
            raise InputError("--scan: is for the stages decoder and initial; leave it out.")
        if options.detectors and (options.stage in ("vqgan", "decoder") or options.views == "any"):
            raise InputError("--detectors: is for the stages initial and ldm with one set of views; leave it out.")
        if options.network and options.stage not in ("initial", "ldm"):
            raise InputError("--network: is for the stages initial and ldm; leave it out.")
        if options.stage == "vqgan":
            chapter.first_vqgan(options.stop_after)
        elif options.stage == "decoder":
            chapter.decoder(options.stop_after, options.weights, options.scan)
        elif options.stage == "initial":
            chapter.initial(options.views, options.stop_after, options.weights, options.network, options.scan)
        else:
            chapter.ldm(options.views, options.stop_after, options.weights, options.network)
    except (InputError, TrainingError) as error:
        if processes.rank() == 0:
            print(f"training: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
