#!/usr/bin/env python3
"""How many volumes a second the training of the paper's diffusion model sees on a GPU, and what memory it takes.

    python benchmarks/throughput.py [--preset paper] [--batches 1 8 32]

The training loop is the real one (:func:`difr3ct_core.training.fit`), with fusion, denoiser, Adam and the moving
average; latents and x-rays are noise, of which the time does not depend. The paper: 868 volumes x 500 epochs in 4 days
on an A100, 1.26 volumes a second. Writes ``h200_ldm_volumes_per_s`` (named after the GPU) into ``results/models.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _results import update_results

from difr3ct_core.datasets import batch_index, preset_views
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.presets import get_preset
from difr3ct_core.results import device_name
from difr3ct_core.stages import _prepare
from difr3ct_core.training import TrainingError, fit

PATIENTS = 64
EVERY = 5  # steps between two looks at the clock


def volumes_per_second(preset_name: str, batch: int, looks: int, compiled: bool) -> dict[str, float]:
    """Median over ``looks`` stretches of a training, the first two left out; and the peak of the GPU's memory in GB."""
    preset = get_preset(preset_name)
    settings = {"batch_size": batch, "channels_last": True, "compile": compiled, "validate_every": EVERY}
    preset = preset.replace(
        train_ldm={**settings, "steps": EVERY * (looks + 2), "log_every": 10**6, "checkpoint_every_s": 1e6}
    )
    torch.manual_seed(0)
    model = LatentDiffusion(preset).cuda()
    _prepare([model.unet], preset.train_ldm)
    views = preset_views(preset)
    latents = torch.randn(PATIENTS, *preset.latent_shape, device="cuda")
    xrays = torch.rand(PATIENTS, len(views), *views[0].detector_shape)
    stamps: list[float] = []

    def loss(step: int, generator: torch.Generator, part: slice) -> tuple[torch.Tensor, dict]:
        rows = batch_index(PATIENTS, batch, step, 0)[part]
        return model.loss(latents[rows.cuda()], xrays[rows].cuda(), views, generator, part, batch)

    def look(_: torch.nn.Module) -> dict[str, float]:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return {}

    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        fit(model, loss, preset.train_ldm, folder, {}, "throughput", 0, look)
    seconds = float(np.median(np.diff(stamps)[1:]))
    return {"volumes_per_s": EVERY * batch / seconds, "gb": torch.cuda.max_memory_allocated() / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--looks", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "models.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("throughput: found no GPU, expected one; run it on a machine with CUDA.", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name().split()[-1].lower()
    rows = {}
    for batch in options.batches:
        with contextlib.suppress(TrainingError):  # too little memory for this batch
            rows[str(batch)] = volumes_per_second(options.preset, batch, options.looks, options.compile)
            print(f"batch {batch}: {rows[str(batch)]}", flush=True)
    best = max(rows, key=lambda batch: rows[batch]["volumes_per_s"])
    figure = {"value": rows[best]["volumes_per_s"], "unit": "volumes/s", "batch": int(best), "by_batch": rows}
    figure |= {"preset": options.preset, "compiled": options.compile}
    command = " ".join(["python benchmarks/throughput.py", *sys.argv[1:]])
    update_results(options.out, {f"{name}_ldm_volumes_per_s": figure}, command, device_name("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
