"""X2CT-GAN: 2D features turned into 3D ones by the network's connections, sharpened by a discriminator.

Written from the paper alone (Ying et al. 2019, CVPR; the public code is GPL and was not looked at). Every view has an
encoder of dense 2D blocks and a 3D decoder of its own, which sees its x-ray face on: its volumes have the axes
(v, depth, u), depth from the source to the detector. Three connections join the two:

- A: the coarsest 2D features, as one vector, through a fully connected layer to the coarsest 3D ones (4³);
- B: the 2D features of every scale, repeated along the depth, as skips of the decoder;
- C: with two views, the features of both decoders turned into the patient's axes and averaged, at every scale, as
  skips of a third decoder, which makes the volume.

Geometry enters by these turns only, so the method exists for parallel x-rays at right angles: 0 and 90 degrees, or one
of them. The loss is 0.1 LSGAN + 10 voxel MSE + 10 mean L1 of the projections along the three axes; the 3D patch
discriminator sees the volume with the x-rays that it was made from, repeated along their rays.

Ours: sizes (:mod:`difr3ct_core.baselines.presets`), group normalisation, no drop-out in connection A (the training of
this project is a pure function of seed and step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..convolution import Conv3d
from ..files import InputError
from ..geometry import View, view_frame
from ..presets import Preset
from ..vqgan_losses import PatchDiscriminator
from .network import Baseline
from .presets import X2CTGANPreset

#: Edge of the coarsest features, 2D and 3D.
COARSEST = 4


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of four channels or more: a group of one would swallow the bias of the convolution before it."""
    return nn.GroupNorm(max(math.gcd(32, channels) // 4, 1), channels)


def to_patient(x: Float[Tensor, "*any v d u"], view: View) -> Float[Tensor, "*any z y x"]:
    """From the axes of a view at a right angle, depth away from the source, to those of the patient."""
    frame = view_frame(view)
    across = int(frame.e_u.abs().argmax())  # 0: u runs along x, 1: along y
    if float(frame.e_u[across]) < 0:
        x = x.flip(-1)
    if float(frame.to_source[1 - across]) > 0:
        x = x.flip(-2)
    return x if across == 0 else x.transpose(-1, -2)


def expand(images: Float[Tensor, "b c v u"], view: View) -> Float[Tensor, "b c z y x"]:
    """Images repeated along their rays, in the patient's axes."""
    b, c, rows, columns = images.shape
    return to_patient(images[:, :, :, None].expand(b, c, rows, columns, columns), view)


class DenseEncoder(nn.Module):
    """2D features per scale, from full resolution to 4²: dense blocks (Huang et al. 2017), and strided convolutions."""

    def __init__(self, settings: X2CTGANPreset) -> None:
        super().__init__()
        widths, growth = settings.widths, settings.growth
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1)
        self.blocks, self.merge, self.down = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            channels = [width + growth * layer for layer in range(settings.dense_layers + 1)]
            self.blocks.append(
                nn.ModuleList(
                    nn.Sequential(_norm(ci), nn.ReLU(), nn.Conv2d(ci, growth, 3, padding=1)) for ci in channels[:-1]
                )
            )
            self.merge.append(nn.Sequential(_norm(channels[-1]), nn.ReLU(), nn.Conv2d(channels[-1], width, 1)))
            if i + 1 < len(widths):
                self.down.append(
                    nn.Sequential(_norm(width), nn.ReLU(), nn.Conv2d(width, widths[i + 1], 4, stride=2, padding=1))
                )

    def forward(self, xray: Float[Tensor, "b 1 v u"]) -> list[Tensor]:
        """Features at full, half, ... resolution."""
        h, found = self.stem(xray), []
        for i, (block, merge) in enumerate(zip(self.blocks, self.merge, strict=True)):
            for layer in block:
                h = torch.cat([h, layer(h)], dim=1)
            h = merge(h)
            found.append(h)
            if i < len(self.down):
                h = self.down[i](h)
        return found


class Decoder3d(nn.Module):
    """3D features from 4³ to full resolution, with a skip at every scale.

    Args:
        widths: channels per scale, from full resolution down.
        skips: channels of the skip at each of these scales.
    """

    def __init__(self, widths: Sequence[int], skips: Sequence[int]) -> None:
        super().__init__()

        def joined(channels: int, skip: int) -> nn.Module:
            return nn.Sequential(
                Conv3d(channels + skip, channels), _norm(channels), nn.ReLU(),
                Conv3d(channels, channels), _norm(channels), nn.ReLU(),
            )  # fmt: skip

        self.join = nn.ModuleList(joined(width, skip) for width, skip in zip(widths, skips, strict=True))
        self.grow = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, 4, stride=2, padding=1) for fine, coarse in pairwise(widths)
        )

    def forward(self, coarsest: Float[Tensor, "b c 4 4 4"], skips: Sequence[Tensor]) -> list[Tensor]:
        """Features at full, half, ... resolution, like ``skips``."""
        h = self.join[-1](torch.cat([coarsest, skips[-1]], dim=1))
        found = [h]
        for i in range(len(self.grow) - 1, -1, -1):
            h = self.join[i](torch.cat([self.grow[i](h), skips[i]], dim=1))
            found.append(h)
        return found[::-1]


class ViewBranch(nn.Module):
    """One view: encoder, connections A and B, decoder in the axes of the view."""

    def __init__(self, settings: X2CTGANPreset) -> None:
        super().__init__()
        widths, decoded = settings.widths, settings.decoder_widths
        self.encoder = DenseEncoder(settings)
        self.connection_a = nn.Linear(widths[-1] * COARSEST**2, decoded[-1] * COARSEST**3)
        self.connection_b = nn.ModuleList(
            nn.Conv2d(flat, deep, 3, padding=1) for flat, deep in zip(widths, decoded, strict=True)
        )
        self.decoder = Decoder3d(decoded, decoded)

    def forward(self, xray: Float[Tensor, "b 1 v u"]) -> list[Tensor]:
        """3D features (v, depth, u) at full, half, ... resolution."""
        flat = self.encoder(xray)
        coarsest = F.relu(self.connection_a(flat[-1].flatten(1))).view(len(xray), -1, *(COARSEST,) * 3)
        skips = [
            connect(f)[:, :, :, None].expand(-1, -1, -1, f.shape[-1], -1)
            for connect, f in zip(self.connection_b, flat, strict=True)
        ]
        return self.decoder(coarsest, skips)


class Critic(nn.Module):
    """3D patch discriminator on volume and x-rays, with the least-squares loss (Mao et al. 2017)."""

    def __init__(self, settings: X2CTGANPreset, views: Sequence[View]) -> None:
        super().__init__()
        self.views = tuple(views)
        self.net = PatchDiscriminator(3, settings.critic_channels, settings.critic_strides, 1 + len(self.views))
        self._left: tuple[Tensor, Tensor, Tensor] | None = None

    def scores(self, volume: Float[Tensor, "b 1 z y x"], given: Float[Tensor, "b n z y x"]) -> Tensor:
        """A score per patch: 1 is real, 0 is made."""
        return self.net(torch.cat([volume, given], dim=1))[-1]

    def judge(self, real: Tensor, fake: Tensor, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, ""]:
        """What the generator minimises: E[(D(x̂) - 1)²]."""
        given = torch.cat([expand(xrays[:, i, None], view) for i, view in enumerate(self.views)], dim=1)
        self._left = (real, fake.detach(), given)
        return (self.scores(fake, given) - 1).square().mean()

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator minimises on the volumes of the last :meth:`judge`: ½ E[(D(x) - 1)²] + ½ E[D(x̂)²]."""
        assert self._left is not None
        real, fake, given = self._left
        value = 0.5 * ((self.scores(real, given) - 1).square().mean() + self.scores(fake, given).square().mean())
        return value, {"critic": value.detach()}


def projection_loss(a: Float[Tensor, "b 1 z y x"], b: Float[Tensor, "b 1 z y x"]) -> Float[Tensor, ""]:
    """Mean over the three axes of the mean absolute difference of the mean projections along them."""
    return torch.stack([(a.mean(axis) - b.mean(axis)).abs().mean() for axis in (2, 3, 4)]).mean()


class X2CTGAN(Baseline):
    """The generator; see the head of this file. For one parallel view at 0 or 90 degrees, or both."""

    kind = "x2ctgan"
    settings_class = X2CTGANPreset

    def __init__(self, preset: Preset, settings: X2CTGANPreset, views: Sequence[View]) -> None:
        super().__init__(preset, settings, views)
        angles = [view.angle_deg for view in self.views]
        if (
            sorted(angles) not in ([0.0], [90.0], [0.0, 90.0])
            or any(view.mode != "parallel" for view in self.views)
            or any(offset for view in self.views for offset in view.offset_mm)
        ):
            raise InputError(
                f"views: found {self.views[0].mode} views at {angles}°, expected centred parallel views at 0°, 90° or "
                "both: X2CT-GAN knows no other geometry."
            )
        s, size = settings, preset.volume.size
        levels = len(s.widths)
        if size != COARSEST * 2 ** (levels - 1) or len(s.decoder_widths) != levels:
            raise InputError(
                f"widths: found {levels} for 2D and {len(s.decoder_widths)} for 3D features, expected "
                f"{math.log2(size / COARSEST) + 1:g} of both, from {size} voxels down to {COARSEST}."
            )
        for view in self.views:
            edges = [count * pixel for count, pixel in zip(view.detector_shape, view.pixel_mm, strict=True)]
            if tuple(view.detector_shape) != (size, size) or any(abs(e - preset.volume.fov_mm) > 1e-6 for e in edges):
                raise InputError(
                    f"views: found a detector of {view.detector_shape} pixels and {edges} mm, expected ({size}, {size})"
                    f" pixels and {preset.volume.fov_mm:g} mm on both edges, one pixel per voxel."
                )
        self.branches = nn.ModuleList(ViewBranch(s) for _ in self.views)
        # The mean at the coarsest scale is where the third decoder begins; it has no skip there.
        self.fused = Decoder3d(s.decoder_widths, (*s.decoder_widths[:-1], 0)) if len(self.views) > 1 else None
        self.head = Conv3d(s.decoder_widths[0], 1)

    def forward(self, xrays: Float[Tensor, "b n v u"]) -> Float[Tensor, "b 1 z y x"]:
        """Volumes of line integrals, in the unit of [-1, 1]; nothing clips them here."""
        self.check(xrays)
        scaled = xrays / self.preset.xray.scale
        found = [
            [to_patient(h, view) for h in branch(scaled[:, i, None])]
            for i, (branch, view) in enumerate(zip(self.branches, self.views, strict=True))
        ]
        if self.fused is None:
            return self.head(found[0][0])
        mean = [sum(scale) / len(scale) for scale in zip(*found, strict=True)]  # connection C
        return self.head(self.fused(mean[-1], [*mean[:-1], mean[-1][:, :0]])[0])

    def critic(self) -> Critic:
        """The discriminator; see :meth:`Baseline.critic`."""
        return Critic(self.settings, self.views)

    def loss(
        self,
        truth: Float[Tensor, "b 1 z y x"],
        xrays: Float[Tensor, "b n v u"],
        generator: torch.Generator,
        part: slice,
        batch: int,
        critic: nn.Module | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms on intensities in [0, 1]; see :meth:`Baseline.loss`."""
        s = self.settings
        fake = self(xrays)
        real01, fake01 = (truth + 1) / 2, (fake + 1) / 2
        voxel, projection = (fake01 - real01).square().mean(), projection_loss(fake01, real01)
        total = s.voxel_weight * voxel + s.projection_weight * projection
        values = {"voxel": voxel.detach(), "projection": projection.detach()}
        if critic is not None and s.gan_weight > 0:
            adversarial = critic.judge(truth, fake, xrays / self.preset.xray.scale)  # type: ignore[operator]
            total, values["gan"] = total + s.gan_weight * adversarial, adversarial.detach()
        return total, values

    @torch.no_grad()
    def reconstruct(self, xrays: Float[Tensor, "b n v u"], seed: int = 0) -> Float[Tensor, "b 1 z y x"]:
        """See :meth:`Baseline.reconstruct`; four patients at a time."""
        return torch.cat([self(part.to(self.device)).clamp(-1, 1).cpu() for part in xrays.split(4)])
