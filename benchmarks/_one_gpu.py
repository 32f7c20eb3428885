"""The chapters of ``one_gpu.py``: models of their own, and data that all its processes share."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difr3ct_core.chapters import Chapter
from difr3ct_core.datasets import Patients
from difr3ct_core.phantoms.variety import varied
from difr3ct_core.presets import Preset
from difr3ct_core.stages import fan_angles


class OwnModels(Chapter):
    """The autoencoder ships; whatever else ships with the project is trained here all the same."""

    _seen: Patients | None = None
    _copies: Tensor | None = None
    _variations: Tensor | None = None

    def copies(self, scan: str | Path, count: int) -> Tensor:
        if self._copies is None:  # asked for first before the processes part, who then share them
            with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
                jobs = [(self.preset, self.data, scan, math.ceil(count / 32), seed) for seed in range(32)]
                self._copies = torch.cat(pool.starmap(_copies, jobs))
        return self._copies[:count]

    def variations(self, count: int) -> Tensor:
        if self._variations is None:  # likewise
            train, part = self.patients("train"), math.ceil(count / 32)
            rows = [torch.arange(k, k + part) % len(train) for k in range(0, count, part)]
            jobs = [(train.hu[some], train.labels[some], train.volume, part * i) for i, some in enumerate(rows)]
            with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
                self._variations = torch.cat(pool.starmap(_variations, jobs))
        return self._variations[:count]

    def weights(self, model: str) -> Path:
        return super().weights(model) if model == "vqgan" else self.run / model

    def _training(self, view_set: str | None) -> Patients:
        # Kept, because it is asked for four times, and detectors and further angles take their time.
        if self._seen is None:
            self._seen = super()._training(view_set)
            if view_set is None:
                self._seen = FannedOut(**vars(self._seen)).rendered(self.preset, self.device)
        return self._seen


def _copies(preset: Preset, data: Path, scan: Path, count: int, seed: int) -> Tensor:
    torch.set_num_threads(1)
    return Chapter("copies", preset, data, Path(), seed, torch.device("cpu")).copies(scan, count)


def _variations(*patients: Any) -> Tensor:
    torch.set_num_threads(1)
    return varied(*patients)


class FannedOut(Patients):
    """Patients whose x-rays are those of the any-view model already."""

    def rendered(self, preset: Preset, device: torch.device) -> FannedOut:
        return super().at_angles(fan_angles(preset), preset.xray, device=device)  # type: ignore[return-value]

    def at_angles(self, angles_deg: Sequence[float], *_: Any, **__: Any) -> FannedOut:
        assert tuple(angles_deg) == tuple(view.angle_deg for view in self.views)
        return self


def open_chapters(
    run: Path, data: Path, presets: dict[str, Preset], device: str, scan: Path | None, vary: float
) -> dict[str, Chapter]:
    """The cohorts, their patients read before the processes part, who then share the memory."""
    chapters: dict[str, Chapter] = {}
    for cohort, preset in presets.items():
        # The device is named, not touched: a process that has begun to use a GPU must not fork.
        chapters[cohort] = OwnModels("tables", preset, data, run / preset.name, 0, torch.device(device))
        for split in ("train", "val", "test"):
            chapters[cohort].patients(split)
    count = len(chapters["lung"].patients("train"))
    if scan is not None:
        chapters["lung"].copies(scan, math.ceil(count / 4))
    if vary:
        chapters["lung"].variations(round(vary * count))
    return chapters
