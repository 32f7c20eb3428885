"""What imperfect detectors cost (simulated): a model that learned from exact x-rays, and one that learned from theirs.

    python benchmarks/detectors.py [--preset small] [--views 8view] [--patients 8] [--samples 4] [--trained RUN]

On held-out phantoms, PSNR of the mean with the peak of the HU window: as drawn, corrected
(:mod:`difr3ct_core.consistency`), and of total variation alone. ``RUN`` holds the other model; without it, its
figures stay as they were measured before. For instance of

    S="--preset small --views 8view --detectors --run RUN --weights pretrained/small-ldm-8view.safetensors"
    I='initial.solver="none" initial.in_voxels=true initial.widths=[32,64,96,96] initial.features=128
       initial.refine_widths=[32,48,64] initial.move_again=false'
    python -m difr3ct_core.training --stage initial $S --set steps=150 batch_size=4 lr=0.0006 warmup_steps=10 $I
    python -m difr3ct_core.training --stage ldm $S --network RUN/initial-8view \\
        --set steps=15 lr=0.0003 warmup_steps=5 $I

What is refined takes seconds for each patient on a CPU. That of ``results/trust.json`` learned on an H200
(``benchmarks/one_gpu.py``, the third run): 520 steps of 16 and 470 of 32, of 1280 phantoms through such detectors and
320 copies of a real CT, whose x-rays were exact by an error of ours, since mended; its answer is not moved to the
x-rays again (``initial.move_again``).

Writes into ``results/trust.json`` one entry for each condition, ``detector_CONDITION``: ``value`` of the samples as
drawn, and in ``exact`` and ``trained`` every way of each model. The solver knows nothing of either.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from _results import update_results
from trust import corrected, decibels

from difr3ct_core import consistency
from difr3ct_core.baselines.classical import tv_body
from difr3ct_core.chapters import Chapter, open_chapter
from difr3ct_core.datasets import Patients
from difr3ct_core.detector import Detector, detect
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.files import read_json
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.weights import latents_digest, load_ldm

ROOT = Path(__file__).resolve().parents[1]
CONDITIONS = {
    "ideal": Detector(),
    "photons_1e3": Detector(i0=1e3),
    "photons_1e4": Detector(i0=1e4),
    "photons_1e5": Detector(i0=1e5),
    "photons_1e6": Detector(i0=1e6),
    "blur_2.5mm": Detector(blur_mm=2.5),
    "scatter_0.1": Detector(scatter_to_primary=0.1),
    "gain_+5%": Detector(gain_error=0.05),
}


def quality(volumes: torch.Tensor, patients: Patients) -> dict[str, Any]:
    """PSNR of the mean over samples (patient, sample, z, y, x): mean over patients, and each."""
    values = decibels(volumes, patients)
    return {"psnr": float(values.mean()), "patients": [round(float(v), 3) for v in values]}


def ways(ldm: LatentDiffusion, chapter: Chapter, seen: Patients, samples: int) -> dict[str, Any]:
    """As drawn and corrected."""
    drawn = posterior_samples(ldm, chapter.vqgan(), seen.xrays, seen.views, samples, chapter.seed)
    return {"none": quality(drawn, seen), "tv": quality(corrected(drawn, seen, chapter, "tv"), seen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--views", default="8view")
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--trained", type=Path, help="run of a model that learned from such x-rays")
    options = parser.parse_args()
    chapter = open_chapter("detectors", options.preset, options.data)
    test = chapter.patients("test", options.views)
    some = test.take(range(min(options.patients, len(test))))
    models, results = {"exact": chapter.ldm(options.views)}, ROOT / "benchmarks" / "results" / "trust.json"
    before = read_json(results) if options.trained is None else {}
    if options.trained is not None:
        models["trained"], autoencoder, _, metadata = load_ldm(options.trained / f"ldm-{options.views}", chapter.device)
        if latents_digest(autoencoder) != latents_digest(chapter.vqgan()):
            raise SystemExit(f"{options.trained}: was trained with another autoencoder; begin it with --weights.")
        about = {"trainings": metadata["history"], "detectors": metadata["fingerprint"].get("detectors")}
    volume, figures = chapter.preset.volume, {}
    for name, detector in CONDITIONS.items():
        noise = torch.Generator().manual_seed(chapter.seed)
        seen = dataclasses.replace(some, xrays=detect(some.xrays, some.views, detector, noise))
        mu = tv_body(seen.xrays, some.views, volume.shape, volume.spacing_mm)
        found = {key: ways(ldm, chapter, seen, options.samples) for key, ldm in models.items()}
        if options.trained is None:
            about, found["trained"] = (before[f"detector_{name}"][key] for key in ("training", "trained"))
        figures[f"detector_{name}"] = {
            "value": found["exact"]["none"]["psnr"], "unit": "dB", "patients": len(some), "samples": options.samples,
            "views": options.views, "training": about,
            "solver": quality(consistency.to_unit(mu, chapter.preset)[:, None], some), **found,
        }  # fmt: skip
        row = {key: {way: round(v["psnr"], 2) for way, v in found[key].items()} for key in found}
        print(f"{name}: solver {figures[f'detector_{name}']['solver']['psnr']:.2f} {row}", flush=True)
    words = f"python benchmarks/detectors.py --preset {options.preset} --views {options.views}"
    words += f" --patients {options.patients} --samples {options.samples}{' --trained RUN' if options.trained else ''}"
    update_results(results, figures, words)


if __name__ == "__main__":
    main()
