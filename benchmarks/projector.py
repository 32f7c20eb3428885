"""Our projector beside ITK-RTK, ASTRA and nanodrr: time, error and memory in one run, one thread each.

    pip install itk-rtk astra-toolbox nanodrr        # in an environment of its own; what is missing is reported so
    OMP_NUM_THREADS=1 python benchmarks/projector.py [--rounds 9] [--peak TOOL MODE]

All tools get the same 128³ volume and the same eight views. They take turns in rounds, so that a busy machine slows
all of them alike; a speed-up is the median over the rounds of the ratio within a round. Writes
``results/projector.json`` (the figures) and ``results/projector_table.json`` (all tables and curves behind them).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _memory import forget_peak, status_bytes
from _peers import PEERS
from _phantoms import blobs, chest, solids
from _results import update_results

from difr3ct_core.drr import backproject, clear_cache, project, project_rays
from difr3ct_core.drr.exact import exact_projection, sample_phantom
from difr3ct_core.files import write_json
from difr3ct_core.geometry import View, standard_views
from difr3ct_core.progress import progress
from difr3ct_core.results import device_name, git_commit

RESULTS = Path(__file__).parent / "results"
COMMAND = "OMP_NUM_THREADS=1 python benchmarks/projector.py"
FOV, SIZE = 320.0, 128
MODES = ("parallel", "cone")
SLOW = ("nanodrr",)  # seconds a call: two rounds are enough


class Ours:
    """The fast sparse projector, behind the same face as its peers."""

    name = "ours"
    package = "difr3ct-core"
    modes = MODES

    def __init__(self, views: tuple[View, ...], shape: tuple[int, int, int], spacing: float, threads: int) -> None:
        torch.set_num_threads(threads)
        self.views, self.shape, self.spacing = views, shape, spacing

    def volume(self, mu: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(mu)[None, None].contiguous()

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return project(volume, self.views, self.spacing)

    def adjoint(self, stack: torch.Tensor) -> torch.Tensor:
        return backproject(stack, self.views, self.shape, self.spacing)

    def array(self, stack: torch.Tensor) -> np.ndarray:
        return stack[0, 0].numpy()


class Definition(Ours):
    """Our ray marching, which the sparse form must equal."""

    name = "ours, ray marching"

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return project_rays(volume, self.views, self.spacing)


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def copy_bandwidth(size: int = 2**26, repeats: int = 9) -> float:
    """Bytes a second, read plus written, of copying 256 MB: what the memory gives to one thread."""
    source, target = torch.ones(size), torch.zeros(size)
    return 2 * 4 * size / min(seconds(target.copy_, source) for _ in range(repeats))


def make_tools(
    mode: str, size: int = SIZE, kinds: tuple[type, ...] = (Ours, *PEERS)
) -> tuple[list[Any], dict[str, str]]:
    """The tools that are installed and know ``mode``, and why the others are missing."""
    views = standard_views("8view", size, FOV, mode)
    tools, missing = [], {}
    for kind in kinds:
        if mode not in kind.modes:
            continue
        try:
            tools.append(kind(views, (size,) * 3, FOV / size, threads=1))
        except ImportError as error:
            missing[kind.name] = str(error)
    return tools, missing


def time_all(tools: list[Any], mu: np.ndarray, rounds: int, label: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward and of forward plus adjoint, for every tool in every round."""
    inputs = {tool.name: tool.volume(mu) for tool in tools}
    times = {tool.name: {"forward": [], "both": []} for tool in tools}
    for number in progress(range(-1, rounds), label):
        for tool in tools:
            if tool.name in SLOW and number >= 2:
                continue
            volume = inputs[tool.name]
            both = getattr(tool, "both", None) or (lambda v, tool=tool: tool.adjoint(tool.forward(v)))
            # The quick ones are taken often enough within a round to be steady.
            repeats = 9 if isinstance(tool, Ours) else 1
            pair = [median(seconds(f, volume) for _ in range(repeats)) for f in (tool.forward, both)]
            if number >= 0:  # the first round only warms up
                times[tool.name]["forward"].append(pair[0])
                times[tool.name]["both"].append(pair[1])
    return times


def speed_up(times: dict[str, dict[str, list[float]]], what: str) -> tuple[float, str]:
    """Median ratio within a round to the fastest peer, and who that is."""
    peers = {name: median(value[what]) for name, value in times.items() if name != Ours.name}
    fastest = min(peers, key=peers.__getitem__)
    ratios = [a / b for a, b in zip(times[fastest][what], times[Ours.name][what], strict=False)]
    return median(ratios), fastest


def peak_of(tool: str, mode: str) -> None:
    """Print the growth of this process's peak memory over one forward projection (run in a process of its own)."""
    (one,), _ = make_tools(mode, kinds=tuple(kind for kind in (Ours, *PEERS) if kind.name == tool))
    volume = one.volume(np.ones((SIZE,) * 3, np.float32))
    # Importing takes more than projecting, so the peak so far is forgotten first (Linux).
    before = forget_peak()
    one.forward(volume)
    print(json.dumps(status_bytes("VmHWM") - before))


def memory(tool: str, mode: str) -> float | None:
    """Bytes that :func:`peak_of` finds, or None where the system keeps no such account."""
    command = [sys.executable, __file__, "--peak", tool, mode]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(answer.stdout.strip().splitlines()[-1]) if answer.returncode == 0 else None


def accuracy() -> tuple[dict[str, Any], np.ndarray]:
    """Errors against exact integrals at three resolutions, and the blobs at the full one."""
    curves: dict[str, Any] = {}
    for phantom, shapes, fine in (("blobs", blobs(), 1), ("ellipsoids", solids(), 4), ("chest", chest(), 4)):
        for size in progress((SIZE // 4, SIZE // 2, SIZE), f"error, {phantom}"):
            mu = sample_phantom(shapes, (size,) * 3, FOV / size, supersample=fine).float().numpy()
            if phantom == "blobs" and size == SIZE:
                full = mu
            for mode in MODES:
                exact = exact_projection(shapes, standard_views("8view", size, FOV, mode)).numpy()
                for tool in make_tools(mode, size, (Ours, Definition, *PEERS))[0]:
                    error = relative(tool.array(tool.forward(tool.volume(mu))), exact)
                    curves.setdefault(phantom, {}).setdefault(mode, {}).setdefault(tool.name, {})[str(size)] = error
        for mode in MODES:
            for errors in curves[phantom][mode].values():
                errors["order"] = math.log2(errors[str(SIZE // 2)] / errors[str(SIZE)])
    return curves, full


def costs() -> dict[str, Any]:
    """Our milliseconds (median of 7) against size and number of views."""
    table: dict[str, Any] = {}
    for mode in MODES:
        cases = [("size", n, n, [22.5 * i for i in range(8)]) for n in (32, 64, 96, 128)]
        cases += [("views", n, SIZE, [180 * i / n for i in range(n)]) for n in (1, 2, 4, 8, 16, 32)]
        for kind, key, size, angles in progress(cases, f"cost, {mode}"):
            clear_cache()
            tool = Ours(standard_views(angles, size, FOV, mode), (size,) * 3, FOV / size, 1)
            volume = tool.volume(np.ones((size,) * 3, np.float32))
            built = seconds(tool.forward, volume)
            stack = tool.forward(volume)
            tool.adjoint(stack)
            row = {
                "forward_ms": 1e3 * median(seconds(tool.forward, volume) for _ in range(7)),
                "adjoint_ms": 1e3 * median(seconds(tool.adjoint, stack) for _ in range(7)),
                "build_ms": 1e3 * built,
            }
            table.setdefault(mode, {}).setdefault(kind, {})[str(key)] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of interleaved timing")
    parser.add_argument("--peak", nargs=2, metavar=("TOOL", "MODE"), help="only print the memory that one tool takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        return peak_of(*arguments.peak)
    bandwidth = copy_bandwidth()
    curves, mu = accuracy()
    table: dict[str, Any] = {"missing": {}, "modes": {}, "error": curves}
    figures: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        tools, missing = make_tools(mode)
        table["missing"].update(missing)
        times = time_all(tools, mu, arguments.rounds, f"time, {mode}")
        rows = {}
        for tool in tools:
            name = tool.name
            rows[name] = {
                "forward_ms": 1e3 * median(times[name]["forward"]),
                "both_ms": 1e3 * median(times[name]["both"]),
                "forward_ms_rounds": [1e3 * value for value in times[name]["forward"]],
                "both_ms_rounds": [1e3 * value for value in times[name]["both"]],
                "blob_error": curves["blobs"][mode][name][str(SIZE)],
                "ellipsoid_error": curves["ellipsoids"][mode][name][str(SIZE)],
                "chest_error": curves["chest"][mode][name][str(SIZE)],
                "peak_mb": _mega(memory(name, mode)),
            }
        ours = rows[Ours.name]
        # What must move at least: the volume read once, the x-rays written once.
        least = 4 * (SIZE**3 + 8 * SIZE**2)
        share = least / (ours["forward_ms"] / 1e3) / bandwidth
        table["modes"][mode] = {"rows": rows, "bandwidth_share": share}
        figures[f"{mode}_error"] = {"value": ours["blob_error"], "unit": "relative L2"}
        figures[f"{mode}_ellipsoid_error"] = {"value": ours["ellipsoid_error"], "unit": "relative L2"}
        figures[f"{mode}_bandwidth_share"] = {"value": share, "unit": "of copying speed"}
        if len(tools) > 1:
            for key, what in ((f"{mode}_speedup", "forward"), (f"{mode}_adjoint_speedup", "both")):
                ratio, fastest = speed_up(times, what)
                figures[key] = {"value": ratio, "unit": "x", "fastest_peer": fastest}
    table["cost"] = costs()
    table["copy_gb_per_s"] = bandwidth / 1e9
    table["provenance"] = {
        "command": COMMAND, "commit": git_commit(), "device": device_name(), "load_average": os.getloadavg()[0],
        "rounds": arguments.rounds, "versions": {t.name: _version(t.package) for t in PEERS},
    }  # fmt: skip
    write_json(RESULTS / "projector_table.json", table)
    update_results(RESULTS / "projector.json", figures, COMMAND)
    columns = {
        "forward_ms": 1,
        "both_ms": 1,
        "blob_error": 100,
        "ellipsoid_error": 100,
        "chest_error": 100,
        "peak_mb": 1,
    }
    for mode in MODES:
        print(f"\n{mode:20}" + "".join(f"{name + ' %' * (factor == 100):>18}" for name, factor in columns.items()))
        for name, row in table["modes"][mode]["rows"].items():
            print(f"{name:20}" + "".join(f"{factor * (row[key] or math.nan):18.3f}" for key, factor in columns.items()))
    for name, reason in table["missing"].items():
        print(f"missing: {name} ({reason})")
    print(json.dumps({key: figure["value"] for key, figure in figures.items()}, indent=1))


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*Sparse|.*swig|.*Swig")
    main()
