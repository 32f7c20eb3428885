"""A chest of ellipsoids with exact contours, for planning tests: small, and mirror images of each other on demand."""

from __future__ import annotations

import numpy as np
import torch

from difr3ct_core.ct_io import CTVolume
from difr3ct_core.radiotherapy import Structures


def toy_chest(spacing: float = 8.0, mirrored: bool = False) -> tuple[CTVolume, Structures]:
    """Body, lungs, heart (left of the midline) and breasts on a grid of 320 mm; ``mirrored`` in x if wanted."""
    n = round(320 / spacing)
    axis = (np.arange(n) - (n - 1) / 2) * spacing
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")

    def ball(cx: float, cy: float, cz: float, a: float, b: float, c: float) -> np.ndarray:
        return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + ((z - cz) / c) ** 2 <= 1

    trunk = ((x / 145) ** 2 + (y / 100) ** 2 <= 1) & (np.abs(z) < 130)
    masks = {
        "lung_left": ball(62, 10, 0, 50, 70, 100),
        "lung_right": ball(-62, 10, 0, 50, 70, 100),
        "breast_left": ball(75, -75, 0, 58, 60, 60),
        "breast_right": ball(-75, -75, 0, 58, 60, 60),
    }
    masks["heart"] = ball(22, -30, -30, 42, 36, 42) & ~masks["lung_right"]
    masks["lung_left"] &= ~masks["heart"]
    chest_wall = (x / 128) ** 2 + (y / 84) ** 2 <= 1
    for side in ("left", "right"):
        masks[f"breast_{side}"] &= ~chest_wall
    masks["body"] = trunk | masks["breast_left"] | masks["breast_right"]
    hu = np.where(masks["body"], 0.0, -1000.0)
    hu[masks["lung_left"] | masks["lung_right"]] = -800.0
    if mirrored:
        hu = hu[:, :, ::-1]
        swap = {"left": "right", "right": "left"}
        turned = {}
        for name, mask in masks.items():
            stem, _, side = name.rpartition("_")
            turned[f"{stem}_{swap[side]}" if side in swap else name] = mask[:, :, ::-1].copy()
        masks = turned
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = axis[0]
    return CTVolume(torch.from_numpy(hu.copy()).float(), affine, "toy chest"), Structures(masks, affine, "toy contours")
