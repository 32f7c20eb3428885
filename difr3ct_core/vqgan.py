"""3D VQGAN: the autoencoder whose latents the diffusion model lives in (§III-B).

An encoder shrinks a CT by 2 on each axis per level, a codebook replaces each latent vector by its nearest
code, a decoder grows the volume back. The layout follows TATS (Ge et al. 2022), with one change for speed:
the first and last level work on 2 x 2 x 2 blocks of voxels folded into channels (space to depth), so that no
convolution with many channels ever runs at full resolution. At equal parameters that is several times faster
and lighter; :file:`benchmarks/` holds the figures.

The autoencoder owns the scale of its latents: :meth:`VQGAN.encode` gives pre-quantisation latents in about
[-1, 1], and :meth:`VQGAN.decode` undoes the scale and quantises, so the diffusion stage knows no internals.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import processes
from .convolution import Conv3d
from .files import InputError
from .presets import VQGANPreset


def _fold(x: Tensor) -> Tensor:
    """Space to depth: 2 x 2 x 2 blocks of voxels become 8 channels."""
    return rearrange(x, "b c (z p) (y q) (x r) -> b (c p q r) z y x", p=2, q=2, r=2)


def _unfold(x: Tensor) -> Tensor:
    """Depth to space, the inverse of :func:`_fold`."""
    return rearrange(x, "b (c p q r) z y x -> b c (z p) (y q) (x r)", p=2, q=2, r=2)


class ResidualBlock3d(nn.Module):
    """Twice (GroupNorm, SiLU, 3³ convolution), added to the input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv1 = Conv3d(channels, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv2 = Conv3d(channels, channels)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity, which trains faster
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _run(layers: nn.Sequential, x: Tensor, checkpointing: bool) -> Tensor:
    """All layers; with checkpointing only their inputs are kept, and the rest is computed again going backward."""
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
    return x


class Encoder(nn.Module):
    """Volume -> latent vectors before quantisation; each level halves the grid."""

    def __init__(self, p: VQGANPreset) -> None:
        super().__init__()
        self.factor = 2**p.levels
        width = 2 * p.base_channels
        layers: list[nn.Module] = [Conv3d(8, width), ResidualBlock3d(width, p.groups)]
        for _ in range(p.levels - 1):
            layers += [nn.Conv3d(width, 2 * width, 4, stride=2, padding=1), ResidualBlock3d(2 * width, p.groups)]
            width *= 2
        layers += [nn.GroupNorm(p.groups, width), nn.SiLU(), nn.Conv3d(width, p.latent_channels, 1)]
        self.layers = nn.Sequential(*layers)
        self.checkpointing = False  # see TrainPreset

    def forward(self, volume: Float[Tensor, "b 1 Z Y X"]) -> Float[Tensor, "b d z y x"]:
        if any(edge % self.factor for edge in volume.shape[2:]):  # strides would drop the last voxels unsaid
            raise InputError(
                f"volume: found {tuple(volume.shape[2:])} voxels, expected multiples of {self.factor} on each axis."
            )
        return _run(self.layers, _fold(volume), self.checkpointing and self.training)


class Decoder(nn.Module):
    """Quantised latent -> volume; two residual blocks a level, as in TATS."""

    def __init__(self, p: VQGANPreset) -> None:
        super().__init__()
        width = p.base_channels * 2**p.levels
        layers: list[nn.Module] = [Conv3d(p.latent_channels, width)]
        layers += [ResidualBlock3d(width, p.groups), ResidualBlock3d(width, p.groups)]
        for _ in range(p.levels - 1):
            layers += [nn.ConvTranspose3d(width, width // 2, 4, stride=2, padding=1)]
            width //= 2
            layers += [ResidualBlock3d(width, p.groups), ResidualBlock3d(width, p.groups)]
        layers += [nn.GroupNorm(p.groups, width), nn.SiLU(), Conv3d(width, 8)]
        self.layers = nn.Sequential(*layers)
        self.checkpointing = False

    def forward(self, code: Float[Tensor, "b d z y x"]) -> Float[Tensor, "b 1 Z Y X"]:
        return _unfold(_run(self.layers, code, self.checkpointing and self.training))


class Codebook(nn.Module):
    """Vector quantisation with exponential-moving-average codes (van den Oord et al. 2017, appendix A).

    All state, the flag ``initialised`` included, lives in buffers, so a resumed run keeps its codes. Codes are
    taken from the data at the first training step. A code whose use falls below ``restart_below`` of the mean
    use is moved to a random latent; the threshold is relative, because an absolute one would restart most of a
    large codebook at every step when a batch has few latent vectors per code.
    """

    codes: Tensor
    usage: Tensor
    sums: Tensor
    initialised: Tensor

    def __init__(self, size: int, channels: int, decay: float, restart_below: float) -> None:
        super().__init__()
        self.size, self.decay, self.restart_below = size, decay, restart_below
        self.register_buffer("codes", torch.zeros(size, channels))
        self.register_buffer("usage", torch.ones(size))  # moving average of each code's share, mean 1
        self.register_buffer("sums", torch.zeros(size, channels))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def nearest(self, latent: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Index of the nearest code of each vector (Euclidean)."""
        parts = []
        # The (n, size) table of distances would not fit at 32³ x 4096; on a CPU a part of it had better fit its cache.
        rows = 1024 if latent.device.type == "cpu" else 16384
        # First the best of every block of codes, then the best block, then the code in it: the maximum of a short row
        # is vectorised on a CPU, the index of the maximum of a long one is not, and that took a third of decoding.
        block = math.gcd(self.size, 64)
        # In mixed precision the product would be of 8 bits, which do not tell neighbouring codes apart.
        with torch.autocast(latent.device.type, enabled=False):
            half_norm = 0.5 * self.codes.square().sum(1)
            for chunk in latent.float().split(rows):
                nearness = torch.addmm(-half_norm, chunk, self.codes.T).view(len(chunk), -1, block)
                best = nearness.amax(2).argmax(1)
                within = nearness[torch.arange(len(chunk), device=best.device), best].argmax(1)
                parts.append(best * block + within)
        return torch.cat(parts)

    def forward(
        self, latent: Float[Tensor, "b d z y x"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b d z y x"], Int[Tensor, "b z y x"]]:
        """Quantise; in training mode also update the codes. Gradients pass straight through.

        Args:
            latent: vectors before quantisation.
            generator: source of the random latents for initialisation and restart.

        Returns:
            the quantised latent, and the index of each code.
        """
        b, _, z, y, x = latent.shape
        flat = rearrange(latent.detach().float(), "b d z y x -> (b z y x) d")
        # All processes see all latent vectors (they are few and small), so that their codes never differ.
        everyone = processes.gather_rows(flat) if self.training else flat
        if self.training and not self.initialised:
            self._initialise(everyone, generator)
        index = self.nearest(flat)
        quantised = rearrange(self.codes[index], "(b z y x) d -> b d z y x", b=b, z=z, y=y, x=x).to(latent.dtype)
        if self.training:
            self._update(everyone, index if everyone is flat else self.nearest(everyone), generator)
        return latent + (quantised - latent).detach(), index.view(b, z, y, x)

    def _random_rows(self, flat: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
        rows = torch.randint(len(flat), (count,), generator=generator, device="cpu").to(flat.device)
        return flat[rows]

    @torch.no_grad()
    def _initialise(self, flat: Tensor, generator: torch.Generator | None) -> None:
        self.codes.copy_(self._random_rows(flat, self.size, generator))
        self.sums.copy_(self.codes)
        self.usage.fill_(1.0)
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, flat: Tensor, index: Tensor, generator: torch.Generator | None) -> None:
        share = self.size / len(flat)  # so that usage has mean 1 whatever the batch
        counts = torch.bincount(index, minlength=self.size).to(flat.dtype) * share
        sums = torch.zeros_like(self.sums).index_add_(0, index, flat) * share
        self.usage.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(self.sums / self.usage.clamp_min(1e-5)[:, None])
        dead = self.usage < self.restart_below
        # The number of restarts is not known before looking; drawing a full set keeps the random stream, and with
        # it a resumed run, independent of that number.
        fresh = self._random_rows(flat, self.size, generator)
        self.codes[dead] = fresh[dead]
        self.sums[dead] = fresh[dead]
        self.usage[dead] = 1.0


class VQGAN(nn.Module):
    """Encoder, codebook and decoder.

    Latents given out by :meth:`encode` are divided by :attr:`latent_scale` and shifted by :attr:`latent_shift`,
    both set once after training by :meth:`fit_latent_scale` and stored with the weights.
    """

    latent_scale: Tensor
    latent_shift: Tensor
    #: Checksum of the autoencoder whose encoder and codes these are, where only the decoder went on learning.
    latents_of: str | None = None

    def __init__(self, preset: VQGANPreset) -> None:
        super().__init__()
        self.preset = preset
        self.encoder = Encoder(preset)
        self.decoder = Decoder(preset)
        self.codebook = Codebook(
            preset.codebook_size, preset.latent_channels, preset.codebook_decay, preset.restart_below
        )
        self.register_buffer("latent_scale", torch.ones(preset.latent_channels))
        self.register_buffer("latent_shift", torch.zeros(preset.latent_channels))

    def forward(
        self, volume: Float[Tensor, "b 1 Z Y X"], generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b 1 Z Y X"], dict[str, Tensor]]:
        """Reconstruct a volume; also return the commitment term of Eq. 11 and the use of the codebook.

        Returns:
            the reconstruction, and ``commitment`` (mean squared distance of latents from their codes),
            ``perplexity`` (exp of the entropy of the codes used in this batch).
        """
        latent = self.encoder(volume)
        quantised, index = self.codebook(latent, generator)
        code = quantised.detach()  # those of before this step's update, which the decoder sees
        share = torch.bincount(index.flatten(), minlength=self.codebook.size).float() / index.numel()
        perplexity = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
        return self.decoder(quantised), {"commitment": F.mse_loss(latent, code), "perplexity": perplexity}

    @torch.no_grad()
    def fit_latent_scale(self, volumes: list[Float[Tensor, "b 1 Z Y X"]]) -> None:
        """Set scale and shift per channel from training volumes, so that latents have mean 0 and deviation 0.5.

        Two standard deviations then span [-1, 1], the range that the paper asks of the latents (§III-B), without
        one extreme latent deciding the scale of all, as a minimum-maximum rule would let it.
        """
        latents = torch.cat([rearrange(self.encoder(v), "b d z y x -> d (b z y x)") for v in volumes], dim=1)
        self.latent_shift.copy_(latents.mean(1))
        self.latent_scale.copy_(2 * latents.std(1).clamp_min(1e-6))

    @torch.no_grad()
    def encode(self, volume: Float[Tensor, "b 1 Z Y X"]) -> Float[Tensor, "b d z y x"]:
        """Volume in [-1, 1] -> scaled latent before quantisation, what the diffusion model learns."""
        shape = (1, -1, 1, 1, 1)
        return (self.encoder(volume) - self.latent_shift.view(shape)) / self.latent_scale.view(shape)

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b d z y x"], batch: int = 8) -> Float[Tensor, "b 1 Z Y X"]:
        """Scaled latent -> quantise -> volume, clamped to [-1, 1]. ``batch`` bounds the memory."""
        shape = (1, -1, 1, 1, 1)
        code = latent * self.latent_scale.view(shape) + self.latent_shift.view(shape)
        parts = []
        for chunk in code.split(batch):
            quantised = self.codebook.codes[self.codebook.nearest(rearrange(chunk, "b d z y x -> (b z y x) d"))]
            b, _, z, y, x = chunk.shape
            quantised = rearrange(quantised, "(b z y x) d -> b d z y x", b=b, z=z, y=y, x=x)
            parts.append(self.decoder(quantised).clamp(-1, 1))
        return torch.cat(parts)

    def loss(
        self,
        volume: Float[Tensor, "b 1 Z Y X"],
        generator: torch.Generator | None = None,
        judge: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 11 and 14: w_L1·|x - x̂| + w_c·||z - sg(e)||² + what ``judge(x, x̂)`` adds.

        Args:
            volume: CTs in [-1, 1].
            generator: of the restarts of codes.
            judge: perceptual and adversarial terms, see :meth:`difr3ct_core.vqgan_losses.Critics.judge`.

        Returns:
            the loss, and its terms for the log.
        """
        reconstruction, terms = self(volume, generator)
        l1 = (reconstruction - volume).abs().mean()
        total = self.preset.l1_weight * l1 + self.preset.commitment_weight * terms["commitment"]
        values = {"l1": l1.detach(), "commitment": terms["commitment"].detach(), "perplexity": terms["perplexity"]}
        if judge is not None:
            look, more = judge(volume, reconstruction)
            total, values = total + look, values | more
        return total, values

    def live_codes(self) -> float:
        """Share of codes in use: those with at least a tenth of the mean use."""
        return float((self.codebook.usage > 0.1).float().mean())
