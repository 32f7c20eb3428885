"""The 3³ convolution of both networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """A 3³ convolution that keeps its grid, with a short cut for a single small volume on a CPU.

    There PyTorch leaves its fast kernel for one that unfolds the volume 27 times, which takes twice the time and the
    memory. Two halves with an overlap of one slice are a batch of two, for which the fast kernel is chosen, and give
    the same numbers.
    """

    #: Below this many elements of the first four axes PyTorch (2.11 to 2.13) takes the slow kernel.
    SMALL = 20480

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "b ci z y x"]) -> Float[Tensor, "b co z y x"]:
        b, c, z, y, _ = x.shape
        if b > 1 or x.device.type != "cpu" or z % 2 or c * z * y > self.SMALL:
            return super().forward(x)
        padded = F.pad(x, (0, 0, 0, 0, 1, 1))
        halves = torch.cat([padded[:, :, : z // 2 + 2], padded[:, :, z // 2 :]])
        first, second = F.conv3d(halves, self.weight, self.bias, padding=(0, 1, 1)).split(1)
        return torch.cat([first, second], dim=2)
