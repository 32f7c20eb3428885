"""The decoder's own training, after the autoencoder's: same codes, better volumes. Beyond the paper.

The autoencoder learns by small crops, which is fast and shows it much, but a crop has no neighbours: at its faces the
encoder and the decoder see zeros where tissue goes on. Here the encoder and the codes stay as they are, so that latents
and all that was trained in them stay valid, and the decoder alone learns from whole volumes and their codes. The codes
of all patients are computed once, so that a step runs no encoder.

The square of the error is added to its absolute value: a posterior mean is judged by its square (PSNR), and few large
errors at the edges of bone make most of it.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import processes
from .checkpoints import seconds_trained
from .datasets import Patients, batch_index
from .files import InputError, write_safetensors
from .metrics import psnr
from .presets import Preset
from .results import provenance
from .stages import _common, _finished, _numbers, _prepare
from .training import fit
from .vqgan import VQGAN
from .weights import latents_digest, load_vqgan, state_digest, training_history

#: Weight of the mean squared error beside the mean absolute error, volumes in [-1, 1]: about equal shares.
SQUARE_WEIGHT = 5.0


def train_decoder(
    vqgan: VQGAN,
    train: Patients,
    preset: Preset,
    folder: str | Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    validation: Patients | None = None,
    stop_after: int | None = None,
    others: Float[Tensor, "n 1 z y x"] | None = None,
    others_share: float = 0.2,
    history: list[dict[str, Any]] | None = None,
) -> VQGAN:
    """The autoencoder of ``folder``, whose decoder went on learning from ``vqgan``'s: loaded, else trained or resumed.

    Args:
        vqgan: trained autoencoder; it is not changed.
        train, preset, folder, seed, device, validation, stop_after: as in :func:`difr3ct_core.stages.train_vqgan`;
            the settings are ``preset.train_decoder``.
        others: further volumes in [-1, 1], such as :func:`difr3ct_core.deformation.deformed_copies` of a real CT.
        others_share: of the volumes of all steps, those that are of ``others``, if there are any.
        history: the trainings behind ``vqgan`` (:func:`difr3ct_core.weights.training_history`), for the file to tell.

    Raises:
        InputError: ``vqgan`` has another shape than the preset's, or the share is none.
    """
    if vqgan.preset != preset.vqgan:
        raise InputError("vqgan: has another shape than the preset's autoencoder; take the preset it was trained with.")
    if not 0 <= others_share < 1:
        raise InputError(f"others_share: found {others_share:g}, expected a share from 0 to below 1.")
    folder = Path(folder)
    path, settings = folder / "weights.safetensors", preset.train_decoder
    fingerprint: dict[str, Any] = {
        **_common(preset, train, seed),
        "kind": "decoder",
        "training": _numbers(settings),
        "autoencoder": state_digest(vqgan),
        "square_weight": SQUARE_WEIGHT,
    }
    if others is not None:
        if others.ndim != 5 or tuple(others.shape[1:]) != (1, *preset.volume.shape) or not len(others):
            raise InputError(
                f"others: found shape {tuple(others.shape)}, expected (n, 1, z, y, x) on the preset's grid."
            )
        fingerprint["others"] = [len(others), others_share, float(others.double().sum())]
    if _finished(path, fingerprint):
        return load_vqgan(path, device)[0]
    model = copy.deepcopy(vqgan).to(device).eval()
    _prepare([model.decoder], settings)
    volumes = [train.unit(), *([] if others is None else [others])]
    codes = [_codes(model, some, device) for some in volumes]

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch_index(len(train), settings.batch_size, step, seed)
        other = torch.zeros(len(rows), dtype=torch.bool)
        if others is not None:
            other = torch.rand(len(rows), generator=generator) < others_share
            rows = torch.where(other, torch.randint(len(others), (len(rows),), generator=generator), rows)
        rows, other = rows[part], other[part].long()
        code = torch.stack([codes[k][i] for k, i in zip(other, rows, strict=True)]).to(device)
        truth = torch.stack([volumes[k][i] for k, i in zip(other, rows, strict=True)]).to(device)
        error = (model.decoder(code) - truth).float()
        l1, square = error.abs().mean(), error.square().mean()
        return l1 + SQUARE_WEIGHT * square, {"l1": l1.detach(), "square": square.detach()}

    truth = None if validation is None else validation.unit()
    known = None if truth is None else _codes(model, truth, device)

    def validate(average: nn.Module) -> dict[str, float]:
        assert truth is not None and known is not None
        with torch.no_grad():
            decoded = torch.cat([average(some.to(device)).clamp(-1, 1).cpu() for some in known.split(4)])
        return {"val_psnr": float(psnr(decoded, truth, 2.0).mean())}

    best = fit(
        model.decoder, loss_of_step, settings, folder, fingerprint, "training decoder", seed,
        validate if validation is not None else None, stop_after,
    )  # fmt: skip
    model.decoder.load_state_dict(best.state_dict())
    model.latents_of = latents_digest(vqgan)
    if stop_after is None and processes.rank() == 0:
        metadata = {
            "kind": "vqgan",
            "preset": preset.to_dict(),
            "perceptual": False,
            "latents_of": model.latents_of,
            "fingerprint": fingerprint,
            "settings": {"training": dataclasses.asdict(settings)},
            "provenance": provenance(preset.name, seed, device, seconds_trained(folder)),
        }
        metadata["history"] = [*(history or []), *training_history(metadata)]
        write_safetensors(path, model.state_dict(), metadata)
    return model.eval()


@torch.no_grad()
def _codes(vqgan: VQGAN, volumes: Float[Tensor, "n 1 Z Y X"], device: str | torch.device) -> Float[Tensor, "n d z y x"]:
    """What the decoder is given: the nearest codes, on the CPU."""
    return torch.cat([vqgan.codebook(vqgan.encoder(some.to(device)))[0].cpu() for some in volumes.split(8)])
