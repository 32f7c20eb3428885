"""Cone beam: two small sets of weights, one in the axial plane and one along z, for each depth.

The source lies in the plane z = 0 and the detector stands upright. Write a ray as source + t·(-DSD·n + u·e_u + v·e_v).
Where it stands in the axial plane at parameter t depends on the detector column u alone, and its height is z = t·v.
So Joseph's walk in the plane, done once per column, serves all rows; what is left is a one-dimensional stretch
along z by 1/t. That stretch is tabulated at ``depths`` values of t, with linear interpolation between neighbours:

    image(u, v) = |ray(u, v)| · Σ_k Σ_z stretch[k, z, v] · (Σ_yx plane[(u, k), yx] · µ(z, y, x))

Neighbouring depths move no point of the volume by more than :data:`MAX_MOVE` voxels along z, which keeps the extra
blur far below that of linear interpolation between voxels. (Quadratic interpolation in depth would need fewer depths
and be a third faster, but has negative weights: a non-negative volume would cast slightly negative x-rays.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..geometry import View, detector_axes
from .joseph import interpolation, joseph
from .sparse import SparseMatrix, blocks, from_table, to_table

#: Largest move along z, in voxels, between neighbouring tabulated depths.
MAX_MOVE = 0.35


class ConeOperator:
    """A cone-beam stack: one (u·depth, y·x) matrix a view; views of equal detector share the stretches along z."""

    def __init__(
        self,
        views: Sequence[View],
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        nz, ny, nx = shape
        self.shape = shape
        self.stack = (len(views), *views[0].detector_shape)
        self.blocks = blocks(nz, ny * nx, device)
        self.planes: list[SparseMatrix] = []
        self.stretches: list[list[tuple[slice, Tensor]]] = []
        lengths = []
        for _, group in groupby(views, key=lambda view: (view.dso_mm, view.dsd_mm, view.pixel_mm, view.offset_mm)):
            members = list(group)
            samples = [_walk(view, (ny, nx), spacing[1:]) for view in members]
            v, u = (axis.numpy() for axis in detector_axes(members[0]))
            near = min(t.min(initial=math.inf) for *_, t in samples)
            far = max(t.max(initial=-math.inf) for *_, t in samples)
            if near > far:  # no ray meets the volume
                near = far = 1.0
            # z = t·v moves by v voxels per unit of t; only rows inside the volume and on the detector count.
            rate = min(np.abs(v).max() / spacing[0], (nz + 1) / 2 / near)
            depths = max(2, math.ceil((far - near) * rate / MAX_MOVE) + 1)
            step = max((far - near) / (depths - 1), 1e-9 * near)
            stretch = self._stretch(near + step * np.arange(depths), v, spacing[0], dtype, device)
            for ray, voxel, weight, t in samples:
                place = np.clip((t - near) / step, 0, depths - 1)
                first = np.minimum(place.astype(np.int64), depths - 2)
                fraction = place - first
                rows = np.concatenate([ray * depths + first, ray * depths + first + 1])
                weights = np.concatenate([weight * (1 - fraction), weight * fraction])
                size = (u.size * depths, ny * nx)
                self.planes.append(SparseMatrix(rows, np.tile(voxel, 2), weights, size, dtype, device))
                self.stretches.append(stretch)
                lengths.append(np.sqrt(members[0].dsd_mm ** 2 + u[None, :] ** 2 + v[:, None] ** 2))
        self.lengths = torch.as_tensor(np.stack(lengths), dtype=dtype, device=device)

    def _stretch(
        self, t: np.ndarray, v: np.ndarray, spacing_z: float, dtype: torch.dtype, device: torch.device
    ) -> list[tuple[slice, Tensor]]:
        """For each block of slices: the detector rows that it reaches, and the weights (depth·z, v) to them."""
        nz = self.shape[0]
        table = np.zeros((t.size, nz, v.size))
        for k, depth in enumerate(t):
            row, column, weight = interpolation(depth * v / spacing_z + (nz - 1) / 2, nz)
            table[k, column, row] = weight
        parts = []
        for block in self.blocks:
            reached = np.flatnonzero(table[:, block].any(axis=(0, 1)))
            window = slice(int(reached[0]), int(reached[-1]) + 1) if reached.size else slice(0, 0)
            weights = torch.as_tensor(table[:, block, window], dtype=dtype, device=device)
            parts.append((window, weights.flatten(0, 1).contiguous()))
        return parts

    def forward(self, volume: Float[Tensor, "n z y x"]) -> Float[Tensor, "n view v u"]:
        n_views, n_v, n_u = self.stack
        images = volume.new_zeros(volume.shape[0], n_views, n_u, n_v)
        for image, one in zip(images, volume, strict=True):
            for number, block in enumerate(self.blocks):
                table = to_table(one[block].flatten(1))
                for view, (plane, stretch) in enumerate(zip(self.planes, self.stretches, strict=True)):
                    window, weights = stretch[number]
                    image[view, :, window].addmm_((plane @ table).view(n_u, -1), weights)
        return images.transpose(2, 3) * self.lengths

    def adjoint(self, projections: Float[Tensor, "n view v u"]) -> Float[Tensor, "n z y x"]:
        nz, ny, nx = self.shape
        images = (projections * self.lengths).transpose(2, 3).contiguous()
        volume = projections.new_empty(projections.shape[0], nz, ny * nx)
        for image, one in zip(images, volume, strict=True):
            for number, block in enumerate(self.blocks):
                table = projections.new_zeros(ny * nx, block.stop - block.start)
                for view, (plane, stretch) in enumerate(zip(self.planes, self.stretches, strict=True)):
                    window, weights = stretch[number]
                    spread = (image[view, :, window] @ weights.t()).view(plane.shape[0], -1)
                    table += plane.transposed @ spread
                from_table(table, one[block])
        return volume.unflatten(2, (ny, nx))


def _walk(view: View, shape_yx: tuple[int, int], spacing_yx: tuple[float, float]) -> tuple[np.ndarray, ...]:
    """Joseph's walk in the axial plane for every detector column; the parameter t is 1 on the detector."""
    _, u = (axis.numpy() for axis in detector_axes(view))
    direction = u[:, None] * view.e_u[:2].numpy() - view.dsd_mm * view.to_source[:2].numpy()
    start = np.broadcast_to(view.source_mm[:2].numpy(), direction.shape)
    return joseph(start, direction, shape_yx, spacing_yx)
