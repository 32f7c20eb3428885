"""INRR3CT: a CT as a function of position, conditioned on the features that the x-rays hold for that position.

The network is :class:`difr3ct_core.implicit.ImplicitVolume`; one set of weights serves every view, on equal terms with
DIFR3CT, which sees each x-ray's angle too.

A step evaluates random voxels, because activations of all of them for every view would fill any memory; they grow with
the views all the same, which is why the paper stops at four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..files import InputError
from ..geometry import View
from ..implicit import ImplicitVolume
from ..presets import Preset
from .network import Baseline
from .presets import INRR3CTPreset


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
        self.field = ImplicitVolume(
            s.unet, s.width, s.view_layers, s.joint_layers, s.octaves, s.omega, preset.xray.scale, preset.volume.fov_mm
        )

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
        self.check(xrays)
        spacing, points = self.preset.volume.spacing_mm, self.settings.points
        return self.field.loss(xrays, self.views, truth, spacing, points, generator, part, batch).mean(), {}

    @torch.no_grad()
    def reconstruct(self, xrays: Float[Tensor, "b n v u"], seed: int = 0) -> Float[Tensor, "b 1 z y x"]:
        """See :meth:`Baseline.reconstruct`; one patient at a time."""
        volume, parts = self.preset.volume, []
        for images in xrays.split(1):
            self.check(images)
            parts.append(self.field.volume(images.to(self.device), self.views, volume.shape, volume.spacing_mm).cpu())
        return torch.cat(parts)
