"""Figures of x-rays: how they come about, from which side, with which beam and dose, and how exactly (chapter 01).

Each function takes a saved result and returns a figure, the frames of a slider, or a table in Markdown. The docstring
names the arrays and values that it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..geometry import View
from ..results import Result
from .benchmarks import html_table
from .style import (
    COLOURS,
    CT,
    XRAY,
    Frames,
    Scale,
    colour_bar,
    finish,
    frame_pixels,
    mark_sides,
    new_figure,
    show_image,
    show_slice,
    show_xray,
    styled,
    top,
)

#: Rays and detectors in every drawing of chapters 01 and 03.
RAY, DETECTOR = COLOURS["orange"], COLOURS["sky"]
METHOD_NAMES = {
    "fbp": "filtered back-projection",
    "sirt": "SIRT",
    "cgls": "CGLS",
    "tv": "total variation",
    "tv_body": "total variation + body outline",
}


def axial_in_mm(ax: Axes, picture: np.ndarray, edge_mm: float) -> None:
    """An axial slice on axes in mm: patient's left at the right, posterior below."""
    half = edge_mm / 2
    show_image(ax, picture, CT).set_extent((-half, half, half, -half))
    for side, letter in ((-0.94, "R"), (0.94, "L")):
        ax.text(
            side * half, -0.94 * half, letter, color="white", fontsize=8, ha="left" if side < 0 else "right", va="top",
            clip_on=True,
        )  # fmt: skip


def parallel_rays(ax: Axes, angle_deg: float, reach_mm: float, spread_mm: float, count: int = 5) -> None:
    """Rays of a parallel beam over an axial slice in mm, from the source's side to the detector."""
    n, e_u = directions(angle_deg)
    arrow = {"arrowstyle": "-|>", "color": RAY, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    for shift in np.linspace(-spread_mm, spread_mm, count):
        ax.annotate("", shift * e_u - 0.93 * reach_mm * n, shift * e_u + reach_mm * n, arrowprops=arrow)
    ends = np.array([side * spread_mm * 1.25 * e_u - reach_mm * n for side in (-1, 1)])
    ax.plot(ends[:, 0], ends[:, 1], color=DETECTOR, lw=4, solid_capstyle="butt")


def directions(angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the unit vectors to the source and along the detector's columns."""
    view = View(angle_deg, (1, 1), (1.0, 1.0))
    return view.to_source[:2].numpy(), view.e_u[:2].numpy()


@styled
def beer_lambert(result: Result) -> Figure:
    """One ray through a chest: attenuation along it, and the share of photons that is left.

    Arrays: ``axial`` (y x, HU), ``mu`` (along +x, 1/mm); values ``spacing_mm``, ``y_mm``, ``patient``.
    The source stands on the patient's left, so that photons travel towards smaller x.
    """
    axial, mu, v = result.arrays["axial"], result.arrays["mu"].astype(np.float64), result.values
    spacing, edge = v["spacing_mm"], v["spacing_mm"] * axial.shape[1]
    left = 100 * np.exp(-spacing * np.cumsum(mu[::-1])[::-1])
    x = (np.arange(len(mu)) - (len(mu) - 1) / 2) * spacing
    figure, axes = new_figure(6.6, 8.0, 3, 1, sharex=True, gridspec_kw={"height_ratios": [4.7, 1.1, 1.1]})
    picture, attenuation, photons = axes[:, 0]
    axial_in_mm(picture, axial, edge)
    # Its row is high enough for it to be as wide as the curves below it.
    picture.set(xlim=(-edge / 2, edge / 2), ylim=(0.4 * edge, -0.34 * edge))
    mark_sides(picture, "axial")
    picture.set_title(v["patient"])
    behind = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
    arrow = {"arrowstyle": "-|>", "color": RAY, "lw": 2.2, "shrinkA": 0, "shrinkB": 0}
    picture.annotate("", (-0.49 * edge, v["y_mm"]), (0.49 * edge, v["y_mm"]), arrowprops=arrow)
    picture.text(0.48 * edge, v["y_mm"] - 6, "source", color=RAY, ha="right", va="bottom", bbox=behind)
    picture.text(-0.48 * edge, v["y_mm"] - 6, "detector", color=RAY, ha="left", va="bottom", bbox=behind)
    attenuation.fill_between(x, mu, step="mid", color=COLOURS["blue"], alpha=0.3, lw=0)
    attenuation.step(x, mu, where="mid", color=COLOURS["blue"], lw=1.4)
    attenuation.set_ylabel("µ in 1/mm")
    attenuation.set_ylim(0, None)
    attenuation.text(
        0.02, 0.9, f"area = line integral = {v['line_integral']:.2f}", transform=attenuation.transAxes, va="top"
    )
    photons.semilogy(x, left, color=COLOURS["red"])
    photons.set_ylabel("photons left, %")
    photons.set_ylim(left.min() / 2.2, 160)
    photons.set_yticks([1, 10, 100], ["1", "10", "100"])
    photons.annotate(
        f"{left[0]:.2g} %", (x[0], left[0]), (8, 8), textcoords="offset points", color=COLOURS["red"], va="bottom"
    )
    photons.set_xticks([-100, 0, 100])
    picture.tick_params(bottom=False)
    photons.set_xlabel("← the photons fly this way          x in mm, patient's left at the right")
    for ax in (attenuation, photons):
        ax.grid(axis="y")
        ax.axhline(0, lw=0)
    return finish(figure, result, "One ray: lung lets photons pass, the heart stops them")


@styled
def views_of_patients(result: Result) -> Figure:
    """Fig. 3 of the paper redrawn: every x-ray of some patients, under a drawing of where each was taken from.

    Arrays: ``axial`` (y x, HU, of the first patient), ``xrays`` (patient view v u); values ``names``, ``angles_deg``,
    ``edge_mm``.
    """
    axial, xrays, v = result.arrays["axial"], result.arrays["xrays"].astype(np.float32), result.values
    angles, names = v["angles_deg"], v["names"]
    width = max(1.2 * len(angles), 4.5) + 0.9
    figure, axes = new_figure(width, 1.27 * (len(names) + 1) + 0.75, len(names) + 1, len(angles))
    scale = Scale(XRAY.label, 0, top(xrays, 0.999))
    for j, angle in enumerate(angles):
        drawing = axes[0, j]
        axial_in_mm(drawing, axial, v["edge_mm"])
        parallel_rays(drawing, angle, 0.46 * v["edge_mm"], 0.26 * v["edge_mm"], 3)
        drawing.set(xlim=(-0.58 * v["edge_mm"], 0.58 * v["edge_mm"]), ylim=(0.58 * v["edge_mm"], -0.58 * v["edge_mm"]))
        if j:
            for text in list(drawing.texts)[:2]:
                text.remove()
        drawing.set_title({0.0: "0° lateral", 90.0: "90° frontal"}.get(angle, f"{angle:g}°"), fontsize=9.5)
        for i in range(len(names)):
            image = show_xray(axes[i + 1, j], xrays[i, j], angle, scale, mirror=True)
    axes[0, 0].set_ylabel("from the feet", fontsize=9)
    for i, name in enumerate(names):
        axes[i + 1, 0].set_ylabel(name, fontsize=9)
    colour_bar(figure, image, axes.ravel().tolist(), scale.label, "right")
    count = f"{len(angles)} x-ray{'s' if len(angles) > 1 else ''} of §V-B"
    whose = " and ".join(f"a {name}" if name == "phantom" else name for name in names)
    return finish(figure, result, f"{count}: {whose}")


@styled
def rotation_frames(result: Result, width_px: int = 640) -> list[np.ndarray]:
    """Frames for a slider over the angle: the axial slice with its rays, beside the x-ray.

    Arrays: ``axial`` (y x, HU), ``xrays`` (view v u); values ``angles_deg``, ``edge_mm``.
    """
    axial, xrays, v = result.arrays["axial"], result.arrays["xrays"].astype(np.float32), result.values
    scale = Scale(XRAY.label, 0, top(xrays, 0.999))
    frames = []
    figure = Figure(figsize=(6.4, 3.3), dpi=width_px / 6.4, facecolor="white")
    FigureCanvasAgg(figure)
    for angle, xray in zip(v["angles_deg"], xrays, strict=True):
        figure.clear()
        left, right = (figure.add_axes((x, 0.01, 0.49, 0.91)) for x in (0.005, 0.505))
        axial_in_mm(left, axial, v["edge_mm"])
        parallel_rays(left, angle, 0.46 * v["edge_mm"], 0.3 * v["edge_mm"])
        limit = 0.56 * v["edge_mm"]
        left.set(xlim=(-limit, limit), ylim=(limit, -limit))
        left.set_title("axial slice, rays and detector")
        show_xray(right, xray, angle, scale, mirror=True)
        right.set_title(f"x-ray at {angle:g}°")
        frames.append(frame_pixels(figure))
    return Frames(frames, result)


@styled
def beams(result: Result) -> Figure:
    """Parallel and cone beam at the same scale, and the magnification measured with pairs of markers.

    Arrays: ``parallel``, ``cone`` (v u), ``markers_parallel``, ``markers_cone`` (pair 2 2, as (v, u) in mm),
    ``depth_mm``, ``measured_parallel``, ``measured_cone`` (pair); values ``edge_parallel_mm``, ``edge_cone_mm``,
    ``dso_mm``, ``dsd_mm``, ``patient``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(9.4, 3.9, 1, 3, gridspec_kw={"width_ratios": [1, 1, 1.05]})
    limit = v["edge_cone_mm"] / 2
    scale = Scale(XRAY.label, 0, top(a["parallel"], 0.999))
    order = np.argsort(a["depth_mm"])
    colours = [COLOURS[name] for name in ("blue", "sky", "green", "orange", "red")]
    for ax, mode in zip(axes[0], ("parallel", "cone"), strict=False):
        half = v[f"edge_{mode}_mm"] / 2
        image = show_xray(ax, a[mode], 90.0, scale, marks=False)
        image.set_extent((half, -half, -half, half))  # mirrored: u grows to the left
        for side, align, letter in ((0.95 * half, "left", "R"), (-0.95 * half, "right", "L")):
            ax.text(side, 0.94 * half, letter, color="white", fontsize=8, ha=align, va="top")
        for colour, k in zip(colours, order, strict=False):
            pair = a[f"markers_{mode}"][k]
            ax.plot(pair[:, 1], pair[:, 0], "o-", color=colour, ms=3.5, lw=1.2)
        ax.set_xlim(limit, -limit)
        ax.set_ylim(-limit, limit)
        ax.set_facecolor("#e4e4e4")
        ax.set_xticks([-200, 0, 200])
        ax.set_yticks([-200, 0, 200])
        ax.set_xlabel("u on the detector, mm")
        ax.set_title(f"{mode} beam, 90°")
    axes[0, 0].set_ylabel("v on the detector, mm")
    plot = axes[0, 2]
    depth = np.linspace(-140, 140, 50)
    plot.plot(depth, v["dsd_mm"] / (v["dso_mm"] - depth), color=COLOURS["grey"], lw=1.2)
    plot.axhline(1, color=COLOURS["grey"], lw=1.2)
    for colour, k in zip(colours, order, strict=False):
        plot.plot(a["depth_mm"][k], a["measured_cone"][k], "o", color=colour, ms=7)
        plot.plot(a["depth_mm"][k], a["measured_parallel"][k], "s", color=colour, ms=6)
    plot.text(-135, v["dsd_mm"] / (v["dso_mm"] - 85), "cone: DSD / (DSO − depth)", fontsize=9, va="bottom")
    plot.text(-135, 1.02, "parallel: 1", fontsize=9, va="bottom")
    plot.set_xlabel("depth towards the source, mm")
    plot.set_title("measured magnification")
    plot.set_ylim(0.9, None)
    plot.grid()
    return finish(figure, result, f"{v['patient']}: a cone beam magnifies, and more so what is near the source")


@styled
def doses(result: Result) -> Figure:
    """The same view with fewer and fewer photons.

    Arrays: ``xrays`` (dose v u), ``noise_measured``, ``noise_predicted`` (dose bin), ``bin_centres`` (line
    integral); values ``photons`` (dose; 0 for no noise), ``angle_deg``, ``patient``.
    """
    a, v = result.arrays, result.values
    noisy = [k for k, photons in enumerate(v["photons"]) if photons]
    n = len(a["xrays"])
    columns = (n + 1) // 2
    figure, axes = new_figure(2.05 * columns + 4.2, 5.0, 2, columns + 1, width_ratios=[*[1] * columns, 1.75])
    scale = Scale(XRAY.label, 0, top(a["xrays"][0], 0.999))
    for ax, xray, photons in zip(axes[:, :-1].ravel(), a["xrays"], v["photons"], strict=False):
        image = show_xray(ax, xray, v["angle_deg"], scale)
        ax.set_title(f"{photons:,} photons" if photons else "no noise")
    colour_bar(figure, image, axes[:, :-1].ravel().tolist(), scale.label, "bottom")
    for ax in axes[:, -1]:
        ax.remove()
    plot = figure.add_subplot(axes[0, 0].get_gridspec()[:, -1])
    for k, name in zip(noisy, ("green", "blue", "red"), strict=False):
        plot.semilogy(a["bin_centres"], a["noise_predicted"][k], "-", color=COLOURS[name], lw=1.2)
        plot.semilogy(a["bin_centres"], a["noise_measured"][k], "o", color=COLOURS[name], ms=4)
        words = (a["bin_centres"][-1] + 0.2, a["noise_predicted"][k][-1], f"{v['photons'][k]:,}")
        plot.text(*words, color=COLOURS[name], va="center", fontsize=9)
    plot.set_xlim(0, a["bin_centres"][-1] + 2.1)
    plot.set_xlabel("line integral")
    plot.set_ylabel("standard deviation")
    plot.set_title("dots measured, lines √(eʸ / N₀)")
    plot.set_ylim(None, 2 * float(np.nanmax(a["noise_measured"])))
    plot.grid()
    return finish(figure, result, "Fewer photons, more noise, and most of it where the body is thick")


@styled
def two_ways(result: Result) -> Figure:
    """The fast x-ray beside independent ones of the same volume, and their differences.

    Arrays: ``fast`` (v u), ``others`` (way v u); values ``names`` (of the others), ``percent`` (relative L2
    difference), ``angle_deg``, ``mode``.
    """
    a, v = result.arrays, result.values
    n = len(a["others"])
    figure, axes = new_figure(2.35 * (1 + 2 * n) + 0.4, 3.9, 1, 1 + 2 * n)
    scale = Scale(XRAY.label, 0, top(a["fast"], 0.999))
    images = [show_xray(axes[0, 0], a["fast"], v["angle_deg"], scale)]
    axes[0, 0].set_title("sparse matrices")
    difference = Scale("difference", -0.1, 0.1, "RdBu_r")
    for k, name in enumerate(v["names"]):
        images.append(show_xray(axes[0, 1 + 2 * k], a["others"][k], v["angle_deg"], scale))
        axes[0, 1 + 2 * k].set_title(name)
        ax = axes[0, 2 + 2 * k]
        shown = show_xray(ax, a["fast"] - a["others"][k], v["angle_deg"], difference, marks=False)
        ax.set_title(f"difference: {v['percent'][k]:.2f} %")
    colour_bar(figure, images[0], [axes[0, 0], *axes[0, 1::2]], scale.label)
    colour_bar(figure, shown, axes[0, 2::2].tolist(), difference.label)
    return finish(figure, result, f"{v['mode'].capitalize()} beam, two ways: only edges differ")


@styled
def convergence(result: Result) -> Figure:
    """Relative error of the projector against closed forms, by resolution.

    Arrays: ``size``, ``parallel``, ``cone`` (percent, per size); values ``slope_parallel``, ``slope_cone``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(5.6, 3.7)
    ax = axes[0, 0]
    for mode, colour, marker in (("parallel", "blue", "o"), ("cone", "red", "s")):
        ax.loglog(a["size"], a[mode], marker=marker, color=COLOURS[colour], label=f"{mode}: {v[f'slope_{mode}']:.1f}")
    guide = np.sqrt(a["parallel"][0] * a["cone"][0]) * (a["size"] / a["size"][0]) ** -2.0
    ax.loglog(a["size"], guide, "--", color=COLOURS["grey"], lw=1.2, label="order 2")
    ax.set_xticks(a["size"], [f"{n}³" for n in a["size"]])
    ax.minorticks_off()
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    values = np.concatenate([a["parallel"], a["cone"]])
    ax.set_ylim(values.min() / 1.6, values.max() * 1.6)
    ax.set_xlabel("voxels and pixels per edge")
    ax.set_ylabel("error against the\nexact integral, %")
    ax.legend(title="order measured")
    ax.grid()
    return finish(figure, result, "Twice the resolution, a quarter of the error")


@styled
def without_learning(result: Result) -> Figure:
    """What classical solvers make of fewer and fewer views.

    Arrays: ``truth`` (z y x, HU), and ``METHOD-VIEWS`` (z y x, HU); values ``view_sets``, ``view_names``,
    ``shown`` (rows: method per set of views), ``row_names``, ``psnr`` (method → set → dB), ``patient``.
    """
    a, v = result.arrays, result.values
    rows, sets = v["shown"], v["view_sets"]
    figure, axes = new_figure(1.62 * (len(sets) + 1) + 0.9, 1.62 * (len(rows) + 1) + 0.9, len(rows) + 1, len(sets) + 1)
    truth = a["truth"].astype(np.float32)
    for i, methods in enumerate([*rows, rows[-1]]):
        plane = "coronal" if i == len(rows) else "axial"
        image = show_slice(axes[i, 0], truth, plane, marks=True)
        for j, (name, method) in enumerate(zip(sets, methods, strict=True)):
            show_slice(axes[i, j + 1], a[f"{method}-{name}"].astype(np.float32), plane)
            if plane == "axial":
                axes[i, j + 1].set_xlabel(f"{v['psnr'][method][name]:.1f} dB", fontsize=9)
        name = v["row_names"][min(i, len(rows) - 1)]
        axes[i, 0].set_ylabel(name if plane == "axial" else f"{name},\ncoronal", fontsize=9)
    for ax, title in zip(axes[0], ["truth", *v["view_names"]], strict=True):
        ax.set_title(title)
    colour_bar(figure, image, axes.ravel().tolist(), CT.label, "right")
    return finish(figure, result, f"Without learning: {v['patient']} from few x-rays")


def solver_table(result: Result) -> str:
    """PSNR of every classical method and set of views, as an HTML table; values as for :func:`without_learning`."""
    v = result.values
    rows = [[METHOD_NAMES[method], *(_best(v, method, name) for name in v["view_sets"])] for method in v["psnr"]]
    return html_table([f"PSNR in dB, {v['patient']}", *v["view_names"]], rows)


def _best(values: Mapping[str, Any], method: str, view_set: str) -> str:
    column = {name: row[view_set] for name, row in values["psnr"].items() if view_set in row}
    if method not in column:
        return "–"
    text = f"{column[method]:.1f}"
    return f"<b>{text}</b>" if column[method] >= max(column.values()) else text
