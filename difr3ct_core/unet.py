"""The denoiser: a time-conditioned 3D U-Net with isotropic convolutions (§III-C).

After the video-diffusion U-Net that the authors name as their source, with one change that CT needs: depth is an
axis like the others, so convolutions are 3 x 3 x 3 and every axis is downsampled. The x-ray condition is
concatenated to the noisy latent as channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .convolution import Conv3d
from .files import InputError
from .presets import UNetPreset


def time_embedding(t: Int[Tensor, " b"], channels: int, period: float = 10_000.0) -> Float[Tensor, "b channels"]:
    """Sinusoids of the step (Vaswani et al. 2017), for t in 0 .. T-1."""
    half = channels // 2
    frequency = torch.exp(-math.log(period) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TimeResidualBlock(nn.Module):
    """Residual block whose second normalisation is scaled and shifted by the time embedding."""

    def __init__(self, channels_in: int, channels_out: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = Conv3d(channels_in, channels_out)
        self.time = nn.Linear(time_channels, 2 * channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.conv2 = Conv3d(channels_out, channels_out)
        self.skip = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b ci z y x"], time: Float[Tensor, "b k"]) -> Float[Tensor, "b co z y x"]:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Multi-head attention among all voxels of a coarse level."""

    def __init__(self, channels: int, heads: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv3d(channels, 3 * heads * head_channels, 1, bias=False)
        self.out = nn.Conv3d(heads * head_channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        shape = x.shape
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three h d) z y x -> three b h (z y x) d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v)
        out = rearrange(out, "b h (z y x) d -> b (h d) z y x", z=shape[2], y=shape[3], x=shape[4])
        return x + self.out(out)


class UNet3d(nn.Module):
    """Predicts ε or v from a noisy latent, the step, and the condition.

    Args:
        channels: of the latent (input and output).
        condition_channels: of the x-ray features; 0 for an unconditional model.
        preset: widths, blocks, attention.
    """

    def __init__(self, channels: int, condition_channels: int, preset: UNetPreset) -> None:
        super().__init__()
        p, widths = preset, preset.widths
        self.condition_channels = condition_channels
        self.checkpointing = False  # see TrainPreset
        time_channels = 4 * widths[0]
        self.time = nn.Sequential(
            nn.Linear(widths[0], time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.time_channels_in = widths[0]
        self.stem = Conv3d(channels + condition_channels, widths[0])

        def level(ci: int, co: int, depth: int, blocks: int) -> nn.ModuleList:
            layers = nn.ModuleList(
                TimeResidualBlock(ci if i == 0 else co, co, time_channels, p.groups) for i in range(blocks)
            )
            if depth >= p.attention_from_level:
                layers.append(SelfAttention(co, p.heads, p.head_channels, p.groups))
            return layers

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for depth, width in enumerate(widths):
            self.down.append(level(widths[max(depth - 1, 0)], width, depth, p.blocks_per_level))
            last = depth == len(widths) - 1
            self.shrink.append(nn.Identity() if last else nn.Conv3d(width, width, 4, stride=2, padding=1))
        self.middle = level(widths[-1], widths[-1], len(widths), 1)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for depth in range(len(widths) - 2, -1, -1):
            self.grow.append(nn.ConvTranspose3d(widths[depth + 1], widths[depth], 4, stride=2, padding=1))
            self.up.append(level(2 * widths[depth], widths[depth], depth, p.blocks_per_level))
        self.head = nn.Sequential(nn.GroupNorm(p.groups, widths[0]), nn.SiLU(), Conv3d(widths[0], channels))
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(
        self, z: Float[Tensor, "b c z y x"], t: Int[Tensor, " b"], condition: Float[Tensor, "b k z y x"] | None = None
    ) -> Float[Tensor, "b c z y x"]:
        """Prediction for z_t. ``condition=None`` is the null condition of guidance: all zeros."""
        multiple = 2 ** (len(self.down) - 1)
        if any(edge % multiple for edge in z.shape[2:]):
            raise InputError(
                f"latent: found {tuple(z.shape[2:])} voxels, expected multiples of {multiple} on each axis."
            )
        if condition is None:
            condition = z.new_zeros(len(z), self.condition_channels, *z.shape[2:])
        time = self.time(time_embedding(t, self.time_channels_in).to(z.dtype))
        h = self.stem(torch.cat([z, condition.to(z.dtype)], dim=1))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            h = self._run(blocks, h, time)
            skips.append(h)
            h = shrink(h)
        h = self._run(self.middle, h, time)
        for blocks, grow, skip in zip(self.up, self.grow, reversed(skips[:-1]), strict=True):
            h = self._run(blocks, torch.cat([grow(h), skip], dim=1), time)
        return self.head(h)

    def _run(self, blocks: nn.ModuleList, h: Tensor, time: Tensor) -> Tensor:
        for block in blocks:
            inputs = (h, time) if isinstance(block, TimeResidualBlock) else (h,)
            again = self.checkpointing and self.training
            h = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return h
