"""Functions of position: sine layers, Fourier features, and the features of x-rays where a point's ray hits them.

What INRR3CT is (:class:`ImplicitVolume`), and what :mod:`difr3ct_core.initial_network` takes over from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .fusion import UNet2d
from .geometry import View, voxel_centres, world_to_detector
from .presets import FusionPreset

#: Voxels that a whole volume is evaluated at, at once, on a CPU, whose cache holds what so many need.
CHUNK = 2**12


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

    def scaled(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's weight and bias times omega: what its sine is of."""
        return [(self.omega * layer.weight, self.omega * layer.bias) for layer in self.layers]


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


class ImplicitVolume(nn.Module):
    """A CT as a function of position, conditioned on what the x-rays hold for that position (INRR3CT).

    A 2D U-Net, the same for all views, makes a feature image of each x-ray at the detector's full resolution. A point
    takes from each view the feature at the detector point which its ray hits (Eq. 10, without the grid). With its
    coordinates and their Fourier features that goes through sine layers, the mean over the views through further ones,
    and a linear layer gives the value. Each x-ray comes with sin and cos of its angle, as in
    :class:`difr3ct_core.fusion.Fusion`, because the mean over views would otherwise lose which view was which.

    Args:
        unet: of the features.
        width, view_layers, joint_layers, octaves, omega: of the sine layers before and after the mean over views, and
            of the Fourier features.
        scale: of the line integrals, by which they are divided.
        fov_mm: edge of the cube that the coordinates are normalised by.
    """

    def __init__(
        self,
        unet: FusionPreset,
        width: int,
        view_layers: int,
        joint_layers: int,
        octaves: int,
        omega: float,
        scale: float,
        fov_mm: float,
    ) -> None:
        super().__init__()
        self.octaves, self.scale, self.fov_mm = octaves, scale, fov_mm
        self.net = UNet2d(3, unet, factor=1)
        self.per_view = SineLayers(unet.out_channels + 3 + 6 * octaves, width, view_layers, omega, True)
        self.joint = SineLayers(width, width, joint_layers, omega, False)
        self.head = nn.Linear(width, 1)

    def features(self, xrays: Float[Tensor, "b n v u"], views: Sequence[View]) -> Float[Tensor, "b n k v u"]:
        """Feature images of line integrals."""
        b, n, rows, columns = xrays.shape
        angles = xrays.new_tensor([math.radians(view.angle_deg) for view in views])
        marks = torch.stack([angles.cos(), angles.sin()], dim=1)[None, :, :, None, None].expand(b, n, 2, rows, columns)
        images = torch.cat([xrays[:, :, None] / self.scale, marks], dim=2)
        return rearrange(self.net(rearrange(images, "b n c v u -> (b n) c v u")), "(b n) k v u -> b n k v u", b=b)

    def at(
        self, features: Float[Tensor, "b n k v u"], views: Sequence[View], points_mm: Float[Tensor, "b p 3"]
    ) -> Float[Tensor, "b p"]:
        """Values in the unit of [-1, 1] at points (x, y, z) in mm."""
        place = fourier_features(points_mm * (2 / self.fov_mm), self.octaves)
        total: Tensor | float = 0.0
        for i, view in enumerate(views):
            seen = sample_features(features[:, i], view, points_mm)
            total = total + self.per_view(torch.cat([seen, place.to(seen)], dim=-1))
        return self.head(self.joint(total / len(views)))[..., 0]

    def loss(
        self,
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        truth: Float[Tensor, "b 1 z y x"],
        spacing_mm: float,
        count: int,
        generator: torch.Generator,
        part: slice,
        batch: int,
    ) -> Float[Tensor, " b"]:
        """Mean squared error at ``count`` random voxels of each patient.

        ``part`` are the rows of a step's ``batch`` that these patients are; voxels are drawn for all of it.
        """
        values, (z, y, x) = truth.flatten(1), truth.shape[2:]
        points = voxel_centres((z, y, x), (spacing_mm,) * 3).view(-1, 3).to(truth.device)
        rows = torch.randint(values.shape[1], (batch, count), generator=generator)[part].to(truth.device)
        found = self.at(self.features(xrays, views), views, points[rows])
        return (found - values.gather(1, rows)).square().mean(1)

    @torch.no_grad()
    def volume(
        self, xrays: Float[Tensor, "b n v u"], views: Sequence[View], shape: Sequence[int], spacing_mm: float
    ) -> Float[Tensor, "b 1 z y x"]:
        """Whole volumes, clipped to [-1, 1]: what :meth:`at` says of every voxel, without a gradient but faster.

        The first layer is linear and so is the interpolation of features. So the layer's part for features is applied
        to the pixels, which are fewer than the points, and its part for places once for all views and patients.
        """
        points = voxel_centres(tuple(shape), (spacing_mm,) * 3).view(-1, 3).to(xrays)
        (weight, bias), *further = self.per_view.scaled()
        joint, count = self.joint.scaled(), weight.shape[1] - (3 + 6 * self.octaves)
        features = (self.features(some[None], views)[0] for some in xrays)
        images = [torch.einsum("ok,nkvu->novu", weight[:, :count], some) for some in features]
        parts = []
        for some in points.split(CHUNK if xrays.device.type == "cpu" else 64 * CHUNK):
            place = F.linear(fourier_features(some * (2 / self.fov_mm), self.octaves), weight[:, count:], bias)
            for image in images:
                total = torch.zeros_like(place)
                for i, view in enumerate(views):
                    seen = sample_features(image[None, i], view, some[None])[0]
                    total += _sines((seen + place).sin_(), further)
                parts.append(self.head(_sines(total / len(views), joint))[:, 0])
        found = torch.stack([torch.cat(parts[i :: len(xrays)]) for i in range(len(xrays))])
        return found.view(-1, 1, *shape).clamp(-1, 1)


def _sines(x: Float[Tensor, "p ci"], layers: Sequence[tuple[Tensor, Tensor]]) -> Float[Tensor, "p co"]:
    for weight, bias in layers:
        x = F.linear(x, weight, bias).sin_()
    return x
