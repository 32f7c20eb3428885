"""The stage between autoencoder and diffusion model: "load or train" of the initial network. Beyond the paper.

It needs the latents of the training set and the x-rays, nothing else; a model of the same run reads the result
(:func:`difr3ct_core.stages.train_ldm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import processes
from .checkpoints import load_state, seconds_trained
from .datasets import Patients, batch_index
from .files import InputError, write_safetensors
from .geometry import views_to_json
from .initial import solved_latent
from .initial_network import InitialNetwork, build_initial
from .initial_volume import InitialVolume
from .latents import data_digest, doubted, encoded, solved, unrefined
from .presets import VIEW_SETS, Preset
from .results import provenance
from .stages import _common, _finished, _numbers, _prepare, _seen, draw_views, fan_angles
from .training import fit
from .vqgan import VQGAN
from .weights import load_initial, state_digest, training_history


def train_initial(
    train: Patients,
    vqgan: VQGAN,
    preset: Preset,
    folder: str | Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    stop_after: int | None = None,
    any_view: bool = False,
    validation: Patients | None = None,
    start: InitialNetwork | InitialVolume | None = None,
    history: Sequence[dict[str, Any]] = (),
    others: Patients | None = None,
) -> InitialNetwork | InitialVolume:
    """The initial network of ``folder`` for the views of ``train``: loaded if finished, else trained or resumed.

    It is asked for the scaled latents of the training volumes, or in voxels (``initial.in_voxels``) for the volumes
    themselves, and judged by the mean square of the difference.

    Args:
        train, vqgan, preset, folder, seed, device, stop_after, any_view, validation: as in
            :func:`difr3ct_core.stages.train_ldm`; the loss of ``validation`` is logged as ``val_loss``.
        start: a network of the same preset to begin with; by default random weights. Where the preset refines a guess
            (``initial.refine_widths``), that guess is the one of ``start``, and the refinement alone is trained: best
            on patients that the guess was not trained with, whose errors are not those of patients it never saw.
        history: the trainings that led to ``start``, for the record
            (:func:`difr3ct_core.weights.training_history`).
        others: further patients with x-rays of the same views, such as deformed copies of a real CT or variations of
            phantoms, that a network in voxels learns from.

    Raises:
        InputError: the preset has no initial network, ``start`` is of another shape, there is no guess to refine,
            further patients that this network cannot learn from, or a preset with a second network.
    """
    if not preset.initial.network:
        raise InputError(f"initial.network: is false in preset {preset.name!r}; set it to true to train one.")
    if preset.initial.second_from:
        raise InputError(
            f"initial.second_from: found {preset.initial.second_from:g} in preset {preset.name!r}, expected 0; train "
            "the two networks apart and put them together with difr3ct_core.weights.join_second."
        )
    if any_view:
        train = train.at_angles(fan_angles(preset), preset.xray, device=device)
    folder = Path(folder)
    path = folder / "weights.safetensors"
    settings = preset.train_initial
    fingerprint = {
        **_common(preset, train, seed),
        "kind": "initial",
        "training": _numbers(settings),
        **_seen(preset, train, vqgan, any_view),
    }
    if start is not None:
        fingerprint["start"] = state_digest(start)
    strange = round(preset.initial.doubted * len(train))  # patients that a refinement also sees with a wrong guess
    if others is not None:
        if not preset.initial.in_voxels or any_view:
            raise InputError(
                "others: found further patients, but what learns from them is an initial network in voxels "
                "(initial.in_voxels) for one set of views; leave out --scan and initial.varied."
            )
        share = round(len(others) / (len(train) + strange + len(others)), 3)
        fingerprint["others"] = [len(others), share, data_digest(others)]
    if _finished(path, fingerprint):
        return load_initial(path, device)[0]
    torch.manual_seed(seed)
    model = build_initial(preset).to(device)
    refines = isinstance(model, InitialVolume) and model.refinement is not None
    if refines:
        _take_guess(model, start, path)
        _prepare([model.refinement], settings)
    elif isinstance(start, InitialVolume) and isinstance(model, InitialVolume):  # a refinement is of that guess alone
        load_state(model.field, start.field.state_dict(), path)
    elif start is not None:
        load_state(model, start.state_dict(), path)
    vqgan = vqgan.to(device).eval()
    in_voxels = preset.initial.in_voxels
    latents = None if in_voxels else encoded(train, vqgan, folder.parent / "latents").to(device)
    # Where the x-rays are always the same, they are solved once.
    solutions = None if any_view else solved(train, vqgan, preset, folder.parent / "latents", device)
    guesses = None
    if isinstance(model, InitialVolume) and refines and not any_view:
        cache = folder.parent / "latents"
        guesses = unrefined(train, vqgan, model, cache, device)
        if strange:
            strangers = train.take(range(strange))
            wrong = doubted(strangers, vqgan, model, cache, seed, device)
            guesses, train = torch.cat([guesses, wrong]), train.joined(strangers)
        if others is not None:
            guesses = torch.cat([guesses, unrefined(others, vqgan, model, cache, device)])
    train = train if others is None else train.joined(others)

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch_index(len(train), settings.batch_size, step, seed)[part]
        pick = draw_views(preset, generator) if any_view else list(range(len(train.views)))
        views = [train.views[i] for i in pick]
        xrays = train.xrays[rows][:, pick].to(device)
        if latents is None:
            truth = train.unit(rows).to(device)
            seen = {} if guesses is None else {"unrefined": guesses[rows.to(guesses.device)].float()}
            return model.loss(xrays, views, truth, generator, part, settings.batch_size, **seen), {}
        at = rows.to(latents.device)
        known = solved_latent(vqgan, xrays, views, preset) if solutions is None else solutions[at]
        return (model(xrays, views, known) - latents[at]).square().mean(), {}

    validate = None
    if validation is not None:
        names = list(VIEW_SETS) if any_view else []
        sets = [validation.with_views(name) for name in names] or [
            validation.take_angles([view.angle_deg for view in train.views])
        ]
        validate = _validation(sets, vqgan, preset, device)
    label = f"training {'any' if any_view else len(train.views)}-view initial network"
    best = fit(model, loss_of_step, settings, folder, fingerprint, label, seed, validate, stop_after)
    assert isinstance(best, InitialNetwork | InitialVolume)
    if stop_after is None and processes.rank() == 0:
        metadata = {
            "kind": "initial",
            "preset": preset.to_dict(),
            "views": views_to_json(train.views),
            "fingerprint": fingerprint,
            "provenance": provenance(preset.name, seed, device, seconds_trained(folder)),
        }
        if history:
            metadata["history"] = [*history, *training_history(metadata)]
        write_safetensors(path, best.state_dict(), metadata)
    return best


def _take_guess(model: InitialVolume, start: nn.Module | None, path: Path) -> None:
    """Give a model the network whose guess it refines, and the refinement of ``start`` if that has one."""
    if not isinstance(start, InitialVolume):
        raise InputError(
            "initial.refine_widths: there is no guess to refine; pass an initial network in voxels, or an INRR3CT."
        )
    load_state(model.field, start.field.state_dict(), path)
    model.field.requires_grad_(False)
    if start.refinement is not None and model.refinement is not None:
        load_state(model.refinement, start.refinement.state_dict(), path)


def _validation(
    sets: Sequence[Patients], vqgan: VQGAN, preset: Preset, device: str | torch.device, patients: int = 16
) -> Callable[[nn.Module], dict[str, float]]:
    """The loss on patients that train nothing, the mean over sets of views."""
    sets = [some.take(range(min(patients, len(some)))) for some in sets]
    truth = sets[0].unit().to(device)
    latents = torch.cat([vqgan.encode(part) for part in truth.split(8)])
    solutions: dict[int, Tensor | None] = {}

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        total = 0.0
        for number, some in enumerate(sets):
            xrays = some.xrays.to(device)
            if isinstance(model, InitialVolume):
                total += float((model(xrays, some.views) - truth).square().mean())
                continue
            if number not in solutions:
                solutions[number] = solved_latent(vqgan, xrays, some.views, preset)
            total += float((model(xrays, some.views, solutions[number]) - latents).square().mean())
        return {"val_loss": total / len(sets)}

    return validate
