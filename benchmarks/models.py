"""Our networks beside MONAI's: time, memory and quality in one run, one thread each.

    pip install monai                                # in an environment of its own
    OMP_NUM_THREADS=1 python benchmarks/models.py [unet] [vqgan] [curves] [paper]

Peers take turns with us in one process, and seconds are those of the processor (one thread), so that a busy machine
slows nobody's figure. Memory is the growth of the peak of a process of its own. Writes ``results/models.json`` (the
figures) and ``results/models_table.json`` (what is behind them).

- ``unet``: one training step of the denoiser at a 16³ latent, against DiffusionModelUNet with as many parameters.
- ``vqgan``: seconds until our VQGAN reaches the PSNR on held-out phantoms that VQVAE, with as many parameters, has
  after 300 of its steps; 64³, same phantoms, same batches. Needs the cohort of preset `small`.
- ``curves``: time and memory against size and number of views.
- ``paper``: one optimiser step of both stages at 128³ and the paper's batch of 1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _memory import forget_peak, status_bytes
from _results import update_results
from torch import nn

from difr3ct_core.datasets import batch_index, load_patients, preset_views
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.files import read_json, write_json
from difr3ct_core.metrics import psnr
from difr3ct_core.presets import Preset, TrainPreset, get_preset
from difr3ct_core.progress import progress
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.results import device_name, git_commit
from difr3ct_core.training import learning_rate
from difr3ct_core.unet import UNet3d
from difr3ct_core.vqgan import VQGAN
from difr3ct_core.vqgan_losses import Critics

RESULTS = Path(__file__).parent / "results"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/models.py"
LATENT = 16


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def nearest(make: Callable[[Any], nn.Module], target: int, candidates: Iterable[Any]) -> nn.Module:
    """The module whose number of parameters is nearest to ``target``; only that one is really made."""

    def distance(candidate: Any) -> int:
        with torch.device("meta"):
            return abs(count(make(candidate)) - target)

    return make(min(candidates, key=distance))


def ours_unet(preset_name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    preset = get_preset(preset_name)
    k = preset.condition_channels
    z, c, t = torch.randn(1, 8, *[LATENT] * 3), torch.randn(1, k, *[LATENT] * 3), torch.tensor([500])
    return UNet3d(8, k, preset.unet), lambda net: net(z, t, c).square().mean()


def peer_unet(preset_name: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    from monai.networks.nets import DiffusionModelUNet

    preset = get_preset(preset_name)
    k, widths = preset.condition_channels, preset.unet.widths

    def make(channels: tuple[int, ...]) -> nn.Module:
        return DiffusionModelUNet(
            spatial_dims=3,
            in_channels=8 + k,
            out_channels=8,
            channels=channels,
            norm_num_groups=8,
            attention_levels=[level >= preset.unet.attention_from_level for level in range(len(widths))],
            num_res_blocks=preset.unet.blocks_per_level,
            num_head_channels=8,
        )

    x, t = torch.randn(1, 8 + k, *[LATENT] * 3), torch.tensor([500])
    with torch.device("meta"):
        target = count(UNet3d(8, k, preset.unet))
    # Ratios of widths like ours, up to the multiples of 8 that its normalisation wants.
    candidates = [
        (*(8 * round(first * w / widths[0] / 8) for w in widths[:-1]), 8 * last)
        for first in range(widths[0] // 2, widths[0] + 9, 8)
        for last in range(widths[-1] // 16, widths[-1] // 8 + 3)
    ]
    return nearest(make, target, candidates), lambda net: net(x, t).square().mean()


def step_seconds(net: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> float:
    """Processor seconds of one forward and backward pass."""
    net.zero_grad(set_to_none=True)
    begin = time.process_time()
    loss(net).backward()
    return time.process_time() - begin


def peak_of(work: Callable[[], Any]) -> float:
    """Growth of this process's peak memory over ``work``, in GB (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was used before and is free again would serve unseen
    before = forget_peak()
    work()
    return (status_bytes("VmHWM") - before) / 1e9


def in_own_process(*words: str) -> dict[str, float]:
    """Call one of :data:`TASKS` in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--task", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-800:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def unet(rounds: int) -> tuple[dict, dict]:
    """The denoisers of `small`, whose latent this is (the figures), and of `paper`, at the same 16³ latent."""
    figures, table = {}, {}
    for preset_name in ("small", "paper"):
        pairs = {"ours": ours_unet(preset_name), "MONAI DiffusionModelUNet": peer_unet(preset_name)}
        times: dict[str, list[float]] = {name: [] for name in pairs}
        for number in progress(range(-2, rounds), f"denoiser step, {preset_name}"):
            for name, (net, loss) in pairs.items():
                seconds = step_seconds(net, loss)
                if number >= 0:
                    times[name].append(seconds)
        ours, peer = pairs
        rows: dict[str, Any] = {
            name: {
                "parameters": count(net),
                "seconds": median(times[name]),
                "rounds": times[name],
                "peak_gb": in_own_process("unet", name, preset_name)["peak_gb"],
            }
            for name, (net, _) in pairs.items()
        }
        table[f"unet_{preset_name}"] = rows
        end = "" if preset_name == "small" else f"_{preset_name}"
        ratio = median(a / b for a, b in zip(times[ours], times[peer], strict=True))
        figures[f"unet_time_ratio{end}"] = {"value": ratio, "unit": "x"}
        figures[f"unet_memory_ratio{end}"] = {"value": rows[ours]["peak_gb"] / rows[peer]["peak_gb"], "unit": "x"}
    return figures, table


def task_unet(name: str, preset_name: str) -> dict[str, float]:
    net, loss = (ours_unet if name == "ours" else peer_unet)(preset_name)
    return {"peak_gb": peak_of(lambda: loss(net).backward())}


def vqgan(
    data: Path, steps: int, batch: int, peer_rates: list[float], our_rate: float, our_steps: int
) -> tuple[dict, dict]:
    """Train the peer with each rate; take its best PSNR; train ours until it is reached."""
    from monai.networks.nets import VQVAE

    preset = get_preset("small")
    train, held_out = load_patients(data, "train", 256), load_patients(data, "val", 8).unit()
    target = count(VQGAN(preset.vqgan))

    def make(width: int) -> nn.Module:
        return VQVAE(
            spatial_dims=3, in_channels=1, out_channels=1, channels=(width, width), num_res_channels=(width, width),
            num_res_layers=2, downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            num_embeddings=preset.vqgan.codebook_size, embedding_dim=preset.vqgan.latent_channels,
        )  # fmt: skip

    def quality(forward: Callable[[torch.Tensor], torch.Tensor]) -> float:
        with torch.no_grad():
            return float(psnr(torch.cat([forward(v).clamp(-1, 1) for v in held_out.split(2)]), held_out, 2.0).mean())

    def run(
        net: nn.Module, loss: Callable, forward: Callable, rate: float, steps: int, every: int, until: float
    ) -> list[dict]:
        """A curve of processor seconds of training and PSNR."""
        settings = TrainPreset(steps=steps, batch_size=batch, lr=rate, warmup_steps=20)
        optimiser = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.5, 0.9))
        spent, curve = 0.0, []
        for step in progress(range(steps), f"{type(net).__name__} at {rate:g}"):
            volume = train.unit(batch_index(len(train), batch, step, 0))
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings, step)
            begin = time.process_time()
            optimiser.zero_grad(set_to_none=True)
            loss(volume, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            spent += time.process_time() - begin
            if (step + 1) % every == 0:
                net.eval()
                curve.append({"step": step + 1, "seconds": spent, "psnr": quality(forward)})
                net.train()
                if curve[-1]["psnr"] >= until:
                    break
        return curve

    curves: dict[str, Any] = {}
    before = read_json(RESULTS / "models_table.json").get("vqgan", {}) if not peer_rates else {}
    curves |= {name: one for name, one in before.get("curves", {}).items() if name != "ours"}
    for rate in peer_rates:
        torch.manual_seed(0)
        peer = nearest(make, target, range(36, 57, 4)).train()

        def peer_loss(volume: torch.Tensor, step: int, peer: nn.Module = peer) -> torch.Tensor:
            reconstruction, quantisation = peer(volume)
            return preset.vqgan.l1_weight * (reconstruction - volume).abs().mean() + quantisation

        curve = run(peer, peer_loss, lambda v, peer=peer: peer(v)[0], rate, steps, steps, float("inf"))
        curves[f"MONAI VQVAE, rate {rate:g}"] = {"parameters": count(peer), "curve": curve}
    best = max(curves.values(), key=lambda one: one["curve"][-1]["psnr"])["curve"][-1]
    torch.manual_seed(0)
    net, generator = VQGAN(preset.vqgan).train(), torch.Generator().manual_seed(0)
    curve = run(
        net, lambda v, step: net.loss(v, generator)[0], lambda v: net(v)[0], our_rate, our_steps, 20, best["psnr"]
    )
    curves["ours"] = {"parameters": count(net), "curve": curve, "reached": curve[-1]["psnr"] >= best["psnr"]}
    figures = {}
    if curves["ours"]["reached"]:
        ratio = curve[-1]["seconds"] / best["seconds"]
        figures["vqgan_time_to_quality_ratio"] = {"value": ratio, "unit": "x", "peer_psnr": best["psnr"]}
    return figures, {"vqgan": {"steps": steps, "batch": batch, "curves": curves}}


def sized(size: int) -> Preset:
    """Preset `small` on a grid of another size."""
    return get_preset("small").replace(volume={"size": size}, xray={"detector_size": size})


def task_sample(size: str, views: str) -> dict[str, float]:
    """One posterior sample, from x-rays to volume, with random weights."""
    preset = sized(int(size))
    ldm, autoencoder = LatentDiffusion(preset).eval(), VQGAN(preset.vqgan).eval()
    seen = preset_views(preset)[: int(views)]
    xrays = torch.rand(1, len(seen), preset.xray.detector_size, preset.xray.detector_size)
    posterior_samples(ldm, autoencoder, xrays, seen, 1, steps=1)
    begin = time.process_time()
    peak = peak_of(lambda: posterior_samples(ldm, autoencoder, xrays, seen, 1))
    return {"seconds": time.process_time() - begin, "peak_gb": peak}


def task_step(stage: str, preset_name: str, size: str) -> dict[str, float]:
    """One optimiser step of a stage at batch 1, the VQGAN with its discriminators where the preset has them."""
    preset = get_preset(preset_name)
    preset = preset.replace(volume={"size": int(size)}, xray={"detector_size": int(size)})
    net: nn.Module = VQGAN(preset.vqgan).train() if stage == "vqgan" else LatentDiffusion(preset).train()
    modules = [net]
    volume = torch.rand(1, 1, *preset.volume.shape) * 2 - 1
    if stage == "vqgan":
        on = preset.vqgan.image_gan_weight > 0
        critics = Critics(preset.vqgan) if on else None
        modules += [critics] if on else []
        late = preset.vqgan.gan_start + preset.vqgan.gan_ramp
        middle = torch.tensor([preset.volume.size // 2])
    else:
        views = preset_views(preset)
        latent, xrays = torch.randn(1, *preset.latent_shape), torch.rand(1, 8, int(size), int(size))
    optimisers = [torch.optim.Adam(one.parameters(), 1e-4) for one in modules]

    def work() -> None:
        if stage == "ldm":
            net.loss(latent, xrays, views)[0].backward()
        elif critics is None:
            net.loss(volume)[0].backward()
        else:
            critics.requires_grad_(False)
            net.loss(volume, judge=lambda real, fake: critics.judge(real, fake, late, middle))[0].backward()
            critics.requires_grad_(True)
            critics.loss()[0].backward()
        for optimiser in optimisers:
            optimiser.step()

    begin = time.process_time()
    weights = 4 * sum(count(one) for one in modules) / 1e9
    peak = peak_of(work) + weights  # the weights were there before
    return {"seconds": time.process_time() - begin, "peak_gb": peak, "parameters": float(sum(map(count, modules)))}


def curves() -> tuple[dict, dict]:
    table: dict[str, Any] = {"size": {}, "views": {}}
    for size in progress((32, 64, 96, 128), "cost against size"):
        table["size"][str(size)] = {
            "sample": in_own_process("sample", str(size), "8"),
            "vqgan_step": in_own_process("step", "vqgan", "small", str(size)),
            "ldm_step": in_own_process("step", "ldm", "small", str(size)),
        }
    for views in progress((1, 2, 4, 8), "cost against views"):
        table["views"][str(views)] = {"sample": in_own_process("sample", "64", str(views))}
    return {}, {"curves": table}


def paper() -> tuple[dict, dict]:
    rows = {stage: in_own_process("step", stage, "paper", "128") for stage in ("vqgan", "ldm")}
    note = {"unit": "GB", "precision": "fp32 on a CPU, without VGG16"}
    figures = {f"paper_{stage}_step_gb": {"value": row["peak_gb"], **note} for stage, row in rows.items()}
    return figures, {"paper": rows}


TASKS: dict[str, Callable[..., dict[str, float]]] = {"unet": task_unet, "sample": task_sample, "step": task_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help="unet, vqgan, curves, paper (default: all)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--data", type=Path, default=Path("data/small-lung"), help="cohort for the VQGANs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--peer-rates", type=float, nargs="*", default=[3e-4, 1e-3], help="none: as measured before")
    parser.add_argument("--our-rate", type=float, default=get_preset("small").train_vqgan.lr)
    parser.add_argument("--our-steps", type=int, default=300, help="length of our schedule")
    parser.add_argument("--task", nargs="+", help="only print what one measurement gives (used by this script)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.task:
        print(json.dumps(TASKS[options.task[0]](*options.task[1:])))
        return
    run = {
        "unet": lambda: unet(options.rounds),
        "vqgan": lambda: vqgan(
            options.data, options.steps, options.batch, options.peer_rates, options.our_rate, options.our_steps
        ),
        "curves": curves,
        "paper": paper,
    }
    for part in options.parts or run:
        figures, table = run[part]()
        path = RESULTS / "models_table.json"
        everything = read_json(path) if path.exists() else {}
        origin = {"command": f"{COMMAND} {part}", "commit": git_commit(), "device": device_name() + ", 1 thread"}
        for name, rows in table.items():
            everything[name] = {**rows, "provenance": origin}
        write_json(path, everything)
        if figures:
            update_results(RESULTS / "models.json", figures, f"{COMMAND} {part}")
        print(json.dumps({key: figure["value"] for key, figure in figures.items()}, indent=1))


if __name__ == "__main__":
    main()
