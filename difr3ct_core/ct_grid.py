"""Linear algebra of axis-aligned grids, and where the body is: the tools of :mod:`.ct`.

Resampling an axis-aligned volume is linear and acts on each axis by itself: one small matrix per axis.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from .ct_io import CTVolume


def axis_weights(
    n_in: int, d_in: float, low_in: float, n_out: int, d_out: float, low_out: float
) -> Float[np.ndarray, "n_out n_in"]:
    """(n_out, n_in) weights that resample one axis; a row sums to the share of its voxel inside the input.

    Where the output is as coarse as the input or coarser: the average of the input (constant in each voxel) over
    the output voxel, which keeps the mean and does not alias. Where it is finer: linear interpolation.
    Grids that coincide give the identity.
    """
    if d_out >= d_in * (1 - 1e-9):
        edge_in = low_in + d_in * np.arange(n_in + 1)
        edge_out = low_out + d_out * np.arange(n_out + 1)
        overlap = np.minimum(edge_out[1:, None], edge_in[1:]) - np.maximum(edge_out[:-1, None], edge_in[:-1])
        return np.maximum(overlap, 0.0) / d_out
    position = (low_out + d_out * (np.arange(n_out) + 0.5) - low_in) / d_in
    inside = (position >= 0) & (position <= n_in)
    index = (position - 0.5).clip(0, n_in - 1)
    return np.maximum(1 - np.abs(index[:, None] - np.arange(n_in)), 0.0) * inside[:, None]


def apply_to_axes(
    values: Float[Tensor, "z y x"], operators: list[np.ndarray], background: float
) -> Float[Tensor, "z2 y2 x2"]:
    """Multiply each axis by its matrix (given for x, y, z); what a row lacks to 1 is ``background``."""
    weights_x, weights_y, weights_z = (torch.from_numpy(w).to(values.dtype) for w in operators)
    out = values - background
    out = (weights_z @ out.flatten(1)).unflatten(1, out.shape[1:])
    out = weights_y @ out
    return out @ weights_x.T + background


def find_body(ct: CTVolume) -> tuple[Bool[np.ndarray, "z y x"], list[np.ndarray]]:
    """A coarse mask (z, y, x) of the body, and the mm edges of its voxels along x, y, z.

    Body: the largest connected part above -400 HU on a grid of about 4 mm, opened in the plane so that the couch
    and its sheet fall off, with the lungs filled in.
    """
    spacing = np.array(ct.spacing_mm)
    step = [max(1, int(v)) for v in 4.0 / spacing]
    coarse = torch.nn.functional.avg_pool3d(ct.hu[None].to(torch.float32), step, ceil_mode=True)[0].numpy()
    tissue = coarse > -400
    opened = ndimage.binary_opening(tissue, structure=np.ones((1, 3, 3), bool))
    parts, count = ndimage.label(opened if opened.any() else tissue)
    if count:
        parts = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        parts = np.stack([ndimage.binary_fill_holes(plane) for plane in parts])
    edges = []
    for axis in range(3):
        voxels = np.minimum(np.arange(parts.shape[2 - axis] + 1) * step[2 - axis], ct.hu.shape[2 - axis])
        edges.append(ct.low_mm[axis] + voxels * ct.affine[axis, axis])
    return parts.astype(bool), edges


def share_outside(body: np.ndarray, edges: list[np.ndarray], low: np.ndarray, high: np.ndarray) -> float:
    """Share of the body's volume outside the box."""
    whole, kept = [], []
    for axis in range(3):
        a, b = edges[axis][:-1], edges[axis][1:]
        whole.append(b - a)
        kept.append(np.maximum(np.minimum(b, high[axis]) - np.maximum(a, low[axis]), 0))
    total = np.einsum("zyx,z,y,x->", body, whole[2], whole[1], whole[0])
    inside = np.einsum("zyx,z,y,x->", body, kept[2], kept[1], kept[0])
    return float(np.clip(1 - inside / total, 0, 1)) if total > 0 else 0.0
