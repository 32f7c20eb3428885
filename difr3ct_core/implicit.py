"""Functions of position: sine layers, Fourier features, and the features of x-rays where a point's ray hits them.

What INRR3CT is built of, and what the initial network of :mod:`difr3ct_core.initial_network` takes over from it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .geometry import View, world_to_detector


class SineLayers(nn.Module):
    """Linear layers followed by sin(omega · x), initialised as SIREN (Sitzmann et al. 2020, §3.2).

    Args:
        channels_in: of the input.
        width: of every layer.
        layers: how many.
        omega: frequency.
        first: whether the input is a signal and not the output of sine layers: its weights are then drawn wider.
    """

    def __init__(self, channels_in: int, width: int, layers: int, omega: float, first: bool) -> None:
        super().__init__()
        self.omega = omega
        self.layers = nn.ModuleList(nn.Linear(channels_in if i == 0 else width, width) for i in range(layers))
        for i, layer in enumerate(self.layers):
            fan = layer.in_features
            bound = 1 / fan if first and i == 0 else math.sqrt(6 / fan) / omega
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "*any ci"]) -> Float[Tensor, "*any co"]:
        for layer in self.layers:
            x = torch.sin(self.omega * layer(x))
        return x


def fourier_features(coordinates: Float[Tensor, "*any 3"], octaves: int) -> Float[Tensor, "*any k"]:
    """Coordinates in [-1, 1], and sin and cos of 2^j·pi times them for j = 0 .. octaves - 1: 3 + 6·octaves numbers."""
    frequencies = math.pi * 2.0 ** torch.arange(octaves, device=coordinates.device, dtype=coordinates.dtype)
    angles = (coordinates[..., None] * frequencies).flatten(-2)
    return torch.cat([coordinates, angles.sin(), angles.cos()], dim=-1)


def sample_features(
    features: Float[Tensor, "b k v u"], view: View, points_mm: Float[Tensor, "b p 3"]
) -> Float[Tensor, "b p k"]:
    """The feature on each point's ray, linearly interpolated; zero where the ray misses the detector."""
    with torch.autocast(points_mm.device.type, enabled=False):  # bf16 would round positions to half a millimetre
        vu = world_to_detector(points_mm, view)
    size = vu.new_tensor(view.detector_shape)
    grid = ((2 * vu + 1) / size - 1).flip(-1)  # grid_sample counts (u, v) from -1 to 1, edge to edge
    found = F.grid_sample(features, grid[:, :, None].to(features), align_corners=False, padding_mode="zeros")
    return rearrange(found, "b k p 1 -> b p k")
