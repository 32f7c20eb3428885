"""Figures that compare methods (chapter 08), from entries of :func:`difr3ct_core.baselines.tables.measure`.

Each function takes a saved result and returns a figure. Its values hold ``entries`` (``lung/difr3ct/8view`` → metrics),
``cohort``, ``titles``, the methods' names for people, and ``views``, the set of x-rays of pictures of one set; its
arrays are ``truth`` and ``METHOD_VIEWS``, each (3, n, n) in HU: axial, coronal, sagittal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..results import Result
from .style import COLOURS, CT, VIEW_COLOURS, VIEW_NAMES, colour_bar, finish, mark_sides, new_figure, show_image, styled

#: Rows of the arrays.
PLANES = ("axial", "coronal", "sagittal")
#: One for each method, in the order of the tables.
MARKERS = "oPsD^vX<>*hdp"


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


def _picture(result: Result, name: str, plane: str) -> np.ndarray:
    """A stored slice as it is looked at: superior up where z runs along the rows, anterior up in an axial slice."""
    picture = np.asarray(result.arrays[name][PLANES.index(plane)])
    return picture if plane == "axial" else picture[::-1]


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the heading first, as Markdown."""
    heading, *others = rows
    lines = [heading, ["---"] * len(heading), *others]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@styled
def overview(result: Result) -> Figure:
    """PSNR and SSIM of every method, a colour for each set of views: Table I as a picture."""
    entries, cohort, titles = (result.values[name] for name in ("entries", "cohort", "titles"))
    present = [m for m in titles if any(key.split("/")[:2] == [cohort, m] for key in entries)]
    figure, axes = new_figure(10.2, 0.34 * len(present) + 2.0, 1, 2, sharey="row")
    y = np.arange(len(present))[::-1]
    for ax, (metric, label) in zip(axes[0], (("psnr", "PSNR, dB (peak: HU window)"), ("ssim", "SSIM")), strict=True):
        for view_set, colour in VIEW_COLOURS.items():
            found = [(at, entry) for at, m in zip(y, present, strict=True) if (entry := _entry(result, m, view_set))]
            if not found:
                continue
            mean = [entry[metric]["mean"] for _, entry in found]
            error = [1.96 * entry[metric]["std"] / math.sqrt(entry["n"]) for _, entry in found]
            rows = [at for at, _ in found]
            ax.errorbar(
                mean, rows, xerr=error, fmt="o", color=colour, markersize=6, elinewidth=1.2, label=VIEW_NAMES[view_set]
            )
        ax.set_xlabel(label)
        ax.grid(True, axis="x", linewidth=0.6)
    axes[0, 0].set_yticks(y, [titles[m] for m in present])
    axes[0, 0].tick_params(axis="y", length=0)
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    n = max(entry["n"] for key, entry in entries.items() if key.startswith(f"{cohort}/"))
    return finish(
        figure,
        result,
        f"{len(present)} methods on {n} held-out phantoms of the cohort {cohort}; bars: 95 % of the mean",
    )


@styled
def methods_side_by_side(result: Result) -> Figure:
    """Every method's middle slices of one patient, from the same x-rays, beside the truth (the paper's Fig. 4, 5)."""
    titles, view_set = result.values["titles"], result.values["views"]
    shown = [(method, title) for method, title in titles.items() if f"{method}_{view_set}" in result.arrays]
    columns = [("truth", "truth"), *((f"{method}_{view_set}", title) for method, title in shown)]
    half = len(columns) if len(columns) <= 7 else math.ceil(len(columns) / 2)
    blocks = [columns[i : i + half] for i in range(0, len(columns), half)]
    planes = ("coronal", "axial")
    figure, axes = new_figure(1.65 * half + 0.3, 4.0 * len(blocks) + 0.9, len(planes) * len(blocks), half)
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr]  # the decibels of a row, the names of the next
    for ax in axes.ravel():
        ax.set_axis_off()
    for k, block in enumerate(blocks):
        for j, (name, title) in enumerate(block):
            for i, plane in enumerate(planes):
                ax = axes[len(planes) * k + i, j]
                ax.set_axis_on()
                image = show_image(ax, _picture(result, name, plane), CT)
                if j == 0:
                    mark_sides(ax, plane)
                    ax.set_ylabel(plane, fontsize=9)
                if i == 0:
                    ax.set_title(title, fontsize=9)
            entry = _entry(result, name.removesuffix(f"_{view_set}"), view_set)
            if entry:
                ax.set_xlabel(f"{entry['psnr']['patients'][0]:.1f} dB", fontsize=9)
    colour_bar(figure, image, axes.ravel().tolist(), CT.label)
    return finish(
        figure, result, f"One patient by {len(shown)} methods: {VIEW_NAMES[view_set]}, {result.values['cohort']} cohort"
    )


@styled
def views_side_by_side(result: Result) -> Figure:
    """Coronal slices of one patient from fewer and fewer x-rays, a row for each of some methods (Fig. 6, 7)."""
    titles = result.values["titles"]
    sets = [name for name in VIEW_NAMES if f"difr3ct_{name}" in result.arrays]
    rows = [m for m in ("difr3ct", "difr3ct_tv", "inrr3ct", "x2ctgan", "tv_body") if m in titles]
    rows = [m for m in rows if any(f"{m}_{name}" in result.arrays for name in sets)]
    figure, axes = new_figure(1.7 * (len(sets) + 1) + 0.4, 1.8 * len(rows) + 1.2, len(rows), len(sets) + 1)
    for i, method in enumerate(rows):
        for j, name in enumerate(["truth", *sets]):
            ax, key = axes[i, j], name if name == "truth" else f"{method}_{name}"
            if i == 0:
                ax.set_title("truth" if name == "truth" else VIEW_NAMES[name], fontsize=9)
            if key not in result.arrays:
                ax.set_axis_off()
                ax.text(
                    0.5,
                    0.5,
                    "not for these\nviews, or not\ntrained",
                    transform=ax.transAxes,
                    ha="center",
                    va="center",
                    fontsize=8,
                )
                continue
            image = show_image(ax, _picture(result, key, "coronal"), CT)
            if j == 0:
                mark_sides(ax, "coronal")
                ax.set_ylabel(titles[method], fontsize=9)
            if entry := _entry(result, method, name):
                ax.set_xlabel(f"{entry['psnr']['patients'][0]:.1f} dB", fontsize=9)
    colour_bar(figure, image, axes.ravel().tolist(), CT.label)
    message = "fewer and fewer x-rays" if len(sets) > 1 else VIEW_NAMES[sets[0]]
    return finish(figure, result, f"One patient, {message}, {result.values['cohort']} cohort")


@styled
def costs(result: Result) -> Figure:
    """PSNR against minutes of training, its peak memory, and seconds per patient."""
    entries, cohort, titles = (result.values[name] for name in ("entries", "cohort", "titles"))
    panels = (
        ("train_minutes", "training, minutes"),
        ("train_peak_gb", "peak memory of the training, GB"),
        ("sample_seconds", "x-rays to volume, seconds"),
    )
    figure, axes = new_figure(11.4, 4.0, 1, 3, sharey="row")
    markers = dict(zip(titles, MARKERS, strict=False))
    present = set()
    for key, entry in entries.items():
        if not key.startswith(f"{cohort}/"):
            continue
        _, method, view_set = key.split("/")
        present |= {method, view_set}
        for ax, (metric, _) in zip(axes[0], panels, strict=True):
            if metric in entry:
                ax.plot(
                    entry[metric]["mean"], entry["psnr"]["mean"], markers[method], color=VIEW_COLOURS[view_set],
                    markersize=7, markeredgecolor="white",
                )  # fmt: skip
    for ax, (metric, label) in zip(axes[0], panels, strict=True):
        ax.set_xlabel(label)
        ax.grid(True, linewidth=0.5)
        if metric == "sample_seconds":
            ax.set_xscale("log")
            ax.set_xlim(left=1e-3)  # what costs less, such as the mean volume, costs nothing
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_locator(NullLocator())
        else:
            ax.set_xlim(left=0)
    axes[0, 0].set_ylabel("PSNR, dB (peak: HU window)")
    _legend(axes[0, 2], titles, markers, present)
    return finish(figure, result, f"What quality costs, {cohort} cohort")


def budget_table(result: Result) -> list[list[str]]:
    """What each learned method was given: a heading, then one row per method and set of views.

    Patients seen and minutes as :func:`difr3ct_core.baselines.registry.training_cost` counts them.
    """
    titles = result.values["titles"]
    rows = [["method", "x-rays", "patients seen", "training, minutes", "peak memory, GB"]]
    for method, title in titles.items():
        for name in VIEW_NAMES:
            entry = _entry(result, method, name)
            if entry and "patients_seen" in entry:
                seen, minutes, peak = (entry[k]["mean"] for k in ("patients_seen", "train_minutes", "train_peak_gb"))
                rows.append([title, VIEW_NAMES[name], f"{seen:.0f}", f"{minutes:.0f}", f"{peak:.1f}"])
    return rows


@styled
def memory(result: Result) -> Figure:
    """Memory of one training step on one patient, by the number of views.

    Values: ``gb``, method → one number (or None) for each of ``counts``; ``titles``; ``preset``.
    """
    v = result.values
    figure, axes = new_figure(7.4, 3.8)
    ax = axes[0, 0]
    for (method, values), marker, colour in zip(v["gb"].items(), MARKERS, COLOURS.values(), strict=False):
        points = [(n, gb) for n, gb in zip(v["counts"], values, strict=True) if gb is not None]
        ax.plot(*zip(*points, strict=True), marker=marker, color=colour, label=v["titles"][method])
    ax.set_xticks(v["counts"])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("views")
    ax.set_ylabel("memory of one step, GB")
    ax.grid(True, axis="y", linewidth=0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return finish(figure, result, f"Memory of one training step on one patient, preset {v['preset']}")


def _legend(ax: Axes, titles: dict[str, str], markers: dict[str, str], present: set[str]) -> None:
    for method, marker in markers.items():
        if method in present:
            ax.plot([], [], marker, color="#767676", label=titles[method])
    for view_set, colour in VIEW_COLOURS.items():
        if view_set in present:
            ax.plot([], [], "s", color=colour, label=VIEW_NAMES[view_set])
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


@styled
def quality_and_sharpness(result: Result) -> Figure:
    """PSNR against sharpness: a blurred mean can win the first while it loses the second.

    One point per method and set of views; the dashed line is the truth's own sharpness.
    """
    cohort, titles = result.values["cohort"], result.values["titles"]
    figure, axes = new_figure(8.4, 4.6)
    ax = axes[0, 0]
    markers = dict(zip(titles, MARKERS, strict=False))
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
    _legend(ax, titles, markers, present)
    return finish(figure, result, f"Error and sharpness of every method, {cohort} cohort")
