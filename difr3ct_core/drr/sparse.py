"""A sparse matrix that acts on tables of rows, and a linear operator with its exact adjoint as an autograd node.

All slices (or all detector columns) of a projection share one small sparse matrix, so one stored weight moves a
whole row of contiguous numbers. ``embedding_bag`` is the kernel for that: a weighted sum of rows of a table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class SparseMatrix:
    """A (rows, columns) matrix in compressed rows. ``matrix @ table`` sums weighted rows of ``table``.

    Args:
        row, column, weight: the entries (1D); equal positions add up. Entries that are exactly zero are dropped.
        shape: (rows, columns).
        dtype, device: of the weights, and of the tables that it will meet.
    """

    def __init__(
        self,
        row: np.ndarray,
        column: np.ndarray,
        weight: np.ndarray,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        kept = weight != 0
        row, column, weight = row[kept], column[kept], weight[kept]
        order = np.lexsort((column, row))
        self.shape = shape
        self._row, self._column, self._weight = row[order], column[order], weight[order]
        offsets = np.zeros(shape[0] + 1, dtype=np.int64)
        np.cumsum(np.bincount(self._row, minlength=shape[0]), out=offsets[1:])
        # 32-bit indices halve what the kernel reads beside the weights.
        index = torch.int32 if max(*shape, row.size) < 2**31 else torch.int64
        self.indices = torch.as_tensor(self._column, dtype=index, device=device)
        self.offsets = torch.as_tensor(offsets, dtype=index, device=device)
        self.weights = torch.as_tensor(self._weight, dtype=dtype, device=device)

    @cached_property
    def transposed(self) -> SparseMatrix:
        """The same weights, stored by columns: the exact adjoint."""
        return SparseMatrix(
            self._column, self._row, self._weight, self.shape[::-1], self.weights.dtype, self.weights.device
        )

    def __matmul__(self, table: Float[Tensor, "columns n"]) -> Float[Tensor, "rows n"]:
        return F.embedding_bag(
            self.indices, table, self.offsets, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


#: One vector register of float32: slices that are transposed together on a CPU.
LANES = 16


def to_table(slices: Float[Tensor, "z voxel"]) -> Float[Tensor, "voxel z"]:
    """The transpose, contiguous. On a CPU by products with a unit matrix, whose kernel does it twice as fast."""
    if slices.device.type != "cpu" or not slices.is_contiguous():
        return slices.t().contiguous()
    table = slices.new_empty(slices.shape[::-1])
    for first in range(0, slices.shape[0], LANES):
        some = slices[first : first + LANES]
        torch.mm(some.t(), _unit(some.shape[0], some.dtype), out=table[:, first : first + LANES])
    return table


def from_table(table: Float[Tensor, "voxel z"], slices: Float[Tensor, "z voxel"]) -> None:
    """Write the transpose of ``table`` into ``slices``."""
    if table.device.type != "cpu":
        slices.copy_(table.t())
        return
    for first in range(0, slices.shape[0], LANES):
        some = table[:, first : first + LANES]
        torch.mm(_unit(some.shape[1], some.dtype), some.t(), out=slices[first : first + LANES])


@lru_cache
def _unit(size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(size, dtype=dtype)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep products exact to the type: no autocast, no TF32 or bfloat16, whatever the training around it has chosen."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    changed = [(one, one.fp32_precision) for one in settings if one.fp32_precision not in ("ieee", "none")]
    try:
        for one, _ in changed:
            one.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for one, before in changed:
            one.fp32_precision = before


def blocks(slices: int, voxels: int, device: torch.device) -> list[slice]:
    """Cut ``slices`` slices of ``voxels`` voxels into blocks that are transposed and multiplied one at a time.

    A block of about 2 MB stays in a CPU's cache between the two steps; a GPU wants few large steps.
    """
    size = 2**19 if device.type == "cpu" else 2**27
    step = max(32, size // voxels)
    return [slice(first, min(first + step, slices)) for first in range(0, slices, step)]


class Operator(Protocol):
    """A linear map from volumes to stacks of x-rays, with its exact adjoint."""

    def forward(self, volume: Float[Tensor, "n z y x"]) -> Float[Tensor, "n view v u"]: ...

    def adjoint(self, projections: Float[Tensor, "n view v u"]) -> Float[Tensor, "n z y x"]: ...


class LinearMap(torch.autograd.Function):
    """``LinearMap.apply(x, operator, adjoint)``: derivatives of any order, in both modes, come from the pair itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Operator, adjoint: bool) -> Tensor:
        ctx.operator, ctx.adjoint = operator, adjoint
        with full_precision(x.device):
            return operator.adjoint(x) if adjoint else operator.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return LinearMap.apply(gradient, ctx.operator, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return LinearMap.apply(tangent, ctx.operator, ctx.adjoint)
