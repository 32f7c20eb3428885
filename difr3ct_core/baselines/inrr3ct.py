"""INRR3CT: a CT as a function of position, conditioned on the features that the x-rays hold for that position.

A 2D U-Net, the same for all views, makes a feature image of each x-ray at the detector's full resolution. A point of
the patient takes from each view the feature at the detector point which its ray hits (Eq. 10 of DIFR3CT, without the
grid). With its coordinates and their Fourier features that goes through sine layers (SIREN, Sitzmann et al. 2020), the
mean over the views through further ones, and a linear layer gives the value.

One set of weights serves every view. As in :class:`difr3ct_core.fusion.Fusion`, and so on equal terms, each x-ray
comes with sin and cos of its angle, because the mean over views would otherwise lose which view was which.

A step evaluates random voxels, because activations of all of them for every view would fill any memory; they grow with
the views all the same, which is why the paper stops at four.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..files import InputError
from ..fusion import UNet2d
from ..geometry import View, voxel_centres
from ..implicit import SineLayers, fourier_features, sample_features
from ..presets import Preset
from .network import Baseline
from .presets import INRR3CTPreset

#: Voxels that a whole volume is evaluated at, at once, per view.
CHUNK = 2**16


class INRR3CT(Baseline):
    """See the head of this file. For 1 to ``settings.most_views`` views."""

    kind = "inrr3ct"
    settings_class = INRR3CTPreset

    def __init__(self, preset: Preset, settings: INRR3CTPreset, views: Sequence[View]) -> None:
        super().__init__(preset, settings, views)
        if not 1 <= len(self.views) <= settings.most_views:
            raise InputError(
                f"views: found {len(self.views)}, expected 1 to {settings.most_views}: INRR3CT keeps activations of "
                "every view for every point, so its memory grows with the views; take fewer."
            )
        s = settings
        multiple = 2 ** (len(s.unet.widths) - 1)
        if any(edge % multiple for edge in self.views[0].detector_shape):
            raise InputError(
                f"views: found a detector of {self.views[0].detector_shape} pixels, expected multiples of {multiple}."
            )
        self.net = UNet2d(3, s.unet, factor=1)
        self.per_view = SineLayers(s.unet.out_channels + 3 + 6 * s.octaves, s.width, s.view_layers, s.omega, True)
        self.joint = SineLayers(s.width, s.width, s.joint_layers, s.omega, False)
        self.head = nn.Linear(s.width, 1)

    def features(self, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, "b n k v u"]:
        """Feature images of line integrals."""
        self.check(xrays)
        b, n, rows, columns = xrays.shape
        angles = xrays.new_tensor([math.radians(view.angle_deg) for view in self.views])
        marks = torch.stack([angles.cos(), angles.sin()], dim=1)[None, :, :, None, None].expand(b, n, 2, rows, columns)
        images = torch.cat([xrays[:, :, None] / self.preset.xray.scale, marks], dim=2)
        return rearrange(self.net(rearrange(images, "b n c v u -> (b n) c v u")), "(b n) k v u -> b n k v u", b=b)

    def at(self, features: Float[Tensor, "b n k v u"], points_mm: Float[Tensor, "b p 3"]) -> Float[Tensor, "b p"]:
        """Values in the unit of [-1, 1] at points (x, y, z) in mm."""
        place = fourier_features(points_mm * (2 / self.preset.volume.fov_mm), self.settings.octaves)
        total: Tensor | float = 0.0
        for i, view in enumerate(self.views):
            seen = sample_features(features[:, i], view, points_mm)
            total = total + self.per_view(torch.cat([seen, place.to(seen)], dim=-1))
        return self.head(self.joint(total / len(self.views)))[..., 0]

    def loss(
        self,
        truth: Float[Tensor, "b 1 z y x"],
        xrays: Float[Tensor, "b n v u"],
        generator: torch.Generator,
        part: slice,
        batch: int,
        critic: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error at random voxels; see :meth:`Baseline.loss`."""
        values = truth.flatten(1)
        points = self._centres(truth.device)
        rows = torch.randint(values.shape[1], (batch, self.settings.points), generator=generator)[part]
        rows = rows.to(truth.device)
        found = self.at(self.features(xrays), points[rows])
        return (found - values.gather(1, rows)).square().mean(), {}

    @torch.no_grad()
    def reconstruct(self, xrays: Float[Tensor, "b n v u"], seed: int = 0) -> Float[Tensor, "b 1 z y x"]:
        """See :meth:`Baseline.reconstruct`; one patient and :data:`CHUNK` points at a time."""
        points = self._centres(self.device)
        volumes = []
        for images in xrays:
            features = self.features(images[None].to(self.device))
            parts = [self.at(features, some[None])[0].cpu() for some in points.split(CHUNK)]
            volumes.append(torch.cat(parts).view(1, *self.preset.volume.shape).clamp(-1, 1))
        return torch.stack(volumes)

    def _centres(self, device: torch.device) -> Float[Tensor, "p 3"]:
        volume = self.preset.volume
        return voxel_centres(volume.shape, volume.spacing_mm).view(-1, 3).to(device)
