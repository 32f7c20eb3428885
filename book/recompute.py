"""Numbers that the book prints, computed again from the arrays of the same saved result.

Each function takes a :class:`~difr3ct_core.results.Result` and yields ``(name, number, tolerance)``: the name is the
path in the result's values ("psnr.8view"), the tolerance what rounding of the stored arrays (whole HU, half
precision) can do. Formulas are written out here, not imported from where the numbers were first computed; SSIM is the
exception. What the arrays do not determine, such as a mean over patients of whom one is stored, has no formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from difr3ct_core.presets import get_preset
from difr3ct_core.results import Result

Found = Iterator[tuple[str, float, float]]
FORMULAS: dict[str, Callable[[Result], Found]] = {}
#: Tolerance of decibels from volumes that were stored as whole HU or in half precision.
DB = 0.02
EXACT = 1e-6


def formula(*names: str) -> Callable[[Callable[[Result], Found]], Callable[[Result], Found]]:
    """Register the formulas of the results called so."""

    def register(function: Callable[[Result], Found]) -> Callable[[Result], Found]:
        FORMULAS.update(dict.fromkeys(names, function))
        return function

    return register


def double(array: np.ndarray) -> np.ndarray:
    """As float64."""
    return np.asarray(array, dtype=np.float64)


def rms(array: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(double(array)))))


def decibels(found: np.ndarray, truth: np.ndarray, low: float, high: float, clip: bool = True) -> float:
    """PSNR of HU volumes whose peak is the window."""
    found, truth = double(found), double(truth)
    if clip:
        found, truth = found.clip(low, high), truth.clip(low, high)
    return 20 * math.log10((high - low) / rms(found - truth))


def window(result: Result, preset: str | None = None) -> tuple[float, float]:
    """The HU window of the preset that made the result."""
    volume = get_preset(preset or result.provenance["preset"]).volume
    return volume.hu_min, volume.hu_max


@formula("quickstart_ambiguity")
def _ambiguity(result: Result) -> Found:
    xrays, volumes = double(result.arrays["xrays"]), double(result.arrays["volumes"])
    for i, (xray, volume) in enumerate(zip(xrays, volumes, strict=True)):
        yield f"misfit_percent.{i}", 100 * rms(xray - xrays[0]) / rms(xrays[0]), 0.01
        yield f"distance_hu.{i}", rms(volume - volumes[0]), 0.5


@formula("quickstart_phantom", "quickstart_real")
def _quickstart(result: Result) -> Found:
    a, limits = result.arrays, window(result)
    each = [decibels(sample, a["truth"], *limits) for sample in a["samples"]]
    for i, value in enumerate(each):
        yield f"psnr_samples.{i}", value, DB
    yield "psnr_one", float(np.mean(each)), DB
    yield "psnr_mean", decibels(a["mean"], a["truth"], *limits), DB
    yield "n_samples", len(each), 0
    yield "rms_error", rms(double(a["mean"]) - double(a["truth"])), 0.2
    yield "rms_std", rms(a["std"]), 0.002 * rms(a["std"]) + EXACT
    yield "mean_ct_hu", float(double(a["truth"]).mean()), 1e-2
    yield "ssim_mean", _ssim(a["mean"], a["truth"], *limits), 2e-3


def _ssim(found: np.ndarray, truth: np.ndarray, low: float, high: float) -> float:
    import torch

    from difr3ct_core.metrics import ssim

    # In [-1, 1], which is part of the convention: the luminance term compares means with zero.
    pair = (
        torch.from_numpy(2 * (double(volume).clip(low, high) - low) / (high - low) - 1)[None, None]
        for volume in (found, truth)
    )
    return float(ssim(*pair, data_range=2.0))


@formula("xray_one_ray")
def _one_ray(result: Result) -> Found:
    v = result.values
    yield "line_integral", float(double(result.arrays["mu"]).sum() * v["spacing_mm"]), 1e-4
    yield "photons_percent", 100 * math.exp(-v["projector"]), 1e-3


@formula("xray_beams")
def _beams(result: Result) -> Found:
    a, v = result.arrays, result.values
    magnified = v["dsd_mm"] / (v["dso_mm"] - double(a["depth_mm"]))
    yield "centre", float(magnified[len(magnified) // 2]), 1e-5
    yield "range_percent", float(100 * (magnified[-1] / magnified[0] - 1)), 1e-3
    yield "worst_percent", float(100 * np.abs(double(a["measured_cone"]) / magnified - 1).max()), 1e-3


@formula("xray_two_ways")
def _two_ways(result: Result) -> Found:
    fast = double(result.arrays["fast"])
    for i, other in enumerate(double(result.arrays["others"])):
        yield f"percent.{i}", 100 * rms(fast - other) / rms(other), 1e-3


@formula("xray_convergence")
def _convergence(result: Result) -> Found:
    size = double(result.arrays["size"])
    for mode in ("parallel", "cone"):
        error = double(result.arrays[mode])
        yield f"slope_{mode}", -math.log(error[-1] / error[0]) / math.log(size[-1] / size[0]), 1e-4


@formula("xray_solvers")
def _solvers(result: Result) -> Found:
    limits = window(result, "small")  # the chapter's grid at every preset
    for method, row in result.values["psnr"].items():
        for name in row:
            volume = result.arrays[f"{method}-{name}"]
            yield f"psnr.{method}.{name}", decibels(volume, result.arrays["truth"], *limits, clip=False), DB


@formula("fusion_ramp")
def _ramp(result: Result) -> Found:
    for key in ("plain", "filtered"):
        for i, picture in enumerate(double(result.arrays[key])):
            yield f"rms_{key}.{i}", rms(picture - double(result.arrays["truth"])), 0.5


@formula("fusion_mistakes")
def _mistakes(result: Result) -> Found:
    stars = double(result.arrays["fused"])
    for i, star in enumerate(stars):
        yield f"peak_percent.{i}", float(100 * star.max() / stars[0].max()), 0.2


@formula("vqgan_ceiling")
def _ceiling(result: Result) -> Found:
    limits = window(result)
    for i, pair in enumerate(zip(result.arrays["decoded"], result.arrays["truth"], strict=True)):
        yield f"psnr.{i}", decibels(*pair, *limits), DB
    width = limits[1] - limits[0]
    yield "psnr_autoencoder_12bit", result.values["psnr_autoencoder"] + 20 * math.log10(4095 / width), EXACT


@formula("quantisation")
def _quantisation(result: Result) -> Found:
    use = double(result.arrays["use"])
    yield "codes_used_percent", float(100 * (use > 0).mean()), EXACT
    yield "perplexity_test", float(np.exp(-(use[use > 0] * np.log(use[use > 0])).sum())), 1e-4
    yield "codebook_size", len(use), 0


@formula("schedules")
def _schedules(result: Result) -> Found:
    for name in ("chen", "ddpm"):
        yield f"half_{name}", int((double(result.arrays[f"gamma_{name}"]) > 0.5).sum()), 0


@formula("end_to_end")
def _end_to_end(result: Result) -> Found:
    a, limits = result.arrays, window(result)
    arrays = {
        "mean_volume": "psnr_mean_volume",
        "wrong_xrays_8view": "wrong_8view",
        **{short: f"model_{name}" for short, name in _views().items()},
        **{f"classical_{short}": f"classical_{name}" for short, name in _views().items()},
    }
    for key, array in arrays.items():
        mean = float(double(a[array]).mean())
        yield f"psnr_{key}", mean, 1e-4
        yield f"psnr_12bit_{key}", mean + 20 * math.log10(4095 / (limits[1] - limits[0])), 1e-4
    yield "n_patients", len(a["model_8view"]), 0
    for name in _views().values():
        yield f"gallery_psnr.model.{name}", decibels(a[f"mean_{name}"], a["truth"], *limits), DB
        yield f"gallery_psnr.classical.{name}", decibels(a[f"best_classical_{name}"], a["truth"], *limits), DB


def _views() -> dict[str, str]:
    return {"8view": "8view", "2view": "2view", "1view": "1view_frontal"}


@formula("solver_order")
def _order(result: Result) -> Found:
    steps = double(result.arrays["steps"])
    for solver in ("ddim", "dpm++2m"):
        error = double(result.arrays[f"error_{solver}"])
        yield f"slope_{solver}", math.log(error[-1] / error[2]) / math.log(steps[-1] / steps[2]), 1e-5


@formula("steps_and_quality")
def _steps(result: Result) -> Found:
    a, v = result.arrays, result.values

    def at(key: str, solver: str, steps: int) -> float:
        return float(a[f"{key}_{solver}"][list(a[f"steps_{solver}"]).index(steps)])

    fast, slow = ("dpm++2m", v["steps_fast"]), ("ddpm", v["steps_slow"])
    yield "psnr_dpm20", at("mean", *fast), EXACT
    yield "psnr_ddpm1000", at("mean", *slow), EXACT
    yield "sample_dpm20", at("sample", *fast), EXACT
    yield "sample_ddpm1000", at("sample", *slow), EXACT
    speed_up = at("seconds", *slow) / at("seconds", *fast)
    yield "speed_up", speed_up, EXACT * speed_up


@formula("guidance")
def _guidance(result: Result) -> Found:
    a = result.arrays
    scales = [float(scale) for scale in a["guidance"]]
    yield "best", scales[int(np.argmax(a["guided_mean"]))], EXACT
    for scale in (1, 4):
        yield f"std_at_{scale}", float(a["guided_std"][scales.index(scale)]), 1e-4


@formula("bias_variance")
def _bias_variance(result: Result) -> Found:
    for key in result.values:
        if key.startswith("rms_"):
            value = float(np.sqrt(double(result.arrays[key.removeprefix("rms_")]).mean()))
            yield key, value, 1e-4 * value + EXACT


@formula("sample_count")
def _count(result: Result) -> Found:
    counts = [int(count) for count in result.arrays["count"]]
    for key in result.values:
        what, _, n = key.rpartition("_")
        yield key, float(result.arrays[f"{what}_2view"][-1 if n == "all" else counts.index(int(n))]), EXACT


@formula("organs")
def _organs(result: Result) -> Found:
    v = result.values
    pairs = zip(v["organ_std_2view"], v["organ_std_8view"], strict=True)
    yield "narrower", sum(eight < two for two, eight in pairs), 0
    sets = [v[key] for key in ("organ_std_2view", "organ_std_4view", "organ_std_8view") if key in v]
    rows = np.array(sets).T
    yield "step_by_step", int((np.diff(rows, axis=1) <= 0).all(1).sum()), 0


@formula("calibration")
def _calibration(result: Result) -> Found:
    a, v = result.arrays, result.values
    yield "expected_widest", 100 * float(a["expected"][0]), 1e-4
    yield "expected_widest", 100 * (1 - 2 / (v["n_samples"] + 1)), 1e-4
    for name in ("2view", "8view"):
        yield f"observed_widest_{name}", 100 * float(a[f"observed_{name}"][0]), 1e-4
        left = double(a[f"left_by_std_{name}"])
        yield f"half_{name}", float(left[16] / left[0]), 1e-4


@formula("phantom_and_real")
def _phantom_and_real(result: Result) -> Found:
    from scipy.stats import spearmanr

    for who in ("phantom", "real"):
        spread = double(result.arrays[f"std_{who}"])
        error = double(result.arrays[f"mean_{who}"]) - double(result.arrays[f"truth_{who}"])
        yield f"rms_std_{who}", rms(spread), 0.002 * rms(spread) + EXACT
        yield f"rms_error_{who}", rms(error), 0.2
        yield f"spearman_{who}", float(spearmanr(spread.ravel(), np.abs(error).ravel()).statistic), 0.01
