"""What a posterior sample costs, and what fewer steps lose: one run, ratios of ourselves.

    python benchmarks/sampling.py [--weights pretrained/small-ldm-8view.safetensors] [--patients 8]

Two threads. Seconds are wall time, except where two ways take turns, which are compared by processor seconds. Writes
into ``results/models.json``:

- ``sample_seconds``: one 64³ sample from eight x-rays with 20 steps, x-ray encoding and decoding included;
- ``dpm_vs_ddpm_db``, ``dpm_vs_ddpm_time_ratio``: 20 steps of DPM-Solver++ against 1000 ancestral ones;
- ``mc100_time_ratio``, ``mc100_peak_gb``: 100 samples within 3 GB, against ten times ten calls for one sample (of which
  ten are made), each of which encodes the x-rays; ``encoded_once`` is the ratio to one call that encodes them once and
  draws its samples one at a time, which leaves what the batch alone saves.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _results import update_results
from models import peak_of

from difr3ct_core.datasets import load_patients
from difr3ct_core.metrics import psnr
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.weights import load_ldm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "models.json"


def clock(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``work`` returns, its wall seconds and its processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "pretrained" / "small-ldm-8view.safetensors")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "small-lung")
    parser.add_argument("--patients", type=int, default=8, help="for the comparison of solvers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["one", "hundred", "solvers"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ldm, vqgan, _, _ = load_ldm(options.weights)
    test = load_patients(options.data, "test", options.patients).with_views("8view")
    one = test.xrays[:1]
    figures: dict[str, dict[str, Any]] = {}

    def draw(n: int, xrays: torch.Tensor = one, **more: Any) -> torch.Tensor:
        return posterior_samples(ldm, vqgan, xrays, test.views, n, **more)

    draw(1, steps=2)  # warm up
    if "one" in options.parts:
        runs = [clock(lambda: draw(1))[1:] for _ in range(5)]
        figures["sample_seconds"] = {
            "value": median(wall for wall, _ in runs), "unit": "s", "processor_seconds": median(cpu for _, cpu in runs),
        }  # fmt: skip
    if "hundred" in options.parts:
        found: list[tuple] = []
        peak = peak_of(lambda: found.append(clock(lambda: draw(100, memory_gb=2.5))))
        _, _, together = found[0]
        _, _, calls = clock(lambda: [draw(1, seed=i) for i in range(10)])
        _, _, single = clock(lambda: draw(10, batch=1))
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        figures["mc100_time_ratio"] = {
            "value": together / (10 * calls), "unit": "x", "encoded_once": together / (10 * single),
            "processor_seconds": together,
        }  # fmt: skip
        figures["mc100_peak_gb"] = {"value": total, "unit": "GB", "sampling_alone_gb": peak}
    if "solvers" in options.parts:
        truth = test.unit()
        seconds, quality = {}, {}
        for solver, steps in (("dpm++2m", 20), ("ddpm", 1000)):
            drawn, _, seconds[solver] = clock(lambda s=solver, n=steps: draw(2, test.xrays, solver=s, steps=n))
            quality[solver] = float(psnr(drawn.mean(1, keepdim=True), truth, 2.0).mean())
        figures["dpm_vs_ddpm_db"] = {
            "value": quality["dpm++2m"] - quality["ddpm"], "unit": "dB", "psnr": quality, "patients": len(test),
        }  # fmt: skip
        ratio = seconds["dpm++2m"] / seconds["ddpm"]
        figures["dpm_vs_ddpm_time_ratio"] = {"value": ratio, "unit": "x"}
    update_results(RESULTS, figures, f"python benchmarks/sampling.py --weights {options.weights.name}")
    print(json.dumps({key: figure["value"] for key, figure in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
