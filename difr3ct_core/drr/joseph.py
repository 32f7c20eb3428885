"""Which voxels a ray meets, and with what weight: the two interpolations that both fast projectors are made of."""

from __future__ import annotations

import numpy as np


def joseph(
    start: np.ndarray, direction: np.ndarray, shape_yx: tuple[int, int], spacing_yx: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Joseph weights (Joseph 1982) of the rays ``start + t·direction`` in one axial slice.

    The method walks each ray from row to row of the slice, or from column to column, whichever it crosses more often,
    and interpolates linearly between the two voxels on either side.

    Args:
        start, direction: (ray, 2) as (x, y) in mm.
        shape_yx, spacing_yx: the slice, centred on the origin.

    Returns:
        ray, voxel (y·nx + x), weight in units of t, and t itself at each sample (1D arrays of equal length). A sample
        beyond the outermost voxel centres fades to zero over one voxel.
    """
    count = np.array(shape_yx[::-1])
    spacing = np.array(spacing_yx[::-1])
    steps = direction / spacing  # voxels per unit of t along x and y
    along_y = np.abs(steps[:, 1]) > np.abs(steps[:, 0])
    parts = []
    for axis in (0, 1):
        rays = np.flatnonzero(along_y == bool(axis))
        if rays.size == 0:
            continue
        other = 1 - axis
        planes = (np.arange(count[axis]) - (count[axis] - 1) / 2) * spacing[axis]
        t = (planes[None, :] - start[rays, axis, None]) / direction[rays, axis, None]
        cross = (start[rays, other, None] + t * direction[rays, other, None]) / spacing[other] + (count[other] - 1) / 2
        length = np.broadcast_to(1 / np.abs(steps[rays, axis, None]), t.shape)
        # Rounding noise would otherwise leave a second voxel with a weight of 1e-14.
        cross = np.where(np.abs(cross - np.round(cross)) < 1e-9, np.round(cross), cross)
        first = np.floor(cross).astype(np.int64)
        fraction = cross - first
        main = np.broadcast_to(np.arange(count[axis])[None, :], t.shape)
        ray = np.broadcast_to(rays[:, None], t.shape)
        for neighbour, share in ((first, 1 - fraction), (first + 1, fraction)):
            inside = (neighbour >= 0) & (neighbour < count[other]) & (share > 0)
            x, y = (main, neighbour) if axis == 0 else (neighbour, main)
            parts.append((ray[inside], (y * count[0] + x)[inside], (share * length)[inside], t[inside]))
    ray, voxel, weight, t = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ray, voxel, weight, t


def interpolation(positions: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Linear interpolation at fractional indices ``positions`` (1D) in ``count`` samples: (row, column, weight).

    Beyond the first and last sample the values fade to zero over one step, as in :func:`joseph`.
    """
    positions = np.where(np.abs(positions - np.round(positions)) < 1e-9, np.round(positions), positions)
    first = np.floor(positions).astype(np.int64)
    row = np.concatenate([np.arange(positions.size)] * 2)
    column = np.concatenate([first, first + 1])
    weight = np.concatenate([first + 1 - positions, positions - first])
    inside = (column >= 0) & (column < count) & (weight > 0)
    return row[inside], column[inside], weight[inside]
