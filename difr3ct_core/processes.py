"""Several processes, one training: who am I, and what is summed or shared between us.

``accelerate launch`` starts the processes, on GPUs or on CPU cores; without it everything here is a no-op. The
project trains small models, so gradients are averaged once, after the last micro-batch of a step, in one flat
message: no wrapper around the model, and any method of it may compute the loss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from .files import InputError


@lru_cache(maxsize=1)
def connect() -> None:
    """Join the other processes of this launch, if there are any.

    Raises:
        InputError: launched as one of several, but accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError(
            "WORLD_SIZE: found more than 1 process, but accelerate is missing; run pip install -e '.[train]'."
        ) from error
    # It chooses NCCL or gloo, and binds each process to its GPU.
    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))


def rank() -> int:
    """Number of this process, 0 for the one that writes files and shows progress."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device: str | torch.device) -> torch.device:
    """``device`` with the GPU of this process filled in."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and count() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def barrier() -> None:
    """Wait for the others."""
    if count() > 1:
        dist.barrier()


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block before the others do: it makes files, they find them."""
    if rank() > 0:
        barrier()
    try:
        yield
    finally:
        if rank() == 0:
            barrier()


def gather_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """The rows of all processes, in their order; every process has as many."""
    if count() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(count())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def computed_together(rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """``work(rows)``, of which every process computes a part; ``work`` must treat each row by itself.

    Where the number of rows does not divide, the last ones are computed more than once and dropped again.
    """
    if count() == 1:
        return work(rows)
    share = -(-len(rows) // count())
    index = torch.arange(rank() * share, (rank() + 1) * share).clamp_max(len(rows) - 1)
    return gather_rows(work(rows[index.to(rows.device)]))[: len(rows)]


def mean_over_processes(value: float, device: torch.device) -> float:
    """The mean of a number."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return float(tensor) / count()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes. A parameter without one has none anywhere."""
    if count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:  # discriminators before they start
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= count()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
