"""Patients on disk: (x-rays, views, volume, labels), split by patient.

A cohort is a folder::

    manifest.json               preset, views and the list of patients with their split
    patients/ID/ct.npz          hu int16 (z, y, x), labels uint8 (z, y, x)
    patients/ID/xrays.npz       line_integrals float32 (view, v, u), all views of the preset

Each file is written atomically, the manifest first, and an existing patient is kept, so a killed preparation goes on
where it stopped.
Splits are drawn per *patient*: several scans of one person never fall on both sides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from . import ct
from .detector import DetectorRange, detect, draw_detector
from .drr import project
from .files import InputError, read_json, read_npz, write_json, write_npz
from .geometry import View, standard_views, views_from_json, views_to_json
from .phantoms import make_phantom
from .presets import REAL_COHORTS, VIEW_SETS, Preset, VolumePreset, XrayPreset
from .progress import progress
from .workers import start_worker

SPLITS = ("train", "val", "test")


def preset_views(preset: Preset, view_set: str = "8view") -> tuple[View, ...]:
    """The views of one of :data:`difr3ct_core.presets.VIEW_SETS` with the preset's detector.

    Raises:
        InputError: unknown set.
    """
    return standard_views(view_set, preset.xray.detector_size, preset.volume.fov_mm, mode=preset.xray.mode)


def render_xrays(
    hu: Float[Tensor, "b z y x"], views: Sequence[View], volume: VolumePreset, xray: XrayPreset
) -> Float[Tensor, "b view v u"]:
    """Digitally reconstructed radiographs of HU volumes (§V-B): line integrals of µ, dimensionless.

    The volume is clipped to the HU window first, so that x-rays and training target describe the same object.
    """
    mu = ct.hu_to_mu(hu.clamp(volume.hu_min, volume.hu_max), xray.mu_water_per_mm)
    return project(mu[:, None], views, volume.spacing_mm)[:, 0]


@dataclass(frozen=True)
class Patients:
    """Some patients in memory. Volumes stay int16, which is a quarter of what float32 in [-1, 1] and x-rays take.

    ``xrays`` are line integrals in the order of ``views``.
    """

    ids: tuple[str, ...]
    hu: torch.Tensor  # int16 (n, z, y, x)
    labels: UInt8[Tensor, "n z y x"]
    xrays: Float[Tensor, "n view v u"]
    views: tuple[View, ...]
    volume: VolumePreset
    detectors: dict[str, Any] | None = None  # of :func:`through_detectors`: their range and seed

    def __len__(self) -> int:
        return len(self.ids)

    def unit(self, index: Sequence[int] | Int[Tensor, " b"] | slice = slice(None)) -> Float[Tensor, "b 1 z y x"]:
        """Volumes in [-1, 1], by the window."""
        return ct.hu_to_unit(self.hu[index].float(), self.volume)[:, None]

    def with_views(self, view_set: str) -> Patients:
        """The same patients with the x-rays of one set of views only.

        Raises:
            InputError: unknown set, or an angle for which no x-rays are stored.
        """
        if view_set not in VIEW_SETS:
            raise InputError(f"views: found {view_set!r}, expected one of {', '.join(VIEW_SETS)}.")
        return self.take_angles(VIEW_SETS[view_set])

    def take_angles(self, angles_deg: Sequence[float]) -> Patients:
        """The same patients with those of their x-rays that were taken at these angles, in this order.

        Raises:
            InputError: an angle for which no x-rays are stored.
        """
        stored = [view.angle_deg for view in self.views]
        missing = [angle for angle in angles_deg if angle not in stored]
        if missing:
            raise InputError(f"views: no x-rays are stored at {missing}°, only at {stored}°; prepare the data again.")
        pick = [stored.index(angle) for angle in angles_deg]
        return dataclasses.replace(self, xrays=self.xrays[:, pick], views=tuple(self.views[i] for i in pick))

    def at_angles(
        self, angles_deg: Sequence[float], xray: XrayPreset, batch: int = 32, device: str | torch.device = "cpu"
    ) -> Patients:
        """The same patients with x-rays rendered anew at other angles (degrees), detector and beam as in ``xray``.

        ``batch`` of them are rendered at a time, on ``device``; the x-rays come back to the CPU.
        """
        views = standard_views(angles_deg, xray.detector_size, self.volume.fov_mm, mode=xray.mode)
        parts = (part.to(device).float() for part in self.hu.split(batch))
        images = [render_xrays(part, views, self.volume, xray).cpu() for part in parts]
        return dataclasses.replace(self, xrays=torch.cat(images), views=views)

    def take(self, index: Sequence[int]) -> Patients:
        """Some of the patients."""
        rows = list(index)
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            hu=self.hu[rows],
            labels=self.labels[rows],
            xrays=self.xrays[rows],
        )

    def joined(self, others: Patients) -> Patients:
        """These patients and others with x-rays of the same views."""
        if self.views != others.views or self.volume != others.volume:
            raise InputError(
                "patients: found two sets of other views or grids, expected the same ones; render them anew."
            )
        both = {name: torch.cat([getattr(self, name), getattr(others, name)]) for name in ("hu", "labels", "xrays")}
        return dataclasses.replace(self, ids=(*self.ids, *others.ids), **both)


def rendered(hu: Float[Tensor, "n 1 z y x"], views: Sequence[View], preset: Preset) -> Patients:
    """Patients without labels from volumes in HU on the preset's grid, their x-rays rendered."""
    whole = hu[:, 0].clamp(preset.volume.hu_min, preset.volume.hu_max).round().to(torch.int16)
    images = [render_xrays(part.float(), views, preset.volume, preset.xray) for part in whole.split(32)]
    ids = tuple(f"copy-{i:04d}" for i in range(len(whole)))
    labels = torch.zeros(whole.shape, dtype=torch.uint8)
    return Patients(ids, whole, labels, torch.cat(images), tuple(views), preset.volume)


def through_detectors(patients: Patients, seed: int = 0, limits: DetectorRange | None = None) -> Patients:
    """The same patients, each x-rayed by a detector of its own: for a model that is to expect real ones.

    Args:
        patients: with exact x-rays.
        seed: of detectors and noise.
        limits: of :func:`difr3ct_core.detector.draw_detector`.

    Returns:
        patients whose names say it, so that nothing computed from the exact x-rays is taken for theirs.
    """
    limits = limits or DetectorRange()
    seen = []
    for i, image in enumerate(patients.xrays):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        seen.append(detect(image, patients.views, draw_detector(generator, limits), generator))
    about = {**dataclasses.asdict(limits), "seed": seed}
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    ids = tuple(f"{name}@{mark}" for name in patients.ids)
    return dataclasses.replace(patients, ids=ids, xrays=torch.stack(seen), detectors=json.loads(json.dumps(about)))


def _data_key(preset: Preset) -> dict[str, Any]:
    """What decides the content of a cohort's files."""
    return {
        "volume": dataclasses.asdict(preset.volume),
        "xray": dataclasses.asdict(preset.xray),
        "cohort": dataclasses.asdict(preset.cohort),
    }


def _make_phantom_patient(job: tuple[Path, int, Preset]) -> None:
    """Draw one phantom and its x-rays into ``folder``."""
    folder, seed, preset = job
    draw, size = preset.cohort.draw_size, preset.volume.size
    phantom = make_phantom(seed, draw, preset.cohort.cohort, preset.volume.fov_mm)
    factor = draw // size
    hu = reduce(phantom.hu, "(z p) (y q) (x r) -> z y x", "mean", p=factor, q=factor, r=factor)
    labels = _majority(phantom.labels, factor)
    hu16 = hu.clamp(preset.volume.hu_min, preset.volume.hu_max).round().to(torch.int16)
    views = preset_views(preset)
    xrays = render_xrays(hu16.float()[None], views, preset.volume, preset.xray)[0]
    write_npz(folder / "ct.npz", hu=hu16.numpy(), labels=labels.numpy())
    write_npz(folder / "xrays.npz", line_integrals=xrays.numpy().astype(np.float32))


def _majority(labels: UInt8[Tensor, "z y x"], factor: int) -> UInt8[Tensor, "z y x"]:
    """The most frequent label of each block of voxels."""
    if factor == 1:
        return labels
    z, y, x = (edge // factor for edge in labels.shape)
    blocks = labels.reshape(z, factor, y, factor, x, factor).permute(0, 2, 4, 1, 3, 5).reshape(z, y, x, factor**3)
    return blocks.mode(-1).values


def make_cohort(folder: str | Path, preset: Preset, workers: int | None = None, first: int | None = None) -> Path:
    """Make, or complete, the phantom cohort of a preset; of a preset on real scans, check that they are prepared.

    Args:
        folder: where; made if missing.
        preset: sizes, number of patients, seed.
        workers: processes; None for one per core; 1 for none beside this one.
        first: number of the first training phantom, from 0 on: training phantoms that an earlier training never saw,
            beside the validation and test phantoms of always. By default that of the cohort there, or 0.

    Returns:
        the folder.

    Raises:
        InputError: the folder holds a cohort made with other numbers, or real scans were not prepared yet.
    """
    folder = Path(folder)
    manifest = folder / "manifest.json"
    c = preset.cohort
    if c.cohort in REAL_COHORTS:
        return _require_prepared(folder, preset)
    if c.draw_size % preset.volume.size:
        raise InputError(f"cohort.draw_size: found {c.draw_size}, expected a multiple of {preset.volume.size}.")
    patients = []
    for split, count, offset in zip(SPLITS, (c.n_train, c.n_val, c.n_test), (0, 10**6, 2 * 10**6), strict=True):
        # Seeds of the splits lie a million apart, so that a larger training set never swallows a test patient.
        for i in range(count):
            seed = c.seed * 10**7 + offset + i + ((first or 0) if split == "train" else 0)
            patients.append({"id": f"{c.cohort}-{split}-{i:04d}", "split": split, "seed": seed})
    if manifest.exists():
        found = read_json(manifest, "the manifest of a cohort")
        if (
            not isinstance(found, dict)
            or found.get("key") != _data_key(preset)
            or (first is not None and found.get("patients") != patients)
        ):
            raise InputError(
                f"{manifest}: the cohort there was made with other numbers than preset {preset.name!r} has; "
                "choose another data folder or remove this one."
            )
        patients = found["patients"]
    else:
        # Written first: a preparation that was killed can then not be completed with other numbers.
        write_json(
            manifest,
            {
                "source": "synthetic phantoms, difr3ct_core.phantoms",
                "key": _data_key(preset),
                "views": views_to_json(preset_views(preset)),
                "patients": patients,
            },
        )
    jobs = [(folder / "patients" / str(p["id"]), int(str(p["seed"])), preset) for p in patients]
    missing = [job for job in jobs if not all((job[0] / name).exists() for name in ("ct.npz", "xrays.npz"))]
    workers = min(workers or multiprocessing.cpu_count(), len(missing))
    if workers <= 1:
        for job in progress(missing, "phantom cohort"):
            _make_phantom_patient(job)
        return folder
    # "spawn": forking a process that already runs torch threads can hang. One thread each: one patient a process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        futures = [pool.submit(_make_phantom_patient, job) for job in missing]
        try:
            for future in progress(as_completed(futures), "phantom cohort", len(futures)):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return folder


def _require_prepared(folder: Path, preset: Preset) -> Path:
    """The folder of a cohort of real scans, which nothing here can make."""
    path, command = folder / "manifest.json", f"python data_scripts/prepare_ct.py CT_FOLDER {folder}"
    if not path.exists():
        raise InputError(
            f"{path}: no such file, expected the cohort {preset.cohort.cohort!r} of preset {preset.name!r}; prepare it "
            f"first: `{command} --preset {preset.name}`."
        )
    found = read_json(path, "the manifest of a cohort")
    key = found.get("key") if isinstance(found, dict) else None
    expected = {"volume": dataclasses.asdict(preset.volume), "xray": dataclasses.asdict(preset.xray)}
    if not isinstance(key, dict) or {name: key.get(name) for name in expected} != expected:
        raise InputError(
            f"{path}: the cohort there was made with other numbers than preset {preset.name!r} has; remove the folder "
            f"and prepare it again: `{command} --preset {preset.name}`."
        )
    return folder


def load_patients(folder: str | Path, split: str, limit: int | None = None) -> Patients:
    """Read one split of a cohort into memory.

    Args:
        folder: made by :func:`make_cohort` or :func:`difr3ct_core.preparation.prepare_cohort`.
        split: "train", "val" or "test".
        limit: at most so many patients.

    Raises:
        InputError: no cohort there, a file is missing or damaged, or the split is unknown or empty.
    """
    folder = Path(folder)
    if split not in SPLITS:
        raise InputError(f"split: found {split!r}, expected one of {', '.join(SPLITS)}.")
    path = folder / "manifest.json"
    manifest = read_json(path, "the manifest of a cohort; make it with data_scripts/make_phantoms.py")
    try:
        volume = VolumePreset(**manifest["key"]["volume"])
        views = views_from_json(manifest["views"])
        ids = [patient["id"] for patient in manifest["patients"] if patient["split"] == split][:limit]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: lacks {error}, expected the manifest of a cohort; make the cohort again.") from error
    if not ids:
        raise InputError(f"{path}: lists no patient in split {split!r}; make a cohort with at least one.")

    def read(patient: str) -> tuple[Tensor, Tensor, Tensor]:
        where = folder / "patients" / patient
        scan = read_npz(where / "ct.npz", ("hu", "labels"))
        for name in ("hu", "labels"):
            if scan[name].shape != volume.shape:
                raise InputError(f"{where / 'ct.npz'}: found {name} of {scan[name].shape}, expected {volume.shape}.")
        images = read_npz(where / "xrays.npz", ("line_integrals",))["line_integrals"]
        if images.shape != (len(views), *views[0].detector_shape):
            raise InputError(
                f"{where / 'xrays.npz'}: found shape {images.shape}, expected {(len(views), *views[0].detector_shape)}."
            )
        return torch.from_numpy(scan["hu"]), torch.from_numpy(scan["labels"]), torch.from_numpy(images)

    with ThreadPoolExecutor(min(16, multiprocessing.cpu_count())) as pool:  # unpacking leaves the interpreter free
        hu, labels, xrays = zip(*pool.map(read, ids), strict=True)
    return Patients(tuple(ids), torch.stack(hu), torch.stack(labels), torch.stack(xrays), tuple(views), volume)


def batch_index(n: int, batch_size: int, step: int, seed: int) -> Int[Tensor, " b"]:
    """Rows of the batch of one training step: shuffled epochs, as a pure function of (seed, step).

    A resumed run needs no saved state to draw the same batches.
    """
    first = step * batch_size
    rows = []
    for position in range(first, first + batch_size):
        epoch, place = divmod(position, n)
        rows.append(_epoch_order(n, epoch, seed)[place])
    return torch.tensor(rows)


_ORDER: dict[tuple[int, int, int], list[int]] = {}


def _epoch_order(n: int, epoch: int, seed: int) -> list[int]:
    key = (n, epoch, seed)
    if key not in _ORDER:
        if len(_ORDER) > 4:
            _ORDER.clear()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _ORDER[key] = torch.randperm(n, generator=generator).tolist()
    return _ORDER[key]
