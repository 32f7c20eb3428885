"""Figures of what goes beyond the paper: consistency, imprecise acquisition, real detectors (chapter 09).

Each function takes a saved result and returns a figure. The docstring names the arrays that it needs.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..results import Result
from .style import COLOURS, VIEW_COLOURS, VIEW_NAMES, Column, Scale, finish, new_figure, slice_grid, styled, top

WAYS = {
    "solver": "TV alone, no prior",
    "none": "samples as drawn",
    "lsq": "+ smallest change",
    "spread": "+ change where unsure",
    "tv": "+ TV near the sample",
    "proximal": "corrected while drawn",
}


@styled
def consistency(result: Result) -> Figure:
    """Quality and re-projection error by way of correction.

    Values: ``ways`` (keys of WAYS), ``views``; for each set of views ``psnr_VIEWS`` (dB, mean of samples),
    ``sample_VIEWS`` (single samples), ``misfit_VIEWS`` (per cent), ``seconds_VIEWS`` (per sample), one entry a way.
    """
    v = result.values
    names = [WAYS[way] for way in v["ways"]]
    figure, axes = new_figure(10.4, 0.36 * len(names) + 1.9, 1, 3, sharey="row")
    y = np.arange(len(names))[::-1]
    panels = (("psnr", "PSNR of the mean, dB"), ("misfit", "re-projection error, %"), ("seconds", "seconds a sample"))
    for ax, (key, label) in zip(axes[0], panels, strict=True):
        for views, marker in zip(v["views"], ("o", "s", "^", "D"), strict=False):
            values = np.asarray(v[f"{key}_{views}"], dtype=float)
            ax.plot(values, y, marker, color=VIEW_COLOURS[views], label=VIEW_NAMES[views], markersize=6)
        ax.set_xlabel(label)
        ax.grid(True, axis="x", linewidth=0.6)
        if key == "misfit":
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter("")
        if key == "seconds":
            ax.set_xlim(left=0)
    axes[0, 0].set_yticks(y, names)
    axes[0, 0].tick_params(axis="y", length=0)
    axes[0, 2].legend(loc="upper left")
    gains = [v[f"psnr_{views}"][v["ways"].index("tv")] - v[f"psnr_{views}"][0] for views in v["views"]]
    words = "beat solver and prior" if min(gains) > 0 else "are between solver and prior"
    return finish(figure, result, f"Samples that obey their x-rays {words}")


@styled
def consistency_pictures(result: Result) -> Figure:
    """One patient: truth, solver alone, samples' mean as drawn and corrected, and the errors.

    Arrays: ``truth``, ``solver``, ``none``, ``tv`` (z y x, HU); values ``picture_psnr`` (way -> dB), ``picture_views``.
    """
    a, v = result.arrays, result.values
    truth = a["truth"].astype(np.float32)
    error = Scale("|error|, HU", 0, top(np.abs(a["none"].astype(np.float32) - truth), 0.995), "inferno")
    columns = [Column("truth", truth)]
    shown = ("solver", "none", "tv")
    titles = {"solver": "TV alone", "none": "mean as drawn", "tv": "mean, corrected"}
    columns += [Column(titles[w], a[w].astype(np.float32), note=f"{v['picture_psnr'][w]:.1f} dB") for w in shown]
    columns += [Column(f"error:\n{titles[w]}", np.abs(a[w].astype(np.float32) - truth), error) for w in shown]
    figure, _ = slice_grid(columns, panel=1.55)
    return finish(figure, result, f"{VIEW_NAMES[v['picture_views']]}: what the correction changes")


@styled
def acquisition(result: Result) -> Figure:
    """X-rays taken off their places: what it costs, and what pose recovery brings back.

    Arrays: ``true`` and ``found`` (case view 3: degrees, mm along u, mm along v), ``psnr_exact``, ``psnr_off``,
    ``psnr_recovered``, and ``psnr_in_place``, without the motion that all views share (dB, one a case).
    """
    a = result.arrays
    figure, axes = new_figure(10.0, 3.7, 1, 3)
    ax = axes[0, 0]
    kinds = ("exact", "off", "recovered", "in_place")
    for case in zip(*(a[f"psnr_{kind}"] for kind in kinds), strict=True):
        ax.plot(range(4), case, "o-", color=COLOURS["grey"], linewidth=1, markersize=4)
    means = [float(np.mean(a[f"psnr_{kind}"])) for kind in kinds]
    ax.plot(range(4), means, "D", color=COLOURS["red"], markersize=8, label="mean")
    ax.set_xticks(range(4), ["places\nknown", "off,\nunknown", "found\nagain", "and moved\nas one"])
    ax.set_xlim(-0.4, 3.4)
    ax.set_ylabel("PSNR of the mean, dB")
    ax.legend()
    for ax, columns, unit in ((axes[0, 1], [0], "degrees"), (axes[0, 2], [1, 2], "mm")):
        true, found = a["true"][..., columns].ravel(), a["found"][..., columns].ravel()
        limit = 1.1 * max(np.abs(true).max(), np.abs(found).max())
        ax.plot([-limit, limit], [-limit, limit], "--", color=COLOURS["grey"], linewidth=1)
        ax.plot(true, found, "o", color=COLOURS["blue"], markersize=4)
        ax.set_xlabel(f"true displacement, {unit}")
        ax.set_ylabel(f"found, {unit}")
        ax.set_aspect("equal")
    for ax in axes[0]:
        ax.grid(True, linewidth=0.6)
    lost, back, as_one = means[0] - means[1], means[2] - means[1], means[3] - means[1]
    title = f"Misplaced x-rays cost {lost:.1f} dB; found again they give {back:.1f} back, and {as_one:.1f} moved as one"
    return finish(figure, result, title)


@styled
def dose(result: Result) -> Figure:
    """Quality against photons a pixel, for a model that was trained without noise.

    Arrays: ``i0``; for each of ``ways`` (values) ``psnr_WAY`` (dB, mean over patients); values ``ideal_WAY`` (dB).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(6.4, 3.8, 1, 1)
    ax = axes[0, 0]
    styles = {"solver": ("green", "s"), "none": ("red", "o"), "tv": ("blue", "D")}
    for way in v["ways"]:
        colour, marker = styles[way]
        ax.plot(a["i0"], a[f"psnr_{way}"], marker + "-", color=COLOURS[colour], label=WAYS[way])
        ax.axhline(v[f"ideal_{way}"], color=COLOURS[colour], linestyle=":", linewidth=1)
    ax.set_xscale("log")
    ax.set_xlabel("photons a pixel in the open beam")
    ax.set_ylabel("PSNR, dB")
    ax.grid(True, linewidth=0.6)
    ax.legend()
    ax.set_title("dotted: an ideal detector", loc="left")
    return finish(figure, result, "Fewer photons, less to hold on to")


@styled
def detectors(result: Result) -> Figure:
    """Imperfect detectors, for a model that learned from exact x-rays and one that learned from theirs.

    Arrays: ``psnr_solver``, ``psnr_exact_none``, ``psnr_exact_tv``, ``psnr_trained_none``, ``psnr_trained_tv`` (dB, one
    a condition); value ``names`` of the conditions.
    """
    a, names = result.arrays, result.values["names"]
    figure, axes = new_figure(9.0, 4.4, 1, 1)
    ax = axes[0, 0]
    y = np.arange(len(names))[::-1]
    for key, label, marker, colour, filled, shift in (
        ("solver", "TV alone", "s", "green", True, 0.0),
        ("exact_none", "learned from exact x-rays, as drawn", "o", "red", True, 0.12),
        ("exact_tv", "the same, corrected", "D", "blue", True, 0.12),
        ("trained_none", "went on with imperfect detectors, as drawn", "o", "red", False, -0.12),
        ("trained_tv", "the same, corrected", "D", "blue", False, -0.12),
    ):
        face = COLOURS[colour] if filled else "white"
        ax.plot(a[f"psnr_{key}"], y + shift, marker, color=COLOURS[colour], markerfacecolor=face, label=label)
    ax.set_yticks(y, names)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("PSNR of the mean, dB")
    ax.grid(True, axis="x", linewidth=0.6)
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8.5)
    gain = float(np.mean(a["psnr_trained_none"][1:] - a["psnr_exact_none"][1:]))
    title = "What imperfect detectors cost"
    if gain > 0:
        title += f"; a model that has met them is {gain:.1f} dB better on average"
    return finish(figure, result, title)
