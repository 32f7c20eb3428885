"""The initial volume: what a classical solver makes of the x-rays, as a further condition. Beyond the paper.

Features carried along rays (Eq. 10) leave the denoiser to learn tomography: how several views together say where
along a ray something lies. That is what a solver of the projection equations knows exactly, for any views and any
beam. Its volume is folded into blocks of the latent grid's voxels and concatenated to the features of
:mod:`difr3ct_core.fusion`, so that the network learns only what the x-rays leave open. A preset with solver "none"
is the paper's model; chapter 04 compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import ct
from .baselines.classical import METHODS
from .files import InputError
from .geometry import View
from .presets import Preset

#: The iterative methods; filtered back-projection has no number of iterations, and is no use with few views.
SOLVERS = {name: method for name, method in METHODS.items() if name != "fbp"}


def initial_volume(
    xrays: Float[Tensor, "b n v u"], views: Sequence[View], preset: Preset, batch: int = 16
) -> Float[Tensor, "b 1 z y x"]:
    """The solver's reconstruction in [-1, 1], clipped to the preset's window.

    Args:
        xrays: line integrals, dimensionless.
        views: one per x-ray, parallel or cone, at any angles.
        preset: ``initial.solver`` is a name of :data:`SOLVERS`; grid and window.
        batch: patients solved together, which bounds the memory.

    Raises:
        InputError: no such solver, or x-rays that do not match the views.
    """
    p = preset.initial
    if p.solver not in SOLVERS:
        raise InputError(f"initial.solver: found {p.solver!r}, expected 'none' or one of {', '.join(SOLVERS)}.")
    parts = []
    with torch.no_grad(), torch.autocast(xrays.device.type, enabled=False):
        for chunk in xrays.float().split(batch):
            mu = SOLVERS[p.solver](chunk, views, preset.volume.shape, preset.volume.spacing_mm, iterations=p.iterations)
            parts.append(ct.hu_to_unit(ct.mu_to_hu(mu, preset.xray.mu_water_per_mm), preset.volume)[:, None])
    return torch.cat(parts)


class InitialCondition(nn.Module):
    """A volume -> channels on the latent grid: one linear map of each block of voxels.

    Args:
        channels: made of each block.
        factor: voxels per latent voxel along an axis.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.fold = nn.Conv3d(1, channels, factor, stride=factor)

    def forward(self, volume: Float[Tensor, "b 1 Z Y X"]) -> Float[Tensor, "b k z y x"]:
        return self.fold(volume)
