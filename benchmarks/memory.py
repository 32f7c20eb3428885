"""Memory of one training step on one patient, by method and number of views (§V-E: latents against voxels).

    python benchmarks/memory.py [--preset small]

Each figure comes from a process of its own, on the CPU in fp32: two steps (loss, gradients, Adam) of batch 1 on one
whole volume, peak resident memory minus what the process held before the model was made. INRR3CT is measured on every
voxel of the volume, as it is described, and on the random ones that its preset takes instead. The autoencoder is the
first stage of DIFR3CT and sees no x-ray. Writes ``results/memory.json``:

- ``METHOD/VIEWS``: GB, such as ``difr3ct/8view``;
- ``ratio_diffusion3d_8view``, ``ratio_inrr3ct_8view``: the others' memory over that of DIFR3CT's diffusion.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch
from _results import update_results
from models import peak_of

from difr3ct_core.baselines.diffusion3d import VoxelDiffusion
from difr3ct_core.baselines.inrr3ct import INRR3CT
from difr3ct_core.baselines.presets import get_baselines
from difr3ct_core.baselines.x2ctgan import X2CTGAN
from difr3ct_core.datasets import preset_views
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.presets import get_preset
from difr3ct_core.vqgan import VQGAN

RESULTS = Path(__file__).parent / "results" / "memory.json"
COUNTS = {"1view_frontal": 1, "2view": 2, "4view": 4, "8view": 8}
METHODS = {
    "difr3ct": "DIFR3CT, diffusion",
    "vqgan": "DIFR3CT, autoencoder",
    "diffusion3d": "3D Diffusion",
    "inrr3ct": "INRR3CT, every voxel",
    "inrr3ct_random": "INRR3CT, random voxels",
    "x2ctgan": "X2CT-GAN",
}


def step_gb(method: str, view_set: str, preset_name: str) -> float:
    """GB that two steps of a method take, in this process."""
    preset, baselines = get_preset(preset_name), get_baselines(preset_name)
    views = preset_views(preset, view_set)
    torch.manual_seed(0)
    truth = torch.rand(1, 1, *preset.volume.shape) * 2 - 1
    xrays = torch.rand(1, len(views), *views[0].detector_shape)

    def two_steps() -> None:
        critic: torch.nn.Module | None = None
        if method == "difr3ct":
            model: torch.nn.Module = LatentDiffusion(preset)
            latent = torch.randn(1, *preset.latent_shape)
            known = torch.randn(1, *preset.latent_shape) if preset.has_initial else None
        elif method == "vqgan":
            model = VQGAN(preset.vqgan)
        elif method == "diffusion3d":
            model = VoxelDiffusion(preset, baselines.diffusion3d, views)
        elif method == "x2ctgan":
            model = X2CTGAN(preset, baselines.x2ctgan, views)
            critic = model.critic()
        else:
            points = truth.numel() if method == "inrr3ct" else baselines.inrr3ct.points
            model = INRR3CT(preset, dataclasses.replace(baselines.inrr3ct, most_views=8, points=points), views)
        optimisers = [torch.optim.Adam(module.parameters()) for module in (model, critic) if module is not None]
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            if method == "difr3ct":
                loss = model.loss(latent, xrays, views, generator, slice(0, 1), 1, known)[0]
            elif method == "vqgan":
                loss = model.loss(truth, generator)[0]
            else:
                loss = model.loss(truth, xrays, generator, slice(0, 1), 1, critic)[0]
            loss.backward()
            if critic is not None:
                critic.loss()[0].backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()

    return peak_of(two_steps)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "VIEWS"), help="measure here, print GB")
    options = parser.parse_args()
    if options.one:
        print(step_gb(*options.one, options.preset))
        return 0
    figures = {}
    for method, title in METHODS.items():
        for view_set, count in COUNTS.items():
            if (method == "x2ctgan" and count > 2) or (method == "vqgan" and count > 1):
                continue
            done = subprocess.run(
                [sys.executable, __file__, "--preset", options.preset, "--one", method, view_set],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                print(f"memory: {method}, {view_set}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            key = f"{method}/{view_set}"
            figures[key] = {"value": float(done.stdout), "unit": "GB", "title": title, "preset": options.preset}
            print(f"{key:32s} {figures[key]['value']:.2f} GB", flush=True)
    own = figures["difr3ct/8view"]["value"]
    for method in ("diffusion3d", "inrr3ct", "inrr3ct_random"):
        if (other := figures.get(f"{method}/8view")) is not None:
            figures[f"ratio_{method}_8view"] = {"value": other["value"] / own, "unit": "x", "preset": options.preset}
    update_results(RESULTS, figures, f"python benchmarks/memory.py --preset {options.preset}")
    print(json.dumps({key: round(f["value"], 2) for key, f in figures.items() if key.startswith("ratio")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
