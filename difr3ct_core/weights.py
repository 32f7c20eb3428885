"""Weights on disk: finished models read back, and made small for shipping.

The file of a finished model, ``weights.safetensors``, holds preset, HU window, spacing, latent scale and views beside
the weights; that of a diffusion model holds its autoencoder too, so that it is all that a reconstruction needs. Of the
files that ship several share an autoencoder, so it lies beside them, and they name it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import load_state
from .diffusion import LatentDiffusion
from .files import InputError, read_safetensors, write_safetensors
from .initial_network import InitialNetwork, build_initial
from .initial_volume import USUAL, InitialVolume
from .presets import Preset
from .vqgan import VQGAN


def weights_file(path: str | Path) -> Path:
    """The file of weights that ``path`` is or, if it is a run's folder, holds."""
    path = Path(path)
    return path / "weights.safetensors" if path.is_dir() else path


def load_vqgan(path: str | Path, device: str | torch.device = "cpu") -> tuple[VQGAN, Preset]:
    """A finished autoencoder and its preset.

    Args:
        path: ``weights.safetensors`` of a run, or the run's folder.

    Raises:
        InputError: not the weights of a VQGAN, truncated, or of another version.
    """
    path, tensors, preset, metadata = _read_weights(path, "vqgan", ("preset",))
    model = VQGAN(preset.vqgan)
    load_state(model, tensors, path)
    model.latents_of = metadata.get("latents_of")
    return model.to(device).eval(), preset


def _read_weights(
    path: str | Path, kind: str, required: tuple[str, ...]
) -> tuple[Path, dict[str, Tensor], Preset, dict[str, Any]]:
    """The file, its tensors, its preset and all its metadata."""
    path = weights_file(path)
    if not path.exists() and (path.parent / "checkpoint.safetensors").exists():
        raise InputError(f"{path}: no such file, but a checkpoint; the training is not finished, run it again.")
    tensors, metadata = read_safetensors(path)
    if metadata.get("kind") != kind:
        raise InputError(
            f"{path}: found weights of kind {metadata.get('kind')!r}, expected {kind!r}, the file that train_{kind} "
            "writes."
        )
    if missing := [name for name in required if name not in metadata]:
        raise InputError(f"{path}: its metadata lack {missing}, expected the file that train_{kind} writes.")
    try:
        return path, tensors, Preset.from_dict(metadata["preset"]), metadata
    except InputError as error:
        raise InputError(f"{path}: {error} It may be of another version; train again.") from error


def load_ldm(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[LatentDiffusion, VQGAN, Preset, dict[str, Any]]:
    """A finished diffusion model, its autoencoder, its preset, and the metadata of the file (views, provenance).

    Args:
        path: ``weights.safetensors`` of a run, or the run's folder.

    Raises:
        InputError: not the weights of a diffusion model, truncated, or of another version; or the autoencoder that it
            names does not lie beside it.
    """
    path, tensors, preset, metadata = _read_weights(path, "ldm", ("preset", "views"))
    model, vqgan = LatentDiffusion(preset), VQGAN(preset.vqgan)
    load_state(model, {k.removeprefix("ldm."): v for k, v in tensors.items() if k.startswith("ldm.")}, path)
    if "autoencoder" in metadata:
        vqgan = _beside(path, metadata["autoencoder"])
    else:
        load_state(vqgan, {k.removeprefix("vqgan."): v for k, v in tensors.items() if k.startswith("vqgan.")}, path)
        vqgan.latents_of = metadata.get("latents_of")
    return model.to(device).eval(), vqgan.to(device).eval(), preset, metadata


def _beside(path: Path, named: Any) -> VQGAN:
    """The autoencoder that lies beside ``path``, if it is the one that was ``named``."""
    if not isinstance(named, dict) or set(named) != {"file", "digest"} or Path(named["file"]).name != named["file"]:
        raise InputError(f"{path}: found {named!r}, expected file and digest of its autoencoder; fetch it again.")
    other = path.with_name(named["file"])
    if not other.exists():
        raise InputError(f"{other}: no such file, but {path.name} needs it beside it; keep the two together.")
    vqgan = load_vqgan(other)[0]
    if latents_digest(vqgan) != named["digest"]:
        raise InputError(f"{other}: is not the autoencoder that {path.name} was trained with; take both together.")
    return vqgan


def load_initial(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[InitialNetwork | InitialVolume, Preset, dict[str, Any]]:
    """A finished initial network, its preset and the metadata of its file.

    Args:
        path: ``weights.safetensors`` of its run, the run's folder, or a diffusion model that holds one; or a trained
            INRR3CT (:mod:`difr3ct_core.baselines`), which is such a network in voxels.

    Raises:
        InputError: neither, or truncated, or of another version.
    """
    path = Path(path)
    kind = read_safetensors(weights_file(path))[1].get("kind")
    if kind == "inrr3ct":
        path, tensors, preset, metadata = _read_weights(path, kind, ("preset", "settings"))
        preset = preset.replace(initial=_like_inrr3ct(metadata["settings"]))
    elif kind == "ldm":
        model, _, preset, metadata = load_ldm(path, device)
        if model.initial_network is None:
            raise InputError(f"{path}: holds a diffusion model without an initial network, expected one with it.")
        return model.initial_network, preset, metadata
    else:
        path, tensors, preset, metadata = _read_weights(path, "initial", ("preset",))
    network = build_initial(preset)
    load_state(network, tensors, path)
    return network.to(device).eval(), preset, metadata


def _like_inrr3ct(settings: dict[str, Any]) -> dict[str, Any]:
    """The section ``initial`` of a preset whose network is the INRR3CT with these settings."""
    same = ("points", "width", "view_layers", "joint_layers", "octaves", "omega")
    unet = settings["unet"]
    sizes = {"widths": tuple(unet["widths"]), "features": unet["out_channels"]}
    return {"solver": "none", "network": True, "in_voxels": True, **sizes, **{name: settings[name] for name in same}}


def training_history(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """All trainings that led to a model, oldest first: what it began from, its initial network, itself.

    Each with ``kind``, ``steps``, ``batch_size``, ``wall_s`` and ``peak_memory_gb``. Of models from before this was
    written down, their own training alone.
    """
    if "history" in metadata:
        return metadata["history"]
    kind, origin = metadata["kind"], metadata["provenance"]
    training = metadata["settings"]["training"] if "settings" in metadata else metadata["preset"][f"train_{kind}"]
    peak = origin.get("peak_gpu_gb", origin["peak_memory_gb"])
    return [{"kind": kind, **{name: training[name] for name in ("steps", "batch_size")},
             "wall_s": origin["wall_s"], "peak_memory_gb": peak}]  # fmt: skip


def join_second(run: str | Path, second: str | Path, path: str | Path, passes: int = 1) -> None:
    """Write a diffusion model with a second initial network for patients whose guess misses their x-rays.

    Args:
        run: the diffusion model, whose own initial network is in voxels and refined.
        second: an initial network of the same widths (:func:`load_initial`), such as one that learned from variations
            of phantoms; it sees patients whose guess misses by more than ``initial_volume.USUAL``.
        path: the file to write.
        passes: how often refinement and move of the second are repeated.

    Raises:
        InputError: networks that do not fit together.
    """
    tensors, metadata = read_safetensors(weights_file(Path(run)))
    first, other = load_initial(run)[0], load_initial(second)
    prefix = "ldm.initial_network."
    if not (isinstance(first, InitialVolume) and first.refinement is not None and first.second is None):
        raise InputError(f"{run}: expected a refined initial network in voxels, without a second one.")
    metadata["preset"]["initial"] |= {"second_from": USUAL, "second_passes": passes}
    inner = InitialVolume(Preset.from_dict(metadata["preset"])).second
    assert inner is not None
    load_state(inner, other[0].state_dict(), Path(second))
    stored = next(value.dtype for name, value in tensors.items() if name.startswith(prefix))
    tensors |= {f"{prefix}second.{name}": value.to(stored) for name, value in inner.state_dict().items()}
    known = training_history(metadata)
    history = [h for h in training_history(other[2]) if h["kind"] != "ldm" and h not in known]
    n_train, device = other[2]["fingerprint"]["n_train"], other[2]["provenance"]["device"]
    others = other[2].get("initial_others") or other[2]["fingerprint"].get("others")
    origin = {"history": history, "n_train": n_train, "others": others, "device": device}
    write_safetensors(path, tensors, {**metadata, "second": origin})


def export_weights(
    run: str | Path, path: str | Path, dtype: torch.dtype = torch.bfloat16, autoencoder: str | Path | None = None
) -> int:
    """Write a half-precision copy of finished weights, for shipping; returns its size in bytes.

    Codebook and latent scale stay in full precision: two codes that round to one would be a code less, and the
    scale is a handful of numbers that everything is multiplied by. Both loaders read the copy like the original.

    Args:
        run: folder of a finished run, or its ``weights.safetensors``.
        path: the file to write.
        dtype: bfloat16 or float16.
        autoencoder: an exported autoencoder in the same folder; a diffusion model that was trained with it then names
            it instead of holding it. One that was trained with another holds its own all the same.
    """
    run = Path(run)
    tensors, metadata = read_safetensors(weights_file(run))
    kept = ("codebook", "latent_scale", "latent_shift")
    small = {
        k: v if not v.is_floating_point() or any(name in k for name in kept) else v.to(dtype)
        for k, v in tensors.items()
    }
    write_safetensors(path, small, {**metadata, "stored_as": str(dtype).removeprefix("torch.")})
    if autoencoder is not None and metadata["kind"] == "ldm":
        digest = latents_digest(load_vqgan(autoencoder)[0])
        # The name of the latents may be of before the rounding or of after it.
        if digest in (latents_digest(load_ldm(run)[1]), latents_digest(load_ldm(path)[1])):
            small = {k: v for k, v in small.items() if not k.startswith("vqgan.")}
            metadata["autoencoder"] = {"file": Path(autoencoder).name, "digest": digest}
            write_safetensors(path, small, {**metadata, "stored_as": str(dtype).removeprefix("torch.")})
    return Path(path).stat().st_size


def state_digest(module: nn.Module) -> str:
    """A short checksum of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def latents_digest(vqgan: VQGAN) -> str:
    """Checksum of the autoencoder in whose latents a model lives: two that differ in the decoder alone share them."""
    return vqgan.latents_of or state_digest(vqgan)
