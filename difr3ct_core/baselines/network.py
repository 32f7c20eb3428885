"""What the trained baselines have in common: one interface, "load or train", and weights on disk.

A baseline is a :class:`Baseline`: a module with a loss and a reconstruction. :func:`train_network` trains any of them
with the project's one loop, on the same patients, x-rays and batches as the diffusion model, and writes
``weights.safetensors`` with preset, settings and views inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import processes
from ..checkpoints import load_state, seconds_trained
from ..datasets import Patients, batch_index
from ..files import InputError, read_safetensors, write_safetensors
from ..geometry import View, views_from_json, views_to_json
from ..latents import data_digest
from ..presets import Preset
from ..results import provenance
from ..stages import _finished, _numbers
from ..training import Opponent, fit
from ..weights import state_digest, training_history
from .presets import settings_from_dict


class Baseline(nn.Module):
    """A network that is trained on patients and turns x-rays into a volume.

    Args:
        preset: the experiment; grid, window and detector.
        settings: the baseline's own numbers.
        views: of the x-rays that it will see.
    """

    #: Name in tables and in the metadata of its weights.
    kind: ClassVar[str]
    #: Class of its settings.
    settings_class: ClassVar[type]
    #: Sections of the preset that decide its training.
    preset_sections: ClassVar[tuple[str, ...]] = ("volume", "xray")

    def __init__(self, preset: Preset, settings: Any, views: Sequence[View]) -> None:
        super().__init__()
        self.preset, self.settings, self.views = preset, settings, tuple(views)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def check(self, xrays: Float[Tensor, "b n v u"]) -> None:
        """Raise an InputError unless there is one finite x-ray of the detector's size for each view."""
        expected = (len(self.views), *self.views[0].detector_shape)
        if xrays.ndim != 4 or tuple(xrays.shape[1:]) != expected:
            raise InputError(
                f"xrays: found shape {tuple(xrays.shape)}, expected (patient, {expected[0]}, {expected[1]}, "
                f"{expected[2]}), for which this {self.kind} was made; take these views, or another model."
            )
        if not torch.isfinite(xrays).all():
            raise InputError("xrays: found NaN or infinity, expected line integrals; check the images.")

    def critic(self) -> nn.Module | None:
        """What is trained against this network, with a method ``loss()``, see :class:`Opponent`; None for nothing."""
        return None

    def loss(
        self,
        truth: Float[Tensor, "b 1 z y x"],
        xrays: Float[Tensor, "b n v u"],
        generator: torch.Generator,
        part: slice,
        batch: int,
        critic: nn.Module | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of some patients: the rows ``part`` of a step's ``batch``, and values for the log.

        Args:
            truth: volumes in [-1, 1].
            xrays: line integrals.
            generator: of the step; numbers are drawn for the whole batch, see :func:`difr3ct_core.training.fit`.
            part, batch: which rows of how many these are.
            critic: what :meth:`critic` gave.
        """
        raise NotImplementedError

    def reconstruct(self, xrays: Float[Tensor, "b n v u"], seed: int = 0) -> Float[Tensor, "b 1 z y x"]:
        """Volumes in [-1, 1] on the CPU, of patients whose line integrals are given.

        Raises:
            InputError: x-rays that do not fit the views.
        """
        raise NotImplementedError


B = TypeVar("B", bound=Baseline)


def train_network(
    network: type[B],
    train: Patients,
    preset: Preset,
    settings: Any,
    folder: str | Path,
    seed: int = 0,
    device: str | torch.device = "cpu",
    stop_after: int | None = None,
    start: str | Path | None = None,
) -> B:
    """The baseline of ``folder``: loaded if finished with the same numbers, else trained, else resumed.

    Args:
        network: the class.
        train: training patients with the x-rays of one set of views.
        preset, settings: numbers.
        folder: of the run.
        seed: of initial weights, batches and noise.
        device: where to train.
        stop_after: leave after so many steps of this call; the model returned is then unfinished.
        start: run folder or weights of the same baseline for the same views, of another cohort, say, to begin with;
            by default random weights.

    Raises:
        InputError: views for which this baseline does not exist, or ``start`` is of another kind or shape.
    """
    path = Path(folder) / "weights.safetensors"
    training = settings.training
    numbers = {key: value for key, value in dataclasses.asdict(settings).items() if key != "training"}
    fingerprint = {
        "kind": network.kind,
        **{section: dataclasses.asdict(getattr(preset, section)) for section in network.preset_sections},
        "settings": numbers,
        "training": _numbers(training),
        "data": data_digest(train),
        "n_train": len(train),
        "views": views_to_json(train.views),
        "seed": seed,
    }
    torch.manual_seed(seed)
    model = network(preset, settings, train.views)  # also says, before anything else, that the views do not suit it
    history: list[dict[str, Any]] = []
    if start is not None:
        beginning, metadata = load_network(network, start)
        fingerprint["start"], history = state_digest(beginning), training_history(metadata)
        load_state(model, beginning.state_dict(), Path(start))
    if _finished(path, fingerprint):
        return load_network(network, path, device)[0]
    model.to(device)
    critic = model.critic()
    if critic is not None:
        critic.to(device)
    if training.channels_last:
        for module in (*model.modules(), *(critic.modules() if critic is not None else ())):
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):  # 2D ones would refuse it
                module.to(memory_format=torch.channels_last_3d)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def loss_of_step(step: int, generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        batch = batch_index(len(train), training.batch_size, step, seed)
        rows = batch[part]
        truth, xrays = train.unit(rows).to(device), train.xrays[rows].to(device)
        return model.loss(truth, xrays, generator, part, len(batch), critic)

    best = fit(
        model, loss_of_step, training, folder, fingerprint, f"training {len(train.views)}-view {network.kind}", seed,
        None, stop_after, None if critic is None else Opponent(critic, critic.loss),
    )  # fmt: skip
    if stop_after is None and processes.rank() == 0:
        metadata = {
            "kind": network.kind,
            "preset": preset.to_dict(),
            "settings": dataclasses.asdict(settings),
            "views": views_to_json(train.views),
            "fingerprint": fingerprint,
            "provenance": provenance(preset.name, seed, device, seconds_trained(folder)),
        }
        write_safetensors(path, best.state_dict(), {**metadata, "history": [*history, *training_history(metadata)]})
    return best  # type: ignore[return-value]


def load_network(network: type[B], path: str | Path, device: str | torch.device = "cpu") -> tuple[B, dict[str, Any]]:
    """A finished baseline and the metadata of its file.

    Args:
        network: the class.
        path: ``weights.safetensors`` of a run, or the run's folder.

    Raises:
        InputError: not the weights of this baseline, truncated, or of another version.
    """
    path = Path(path)
    path = path / "weights.safetensors" if path.is_dir() else path
    tensors, metadata = read_safetensors(path)
    if metadata.get("kind") != network.kind:
        raise InputError(f"{path}: found weights of kind {metadata.get('kind')!r}, expected {network.kind!r}.")
    if missing := [name for name in ("preset", "settings", "views") if name not in metadata]:
        raise InputError(f"{path}: its metadata lack {missing}, expected the file that a training writes; train again.")
    try:
        preset = Preset.from_dict(metadata["preset"])
        settings = settings_from_dict(network.settings_class, metadata["settings"])
    except InputError as error:
        raise InputError(f"{path}: {error} It may be of another version; train again.") from error
    model = network(preset, settings, views_from_json(metadata["views"], str(path)))
    load_state(model, tensors, path)
    return model.to(device).eval(), metadata
