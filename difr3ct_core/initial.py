"""The initial latent: a first reconstruction as a further condition. Beyond the paper.

Features carried along rays (Eq. 10) leave the denoiser to learn tomography: how several views together say where
along a ray something lies. A solver of the projection equations knows that exactly, for any views and any beam. Its
volume goes through the encoder of the autoencoder, which gives a first guess in the very coordinates that the
denoiser works in, and is concatenated to the features of :mod:`difr3ct_core.fusion`: the network learns what the
x-rays leave open. With few views a solver has little to say; there a network that has seen patients
(:mod:`difr3ct_core.initial_network`), told of the solver's latent, gives the first guess in its place. A preset with
solver "none" and no network is the paper's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .consistency import misfit as misfit_of
from .geometry import View
from .initial_volume import InitialVolume, initial_volume
from .presets import Preset
from .vqgan import VQGAN

if TYPE_CHECKING:
    from .datasets import Patients
    from .diffusion import LatentDiffusion


def solved_latent(
    vqgan: VQGAN, xrays: Float[Tensor, "b n v u"], views: Sequence[View], preset: Preset, batch: int = 16
) -> Float[Tensor, "b c z y x"] | None:
    """The encoded volume of the solver: scaled latents on the device of the x-rays; None if the preset wants none."""
    if not preset.initial.solves_latents:
        return None
    with torch.no_grad():
        return torch.cat([vqgan.encode(initial_volume(chunk, views, preset, batch)) for chunk in xrays.split(batch)])


@dataclass(frozen=True)
class FirstGuess:
    """What the denoiser starts from."""

    #: Scaled latents (b, c, z, y, x); None for the paper's model.
    latent: Tensor | None
    #: What the autoencoder loses of a guess in voxels (b, 1, z, y, x): the guess minus its decoded latent, which
    #: belongs to every sample; None for a guess in latents.
    lost: Tensor | None = None
    #: Of a guess in voxels, how far it misses its x-rays before anything moves it there, less what their noise explains
    #: (:func:`difr3ct_core.consistency.misfit`): (b,).
    misfit: Tensor | None = None


def first_guess(
    model: LatentDiffusion,
    vqgan: VQGAN,
    xrays: Float[Tensor, "b n v u"],
    views: Sequence[View],
    batch: int = 16,
    solved: Float[Tensor, "b c z y x"] | None = None,
    keep: bool = True,
) -> FirstGuess:
    """What the denoiser starts from, for :meth:`difr3ct_core.diffusion.LatentDiffusion.condition`.

    Args:
        model: whose preset says what that is.
        vqgan, xrays, views, batch: as in :func:`solved_latent`.
        solved: what that function returned, if it is known already.
        keep: whether to compute :attr:`FirstGuess.lost` and :attr:`FirstGuess.misfit`.

    Returns:
        what the model's initial network says, or what the solver found where it has no such network, on the device of
        the x-rays.
    """
    if solved is None:
        solved = solved_latent(vqgan, xrays, views, model.preset, batch)
    network = model.initial_network
    if network is None:
        return FirstGuess(solved)
    latents, lost, misfit = [], [], []
    with torch.no_grad():
        for rows in torch.arange(len(xrays)).split(batch):
            if isinstance(network, InitialVolume):
                seen = network.unrefined(xrays[rows], views)
                volume = network.refined(seen, xrays[rows], views)
                latents.append(vqgan.encode(volume))
                if keep:
                    lost.append(volume - vqgan.decode(latents[-1]))
                    misfit.append(misfit_of(seen[:, 0], xrays[rows], views, model.preset)[0])
            else:
                latents.append(network(xrays[rows], views, None if solved is None else solved[rows]))
    joined = (torch.cat(parts) if parts else None for parts in (latents, lost, misfit))
    return FirstGuess(*joined)


def usual_misfit(
    model: LatentDiffusion, vqgan: VQGAN, patients: Patients, device: str | torch.device, most: int = 16
) -> float:
    """Mean misfit of the first guess (:class:`difr3ct_core.initial.FirstGuess`) on some patients that train nothing."""
    some = patients.take(range(min(most, len(patients))))
    misfit = first_guess(model, vqgan, some.xrays.to(device), some.views).misfit
    assert misfit is not None
    return float(misfit.mean())


def initial_latent(
    model: LatentDiffusion,
    vqgan: VQGAN,
    xrays: Float[Tensor, "b n v u"],
    views: Sequence[View],
    batch: int = 16,
    solved: Float[Tensor, "b c z y x"] | None = None,
) -> Float[Tensor, "b c z y x"] | None:
    """The latents of :func:`first_guess`; None for a preset without one, the paper's."""
    return first_guess(model, vqgan, xrays, views, batch, solved, keep=False).latent
