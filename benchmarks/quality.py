"""What the shipped models reach on held-out phantoms, and on the real scan apart.

    python benchmarks/quality.py [--preset small] [--patients 16] [--samples 8]

PSNR with the peak of the HU window (2500); add 4.29 dB for the "12-bit" peak of 4095 (stored beside it). SSIM with an
11³ Gaussian. "Mean" is the mean of the samples, "sample" one of them, averaged over patients. Writes
``results/quality_small.json``. Keys without a trained model of their own are left out; ``any_view`` ones are the
any-view model on those views. ``initial`` is what the initial network says, decoded, without any diffusion.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _results import update_results

from difr3ct_core.baselines.classical import METHODS
from difr3ct_core.chapters import open_chapter
from difr3ct_core.ct import hu_to_mu, hu_to_unit, mu_to_hu
from difr3ct_core.datasets import Patients
from difr3ct_core.initial import first_guess
from difr3ct_core.metrics import psnr, ssim, to_12_bit
from difr3ct_core.presets import VIEW_SETS
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.weights import load_ldm

ROOT = Path(__file__).resolve().parents[1]


def scores(volume: torch.Tensor, truth: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"psnr": psnr(volume, truth, 2.0), "ssim": ssim(volume, truth, 2.0)}


def classical(patients: Patients, view_set: str, preset: Any) -> torch.Tensor:
    """Total variation (with the body's outline at 1 and 2 views), in [-1, 1]."""
    seen, volume, water = patients.with_views(view_set), preset.volume, preset.xray.mu_water_per_mm
    bounds = tuple(float(hu_to_mu(torch.tensor(hu), water)) for hu in (volume.hu_min, volume.hu_max))
    mu = METHODS["tv_body"](seen.xrays, seen.views, volume.shape, volume.spacing_mm, bounds)
    return hu_to_unit(mu_to_hu(mu, water).clamp(volume.hu_min, volume.hu_max), volume)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--models", nargs="+", help="measure only these diffusion models, such as 8view any")
    options = parser.parse_args()
    chapter = open_chapter("quality", options.preset, options.data)
    preset, window = chapter.preset, chapter.preset.volume.hu_max - chapter.preset.volume.hu_min
    test = chapter.patients("test")
    test = test.take(range(options.patients))
    sets = [("", test)] + ([("real_", chapter.real)] if chapter.real is not None else [])
    figures: dict[str, dict[str, Any]] = {}

    def note(key: str, found: dict[str, torch.Tensor], patients: int, **drawn: int) -> None:
        for metric, values in found.items():
            name = f"{metric}_{key}" if not key.startswith("vqgan") else key.replace("vqgan", f"vqgan_{metric}")
            spread = float(values.std()) if patients > 1 else 0.0
            more = {"psnr_4095": to_12_bit(float(values.mean()), window)} if metric == "psnr" else {}
            unit = "dB" if metric == "psnr" else "of 1"
            figures[name] = {
                "value": float(values.mean()),
                "unit": unit,
                "std": spread,
                "patients": patients,
                **drawn,
                **more,
            }
            print(f"{name:40} {float(values.mean()):8.3f} ± {spread:.3f}", flush=True)

    vqgan = chapter.vqgan()
    for prefix, patients in sets if not options.models else []:
        truth = patients.unit()
        with torch.inference_mode():
            decoded = torch.cat([vqgan.decode(vqgan.encode(part)) for part in truth.split(4)])
        end = "_real" if prefix else ""
        note(f"vqgan{end}", scores(decoded, truth), len(patients))
    figures["codebook_alive"] = {"value": vqgan.live_codes(), "unit": "of 1"}
    models = [(name, name, "") for name in VIEW_SETS] + [("any", name, "any_view_") for name in VIEW_SETS]
    for model, view_set, mark in models:
        if options.models and model not in options.models:
            continue
        path = chapter.weights(f"ldm-{model}")
        if not path.exists() or (model != "any" and path.name.endswith("ldm-any.safetensors")):
            continue
        ldm, autoencoder, *_ = load_ldm(path, chapter.device)
        for prefix, patients in sets:
            seen, truth = patients.with_views(view_set), patients.unit()
            drawn = posterior_samples(ldm, autoencoder, seen.xrays, seen.views, options.samples)
            key = f"{prefix}{mark}{view_set}"
            note(key, scores(drawn.mean(1, keepdim=True), truth), len(patients), samples=options.samples)
            single = scores(drawn[:, :1], truth)
            for metric, values in single.items():
                unit = "dB" if metric == "psnr" else "of 1"
                figures[f"sample_{metric}_{key}"] = {"value": float(values.mean()), "unit": unit}
            if ldm.initial_network is not None:
                with torch.inference_mode():
                    guess = first_guess(ldm, autoencoder, seen.xrays.to(chapter.device), seen.views)
                    volume = autoencoder.decode(guess.latent)
                    volume = volume if guess.lost is None else volume + guess.lost
                note(f"{prefix}initial_{mark}{view_set}", scores(volume.cpu(), truth), len(patients))
    for prefix, patients in sets if not options.models else []:
        for view_set in VIEW_SETS:
            found = {"psnr": psnr(classical(patients, view_set, preset), patients.unit(), 2.0)}
            note(f"{prefix}classical_{view_set}", found, len(patients))
    if not options.models:
        mean = chapter.patients("train").hu.double().mean(0).float()[None, None]
        note(
            "mean_volume",
            {"psnr": psnr(hu_to_unit(mean, preset.volume).expand_as(test.unit()), test.unit(), 2.0)},
            len(test),
        )
    path = ROOT / "benchmarks" / "results" / f"quality_{options.preset}.json"
    words = f"--preset {options.preset} --patients {options.patients} --samples {options.samples}"
    update_results(path, figures, f"python benchmarks/quality.py {words}")
    print(json.dumps({key: round(figure["value"], 3) for key, figure in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
