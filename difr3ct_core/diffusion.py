"""The forward process, its schedules and the training loss (§III-C, Eq. 1-9 and 15).

Symbols: z_0 a latent, z_t the noisy latent, t = 0 .. T-1 the step, γ_t the share of signal power (the product
ᾱ_t of Ho et al. 2020), so that

    z_t = sqrt(γ_t) z_0 + sqrt(1 - γ_t) ε,    ε ~ N(0, I)                                          (Eq. 3)

The paper says "linear schedule [54]". Reference 54 is Chen 2023, whose linear schedule is γ(t) = 1 - t; most
readers will think of Ho et al.'s linear β instead. Both are here, :class:`Schedule` says which is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .files import InputError
from .fusion import Fusion
from .geometry import View
from .initial_network import build_initial
from .presets import DiffusionPreset, Preset
from .unet import UNet3d

#: A denoiser: (z_t, t in 0 .. T-1, condition or None) -> prediction of the same shape as z_t.
Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Schedule(nn.Module):
    """γ_t for t = 0 .. T-1, falling, and never exactly 0 or 1.

    Args:
        preset: ``timesteps`` T, ``schedule`` ("chen_linear": γ = 1 - (t + 1)/(T + 1), the continuous schedule at T
            inner points; "ddpm_linear": β from 1e-4 to 0.02, rescaled by 1000/T), ``prediction`` ("epsilon", "v").

    Raises:
        InputError: unknown schedule or prediction.
    """

    gamma: Tensor

    def __init__(self, preset: DiffusionPreset) -> None:
        super().__init__()
        steps = preset.timesteps
        if preset.schedule == "chen_linear":
            gamma = 1 - (torch.arange(steps, dtype=torch.float64) + 1) / (steps + 1)
        elif preset.schedule == "ddpm_linear":
            scale = 1000 / steps
            beta = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps, dtype=torch.float64)
            gamma = torch.cumprod(1 - beta, 0)
        else:
            raise InputError(f"diffusion.schedule: found {preset.schedule!r}, expected 'chen_linear' or 'ddpm_linear'.")
        if preset.prediction not in ("epsilon", "v"):
            raise InputError(f"diffusion.prediction: found {preset.prediction!r}, expected 'epsilon' or 'v'.")
        self.timesteps, self.prediction = steps, preset.prediction
        # Double precision: λ near t = 0 is the log of a small difference. Not persistent: the preset defines it.
        self.register_buffer("gamma", gamma, persistent=False)

    def _apply(self, fn: Callable) -> Schedule:  # type: ignore[override]
        """Move with the model, but keep double precision (not to be halved by ``model.to(bfloat16)``)."""
        self.gamma = self.gamma.to(fn(torch.empty(0)).device)
        return self

    def alpha_sigma(self, t: Int[Tensor, " b"], like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(γ_t) and sqrt(1 - γ_t), shaped to multiply ``like`` (b, ...)."""
        gamma = self.gamma[t.to(self.gamma.device)].view(-1, *[1] * (like.ndim - 1))
        return gamma.sqrt().to(like), (1 - gamma).sqrt().to(like)

    def noisy(self, z0: Float[Tensor, "b ..."], t: Int[Tensor, " b"], noise: Float[Tensor, "b ..."]) -> Tensor:
        """Eq. 3: a sample of q(z_t | z_0)."""
        alpha, sigma = self.alpha_sigma(t, z0)
        return alpha * z0 + sigma * noise

    def target(self, z0: Float[Tensor, "b ..."], t: Int[Tensor, " b"], noise: Float[Tensor, "b ..."]) -> Tensor:
        """What the denoiser is asked for: ε (Eq. 5), or v = sqrt(γ) ε - sqrt(1 - γ) z_0 (Salimans & Ho 2022)."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self.alpha_sigma(t, z0)
        return alpha * noise - sigma * z0

    def to_x0(self, z: Float[Tensor, "b ..."], t: Int[Tensor, " b"], prediction: Float[Tensor, "b ..."]) -> Tensor:
        """The clean latent that a prediction implies: Eq. 3 solved for z_0."""
        alpha, sigma = self.alpha_sigma(t, z)
        if self.prediction == "epsilon":
            return (z - sigma * prediction) / alpha
        return alpha * z - sigma * prediction


def diffusion_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    z0: Float[Tensor, "b c z y x"],
    condition: Float[Tensor, "b k z y x"] | None,
    dropout: float,
    generator: torch.Generator | None = None,
    part: slice = slice(None),
    batch: int | None = None,
) -> Float[Tensor, ""]:
    """Eq. 15: mean squared error of the prediction at random t, with random drop-out of the condition.

    Args:
        denoiser: predicts ε or v; must accept a condition of zeros as "no condition" (guidance, Eq. 8).
        schedule: forward process.
        z0: clean latents.
        condition: x-ray features on the latent grid.
        dropout: probability with which a sample's condition is replaced by zeros.
        generator: source of t, ε and the drop-out (on the CPU, so that every device draws the same numbers).
        part, batch: z0 are these rows of a batch of so many, of which other processes compute the rest. The numbers
            are drawn for the whole batch, so that a row gets the same ones however the batch is shared out.
    """
    b = len(z0) if batch is None else batch
    t = torch.randint(schedule.timesteps, (b,), generator=generator)[part].to(z0.device)
    noise = torch.randn((b, *z0.shape[1:]), generator=generator)[part].to(z0)
    keep = (torch.rand(b, generator=generator) >= dropout)[part].to(z0.device)
    if condition is not None:
        condition = condition * keep.view(-1, *[1] * (condition.ndim - 1)).to(condition.dtype)
    prediction = denoiser(schedule.noisy(z0, t, noise), t, condition)
    return (prediction - schedule.target(z0, t, noise)).square().mean()


class LatentDiffusion(nn.Module):
    """Fusion and denoiser, trained together (Eq. 15): the second stage, which sees latents and x-rays only.

    Args:
        preset: the whole experiment; the latent grid follows from it.
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        channels, *grid = preset.latent_shape
        factor = 2**preset.vqgan.levels
        self.schedule = Schedule(preset.diffusion)
        self.fusion = Fusion(preset.fusion, (grid[0], grid[1], grid[2]), preset.volume.spacing_mm * factor, factor)
        self.unet = UNet3d(channels, preset.condition_channels, preset.unet)
        # Trained before, by itself: the diffusion model only reads what it says.
        self.initial_network = build_initial(preset).requires_grad_(False) if preset.initial.network else None

    def condition(
        self,
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        initial: Float[Tensor, "b c z y x"] | None = None,
    ) -> Float[Tensor, "b k z y x"]:
        """Line integrals and their geometry -> condition on the latent grid.

        Args:
            xrays: dimensionless.
            views: one per x-ray.
            initial: of :func:`difr3ct_core.initial.initial_latent`; None for a preset without one, the paper's.

        Raises:
            InputError: ``initial`` is missing, or given to a model that was not made for it.
        """
        if (initial is None) == self.preset.has_initial:
            raise InputError(
                f"initial: {'missing' if initial is None else 'given'}, but the model was made with"
                f"{'' if self.preset.has_initial else 'out'} one; pass what initial_latent(model, vqgan, xrays, views) "
                "returns."
            )
        features = self.fusion(xrays / self.preset.xray.scale, views)
        return features if initial is None else torch.cat([features, initial.to(features.dtype)], dim=1)

    def loss(
        self,
        latents: Float[Tensor, "b c z y x"],
        xrays: Float[Tensor, "b n v u"],
        views: Sequence[View],
        generator: torch.Generator | None = None,
        part: slice = slice(None),
        batch: int | None = None,
        initial: Float[Tensor, "b c z y x"] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 15 for one batch, or for some rows of it; see :func:`diffusion_loss` and :meth:`condition`."""
        condition = self.condition(xrays, views, initial)
        dropout = self.preset.diffusion.condition_dropout
        return diffusion_loss(self.unet, self.schedule, latents, condition, dropout, generator, part, batch), {}
