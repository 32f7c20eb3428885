"""What trainings read of the volumes and x-rays again and again, computed once and kept on disk.

One file for a pair of autoencoder and patients (and views, solver or initial network), named by their checksums; those
of autoencoders that are gone are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import processes
from .consistency import QUIET
from .datasets import Patients
from .deformation import Deformation, warped
from .files import InputError, read_safetensors, write_safetensors
from .geometry import views_to_json
from .initial import initial_latent, solved_latent
from .initial_volume import FIELD_VIEWS, ITERATIONS, PRIOR_WEIGHT_MM, TV_WEIGHT_MM, USUAL, InitialVolume
from .presets import Preset
from .progress import progress
from .vqgan import VQGAN
from .weights import latents_digest, state_digest

if TYPE_CHECKING:
    from .diffusion import LatentDiffusion

#: Checksums of volumes by the tensor that holds them: of thousands of patients one takes seconds.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def data_digest(patients: Patients) -> str:
    """A short checksum of names and volumes."""
    names = repr(patients.ids)
    version, digests = _known.get(patients.hu, (-1, {}))
    if version != patients.hu._version:  # the volumes were changed in place
        version, digests = patients.hu._version, {}
        _known[patients.hu] = version, digests
    if names not in digests:
        digest = hashlib.sha256(names.encode())
        digest.update(patients.hu.numpy().tobytes())
        digests[names] = digest.hexdigest()[:16]
    return digests[names]


def _kept(cache: Path, key: dict[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """The latents of ``key``, from the file in ``cache`` if there is one, else computed and written."""
    rest = {name: value for name, value in key.items() if name != "autoencoder"}
    name = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{key['autoencoder']}-{name}.safetensors"
    if path.exists():
        with contextlib.suppress(InputError):  # damaged: compute again
            tensors, metadata = read_safetensors(path)
            if metadata.get("key") == json.loads(json.dumps(key)):
                return tensors["latents"]
    latents = compute().cpu()
    if processes.rank() == 0:
        write_safetensors(path, {"latents": latents}, {"key": key})
        for old in cache.glob("[!.]*.safetensors"):  # a name with a dot is what another training is writing just now
            if not old.name.startswith(key["autoencoder"]):
                old.unlink(missing_ok=True)
    return latents


def encoded(patients: Patients, vqgan: VQGAN, cache: Path) -> Float[Tensor, "n c z y x"]:
    """Latents of all patients' volumes, on the CPU."""
    device = next(vqgan.parameters()).device
    key = {"autoencoder": latents_digest(vqgan), "data": data_digest(patients)}
    starts = range(0, len(patients), 8)
    return _kept(
        cache, key, lambda: torch.cat([vqgan.encode(patients.unit(slice(i, i + 8)).to(device)) for i in starts])
    )


def solved(
    patients: Patients, vqgan: VQGAN, preset: Preset, cache: Path, device: str | torch.device
) -> Float[Tensor, "n c z y x"] | None:
    """Latents of what the solver makes of all patients' x-rays, on ``device``; None if the preset wants none."""
    if not preset.initial.solves_latents:
        return None
    key = {
        "autoencoder": latents_digest(vqgan),
        "data": data_digest(patients),
        "views": views_to_json(patients.views),
        "solver": [preset.initial.solver, preset.initial.iterations],
        "xray": dataclasses.asdict(preset.xray),
    }

    def solve(xrays: Tensor) -> Tensor:
        batch = 16 if xrays.device.type == "cpu" else 128
        latents = solved_latent(vqgan, xrays, patients.views, preset, batch)
        assert latents is not None
        return latents

    return _kept(cache, key, lambda: processes.computed_together(patients.xrays.to(device), solve)).to(device)


#: How far :func:`doubted` moves a guess: so far that phantoms miss their x-rays as a real chest does, by 0.06 to 0.1.
DOUBT = Deformation(scale=(0.96, 1.04), turn_deg=2.5, shift_mm=2.5, coarse_mm=3.0, fine_mm=1.9)


def unrefined(
    patients: Patients, vqgan: VQGAN, network: InitialVolume, cache: Path, device: str | torch.device
) -> Float[Tensor, "n k z y x"]:
    """What the refinement of ``network`` sees of all patients, in half precision on ``device``.

    Two bytes a voxel: thousands of patients at 64³ fit a GPU.
    """

    def see(xrays: Tensor) -> Tensor:
        with torch.no_grad():
            parts = xrays.split(16 if xrays.device.type == "cpu" else 64)
            seen = (network.unrefined(some, patients.views).half() for some in progress(parts, "first guess"))
            return torch.cat(list(seen))

    return _kept(
        cache, _seen_by(network, patients, vqgan), lambda: processes.computed_together(patients.xrays.to(device), see)
    ).to(device)


def doubted(
    patients: Patients, vqgan: VQGAN, network: InitialVolume, cache: Path, seed: int, device: str | torch.device
) -> Float[Tensor, "n k z y x"]:
    """The same as :func:`unrefined`, had the network's volumes been those of patients that it does not understand.

    Each is put under a random map (:func:`difr3ct_core.deformation.warped`, :data:`DOUBT`), so that it misses its
    x-rays, and is then moved to them as one that is hardly believed.
    """

    def see() -> Tensor:
        found = unrefined(patients, vqgan, network, cache, device)[:, :1]
        size, fov = 16 if torch.device(device).type == "cpu" else 64, patients.volume.fov_mm
        parts = []
        for start in progress(range(0, len(patients), size), "doubted guess"):
            rows = slice(start, start + size)
            wrong = warped(found[rows].float().to(device), fov, seed + start, DOUBT)
            right = network.moved(wrong, patients.xrays[rows].to(device), patients.views)
            parts.append(torch.cat([wrong, right], dim=1).half().cpu())
        return torch.cat(parts)

    key = _seen_by(network, patients, vqgan) | {"doubt": dataclasses.asdict(DOUBT), "seed": seed}
    return _kept(cache, key, see).to(device)


def _seen_by(network: InitialVolume, patients: Patients, vqgan: VQGAN) -> dict[str, Any]:
    return {
        "autoencoder": latents_digest(vqgan),
        "data": data_digest(patients),
        "views": views_to_json(patients.views),
        "network": state_digest(network.field),
        "moved": [FIELD_VIEWS, TV_WEIGHT_MM, PRIOR_WEIGHT_MM, ITERATIONS, USUAL, QUIET, "blocks"],
        "xray": dataclasses.asdict(network.preset.xray),
        "detectors": patients.detectors,
    }


def guessed(
    patients: Patients, vqgan: VQGAN, model: LatentDiffusion, cache: Path, device: str | torch.device
) -> Float[Tensor, "n c z y x"] | None:
    """Latents of the first guess for all patients, on ``device``; None for a preset without one, the paper's."""
    network, preset = model.initial_network, model.preset
    if not isinstance(network, InitialVolume) or network.refinement is None:
        known = solved(patients, vqgan, preset, cache, device)
        return initial_latent(model, vqgan, patients.xrays.to(device), patients.views, solved=known)
    seen = unrefined(patients, vqgan, network, cache, device)
    with torch.no_grad():
        pairs = zip(seen.split(16), patients.xrays.to(device).split(16), strict=True)
        volumes = (network.refined(some.float(), images, patients.views) for some, images in pairs)
        return torch.cat([vqgan.encode(some) for some in volumes])
