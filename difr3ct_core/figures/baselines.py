"""Figures that compare methods, from what ``benchmarks/tables.py`` wrote (chapter 08).

Each function takes a saved result and returns a figure. Its values hold ``entries``, the content of ``tables.json``
(``lung/difr3ct/8view`` → metrics), ``cohort``, and ``titles``, the methods' names for people; its arrays are those of
``tables_COHORT.npz``: ``truth`` and ``METHOD_VIEWS``, each (3, n, n) in HU: axial, coronal, sagittal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..results import Result
from .style import CT, VIEW_COLOURS, VIEW_NAMES, colour_bar, finish, mark_sides, new_figure, show_image, styled

#: Rows of the arrays.
PLANES = ("axial", "coronal", "sagittal")


def _entry(result: Result, method: str, view_set: str) -> dict[str, Any] | None:
    return result.values["entries"].get(f"{result.values['cohort']}/{method}/{view_set}")


def paper_table(result: Result, metrics: tuple[str, ...] = ("psnr", "ssim")) -> list[list[str]]:
    """The table in the paper's shape: a heading, then one row per method and one column per set of views.

    A cell holds mean ± standard deviation of each metric; the best mean of a column is marked with \\*\\*, a method
    that does not exist for these views has a dash.
    """
    entries, cohort, titles = (result.values[name] for name in ("entries", "cohort", "titles"))
    sets = [name for name in VIEW_NAMES if any(key.split("/")[::2] == [cohort, name] for key in entries)]
    best = {
        (name, metric): max(
            entry[metric]["mean"] for key, entry in entries.items() if key.split("/")[::2] == [cohort, name]
        )
        for name in sets
        for metric in metrics
    }
    rows = [["method", *(VIEW_NAMES[name] for name in sets)]]
    for method, title in titles.items():
        cells = []
        for name in sets:
            entry = _entry(result, method, name)
            parts = []
            for metric in metrics if entry else ():
                mean, std = entry[metric]["mean"], entry[metric]["std"]
                text = f"{mean:.2f} ± {std:.2f}" if metric.startswith("psnr") else f"{mean:.3f} ± {std:.3f}"
                parts.append(f"**{text}**" if mean == best[name, metric] else text)
            cells.append(" / ".join(parts) or "–")
        if any(cell != "–" for cell in cells):
            rows.append([title, *cells])
    return rows


@styled
def methods_side_by_side(result: Result, view_set: str, planes: tuple[str, ...] = ("coronal", "axial")) -> Figure:
    """Every method's middle slices of one patient, from the same x-rays, beside the truth (the paper's Fig. 4, 5)."""
    titles = result.values["titles"]
    shown = [(method, title) for method, title in titles.items() if f"{method}_{view_set}" in result.arrays]
    columns = [("truth", "truth"), *((f"{method}_{view_set}", title) for method, title in shown)]
    figure, axes = new_figure(1.6 * len(columns) + 0.3, 1.6 * len(planes) + 1.3, len(planes), len(columns))
    for j, (name, title) in enumerate(columns):
        for i, plane in enumerate(planes):
            picture = np.asarray(result.arrays[name][PLANES.index(plane)])
            # Rows rise with z where superior must be up; in an axial slice anterior is up already.
            image = show_image(axes[i, j], picture if plane == "axial" else picture[::-1], CT)
            if j == 0:
                mark_sides(axes[i, 0], plane)
                axes[i, 0].set_ylabel(plane, fontsize=9)
        axes[0, j].set_title(title, fontsize=9)
        entry = _entry(result, name.removesuffix(f"_{view_set}"), view_set)
        if entry:
            axes[-1, j].set_xlabel(f"{entry['psnr']['patients'][0]:.1f} dB", fontsize=9)
    colour_bar(figure, image, axes.ravel().tolist(), CT.label)
    return finish(
        figure, result, f"One patient, every method: {VIEW_NAMES[view_set]}, {result.values['cohort']} cohort"
    )


@styled
def quality_and_sharpness(result: Result) -> Figure:
    """PSNR against sharpness: a blurred mean can win the first while it loses the second.

    One point per method and set of views; the dashed line is the truth's own sharpness.
    """
    cohort, titles = result.values["cohort"], result.values["titles"]
    figure, axes = new_figure(8.4, 4.6)
    ax = axes[0, 0]
    markers = dict(zip(titles, "osD^vPX<>*hd", strict=False))
    for key, entry in result.values["entries"].items():
        if not key.startswith(f"{cohort}/"):
            continue
        _, method, view_set = key.split("/")
        x, y = entry["sharpness"]["mean"], entry["psnr"]["mean"]
        ax.plot(x, y, markers[method], color=VIEW_COLOURS[view_set], markersize=7, markeredgecolor="white")
    ax.axvline(1.0, color="black", linestyle="--", linewidth=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("gradient energy, share of the truth's (left: blurred, right: noisy)")
    ax.set_ylabel("PSNR, dB (peak: HU window)")
    present = {key.split("/")[i] for key in result.values["entries"] if key.startswith(f"{cohort}/") for i in (1, 2)}
    for method, marker in markers.items():
        if method in present:
            ax.plot([], [], marker, color="#767676", label=titles[method])
    for view_set, colour in VIEW_COLOURS.items():
        if view_set in present:
            ax.plot([], [], "s", color=colour, label=VIEW_NAMES[view_set])
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return finish(figure, result, f"Error and sharpness of every method, {cohort} cohort")
