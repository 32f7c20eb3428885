#!/usr/bin/env python3
"""Every model of Tables I and II on one GPU in some minutes, trained beside each other and scored.

    nvidia-cuda-mps-control -d               # lets small kernels of several processes run at once; optional
    python benchmarks/one_gpu.py --presets small small-thoracic --data data --out OUT --seconds 375 120

More patients of ``lung`` than the preset has: a preset as a JSON file with ``cohort.n_train`` changed, its phantoms
drawn by ``data_scripts/make_phantoms.py --preset FILE``, with ``--first N`` those that an earlier training never saw. A
third preset, of ``intact``, trains DIFR3CT at eight views for the radiotherapy study. Three runs on an H200 are behind
``results/tables.json``. One gave INRR3CT, X2CT-GAN at one frontal view and DIFR3CT 4096 patients of ``lung``
(``--seconds 310 130 40 --grace-s 45 --start pretrained``, twelve jobs). In the next, DIFR3CT's refinement and INRR3CT
went on with 2560 others, ``--first 4096``, and 768 of ``thoracic`` likewise (``--seconds 340 100 40 --grace-s 45
--start pretrained --refine 32 48 64 --guess FOLDER``, eleven jobs); what is refined took long to compute, so that the
refinement had a few hundred steps, and at eight views it refined a solver's volume. The better rows of INRR3CT are in
the tables. A third gave DIFR3CT 1280 of ``lung`` and 320 copies of a scan, then 768 of ``thoracic``, ``--first 8192``
(four jobs, ``--seconds 216 100 60 --grace-s 40 --start pretrained --refine 32 48 64 --guess FOLDER --scan A0001``; at
eight views alone, ``--seconds 135 65 40``, of which most went into computing what is refined): the rows of DIFR3CT for
``thoracic`` at two to eight views are of it. For ``lung`` it brought nothing: copies of one scan helped on that patient
by 2 dB, on another by 0.1, and cost phantoms 0.5 at four views (their errors are so much larger that the loss is mostly
theirs). A fourth trained the second networks (``initial.second_from``) at eight, four and two views: 1024 phantoms,
``--first 9500``, and a variation of each (``--seconds 455 --grace-s 72 --start pretrained --refine 32 48 64 --vary 1``,
five jobs); for phantoms they were 0.05 to 0.35 dB behind the first ones, so that those stayed.

One process for a method and its views. All start together on ``lung`` and share the GPU; the steps of each are planned
for the same time from how long its first ones take, so that every schedule of the learning rate comes to its end. Some
end early or late for it: the tables print the minutes that each had and the patients that it saw. Then every model goes
on from there on ``thoracic`` until the second time is over (Table II); who was late has little of it.

All begin with random weights; with ``--start pretrained`` DIFR3CT goes on from those that ship instead, the any-view
model from the 4-view one. With ``--refine`` its first guess is a refined volume (:mod:`difr3ct_core.initial_volume`):
that of INRR3CT, at eight views of the one for four; ``--scan`` names a real CT, deformed copies of which are then a
part of what it learns from on ``lung``; with ``--vary`` variations of phantoms are
(:mod:`difr3ct_core.phantoms.variety`), and the guess itself learns from them first. ``--guess`` names INRR3CT's
weights, with which INRR3CT goes on too, as the control. ``detectors/8view`` is DIFR3CT on x-rays of imperfect
detectors (:func:`difr3ct_core.datasets.through_detectors`), for ``benchmarks/detectors.py``.

Writes into ``--out``: ``small-ldm-VIEWS.safetensors`` (bfloat16), ``tables.json`` and ``tables_COHORT.npz`` (as
``benchmarks/tables.py``), and ``steps.json``, what was trained for how many steps. Logs stay in ``--run``, and models
of the other cohorts and of ``detectors`` in its folder ``export``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _one_gpu import open_chapters
from _results import update_results

from difr3ct_core import training
from difr3ct_core.baselines.presets import get_baselines, with_training
from difr3ct_core.baselines.registry import METHODS, Options
from difr3ct_core.baselines.tables import compare, measure, middle_slices
from difr3ct_core.chapters import Chapter, project_root
from difr3ct_core.files import read_json, read_npz, write_json, write_npz, write_safetensors
from difr3ct_core.latents import encoded, solved
from difr3ct_core.presets import COHORTS, VIEW_SETS, Preset, get_preset
from difr3ct_core.results import device_name
from difr3ct_core.vqgan_losses import Perceptual
from difr3ct_core.weights import export_weights, load_initial, load_ldm, training_history

#: What differs from the preset, which CPUs train: larger batches, which a GPU computes in the same time.
INITIAL = {"batch_size": 16, "lr": 5e-4, "warmup_steps": 100}
REFINEMENT = {"batch_size": 16, "lr": 1e-3, "warmup_steps": 100, "ema_decay": 0.995, "precision": "auto",
              "betas": (0.9, 0.99), "channels_last": True}  # fmt: skip
LDM = {"batch_size": 32, "lr": 1e-3, "warmup_steps": 100, "ema_decay": 0.995}
BASELINES = {
    "inrr3ct": ["batch_size=8", "lr=0.0003", "warmup_steps=100"],
    "diffusion3d": ["batch_size=16", "warmup_steps=100", "ema_decay=0.995"],
}
QUIET = {"checkpoint_every_s": 1e6, "validate_every": 0}
#: Steps from which the time of one is reckoned, and the share of the time that is then planned for.
TRIAL, PLANNED = 40, 0.88
#: Share of DIFR3CT's time that its initial network gets.
INITIAL_SHARE = 0.5
REFINEMENT_SHARE = 0.6
#: With ``--vary``, of what the guess itself learns in before the refinement.
FIELD_SHARE = 0.4
#: Learning rates where DIFR3CT goes on from weights, and of the cohorts after the first, of those above.
FURTHER, SECOND = 0.7, 0.4
COMMAND = "python benchmarks/one_gpu.py"
#: Samples whose mean is scored; 3D Diffusion, in voxels, draws fewer.
SAMPLES, VOXEL_SAMPLES = 16, 8


@dataclass(frozen=True)
class Plan:
    """What the processes share."""

    out: Path
    run: Path
    data: Path
    patients: int
    ends: dict[str, float]  # cohort -> seconds of time.monotonic() at which its training is over
    smoke: int  # steps of every training, to try it out
    start: Path | None  # folder of weights that DIFR3CT goes on from
    refine: tuple[int, ...]  # widths of the network that refines its first guess; () for none
    guess: Path | None  # folder of INRR3CT's weights, COHORT-VIEWS.safetensors, whose volumes that is
    scan: Path | None  # a real CT, copies of which the refinement learns from
    vary: float  # variations for each patient of lung, from which the guess and its refinement learn too
    encoding: Any  # lock: one process encodes the volumes, the others read what it wrote


_stamps: list[float] = []


def _clock(steps: Any, *_: Any, **__: Any) -> Iterator[int]:
    """In the place of a progress bar: remembers when each step began."""
    _stamps.clear()
    for step in steps:
        _stamps.append(time.monotonic())
        yield step


def step_seconds() -> float:
    """Median time of a step of the last training, its first ones left out."""
    return float(np.median(np.diff(_stamps[len(_stamps) // 3 :]))) if len(_stamps) > 1 else 0.0


def jobs() -> list[tuple[str, str]]:
    """(method, views), the longest first."""
    trained = ("diffusion3d", "x2ctgan", "difr3ct", "inrr3ct")
    more = [("difr3ct", "any"), ("detectors", "8view"), ("naf", "")]
    return [(name, views) for name in trained for views in METHODS[name].view_sets] + more


class Job:
    """One process: one method and its views on both cohorts."""

    def __init__(self, name: str, views: str, chapters: dict[str, Chapter], plan: Plan) -> None:
        self.name, self.views, self.chapters, self.plan = name, views, chapters, plan
        self.done: dict[str, Any] = {}

    def train(self, cohort: str, stage: str, seconds: float, work: Callable[[int, int | None], Any]) -> None:
        """Train a stage for about so many seconds; ``work(steps, stop_after)`` trains."""
        began = time.monotonic()
        steps = self.plan.smoke
        if not steps:
            work(10**6, TRIAL)  # set aside by the training that follows, which has other numbers
            rest = seconds - (time.monotonic() - began)
            steps = max(TRIAL, round(PLANNED * rest / step_seconds() / 10) * 10)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        work(steps, None)
        self.done[f"{cohort}/{self.name}/{self.views}/{stage}"] = {
            "steps": steps,
            "seconds": round(time.monotonic() - began, 1),
            "step_s": round(step_seconds(), 5),
        }

    def run(self) -> None:
        """All cohorts, one after the other."""
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(1)
        training.progress = _clock
        for cohort, chapter in self.chapters.items():
            if self.name == "naf":
                for views in VIEW_SETS:
                    self.score(cohort, "naf", views, Options())
                continue
            if cohort != "lung" and (self.views == "any" or self.name == "detectors"):
                return
            if cohort == "intact" and (self.name, self.views) != ("difr3ct", "8view"):
                return
            begin = self.chapters["lung"].run if cohort != "lung" else None
            options = Options()
            if self.name in ("difr3ct", "detectors"):
                if self.name == "detectors":
                    chapter.detectors, chapter.run = True, self.plan.run / "detectors"
                self.latent_diffusion(cohort, chapter, begin)
            else:
                options = self.baseline(cohort, chapter, begin)
            if self.views != "any" and self.name != "detectors":
                for name in (self.name, "difr3ct_tv") if self.name == "difr3ct" else (self.name,):
                    self.score(cohort, name, self.views, options)
            write_json(self.plan.run / "done" / f"{self.name}-{self.views}.json", self.done)

    def left(self, cohort: str) -> float:
        """Seconds until the training on this cohort must be over."""
        return max(5.0, self.plan.ends[cohort] - time.monotonic())

    def beginning(self, begun: Path | None) -> tuple[Path | None, float]:
        """Weights that DIFR3CT begins with, and the share of the learning rates that is then right."""
        if begun is not None:
            return begun / f"ldm-{self.views}", SECOND
        if self.plan.start is None:
            return None, 1.0
        return self.plan.start / f"small-ldm-{'4view' if self.views == 'any' else self.views}.safetensors", FURTHER

    def guess_of(self, cohort: str, begin: Path | None) -> Path | None:
        """INRR3CT's weights of a cohort, with the refinement of ``begin`` if that has one; None if there are none."""
        views = self.views if self.views in METHODS["inrr3ct"].view_sets else "4view"  # of which it takes four
        found = self.plan.guess and self.plan.guess / f"{cohort}-{views}.safetensors"
        if not found or not found.exists():
            return None
        network, _, metadata = load_initial(found)
        before = None if begin is None else load_ldm(begin)
        if before is None or not before[2].initial.refine_widths:
            return found
        state = {**before[0].initial_network.state_dict(), **network.state_dict()}
        path = self.plan.run / "guess" / found.name
        told = training_history(before[3])
        history = [training for training in training_history(metadata) if training not in told]
        write_safetensors(path, state, {"kind": "initial", "preset": before[2].to_dict(), "history": history})
        return path

    def varied_guess(self, chapter: Chapter, preset: Preset, begin: Path | None, network: Path | None) -> Path:
        """The guess, that of ``network`` or ``begin``, trained further on variations too."""
        kept, chapter.run = chapter.run, chapter.run / "guess"

        def field(steps: int, stop_after: int | None) -> None:
            first = {**INITIAL, **QUIET, "steps": steps, "lr": FURTHER * INITIAL["lr"], "precision": "fp32"}
            chapter.preset = preset.replace(initial={"refine_widths": ()}, train_initial=first)
            chapter.initial(self.views, stop_after, begin, network, self.plan.scan)

        self.train("lung", "guess", FIELD_SHARE * self.left("lung"), field)
        found, chapter.run = chapter.run / f"initial-{self.views}", kept
        return found

    def latent_diffusion(self, cohort: str, chapter: Chapter, begun: Path | None) -> None:
        """Initial network and diffusion model, exported."""
        begin, rate = self.beginning(begun)
        preset = chapter.preset if begin is None else chapter.preset.replace(initial=load_ldm(begin)[2].initial)
        preset = preset.replace(initial={"second_from": 0.0})  # put in by join_second afterwards
        network = None
        if self.plan.refine:
            network = self.guess_of(cohort, begin) if cohort != "lung" or not preset.initial.in_voxels else None
            guess = {"solver": "none", "network": True, "in_voxels": True, "refine_widths": self.plan.refine}
            if cohort == "lung":
                guess |= {"varied": self.plan.vary, "doubted": 0.0} if self.plan.vary else {}
            if self.name == "detectors":  # whose guesses are wrong anyway, and whose x-rays are
                guess |= {"doubted": 0.0, "move_again": False}
            preset = preset.replace(initial=guess)
        any_view = self.views == "any"
        if cohort == "lung" and self.plan.vary and not any_view:
            network = self.varied_guess(chapter, preset, begin, network)
        train, vqgan = chapter.patients("train", None if any_view else self.views), chapter.vqgan()
        with self.plan.encoding:
            encoded(train, vqgan.to(chapter.device), chapter.run / "latents")
        if not any_view and self.name == "difr3ct":
            solved(train, vqgan, preset, chapter.run / "latents", chapter.device)
        share = REFINEMENT_SHARE if self.plan.refine else INITIAL_SHARE

        def initial(steps: int, stop_after: int | None) -> None:
            settings = REFINEMENT if self.plan.refine else INITIAL
            slower = 1.0 if self.plan.refine and cohort == "lung" else rate  # a refinement begins anew there
            first = {**settings, **QUIET, "steps": steps, "lr": slower * settings["lr"]}
            chapter.preset = preset.replace(train_initial=first)
            scan = self.plan.scan if cohort == "lung" and not any_view else None
            chapter.initial(self.views, stop_after, begin, network, scan)

        def ldm(steps: int, stop_after: int | None) -> None:
            second = {**LDM, **QUIET, "steps": steps, "lr": rate * LDM["lr"]}
            chapter.preset = chapter.preset.replace(train_ldm=second)
            chapter.ldm(self.views, stop_after, begin, chapter.run / f"initial-{self.views}")

        self.train(cohort, "initial", share * self.left(cohort), initial)
        self.train(cohort, "ldm", self.left(cohort), ldm)
        kind = "small" if cohort == "lung" else f"small-{cohort}"
        made = self.plan.run / "export" / f"{kind}-{'detectors' if self.name == 'detectors' else 'ldm'}-{self.views}"
        made = made.with_suffix(".safetensors")
        folder = chapter.run / f"ldm-{self.views}"
        export_weights(folder, made, autoencoder=made.with_name("small-vqgan.safetensors"))
        shutil.copy(folder / "log.csv", made.with_suffix(".csv"))
        shutil.copy(chapter.run / f"initial-{self.views}" / "log.csv", made.with_name(f"{made.stem}-initial.csv"))
        if cohort == "lung" and self.name == "difr3ct":
            shutil.copy(made, self.plan.out / made.name)

    def baseline(self, cohort: str, chapter: Chapter, begun: Path | None) -> Options:
        """A network of its own; returns with which options it was trained."""
        begin = begun / f"{self.name}-{self.views}" if begun else None
        if self.name == "inrr3ct":  # what DIFR3CT refines goes on, as the control
            begin = self.guess_of(cohort, None) or begin
        changes = BASELINES.get(self.name, [])
        settings = with_training(getattr(get_baselines(chapter.preset.name), self.name), changes)
        rate = settings.training.lr * (SECOND if begin else 1.0)
        options = Options()

        def work(steps: int, stop_after: int | None) -> None:
            nonlocal options
            words = [*changes, f"steps={steps}", "checkpoint_every_s=1e6", f"lr={rate}"]
            options = Options(stop_after, words, begin)
            METHODS[self.name].prepare(chapter, self.views, options)

        self.train(cohort, "train", self.left(cohort), work)
        return options

    def score(self, cohort: str, name: str, views: str, options: Options) -> None:
        """One row of a table."""
        chapter, out = self.chapters[cohort], self.plan.out
        chapter.preset = chapter.preset.replace(
            sampling={"n_samples": VOXEL_SAMPLES if name == "diffusion3d" else SAMPLES}
        )
        look = Perceptual(chapter.vgg16).to(chapter.device) if chapter.vgg16 is not None else None
        entry, slices = measure(chapter, name, views, self.plan.patients, look, options)
        key = f"{cohort}/{name}/{views}"
        update_results(out / "tables.json", {key: entry}, COMMAND, device_name(chapter.device))
        write_npz(self.plan.run / "slices" / f"{cohort}_{name}_{views}.npz", slices=slices)
        print(f"{time.monotonic() - _began:6.1f} s  {key:34s} {entry['value']:6.2f} dB", flush=True)


_began = time.monotonic()


def _work(name: str, views: str, chapters: dict[str, Chapter], plan: Plan) -> None:
    log = open(plan.run / "done" / f"{name}-{views}.log", "w")  # noqa: SIM115
    sys.stderr = log
    try:
        Job(name, views, chapters, plan).run()
    except BaseException:
        print(f"{name}/{views}: {traceback.format_exc()}", flush=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", required=True, help="of lung, thoracic, intact: names or JSON files")
    parser.add_argument("--data", type=Path, required=True, help="folder with the cohorts of these presets")
    parser.add_argument("--run", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", nargs="+", type=float, default=[360, 150, 60], help="of each cohort")
    parser.add_argument("--grace-s", type=float, default=60, help="for the last scores")
    parser.add_argument("--start", type=Path, help="folder of weights that DIFR3CT goes on from (default: random ones)")
    parser.add_argument("--refine", nargs="+", type=int, default=[], help="widths: DIFR3CT refines its first guess")
    parser.add_argument(
        "--guess", type=Path, help="folder of INRR3CT's weights to be refined, COHORT-VIEWS.safetensors"
    )
    parser.add_argument("--scan", type=Path, help="with --refine: a real CT, copies of which are learned from on lung")
    parser.add_argument(
        "--vary", type=float, default=0.0, metavar="SHARE", help="with --refine: variations of each patient of lung"
    )
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--smoke", type=int, default=0, metavar="STEPS", help="try everything with so few steps")
    parser.add_argument("--only", nargs="+", help="jobs such as difr3ct/2view (default: all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.scan or options.vary) and not options.refine:
        parser.error("--scan, --vary: are for a refinement; give --refine as well")
    for folder in (options.out, *(options.run / name for name in ("done", "export", "guess", "slices"))):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(project_root() / "pretrained" / "small-vqgan.safetensors", options.run / "export")
    presets = {name: get_preset(given) for name, given in zip(COHORTS, options.presets, strict=False)}
    if len(options.presets) > len(COHORTS) or len(options.seconds) < len(presets):
        parser.error("expected at most three presets, and --seconds for each")
    chapters = open_chapters(options.run, options.data, presets, options.device, options.scan, options.vary)
    chosen = [job for job in jobs() if options.only is None or "/".join(job) in options.only]
    context = multiprocessing.get_context("fork")
    now = time.monotonic()
    ends = dict(zip(presets, (now + np.cumsum(options.seconds)).tolist(), strict=False))
    plan = Plan(
        options.out, options.run, options.data, options.patients, ends, options.smoke, options.start,
        tuple(options.refine), options.guess, options.scan, options.vary, context.Lock(),
    )  # fmt: skip
    print(f"{now - _began:6.1f} s  data read, {len(chosen)} processes start", flush=True)
    running = [context.Process(target=_work, args=(*job, chapters, plan), daemon=True) for job in chosen]
    for process in running:
        process.start()
    for process in running:
        process.join(max(0.0, max(ends.values()) + options.grace_s - time.monotonic()))
    late = [job for job, process in zip(chosen, running, strict=True) if process.is_alive()]
    for process in running:
        process.terminate()
    done = {}
    for path in sorted((options.run / "done").glob("*.json")):
        done |= read_json(path)
    write_json(options.out / "steps.json", done)
    for cohort, chapter in chapters.items():
        shown = {"truth": middle_slices(chapter.patients("test").hu[0])}
        for path in sorted((options.run / "slices").glob(f"{cohort}_*.npz")):
            shown[path.stem.removeprefix(f"{cohort}_")] = read_npz(path)["slices"]
        write_npz(options.out / f"tables_{cohort}.npz", **shown)
        if (options.out / "tables.json").exists():
            of_cohort = {k: v for k, v in read_json(options.out / "tables.json").items() if k.startswith(f"{cohort}/")}
            if tested := compare(of_cohort):
                update_results(options.out / "tables.json", tested, "", measured=False)
    failed = [job for job, process in zip(chosen, running, strict=True) if process.exitcode not in (0, -15)]
    print(f"{time.monotonic() - _began:6.1f} s  late: {late}; failed: {failed}", flush=True)
    print(json.dumps(done))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
