"""How far to believe a reconstruction: agreement with the x-rays, coverage of intervals, misplaced x-rays.

    python benchmarks/trust.py [--preset small] [--patients 8] [--samples 8] [--interval-patients 24]

On held-out phantoms, and on the real scan apart (keys with ``real_``). PSNR with the peak of the HU window. "Solver" is
total variation on the same x-rays, with the trunk's outline at one and two views. Writes ``results/trust.json``:

- ``consistency_gain_VIEWS``: mean of corrected samples over the solver, dB; every way of correction and its seconds are
  in ``ways``;
- ``residual_ratio``: re-projection error as drawn over that of corrected samples (8 views);
- ``coverage_90``: of conformal intervals fitted on the validation split, of the test split's body, and
  ``coverage_90_ORGAN``, on ``--interval-patients`` of each split: patients differ, and few of them say little; with
  ``coverage_90_known``, overall and in ``organs``, of intervals that are told which organ a voxel belongs to;
- ``error_uncertainty_rank_correlation``: of spread and error of the mean, in the body;
- ``pose_psnr_loss``, ``pose_psnr_recovered``: x-rays up to 5 degrees and 10 mm off, dB; with ``_in_place``, where the
  motion that all views share, which is one of the patient, is taken out of what is wrong and of what was found.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from _results import update_results

from difr3ct_core import consistency
from difr3ct_core.baselines.classical import tv_body
from difr3ct_core.chapters import Chapter, open_chapter
from difr3ct_core.ct import unit_to_hu
from difr3ct_core.datasets import Patients, render_xrays
from difr3ct_core.detector import jitter_views
from difr3ct_core.geometry import View
from difr3ct_core.initial import first_guess
from difr3ct_core.metrics import psnr
from difr3ct_core.phantoms import LABELS
from difr3ct_core.pose import moved_together, recover_views
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.sampling import dpm_solver_pp_2m, gaussian, guided
from difr3ct_core.uncertainty import fit_by_organ, fit_conformal, organ_weight, rank_correlation

ROOT = Path(__file__).resolve().parents[1]
VIEWS = {"8view": "8view", "4view": "4view", "2view": "2view", "1view": "1view_frontal"}
WAYS = ("none", "lsq", "spread", "tv")


def decibels(volumes: torch.Tensor, patients: Patients) -> torch.Tensor:
    """PSNR of the mean over samples, one a patient."""
    return psnr(volumes.mean(1, keepdim=True), patients.unit(), 2.0)


def misfit(volumes: torch.Tensor, patients: Patients, chapter: Chapter) -> float:
    pairs = zip(volumes, patients.xrays, strict=True)
    found = [consistency.residual(v, p, patients.views, chapter.preset).mean() for v, p in pairs]
    return float(torch.stack(found).mean())


def corrected(volumes: torch.Tensor, patients: Patients, chapter: Chapter, way: str, **more: Any) -> torch.Tensor:
    pairs = zip(volumes, patients.xrays, strict=True)
    return torch.stack([consistency.correct(v, p, patients.views, chapter.preset, way, **more) for v, p in pairs])


def proximal(chapter: Chapter, view_set: str, patients: Patients, samples: int, below: int) -> torch.Tensor:
    """Samples whose clean latent is decoded, corrected and encoded again at the late steps of the sampling."""
    ldm, vqgan, preset = chapter.ldm(view_set), chapter.vqgan(), chapter.preset
    volumes = []
    with torch.inference_mode():
        for i in range(len(patients)):
            one = patients.take([i])
            guess = first_guess(ldm, vqgan, one.xrays, one.views)
            lost = 0.0 if guess.lost is None else guess.lost
            condition = ldm.condition(one.xrays, one.views, guess.latent).expand(samples, -1, -1, -1, -1)
            z = gaussian((samples, *preset.latent_shape), [torch.Generator().manual_seed(j) for j in range(samples)])

            def move(volume: torch.Tensor, one: Patients = one) -> torch.Tensor:
                return consistency.correct(volume[:, 0], one.xrays[0], one.views, preset, "tv", iterations=15)[:, None]

            def decode(latent: torch.Tensor, lost: Any = lost) -> torch.Tensor:
                return vqgan.decode(latent) + lost

            def encode(volume: torch.Tensor, lost: Any = lost) -> torch.Tensor:
                return vqgan.encode(volume - lost)

            denoise = guided(ldm.unet, ldm.schedule, condition)
            model = consistency.proximal_model(denoise, move, decode, encode, below)
            latent = dpm_solver_pp_2m(model, z, ldm.schedule, preset.sampling.steps)
            volumes.append(decode(latent)[:, 0])
    return torch.stack(volumes)


def agreement(chapter: Chapter, patients: Patients, mark: str, samples: int, full: bool) -> dict[str, dict[str, Any]]:
    """Every way of correction on every set of views."""
    figures: dict[str, dict[str, Any]] = {}
    volume, vqgan = chapter.preset.volume, chapter.vqgan()
    for short, name in VIEWS.items():
        some = patients.with_views(name)
        began = time.perf_counter()
        drawn = posterior_samples(chapter.ldm(name), vqgan, some.xrays, some.views, samples)
        drawing = (time.perf_counter() - began) / len(some) / samples
        began = time.perf_counter()
        mu = tv_body(some.xrays, some.views, volume.shape, volume.spacing_mm)
        alone = consistency.to_unit(mu, chapter.preset)[:, None]
        took = (time.perf_counter() - began) / len(some)
        solver = float(decibels(alone, some).mean())
        rows = {"solver": {"psnr": solver, "misfit": misfit(alone, some, chapter), "seconds": took}}
        for way in WAYS:
            began = time.perf_counter()
            moved = corrected(drawn, some, chapter, way)
            rows[way] = {
                "psnr": float(decibels(moved, some).mean()),
                "sample_psnr": float(decibels(moved[:, :1], some).mean()),
                "misfit": misfit(moved, some, chapter),
                "seconds": drawing + (time.perf_counter() - began) / len(some) / samples,
            }
        if full and short in ("8view", "2view"):
            for below in (100, 400):
                began = time.perf_counter()
                inside = proximal(chapter, name, some.take(range(min(4, len(some)))), min(samples, 4), below)
                took = (time.perf_counter() - began) / inside.shape[0] / inside.shape[1]
                few = some.take(range(len(inside)))
                after = corrected(inside, few, chapter, "tv")
                rows[f"proximal below t = {below}"] = {
                    "psnr": float(decibels(inside, few).mean()),
                    "misfit": misfit(inside, few, chapter),
                    "then_tv_psnr": float(decibels(after, few).mean()),
                    "same_patients_tv_psnr": float(
                        decibels(corrected(drawn[: len(few), : inside.shape[1]], few, chapter, "tv"), few).mean()
                    ),
                    "seconds": took,
                    "patients": len(few),
                }
        figures[f"{mark}consistency_gain_{short}"] = {
            "value": rows["tv"]["psnr"] - solver, "unit": "dB", "patients": len(some), "samples": samples, "ways": rows,
        }  # fmt: skip
        if short == "8view" and not mark:
            figures["residual_ratio"] = {"value": rows["none"]["misfit"] / rows["tv"]["misfit"], "unit": "x"}
        print(mark, short, json.dumps(rows), flush=True)
    return figures


def intervals(chapter: Chapter, count: int, samples: int, view_set: str = "2view") -> dict[str, dict[str, Any]]:
    """Conformal intervals fitted on validation patients, tested on test patients, of plain and corrected samples."""
    figures: dict[str, dict[str, Any]] = {}
    drawn: dict[str, tuple[Patients, torch.Tensor]] = {}
    for split in ("val", "test"):
        some = chapter.patients(split, view_set)
        some = some.take(range(min(count, len(some))))
        found = posterior_samples(chapter.ldm(view_set), chapter.vqgan(), some.xrays, some.views, samples)
        drawn[split] = (some, found)
    for way, mark in (("none", ""), ("tv", "_consistent")):
        parts = {}
        for split, (some, found) in drawn.items():
            hu = unit_to_hu(corrected(found, some, chapter, way), chapter.preset.volume)
            parts[split] = (some, hu.mean(1), hu.std(1), some.hu.float())
        body = {split: part[0].labels != LABELS["air"] for split, part in parts.items()}
        calibrating, where = parts["val"][0], body["val"]
        numbers = torch.arange(len(calibrating))[:, None, None, None].expand(where.shape)
        patient = numbers[where]
        weight = organ_weight(calibrating.labels[where])
        fitted = fit_conformal(*(v[where] for v in parts["val"][1:]), 0.9, patient=patient, weight=weight)
        test, mean, std, truth = parts["test"]
        inside, where = fitted.coverage(mean, std, truth), body["test"]
        width = fitted.half_width(mean, std)
        raw = float(((truth - mean).abs() <= 1.6449 * std)[where].double().mean())
        by_patient = [100 * float(held[own].double().mean()) for held, own in zip(inside, where, strict=True)]
        figures[f"coverage_90{mark}"] = {
            "value": 100 * float(inside[where].double().mean()), "unit": "%", "views": view_set, "samples": samples,
            "patients": len(test), "calibration_patients": len(calibrating), "by_patient": by_patient,
            "mean_half_width_hu": float(width[where].mean()), "uncalibrated": 100 * raw, "asked": 100 * fitted.asked,
        }  # fmt: skip
        known = fit_by_organ(*(v[body["val"]] for v in parts["val"][1:]), calibrating.labels[body["val"]], patient)
        told = torch.zeros_like(inside)
        organs = {}
        for organ, label in LABELS.items():
            own = test.labels == label
            if organ == "air" or label not in known or int(own.sum()) < 5e-4 * own.numel():
                continue
            told[own] = known[label].coverage(mean[own], std[own], truth[own])
            organs[organ] = {
                "value": 100 * float(told[own].double().mean()),
                "mean_half_width_hu": float(known[label].half_width(mean[own], std[own]).mean()),
            }
        of_these = torch.isin(test.labels, torch.tensor([LABELS[organ] for organ in organs], dtype=torch.uint8))
        figures[f"coverage_90_known{mark}"] = {
            "value": 100 * float(told[of_these].double().mean()), "unit": "%", "views": view_set, "organs": organs,
            "organs_88_to_92": sum(88 <= o["value"] <= 92 for o in organs.values()),
        }  # fmt: skip
        if not mark:
            for organ, label in LABELS.items():
                own = test.labels == label
                if organ != "air" and int(own.sum()) >= 5e-4 * own.numel():
                    figures[f"coverage_90_{organ}"] = {
                        "value": 100 * float(inside[own].double().mean()), "unit": "%",
                        "mean_half_width_hu": float(width[own].mean()),
                    }  # fmt: skip
        figures[f"error_uncertainty_rank_correlation{mark}"] = {
            "value": rank_correlation(std[where], (mean - truth).abs()[where]), "unit": "of 1", "views": view_set,
        }  # fmt: skip
    return figures


def places(chapter: Chapter, patients: Patients, view_set: str = "8view") -> dict[str, dict[str, Any]]:
    """X-rays up to 5 degrees and 10 mm off: unknown, and found again."""
    ldm, vqgan, preset = chapter.ldm(view_set), chapter.vqgan(), chapter.preset
    nominal, volume = patients.with_views(view_set).views, preset.volume
    scores: dict[str, list[float]] = {
        name: [] for name in ("exact", "off", "recovered", "off_in_place", "recovered_in_place")
    }

    def quality(xrays: torch.Tensor, views: tuple[View, ...], one: Patients) -> float:
        return float(decibels(posterior_samples(ldm, vqgan, xrays, views, 2), one))

    for i in range(len(patients)):
        one = patients.take([i])
        true = jitter_views(nominal, 5.0, 10.0, torch.Generator().manual_seed(i))
        xrays = render_xrays(one.hu.float(), true, volume, preset.xray)
        guess = nominal
        for _ in range(4):
            drawn = posterior_samples(ldm, vqgan, xrays, guess, 2)
            found = consistency.to_mu(drawn[0].mean(0), preset)
            guess = recover_views(found, xrays[0], guess, volume.spacing_mm, coarse=max(volume.size // 32, 1))
        for name, views in (("exact", true), ("off", nominal), ("recovered", guess)):
            scores[name].append(quality(xrays, tuple(views), one))
            if name != "exact":
                scores[f"{name}_in_place"].append(quality(xrays, moved_together(views, true), one))
    mean = {key: sum(values) / len(values) for key, values in scores.items()}
    about = {"unit": "dB", "patients": len(patients), "views": view_set, "psnr": mean}
    return {
        "pose_psnr_loss": {"value": mean["exact"] - mean["off"], **about},
        "pose_psnr_recovered": {"value": mean["recovered"] - mean["off"], **about},
        "pose_psnr_loss_in_place": {"value": mean["exact"] - mean["off_in_place"], **about},
        "pose_psnr_recovered_in_place": {"value": mean["recovered_in_place"] - mean["off_in_place"], **about},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--interval-patients", type=int, default=24, help="of each split, for coverage_90")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--parts", nargs="+", default=["agreement", "real", "intervals", "places"])
    parser.add_argument("--inside", action="store_true", help="also correct inside the sampling, which takes long")
    options = parser.parse_args()
    chapter = open_chapter("trust", options.preset, options.data)
    test = chapter.patients("test")
    some = test.take(range(min(options.patients, len(test))))
    figures: dict[str, dict[str, Any]] = {}
    if "agreement" in options.parts:
        figures |= agreement(chapter, some, "", options.samples, full=options.inside)
    if "real" in options.parts and chapter.real is not None:
        figures |= agreement(chapter, chapter.real, "real_", options.samples, full=False)
    if "intervals" in options.parts:
        figures |= intervals(chapter, options.interval_patients, options.samples)
    if "places" in options.parts:
        figures |= places(chapter, some.take(range(min(4, len(some)))))
    words = f"python benchmarks/trust.py --preset {options.preset} --patients {options.patients}"
    words += f" --interval-patients {options.interval_patients}"
    update_results(ROOT / "benchmarks" / "results" / "trust.json", figures, f"{words} --samples {options.samples}")
    print(json.dumps({key: round(figure["value"], 3) for key, figure in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
