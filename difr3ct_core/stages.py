"""The two stages, "load or train": the autoencoder, then the diffusion model in its latents.

:func:`train_vqgan` and :func:`train_ldm` return the finished model of a folder if it is there and was made with the
same numbers, resume it if it is half done, and train it otherwise: the same cell of a notebook serves a laptop and a
server. A finished model is ``weights.safetensors`` in the run's folder, with preset, HU window, spacing, latent scale
and views inside; the file of a diffusion model holds its autoencoder too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import processes
from .checkpoints import differences, load_state, seconds_trained
from .datasets import Patients, batch_index
from .diffusion import LatentDiffusion, diffusion_loss
from .files import InputError, alone_in, read_safetensors, write_safetensors
from .geometry import views_to_json
from .initial import initial_latent, usual_misfit
from .latents import data_digest, encoded, guessed
from .metrics import psnr
from .presets import VIEW_SETS, Preset, TrainPreset
from .results import provenance
from .training import Opponent, fit
from .vqgan import VQGAN
from .vqgan_losses import Critics, Perceptual
from .weights import latents_digest, load_initial, load_ldm, load_vqgan, state_digest, training_history

#: Settings of a training that do not decide its result (but for the rounding of sums).
MANNER = (
    "log_every",
    "checkpoint_every_s",
    "validate_every",
    "accumulate",
    "checkpointing",
    "compile",
    "channels_last",
)


def _numbers(settings: TrainPreset) -> dict[str, Any]:
    """What of a training's settings decides its result."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in MANNER}


def _critics(preset: Preset, vgg16: str | Path | None, device: str | torch.device) -> Critics | None:
    """The judges of Eq. 12-14, or None where the preset leaves all of their terms out."""
    p = preset.vqgan
    if not any((p.perceptual_weight, p.image_gan_weight, p.volume_gan_weight)):
        return None
    look = Perceptual(vgg16).to(device) if vgg16 is not None and p.perceptual_weight > 0 else None
    return Critics(p, look).to(device)


def with_settings(preset: Preset, section: str, words: Sequence[str]) -> Preset:
    """``preset`` with fields changed by words: ``accumulate=4``, or ``initial.iterations=60`` of another section.

    Args:
        preset: what to start from.
        section: of words without a dot.
        words: NAME=VALUE or SECTION.NAME=VALUE.

    Raises:
        InputError: no such field, or a value of the wrong type.
    """
    changed = preset.to_dict()
    for word in words:
        name, equals, value = word.partition("=")
        where, dot, field = name.rpartition(".")
        where, field = (where, field) if dot else (section, name)
        fields = changed.get(where)
        if not equals or not isinstance(fields, dict) or field not in fields:
            known = ", ".join(sorted(changed[section]))
            raise InputError(
                f"{section}: found {word!r}, expected NAME=VALUE with a name of {known}; or SECTION.NAME=VALUE."
            )
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return Preset.from_dict(changed)


def _prepare(networks: list[nn.Module], settings: TrainPreset) -> None:
    """Set memory layout, checkpointing and compilation of the 3D networks as the preset says."""
    for network in networks:
        if settings.channels_last:
            network.to(memory_format=torch.channels_last_3d)
        network.checkpointing = settings.checkpointing
        if settings.compile:
            network.compile()


def _finished(path: Path, fingerprint: dict[str, Any]) -> bool:
    """Is there a finished model made with these numbers? One made with others is set aside, never overwritten."""
    with processes.first_alone():
        return _look(path, fingerprint)


def _look(path: Path, fingerprint: dict[str, Any]) -> bool:
    folder = path.parent
    for existing in (path, folder / "checkpoint.safetensors"):
        if existing.exists():
            _, metadata = read_safetensors(existing)
            found = metadata.get("fingerprint")
            if existing == path and isinstance(found, dict):
                # To use a finished model it does not matter what its training began with, or saw besides.
                free = {"start", "initial_network", "others"} - set(fingerprint)
                found = {name: value for name, value in found.items() if name not in free}
            if found == json.loads(json.dumps(fingerprint)):
                if existing == path:
                    return True
                continue
            number = 1
            while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
                number += 1
            with alone_in(folder, "the other training"):  # never from under a run
                folder.rename(aside)
            changed = differences(found, fingerprint)
            print(f"{folder}: the run there was made with other numbers ({changed}); moved to {aside.name}.")
            return False
    return False


def _common(preset: Preset, train: Patients, seed: int) -> dict[str, Any]:
    return {
        "volume": dataclasses.asdict(preset.volume),
        "vqgan": dataclasses.asdict(preset.vqgan),
        "data": data_digest(train),
        "n_train": len(train),
        "seed": seed,
    }


def _seen(preset: Preset, train: Patients, vqgan: VQGAN, any_view: bool) -> dict[str, Any]:
    """What the stages behind the autoencoder have in common: x-rays, their views, and the latents."""
    return {
        "initial": dataclasses.asdict(preset.initial),
        "xray": dataclasses.asdict(preset.xray),
        "views": views_to_json(train.views),
        "autoencoder": latents_digest(vqgan),
        **({"detectors": train.detectors} if train.detectors else {}),
        **({"any_view": dataclasses.asdict(preset.any_view)} if any_view else {}),
    }


def train_vqgan(
    train: Patients,
    preset: Preset,
    folder: str | Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    validation: Patients | None = None,
    stop_after: int | None = None,
    vgg16: str | Path | None = None,
) -> VQGAN:
    """The autoencoder of ``folder``: loaded if finished, else trained (§III-B), else resumed.

    Args:
        train: training patients.
        preset: sizes and settings.
        folder: of the run.
        seed: of initial weights, batches and restarts of codes.
        device: where to train.
        validation: patients whose mean PSNR (window peak, dB) is logged as ``val_psnr``.
        stop_after: see :func:`fit`; the model returned is then unfinished.
        vgg16: weights of the perceptual loss (``data_scripts/fetch_vgg16.py``); None leaves the term out, and says so.
    """
    folder = Path(folder)
    path = folder / "weights.safetensors"
    settings = preset.train_vqgan
    fingerprint = {**_common(preset, train, seed), "kind": "vqgan", "training": _numbers(settings)}
    if preset.vqgan.perceptual_weight > 0:
        fingerprint["perceptual"] = vgg16 is not None
    if _finished(path, fingerprint):
        return load_vqgan(path, device)[0]
    if settings.crop < 0 or settings.crop > preset.volume.size or settings.crop % 2**preset.vqgan.levels:
        raise InputError(
            f"train_vqgan.crop: found {settings.crop}, expected 0 or a multiple of {2**preset.vqgan.levels} up to the "
            f"volume's {preset.volume.size} voxels."
        )
    torch.manual_seed(seed)
    model = VQGAN(preset.vqgan).to(device)
    _prepare([model.encoder, model.decoder], settings)
    critics = _critics(preset, vgg16, device)
    without = preset.vqgan.perceptual_weight > 0 and vgg16 is None
    if without and processes.rank() == 0:
        print("training VQGAN: the perceptual loss is off, VGG16 is missing; data_scripts/fetch_vgg16.py brings it.")

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch_index(len(train), settings.batch_size, step, seed)[part]
        volumes = train.unit(rows)
        if settings.crop:
            corners = torch.randint(
                preset.volume.size - settings.crop + 1, (settings.batch_size, 3), generator=generator
            )[part]
            volumes = crops(volumes, corners, settings.crop)
        if critics is None:
            return model.loss(volumes.to(device), generator)
        slices = torch.randint(volumes.shape[2], (settings.batch_size,), generator=generator)[part]
        return model.loss(volumes.to(device), generator, lambda real, fake: critics.judge(real, fake, step, slices))

    def validate(average: nn.Module) -> dict[str, float]:
        assert validation is not None
        truth = validation.unit()
        with torch.no_grad():
            decoded = torch.cat([average(volume.to(device))[0].clamp(-1, 1).cpu() for volume in truth.split(4)])
        return {"val_psnr": float(psnr(decoded, truth, 2.0).mean()), "live_codes": average.live_codes()}  # type: ignore[operator]

    best = fit(
        model, loss_of_step, settings, folder, fingerprint, "training VQGAN", seed,
        validate if validation is not None else None, stop_after,
        None if critics is None else Opponent(critics, critics.loss),
    )  # fmt: skip
    assert isinstance(best, VQGAN)
    if stop_after is not None:
        return best
    best.fit_latent_scale([train.unit(slice(i, i + 8)).to(device) for i in range(0, min(len(train), 128), 8)])
    if processes.rank() == 0:
        write_safetensors(
            path,
            best.state_dict(),
            {
                "kind": "vqgan",
                "preset": preset.to_dict(),
                "perceptual": preset.vqgan.perceptual_weight > 0 and not without,
                "fingerprint": fingerprint,
                "provenance": provenance(preset.name, seed, device, seconds_trained(folder)),
            },
        )
    return best


def crops(
    volumes: Float[Tensor, "b 1 Z Y X"], corners: Int[Tensor, "b 3"], edge: int
) -> Float[Tensor, "b 1 edge edge edge"]:
    """One cube of each volume, from its first corner (z, y, x)."""
    parts = [
        volume[:, z : z + edge, y : y + edge, x : x + edge]
        for volume, (z, y, x) in zip(volumes, corners.tolist(), strict=True)
    ]
    return torch.stack(parts)


def fan_angles(preset: Preset) -> tuple[float, ...]:
    """Angles in degrees at which the any-view model sees x-rays in training: even over half a turn, from lateral on."""
    return tuple(180.0 * i / preset.any_view.fan for i in range(preset.any_view.fan))


def draw_views(preset: Preset, generator: torch.Generator) -> list[int]:
    """The views of one training step of the any-view model: positions in :func:`fan_angles`, in rising order.

    With probability ``paper_share`` one of the paper's sets, so that these are learned best; else a number of views
    from 1 to ``most`` and then so many angles, both evenly.
    """
    p, angles = preset.any_view, fan_angles(preset)
    if float(torch.rand((), generator=generator)) < p.paper_share:
        names = list(VIEW_SETS)
        chosen = VIEW_SETS[names[int(torch.randint(len(names), (), generator=generator))]]
        return [angles.index(angle) for angle in chosen]
    count = int(torch.randint(1, p.most + 1, (), generator=generator))
    return sorted(torch.randperm(p.fan, generator=generator)[:count].tolist())


def _beginning(start: str | Path, autoencoder: str) -> tuple[LatentDiffusion, list[dict[str, Any]]]:
    """The model in ``start``, if it lives in the latents of the same autoencoder, and how it was trained."""
    model, vqgan, _, metadata = load_ldm(start)
    if latents_digest(vqgan) != autoencoder:
        raise InputError(f"{start}: was trained with another autoencoder; start from weights of this run's.")
    return model, training_history(metadata)


def _validation_loss(
    sets: Sequence[Patients], vqgan: VQGAN, device: str | torch.device, patients: int = 16, rounds: int = 2
) -> Callable[[nn.Module], dict[str, float]]:
    """Eq. 15 on patients that train nothing, at the same steps and noise every time: the mean over sets of views.

    Of few patients and steps, because on a CPU a look at all of them takes as long as dozens of training steps.
    """
    sets = [some.take(range(min(patients, len(some)))) for some in sets]
    latents = torch.cat([vqgan.encode(part.to(device)) for part in sets[0].unit().split(8)])
    first: dict[int, Tensor | None] = {}

    @torch.no_grad()
    def validate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, LatentDiffusion)
        total = 0.0
        for number, some in enumerate(sets):
            xrays = some.xrays.to(device)
            if number not in first:
                first[number] = initial_latent(model, vqgan, xrays, some.views)
            condition = model.condition(xrays, some.views, first[number])
            generator = torch.Generator().manual_seed(number)
            for _ in range(rounds):
                total += float(diffusion_loss(model.unet, model.schedule, latents, condition, 0.0, generator))
        return {"val_loss": total / len(sets) / rounds}

    return validate


def _renew_decoder(path: Path, vqgan: VQGAN) -> None:
    """Let a finished model's file, which holds its autoencoder, take that one's new decoder."""
    if processes.rank() == 0 and state_digest(load_ldm(path)[1]) != state_digest(vqgan):
        tensors, metadata = read_safetensors(path)
        tensors |= {f"vqgan.{k}": v for k, v in vqgan.state_dict().items()}
        write_safetensors(path, tensors, {**metadata, "latents_of": latents_digest(vqgan)})


def train_ldm(
    train: Patients,
    vqgan: VQGAN,
    preset: Preset,
    folder: str | Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    stop_after: int | None = None,
    any_view: bool = False,
    validation: Patients | None = None,
    start: str | Path | None = None,
    network: str | Path | None = None,
) -> LatentDiffusion:
    """The diffusion model of ``folder`` for the views of ``train``: loaded if finished, else trained or resumed.

    The finished file holds the autoencoder too, so that it is all that a reconstruction needs.

    Args:
        train: training patients with the x-rays of one set of views (:meth:`Patients.with_views`).
        vqgan: trained autoencoder.
        preset, folder, seed, device, stop_after: as in :func:`train_vqgan`.
        any_view: beyond the paper, one model for 1 to ``preset.any_view.most`` views at any angles: every step sees
            the x-rays of other views (:func:`draw_views`). The x-rays in ``train`` are then not used.
        validation: patients with all views; their loss at noise that never changes is logged as ``val_loss``.
        start: weights of another diffusion model on the same autoencoder to begin with (fine-tuning), such as the
            any-view model for one set of views; by default random weights.
        network: for a preset with an initial network, the folder of
            :func:`difr3ct_core.stage_initial.train_initial`, or weights of a model that holds one; by default that of
            ``start``. It becomes a part of the model and is not trained further.

    Raises:
        InputError: ``start`` is of another shape or autoencoder, or the preset wants an initial network and there is
            none.
    """
    if any_view:
        train = train.at_angles(fan_angles(preset), preset.xray, device=device)
    folder = Path(folder)
    path = folder / "weights.safetensors"
    settings = preset.train_ldm
    fingerprint = {
        **_common(preset, train, seed),
        "kind": "ldm",
        "training": _numbers(settings),
        "fusion": dataclasses.asdict(preset.fusion),
        "unet": dataclasses.asdict(preset.unet),
        "diffusion": dataclasses.asdict(preset.diffusion),
        **_seen(preset, train, vqgan, any_view),
    }
    beginning, first, others, history = None, None, None, []
    if start is not None:
        beginning, history = _beginning(start, fingerprint["autoencoder"])
        fingerprint["start"] = state_digest(beginning)
        first = beginning.initial_network
    if network is not None:
        before = None if first is None else state_digest(first)
        first, _, metadata = load_initial(network)
        # What a refinement learned from beside phantoms (a finished model that holds one says it itself).
        others = metadata.get("initial_others") or metadata.get("fingerprint", {}).get("others")
        if state_digest(first) != before:  # else its training is told already
            history = [*history, *training_history(metadata)]
    if first is not None:
        fingerprint["initial_network"] = state_digest(first)
    if _finished(path, fingerprint):
        _renew_decoder(path, vqgan)
        return load_ldm(path, device)[0]
    if preset.initial.network != (first is not None):
        raise InputError(
            f"network: {'given' if first else 'missing'}, but initial.network of preset {preset.name!r} is "
            f"{str(preset.initial.network).lower()}; pass the folder of train_initial if and only if it is true."
        )
    torch.manual_seed(seed)
    model = LatentDiffusion(preset).to(device)
    if first is not None and model.initial_network is not None:
        load_state(model.initial_network, first.state_dict(), Path(str(network or start)))
    if beginning is not None:
        # The initial network, if the beginning has one, may be an older one.
        old = {k: v for k, v in beginning.state_dict().items() if not k.startswith("initial_network.")}
        new = {k: v for k, v in model.state_dict().items() if k.startswith("initial_network.")}
        load_state(model, old | new, Path(str(start)))
    _prepare([model.unet], settings)
    vqgan = vqgan.to(device).eval()
    latents = encoded(train, vqgan, folder.parent / "latents").to(device)
    # Where the x-rays are always the same, they are solved once.
    initial = None
    if not any_view and preset.has_initial:
        initial = guessed(train, vqgan, model, folder.parent / "latents", device)

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch_index(len(train), settings.batch_size, step, seed)
        rows = batch[part]
        pick = draw_views(preset, generator) if any_view else range(len(train.views))
        xrays, views = train.xrays[rows][:, list(pick)], [train.views[i] for i in pick]
        xrays, at = xrays.to(device), rows.to(latents.device)
        known = initial_latent(model, vqgan, xrays, views) if initial is None else initial[at]
        return model.loss(latents[at], xrays, views, generator, part, len(batch), known)

    validate = None
    if validation is not None:
        sets = (
            [validation.with_views(name) for name in VIEW_SETS]
            if any_view
            else [validation.take_angles([view.angle_deg for view in train.views])]
        )
        validate = _validation_loss(sets, vqgan, device)
    label = f"training {'any' if any_view else len(train.views)}-view LDM"
    best = fit(model, loss_of_step, settings, folder, fingerprint, label, seed, validate, stop_after)
    assert isinstance(best, LatentDiffusion)
    if stop_after is None and processes.rank() == 0:
        tensors = {f"ldm.{k}": v for k, v in best.state_dict().items()}
        tensors |= {f"vqgan.{k}": v for k, v in vqgan.state_dict().items()}
        if validation is not None and preset.initial.in_voxels and not any_view:
            preset = preset.replace(sampling={"usual_misfit": usual_misfit(best, vqgan, sets[0], device)})
        metadata = {
            "kind": "ldm",
            "preset": preset.to_dict(),
            "views": views_to_json(train.views),
            **({"any_view_most": preset.any_view.most} if any_view else {}),
            **({"latents_of": vqgan.latents_of} if vqgan.latents_of else {}),
            **({"initial_others": others} if others else {}),
            "fingerprint": fingerprint,
            "provenance": provenance(preset.name, seed, device, seconds_trained(folder)),
        }
        metadata["history"] = [*history, *training_history(metadata)]
        write_safetensors(path, tensors, metadata)
    return best
