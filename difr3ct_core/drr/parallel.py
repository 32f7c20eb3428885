"""Parallel beam: one small matrix from axial slice to detector line, the same for every slice.

All rays of a parallel view around z lie in axial planes, so the volume is never interpolated along z, unless the
detector's rows are not the volume's slices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import View, detector_axes
from .joseph import interpolation, joseph
from .sparse import SparseMatrix, blocks, from_table, to_table


class ParallelOperator:
    """All views of a parallel stack as one (view·u, y·x) matrix, and a (v, z) interpolation where the grids differ."""

    def __init__(
        self,
        views: Sequence[View],
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        (nz, ny, nx), (n_v, n_u) = shape, views[0].detector_shape
        self.shape = shape
        self.stack = (len(views), n_v, n_u)
        rows, columns, weights = [], [], []
        resample = np.zeros((len(views), n_v, nz))
        for index, view in enumerate(views):
            v, u = (axis.numpy() for axis in detector_axes(view))
            start = u[:, None] * view.e_u[:2].numpy()
            direction = np.broadcast_to(-view.to_source[:2].numpy(), start.shape)
            ray, voxel, weight, _ = joseph(start, direction, (ny, nx), spacing[1:])
            rows.append(ray + index * n_u)
            columns.append(voxel)
            weights.append(weight)
            row, column, weight = interpolation(v / spacing[0] + (nz - 1) / 2, nz)
            resample[index, row, column] = weight
        joined = (np.concatenate(part) for part in (rows, columns, weights))
        self.matrix = SparseMatrix(*joined, (len(views) * n_u, ny * nx), dtype, device)
        same_grid = n_v == nz and np.array_equal(resample, np.broadcast_to(np.eye(nz), resample.shape))
        self.resample = None if same_grid else torch.as_tensor(resample, dtype=dtype, device=device)

    def forward(self, volume: Float[Tensor, "n z y x"]) -> Float[Tensor, "n view v u"]:
        n, (nz, ny, nx), (n_views, _, n_u) = volume.shape[0], self.shape, self.stack
        slices = volume.reshape(n * nz, ny * nx)
        lines = volume.new_empty(n * nz, n_views * n_u)
        for block in blocks(n * nz, ny * nx, volume.device):
            lines[block] = (self.matrix @ to_table(slices[block])).t()
        lines = lines.reshape(n, nz, n_views, n_u).transpose(1, 2)
        return lines.contiguous() if self.resample is None else self.resample @ lines

    def adjoint(self, projections: Float[Tensor, "n view v u"]) -> Float[Tensor, "n z y x"]:
        n, (nz, ny, nx), (n_views, _, n_u) = projections.shape[0], self.shape, self.stack
        lines = projections if self.resample is None else self.resample.transpose(1, 2) @ projections
        lines = lines.transpose(1, 2).reshape(n * nz, n_views * n_u)
        slices = projections.new_empty(n * nz, ny * nx)
        for block in blocks(n * nz, ny * nx, projections.device):
            from_table(self.matrix.transposed @ to_table(lines[block]), slices[block])
        return slices.reshape(n, nz, ny, nx)
