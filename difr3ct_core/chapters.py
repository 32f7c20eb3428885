"""What every notebook begins with: data and models of a preset, made or loaded, and saved results.

Chapters exchange *files*, never variables. Each method here returns what is on disk and makes what is missing, so any
chapter can be run alone::

    chapter = open_chapter("05_sampling", preset="tiny", data="data", run="runs/tiny", seed=0, device="auto")
    ldm = chapter.ldm("2view")           # loaded if trained, else trained here, with a progress bar

Layout::

    DATA/PRESET-COHORT/      the cohort: phantoms, or prepared real scans (PRESET-lidc, at presets such as paper-lidc)
    DATA/sample_ct/          the real scan, if it was fetched
    RUN/vqgan/               autoencoder
    RUN/decoder/             the same after its decoder's own training, where the preset has one
    RUN/ldm-VIEWS/           one diffusion model per set of views, as in the paper
    RUN/results/             NAME.npz and NAME.json of every chapter
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ct
from .checkpoints import read_log
from .checks import pick_device
from .datasets import Patients, load_patients, make_cohort, preset_views, render_xrays, rendered, through_detectors
from .deformation import deformed_copies
from .diffusion import LatentDiffusion
from .files import InputError, read_safetensors
from .initial_network import InitialNetwork
from .initial_volume import InitialVolume
from .phantoms.variety import varied
from .presets import COHORTS, Preset, get_preset
from .processes import first_alone, rank
from .results import Result, load_result, provenance, run_id, save_result
from .stage_decoder import train_decoder
from .stage_initial import train_initial
from .stages import train_ldm, train_vqgan
from .training import own_parts
from .vqgan import VQGAN
from .weights import load_initial, load_ldm, load_vqgan, training_history, weights_file


def project_root() -> Path:
    """The folder that holds the project, seen from the working folder; the working folder itself outside a checkout.

    JupyterLab starts a kernel in ``notebooks/``, papermill in the root: both must mean the same ``data/``.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").exists() and (folder / "notebooks").is_dir():
            return folder
    return here


class Chapter:
    """Data, models and results of one run of one chapter; make it with :func:`open_chapter`."""

    #: Whether weights that ship with the project are used where the run has none of its own.
    shipped = True
    #: Whether diffusion models train on imperfect x-rays (:func:`difr3ct_core.datasets.through_detectors`).
    detectors = False

    def __init__(self, name: str, preset: Preset, data: Path, run: Path, seed: int, device: torch.device) -> None:
        self.name, self.preset, self.data, self.run = name, preset, data, run
        self.seed, self.device = seed, device
        self._began = time.monotonic()
        self._patients: dict[str, Patients] = {}
        self._opened: set[str] = set()  # data, for provenance

    @property
    def results(self) -> Path:
        """Folder of the saved results."""
        return self.run / "results"

    def patients(self, split: str, view_set: str | None = None) -> Patients:
        """Patients of one split ("train", "val", "test"), with all x-rays or those of one set of views."""
        if split not in self._patients:
            folder = self.data / self.preset.cohort_folder
            with first_alone():
                make_cohort(folder, self.preset)
            self._patients[split] = load_patients(folder, split)
            self._opened.add(folder.name)
        patients = self._patients[split]
        return patients.with_views(view_set) if view_set else patients

    @cached_property
    def real(self) -> Patients | None:
        """LIDC-IDRI-0001 on the preset's grid, as a cohort of one; None if it was not fetched. It trains nothing."""
        scan, labels = ct.sample_ct(self.data), ct.sample_labels(self.data)
        if scan is None:
            return None
        volume = self.preset.volume
        self._opened.add("LIDC-IDRI-0001")
        prepared = ct.prepare_ct(scan, volume)
        hu = prepared.hu.clamp(volume.hu_min, volume.hu_max).round()
        views = preset_views(self.preset)
        organs = torch.zeros(volume.shape, dtype=torch.uint8)
        if labels is not None:
            organs = ct.prepare_labels(labels, prepared).to(torch.uint8)
        xrays = render_xrays(hu[None], views, volume, self.preset.xray)
        return Patients(("LIDC-IDRI-0001",), hu.to(torch.int16)[None], organs[None], xrays, views, volume)

    @property
    def vgg16(self) -> Path | None:
        """Weights of the perceptual loss, if ``data_scripts/fetch_vgg16.py`` brought them."""
        path = self.data / "vgg16" / "vgg16_lpips.safetensors"
        return path if path.exists() else None

    def vqgan(self, stop_after: int | None = None) -> VQGAN:
        """The trained autoencoder (chapter 02): shipped, finished, or trained now, with its decoder's own training
        where the preset has one."""
        own = self.run / "decoder" / "weights.safetensors"
        if stop_after is None and own.exists() and not (self.run / "vqgan").exists():
            found, preset = load_vqgan(own, self.device)
            if (preset.vqgan, preset.volume) == (self.preset.vqgan, self.preset.volume):
                return found
        if (path := self.weights("vqgan")).suffix:
            return load_vqgan(path, self.device)[0]
        if self.preset.train_decoder.steps and stop_after is None:
            return self.decoder()
        return self.first_vqgan(stop_after)

    def first_vqgan(self, stop_after: int | None = None) -> VQGAN:
        """The run's autoencoder before its decoder's own training: finished, or trained now."""
        return train_vqgan(
            self.patients("train"), self.preset, self.run / "vqgan", self.seed, self.device, self.patients("val"),
            stop_after, self.vgg16,
        )  # fmt: skip

    def decoder(
        self, stop_after: int | None = None, start: str | Path | None = None, scan: str | Path | None = None
    ) -> VQGAN:
        """The run's autoencoder after its decoder's own training (folder ``decoder``): finished, or trained now.

        ``start``: weights of an autoencoder to begin with; by default the run's own. ``scan``: a real CT, NIfTI or a
        folder of DICOM, of which deformed copies are a fifth of what the decoder learns from.
        """
        own_parts(self.preset.train_decoder)  # said before the autoencoder trains for hours
        if not self.preset.train_decoder.steps:
            raise InputError(
                f"train_decoder.steps: found 0 in preset {self.preset.name!r}, which leaves the decoder's own training "
                "out; set it with --set steps=8000."
            )
        others = None if scan is None else ct.hu_to_unit(self.copies(scan, 128), self.preset.volume)
        vqgan = load_vqgan(start, self.device)[0] if start is not None else self.first_vqgan()
        history = []
        if rank() == 0:  # which alone writes the file
            history = training_history(read_safetensors(weights_file(start or self.run / "vqgan"))[1])
        return train_decoder(
            vqgan, self.patients("train"), self.preset, self.run / "decoder", self.seed, self.device,
            self.patients("val"), stop_after, others, history=history,
        )  # fmt: skip

    def copies(self, scan: str | Path, count: int) -> Tensor:
        """Deformed copies of a real CT on the preset's grid: HU (count, 1, z, y, x).

        Raises:
            InputError: the scan is the test patient, or cannot be read.
        """
        if Path(scan).resolve().is_relative_to((self.data / "sample_ct" / "lidc_idri_0001").resolve()):
            raise InputError(f"{scan}: LIDC-IDRI-0001 is the test patient and trains nothing; take another scan.")
        volume = self.preset.volume
        fine = ct.prepare_ct(ct.read_ct(scan), dataclasses.replace(volume, size=2 * volume.size))
        return deformed_copies(fine.hu, volume, count, self.seed)

    def weights(self, model: str) -> Path:
        """Where the weights of a model are or will be: a file that ships with the project, or its run folder.

        A run folder of one's own always goes first, so ``--run`` or a started training replaces what was shipped.

        Args:
            model: "vqgan", "ldm-8view", ..., "ldm-any". Where no model of those views was shipped, the any-view model
                serves them; where no autoencoder of a cohort of phantoms was, the one of `lung`: it knows what chests
                are made of, and no x-ray.
        """
        own = self.run / model
        if own.exists() or not self.shipped:
            return own
        name = self.preset.name
        names = [f"{name}-{model}"]
        if model.startswith("ldm-"):
            names.append(f"{name}-ldm-any")
        elif self.preset.cohort.cohort in COHORTS:
            names.append(f"{name.partition('-')[0]}-{model}")
        files = [project_root() / "pretrained" / f"{name}.safetensors" for name in names]
        return next((path for path in files if path.exists()), own)

    def log(self, model: str) -> Path:
        """Folder or file with the log of a model's training, for :func:`difr3ct_core.checkpoints.read_log`."""
        path = self.weights(model)
        return path.with_suffix(".csv") if path.suffix else path

    def decoder_log(self) -> Path | None:
        """The log of the decoder's own training, beside that of :meth:`log`; None where there was none."""
        path = self.weights("vqgan")
        found = path.with_name(f"{path.stem.removesuffix('vqgan')}decoder.csv") if path.suffix else self.run / "decoder"
        return found if found.exists() else None

    def ldm(
        self,
        view_set: str,
        stop_after: int | None = None,
        start: str | Path | None = None,
        network: str | Path | None = None,
    ) -> LatentDiffusion:
        """The trained diffusion model for a set of views (chapter 04), or "any" for the any-view model.

        ``start``: weights to begin a training with, see :func:`difr3ct_core.stages.train_ldm`; where the run has no
        autoencoder of its own, theirs is taken. ``network``: an initial network trained elsewhere, or an INRR3CT; the
        preset's section ``initial`` becomes the one of that.
        """
        if (path := self.weights(f"ldm-{view_set}")).suffix:
            return load_ldm(path, self.device)[0]
        any_view = view_set == "any"
        vqgan = self._autoencoder(start)
        preset, finished = self.preset, (self.run / f"ldm-{view_set}" / "weights.safetensors").exists()
        if network is not None:
            preset = preset.replace(initial=load_initial(network)[1].initial)
        elif preset.initial.network and ((self.run / f"initial-{view_set}").exists() or not (start or finished)):
            self.initial(view_set, start=start)
            network = self.run / f"initial-{view_set}"
        return train_ldm(
            self._training(None if any_view else view_set), vqgan, preset,
            self.run / f"ldm-{view_set}", self.seed, self.device, stop_after, any_view, self.patients("val"), start,
            network,
        )  # fmt: skip

    def _training(self, view_set: str | None) -> Patients:
        """The training patients, through imperfect detectors where the chapter is told so."""
        train = self.patients("train", view_set)
        if not self.detectors:
            return train
        if view_set is None:
            raise InputError(
                "detectors: found views 'any', expected one set of views, whose x-rays can be changed once."
            )
        return through_detectors(train, self.seed)

    def _autoencoder(self, start: str | Path | None) -> VQGAN:
        """The run's own; where it has none and a training begins with weights, theirs."""
        if start is None or (self.run / "vqgan").exists():
            return self.vqgan()
        return load_ldm(start, self.device)[1]

    def initial(
        self,
        view_set: str,
        stop_after: int | None = None,
        start: str | Path | None = None,
        network: str | Path | None = None,
        scan: str | Path | None = None,
    ) -> InitialNetwork | InitialVolume:
        """The initial network for a set of views, or "any", finished or trained now; see :meth:`ldm`.

        ``start``: weights of a diffusion model; a training begins with its initial network, if it has one, unless
        ``network`` names another, or an INRR3CT. Where the preset refines a guess, it is the guess of that. Deformed
        copies of ``scan``, as in :meth:`decoder`, are a fifth of what it learns from beside the patients themselves;
        variations of them (``initial.varied``) come on top.
        """
        any_view = view_set == "any"
        beginning, history = None if start is None else load_ldm(start, self.device)[0].initial_network, []
        if network is not None:
            beginning, _, metadata = load_initial(network, self.device)
            history = training_history(metadata)
        vqgan, train = self._autoencoder(start), self._training(None if any_view else view_set)
        others = None
        if (more := self._others(len(train), scan)) is not None:
            others = rendered(more, train.views, self.preset)
            others = through_detectors(others, self.seed + 1) if self.detectors else others
        return train_initial(
            train, vqgan, self.preset,
            self.run / f"initial-{view_set}", self.seed, self.device, stop_after, any_view, self.patients("val"),
            beginning, history, others,
        )  # fmt: skip

    def _others(self, count: int, scan: str | Path | None) -> Tensor | None:
        """Volumes that no patient of the cohort has, for its initial network: HU (n, 1, z, y, x), or None."""
        more = [] if scan is None else [self.copies(scan, math.ceil(count / 4))]
        if number := round(self.preset.initial.varied * count):
            more.append(self.variations(number))
        return torch.cat(more) if more else None

    def variations(self, count: int) -> Tensor:
        """Variations of the training patients (:func:`difr3ct_core.phantoms.variety.varied`), each in its turn."""
        if self.preset.cohort.cohort not in COHORTS:
            raise InputError(
                f"initial.varied: varies phantoms by their labels, and the patients of {self.preset.name!r} are real "
                "ones; set it to 0."
            )
        train = self.patients("train")
        rows = torch.arange(count) % len(train)
        return varied(train.hu[rows], train.labels[rows], self.preset.volume, self.seed)

    def short_run(self, model: str) -> Path:
        """Folder with the log of a training on this machine, for :func:`difr3ct_core.checkpoints.read_log`.

        Where the run trained its own weights, that is their training. Where they shipped, it is the first
        ``preset.book.scratch_steps`` steps of the same training on a few patients, made now (or before).
        """
        if not self.weights(model).suffix:
            return self.weights(model)
        steps, folder = self.preset.book.scratch_steps, self.run / "scratch" / model
        if (folder / "log.csv").exists() and read_log(folder, "loss")[0][-1] + 1 >= steps:
            return folder
        few = self.patients("train")
        few = few.take(range(min(4 * self.preset.train_ldm.batch_size, len(few))))
        preset = self.preset.replace(train_vqgan={"log_every": 1}, train_ldm={"log_every": 1})
        if model == "vqgan":
            train_vqgan(few, preset, folder, self.seed, self.device, stop_after=steps)
        else:
            views = model.removeprefix("ldm-")
            some = few if views == "any" else few.with_views(views)
            shipped, ldm = self.weights(model), self.ldm(views)  # its initial network is taken as it is
            train_ldm(
                some, self.vqgan(), preset.replace(initial=ldm.preset.initial), folder, self.seed, self.device,
                steps, views == "any", network=shipped if ldm.initial_network else None,
            )  # fmt: skip
        return folder

    def save(
        self, name: str, arrays: Mapping[str, np.ndarray | torch.Tensor], values: Mapping[str, Any], **more: Any
    ) -> Result:
        """Save a result of this chapter with its provenance; ``more`` is added to the provenance."""
        about = {"chapter": self.name, "run": run_id(self.run), "data": sorted(self._opened), **more}
        wall_s = time.monotonic() - self._began
        origin = provenance(self.preset.name, self.seed, self.device, wall_s, **about)
        return save_result(self.results, name, arrays, values, origin)

    def load(self, name: str) -> Result:
        """A saved result of this or another chapter of the same run."""
        return load_result(self.results, name)


def open_chapter(
    name: str,
    preset: str = "tiny",
    data: str | Path = "data",
    run: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Chapter:
    """Begin a chapter; the arguments are the parameters of every notebook.

    Args:
        name: of the notebook, for provenance.
        preset: "tiny", "small" or "paper".
        data, run: folders; relative ones are taken from the project's root. ``run`` is by default ``runs/PRESET``.
        seed: of training and sampling.
        device: "auto", "cpu", "cuda", ...

    Raises:
        InputError: unknown preset or device.
    """
    root, settings = project_root(), get_preset(preset)
    run = root / (run or f"runs/{settings.name}")
    return Chapter(name, settings, root / data, run, seed, pick_device(device))
