"""Figures of posterior samples: from two x-rays to a CT (chapter 00) and how samples are drawn (chapter 05).

Each function takes a saved result and returns a figure. The docstring names the arrays that it needs.
"""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..results import Result
from .style import (
    COLOURS,
    XRAY,
    Column,
    Frames,
    Scale,
    colour_bar,
    finish,
    frame_pixels,
    new_figure,
    plane_of,
    show_image,
    show_slice,
    show_xray,
    slice_grid,
    styled,
    top,
)

#: Spread and error share this scale, so that their pictures can be compared.
STD = Scale("standard deviation or |error|, HU", 0, 300, "inferno")
SOLVERS = {
    "ddpm": ("ancestral (DDPM)", "orange", "^", ":"),
    "ddim": ("DDIM", "green", "s", "--"),
    "dpm++2m": ("DPM-Solver++(2M)", "blue", "o", "-"),
}


@styled
def two_xrays(result: Result) -> Figure:
    """The input: x-rays of one patient.

    Arrays: ``xrays`` (view v u); values ``angles_deg``, ``patient``.
    """
    xrays, angles = result.arrays["xrays"], result.values["angles_deg"]
    figure, axes = new_figure(3.0 * len(xrays) + 0.5, 3.8, 1, len(xrays))
    scale = Scale(XRAY.label, 0, top(xrays, 0.999))
    for ax, xray, angle in zip(axes[0], xrays, angles, strict=True):
        image = show_xray(ax, xray, angle, scale)
        ax.set_title(f"{ {0.0: 'lateral', 90.0: 'frontal'}.get(angle, 'oblique') }, {angle:g}°")
    colour_bar(figure, image, axes[0].tolist(), scale.label, "right")
    return finish(figure, result, f"All that the model sees of {result.values['patient']}")


@styled
def ambiguity(result: Result) -> Figure:
    """Volumes that have the same x-rays.

    Arrays: ``volumes`` (n z y x, HU), ``xrays`` (n view v u); values ``names``, ``angles_deg``, ``misfit_percent``
    (of the x-rays, one per volume), ``distance_hu`` (root mean squared distance to the first volume).
    """
    volumes, xrays, v = result.arrays["volumes"], result.arrays["xrays"], result.values
    angles, n = v["angles_deg"], len(volumes)
    rows = 2 + len(angles)
    figure, axes = new_figure(1.85 * n + 0.9, 1.7 * rows + 0.7, rows, n)
    scale = Scale(XRAY.label, 0, top(xrays, 0.999))
    for j in range(n):
        for i, plane in enumerate(("coronal", "axial")):
            ct = show_slice(axes[i, j], volumes[j], plane, marks=j == 0)
        for i, angle in enumerate(angles):
            image = show_xray(axes[2 + i, j], xrays[j, i], angle, scale, marks=j == 0)
        axes[0, j].set_title(v["names"][j])
        if j:
            axes[1, j].set_xlabel(f"{v['distance_hu'][j]:.0f} HU from the truth", fontsize=9)
            axes[-1, j].set_xlabel(f"x-rays differ by {v['misfit_percent'][j]:.1g} %", fontsize=9)
    for i, text in enumerate(["coronal", "axial", *(f"x-ray at {angle:g}°" for angle in angles)]):
        axes[i, 0].set_ylabel(text, fontsize=9)
    colour_bar(figure, ct, axes[:2].ravel().tolist(), "HU", "right")
    colour_bar(figure, image, axes[2:].ravel().tolist(), scale.label, "right")
    return finish(figure, result, "Different chests, the same x-rays")


@styled
def posterior(result: Result) -> Figure:
    """Truth, samples, their mean, their spread and the error of the mean.

    Arrays: ``truth``, ``mean``, ``std`` (z y x, HU), ``samples`` (n z y x, HU); values ``patient``, ``psnr_mean``,
    ``psnr_samples`` (dB).
    """
    a, v = result.arrays, result.values
    truth, mean = (a[key].astype(np.float32) for key in ("truth", "mean"))
    columns = [Column("truth", truth)]
    for i in range(2):
        sample = a["samples"][i].astype(np.float32)
        columns.append(Column(f"sample {i + 1}", sample, note=f"{v['psnr_samples'][i]:.1f} dB"))
    columns += [
        Column(f"mean of {len(a['samples'])}", mean, note=f"{v['psnr_mean']:.1f} dB"),
        Column("standard deviation", a["std"].astype(np.float32), STD, note="known without the truth"),
        Column("|mean − truth|", np.abs(mean - truth), STD, note="needs the truth"),
    ]
    figure, _ = slice_grid(columns, ("coronal", "axial", "sagittal"), panel=1.6)
    return finish(figure, result, f"From two x-rays: {v['patient']}")


@styled
def sample_strip(result: Result) -> Figure:
    """Every sample in one coronal slice, after the truth.

    Arrays and values: as for :func:`posterior`.
    """
    a, v = result.arrays, result.values
    pictures = [("truth", a["truth"], ""), ("mean", a["mean"], f"{v['psnr_mean']:.1f} dB")]
    pictures += [
        (f"sample {i + 1}", sample, f"{v['psnr_samples'][i]:.1f} dB") for i, sample in enumerate(a["samples"][:8])
    ]
    columns = (len(pictures) + 1) // 2
    figure, axes = new_figure(1.75 * columns + 0.6, 4.9, 2, columns)
    for ax, (title, volume, note) in zip(axes.ravel(), pictures, strict=False):
        image = show_slice(ax, volume, "coronal", marks=title == "truth")
        ax.set_title(title)
        ax.set_xlabel(note, fontsize=9)
    for ax in axes.ravel()[len(pictures) :]:
        ax.set_axis_off()
    colour_bar(figure, image, axes.ravel().tolist(), "HU", "right")
    return finish(figure, result, "Each sample is a possible chest; where samples differ, the x-rays are silent")


@styled
def solver_order(result: Result) -> Figure:
    """Error of the deterministic solvers on a problem whose answer is known, against the number of steps.

    Arrays: ``steps`` (n,), ``error_ddim``, ``error_dpm++2m`` (n,); values ``slope_ddim``, ``slope_dpm++2m``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(5.8, 4.0)
    ax = axes[0, 0]
    for key in ("ddim", "dpm++2m"):
        name, colour, marker, line = SOLVERS[key]
        label = f"{name}: order {-v[f'slope_{key}']:.2f}"
        ax.loglog(a["steps"], a[f"error_{key}"], color=COLOURS[colour], marker=marker, linestyle=line, label=label)
    ax.set_xticks(a["steps"], [f"{int(n)}" for n in a["steps"]])
    ax.minorticks_off()
    ax.set_xlabel("steps (evaluations of the model)")
    ax.set_ylabel("error of the sample")
    ax.grid(True, linewidth=0.6)
    ax.legend()
    return finish(figure, result, "Twice the steps: half the error, or a quarter")


@styled
def steps_and_quality(result: Result) -> Figure:
    """PSNR of the posterior mean and of single samples against the number of steps and against time.

    Arrays: per solver ``steps_SOLVER``, ``mean_SOLVER``, ``sample_SOLVER`` (dB), ``seconds_SOLVER`` (per patient);
    values ``psnr_dpm20``, ``psnr_ddpm1000`` (dB), ``steps_fast``, ``steps_slow``.
    """
    a = result.arrays
    figure, axes = new_figure(10.2, 3.9, 1, 3, sharey="row")
    panels = (("steps", "mean", "Mean of the samples"), ("steps", "sample", "One sample"), ("seconds", "mean", "Time"))
    for ax, (x, y, title) in zip(axes[0], panels, strict=True):
        for key, (name, colour, marker, line) in SOLVERS.items():
            ax.plot(
                a[f"{x}_{key}"],
                a[f"{y}_{key}"],
                color=COLOURS[colour],
                marker=marker,
                linestyle=line,
                label=name,
                markersize=5,
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(True, linewidth=0.6)
        ax.set_title(title, loc="left")
        ax.set_xlabel("steps" if x == "steps" else "seconds per patient")
    axes[0, 0].set_ylabel("PSNR, dB (peak = HU window)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    v = result.values
    same = abs(v["psnr_dpm20"] - v["psnr_ddpm1000"]) <= 0.3
    relation = "do as well as" if same else "beside"
    return finish(
        figure, result, f"{v['steps_fast']} steps of a fast solver {relation} {v['steps_slow']} ancestral steps"
    )


@styled
def denoising_film(result: Result) -> Figure:
    """Frames of one draw: the noisy latent and the guess of the clean one, both decoded.

    Arrays: ``frame_t`` (n,), ``noisy``, ``clean`` (n z y x, HU), ``film_truth`` (z y x, HU).
    """
    a = result.arrays
    n = len(a["frame_t"])
    figure, axes = new_figure(1.45 * (n + 1) + 0.5, 3.55, 2, n + 1)
    for i, key in enumerate(("noisy", "clean")):
        for j in range(n):
            image = show_slice(axes[i, j], a[key][j], "coronal", marks=j == 0)
            if i == 0:
                axes[i, j].set_title(f"t = {int(a['frame_t'][j])}")
    axes[0, 0].set_ylabel("latent z_t", fontsize=9)
    axes[1, 0].set_ylabel("guess of z_0", fontsize=9)
    axes[0, n].set_axis_off()
    show_slice(axes[1, n], a["film_truth"], "coronal")
    axes[1, n].set_title("truth")
    colour_bar(figure, image, axes.ravel().tolist(), "HU", "right")
    return finish(figure, result, "The outline is decided in the first steps, the detail in the last")


@styled
def film_frames(result: Result, width_px: int = 560) -> list[np.ndarray]:
    """One picture for every step of a draw, for a slider: the noisy latent and the guess, decoded, and the truth.

    Arrays: ``every_noisy``, ``every_clean`` (step z x, HU), ``film_truth`` (z y x, HU).
    """
    a, frames = result.arrays, []
    truth = plane_of(a["film_truth"], "coronal")
    figure = Figure(figsize=(5.6, 2.1), dpi=width_px / 5.6, facecolor="white")
    FigureCanvasAgg(figure)
    for noisy, clean in zip(a["every_noisy"], a["every_clean"], strict=True):
        figure.clear()
        for i, (title, picture) in enumerate((("latent", noisy[::-1]), ("guess", clean[::-1]), ("truth", truth))):
            ax = figure.add_axes((0.005 + i / 3, 0.01, 0.323, 0.87))
            show_image(ax, picture)
            ax.set_title(title)
        frames.append(frame_pixels(figure))
    return Frames(frames, result)


@styled
def guidance_sweep(result: Result) -> Figure:
    """What the guidance scale does to quality and spread.

    Arrays: ``guidance`` (n,), ``guided_mean``, ``guided_sample`` (dB), ``guided_std`` (HU), ``guided_picture`` (n z y
    x, HU).
    """
    a = result.arrays
    n = len(a["guidance"])
    figure, axes = new_figure(10.2, 5.6, 2, 1, height_ratios=[1.25, 1])
    axes[0, 0].set_axis_off()
    axes[1, 0].set_axis_off()
    upper = axes[0, 0].get_subplotspec().subgridspec(1, 2)
    lower = axes[1, 0].get_subplotspec().subgridspec(1, n)
    left, right = figure.add_subplot(upper[0]), figure.add_subplot(upper[1])
    left.plot(a["guidance"], a["guided_mean"], "o-", color=COLOURS["blue"], label="mean of the samples")
    left.plot(a["guidance"], a["guided_sample"], "s--", color=COLOURS["sky"], label="one sample")
    left.set_ylabel("PSNR, dB")
    left.legend()
    right.plot(a["guidance"], a["guided_std"], "o-", color=COLOURS["red"])
    right.set_ylabel("mean standard deviation, HU")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("guidance scale s (0: no x-rays, 1: the conditional model)")
        ax.grid(True, linewidth=0.6)
    panels = [figure.add_subplot(cell) for cell in lower]
    for j, ax in enumerate(panels):
        image = show_slice(ax, a["guided_picture"][j], "coronal", marks=j == 0)
        ax.set_title(f"s = {a['guidance'][j]:g}")
    colour_bar(figure, image, panels, "HU", "right")
    beyond, one = a["guidance"] > 1, a["guidance"] == 1
    narrower = a["guided_std"][beyond].max() < a["guided_std"][one].min()
    truer = a["guided_mean"][beyond].max() > a["guided_mean"][one].max() + 0.1
    message = "narrows the samples" if narrower else "changes the spread of the samples"
    return finish(
        figure, result, f"Guidance beyond 1 {message}{'' if truer else ' and does not make their mean truer'}"
    )
