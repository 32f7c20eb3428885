"""Figures of Eq. 10: rays of a voxel, a point traced through fusion, and back-projection (chapter 03).

Each function takes a saved result and returns a figure or the frames of a slider. The docstring names the arrays and
values that it needs. Points are (x, y, z) in mm.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..results import Result
from .style import (
    COLOURS,
    CT,
    Frames,
    Scale,
    TalkFigure,
    colour_bar,
    finish,
    frame_pixels,
    mark_sides,
    new_figure,
    show_image,
    show_slice,
    styled,
)
from .xrays import DETECTOR, RAY, axial_in_mm

POINT = COLOURS["red"]
#: Fused values relative to their maximum.
SHARE = Scale("share of the maximum", 0, 1, "magma")


@styled
def rays_in_space(result: Result) -> Figure:
    """Eq. 10 in space: one voxel, its rays through the chest, and where they fall on the x-rays.

    Arrays: ``axial`` (y x, HU, at the voxel's height), and per mode ``xrays-MODE`` (view v u), ``corners-MODE``
    (view 2 2 3: detector corners by row and column), ``hits-MODE`` and ``towards_source-MODE`` (view 3); values
    ``modes``, ``point_mm``, ``edge_mm``, ``angles_deg``, ``dso_mm``.
    """
    a, v = result.arrays, result.values
    figure = TalkFigure(figsize=(9.6, 4.3))
    for k, mode in enumerate(v["modes"]):
        ax: Any = figure.add_axes((0.5 * k, 0.0, 0.5, 0.88), projection="3d", computed_zorder=False)
        half, height = v["edge_mm"] / 2, v["point_mm"][2]
        for xray, corners in zip(a[f"xrays-{mode}"], a[f"corners-{mode}"], strict=True):
            grey = np.clip(xray / np.quantile(xray, 0.998), 0, 1)
            _textured(ax, corners, grey, zorder=1)
        slice_corners = np.array([[[x, y, height] for x in (-half, half)] for y in (-half, half)])
        grey = np.clip((a["axial"].astype(np.float32) - CT.low) / (CT.high - CT.low), 0, 1)
        _textured(ax, slice_corners, grey, zorder=2, alpha=0.9)
        point, up = np.array(v["point_mm"]), np.array([0.0, 0.0, 1.0])
        for j, angle in enumerate(v["angles_deg"]):
            hit, source = a[f"hits-{mode}"][j], a[f"towards_source-{mode}"][j]
            ax.plot(*np.stack([source, point, hit]).T, color=RAY, lw=2, zorder=3)
            ax.plot(*hit[:, None], "o", color=RAY, mec="white", ms=8, zorder=4)
            name = ax.text(*(hit + 26 * up), f"π at {angle:g}°", color="white", fontsize=9, ha="center", zorder=6)
            name.set_path_effects([withStroke(linewidth=2.5, foreground="black")])
            words = "from far away" if mode == "parallel" else f"source at {v['dso_mm']:g} mm"
            name = ax.text(
                *(source - 20 * up), words, color=COLOURS["black"], fontsize=9, ha="center", va="top", zorder=6
            )
            name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        ax.plot(*point[:, None], "o", color=POINT, mec="white", ms=8, zorder=5)
        name = ax.text(*(point + 24 * up), "p", color=POINT, fontsize=13, fontweight="bold", ha="center", zorder=6)
        name.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        ax.view_init(elev=24, azim=48)
        ax.set_box_aspect((1, 1, 0.72), zoom=1.4)
        reach = 300
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-0.72 * reach + 30, 0.72 * reach + 30))
        ax.set_axis_off()
        ax.text2D(0.5, 1.0, f"{mode} beam", transform=ax.transAxes, ha="center", fontsize=10.5)
    return finish(figure, result, "Eq. 10: each x-ray gives the point the feature that its ray hits")


def _textured(ax: Any, corners: np.ndarray, grey: np.ndarray, zorder: int, alpha: float = 1.0) -> None:
    """A picture (row, column) of 0 to 1 as a plane in space; its corners are (row end, column end, xyz)."""
    rows, columns = (np.linspace(0, 1, n + 1) for n in grey.shape)
    r, c = np.meshgrid(rows, columns, indexing="ij")
    weights = np.stack([(1 - r) * (1 - c), (1 - r) * c, r * (1 - c), r * c], -1)
    x, y, z = np.moveaxis(weights @ corners.reshape(4, 3), -1, 0)
    colours = mpl.colormaps["gray"](grey)
    colours[..., 3] = alpha
    ax.plot_surface(
        x, y, z, facecolors=colours, rstride=1, cstride=1, shade=False, antialiased=False, linewidth=0, zorder=zorder
    )


@styled
def rays_in_plane(result: Result) -> Figure:
    """The same from above: a voxel, the rays of all views, and the pixels that they hit.

    Arrays: ``axial`` (y x, HU), and per mode ``ends-MODE`` (view 2 2: source side and detector hit, xy mm) and
    ``detectors-MODE`` (view 2 2: its two ends); values ``modes``, ``point_mm``, ``edge_mm``, ``angles_deg``.
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(9.2, 5.1, 1, len(v["modes"]))
    for ax, mode in zip(axes[0], v["modes"], strict=True):
        axial_in_mm(ax, a["axial"].astype(np.float32), v["edge_mm"])
        for ends, detector, angle in zip(a[f"ends-{mode}"], a[f"detectors-{mode}"], v["angles_deg"], strict=True):
            ax.plot(*detector.T, color=DETECTOR, lw=3, solid_capstyle="butt", zorder=2)
            ax.plot(*ends.T, color=RAY, lw=1.5, zorder=3)
            ax.plot(*ends[1], "o", color=RAY, mec="white", ms=6, zorder=4)
            ax.text(*(detector.mean(0) * 1.15), f"{angle:g}°", fontsize=8.5, ha="center", va="center")
        ax.plot(*v["point_mm"][:2], "o", color=POINT, mec="white", ms=8, zorder=5)
        ax.set(xlim=(-335, 300), ylim=(285, -315))
        ax.set_title(f"{mode} beam")
    return finish(figure, result, "One voxel, its ray in every view, and the pixel each ray hits")


@styled
def point_trace(result: Result) -> Figure:
    """A bright point → its x-rays → Eq. 10.

    Arrays: ``volume`` (z y x), and per mode ``strips-MODE`` (view u, the row of the point's height in each view),
    ``hits-MODE`` (view: u in pixels), ``fused-MODE`` (z y x); values ``modes``, ``point_index`` (z, y, x),
    ``angles_deg``, ``error_mm`` (by mode).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(9.2, 4.75, len(v["modes"]), 4, gridspec_kw={"width_ratios": [1, 1.25, 1, 1]})
    z, y, _ = v["point_index"]
    for i, mode in enumerate(v["modes"]):
        fused = a[f"fused-{mode}"].astype(np.float32)
        show_slice(axes[i, 0], a["volume"] / a["volume"].max(), "axial", z, SHARE, marks=True)
        strips = a[f"strips-{mode}"].astype(np.float32)
        ax = axes[i, 1]
        ax.imshow(strips / strips.max(), cmap=SHARE.cmap, vmin=0, vmax=1, aspect="auto")
        ax.plot(a[f"hits-{mode}"], np.arange(len(strips)), "o", mfc="none", mec="white", ms=9, mew=1.2)
        ax.set_yticks(range(len(strips)), [f"{angle:g}°" for angle in v["angles_deg"]], fontsize=8)
        ax.set_xticks([])
        ax.set_xlabel("u on the detector  →", fontsize=9)
        image = show_slice(axes[i, 2], fused / fused.max(), "axial", z, SHARE)
        show_slice(axes[i, 3], fused / fused.max(), "coronal", y, SHARE)
        axes[i, 2].set_xlabel(f"maximum {v['error_mm'][mode]:.1f} mm off", fontsize=9)
        axes[i, 0].set_ylabel(f"{mode} beam", fontsize=10)
    titles = ("a point", "its x-rays; circles: π(p)", "Eq. 10, axial", "Eq. 10, coronal")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    colour_bar(figure, image, axes.ravel().tolist(), SHARE.label, "right")
    return finish(figure, result, "A point becomes a star: the rays of all views meet only where it was")


@styled
def views_frames(result: Result, width_px: int = 640) -> list[np.ndarray]:
    """Frames for a slider over the number of views: Eq. 10 of a point and of a chest.

    Arrays: ``fused`` (count 2 y x: point and chest), ``truth`` (2 y x); values ``counts``, ``first_names``.
    """
    a, v = result.arrays, result.values
    figure = Figure(figsize=(6.4, 3.45), dpi=width_px / 6.4, facecolor="white")
    FigureCanvasAgg(figure)
    frames = []
    for count, pictures in zip(v["counts"], a["fused"].astype(np.float32), strict=True):
        figure.clear()
        for k, (picture, title) in enumerate(zip(pictures, ("a point", "a chest"), strict=True)):
            ax = figure.add_axes((0.005 + 0.5 * k, 0.01, 0.49, 0.9))
            high = picture.max() if k == 0 else np.quantile(picture, 0.995)
            show_image(ax, picture / high, SHARE if k == 0 else Scale("", 0, 1))
            mark_sides(ax, "axial")
            ax.set_title(f"Eq. 10 of {title}, {count} view{'s' if count > 1 else ''}")
        frames.append(frame_pixels(figure))
    return Frames(frames, result)


@styled
def back_projection(result: Result) -> Figure:
    """Eq. 10 with the x-rays themselves as features, beside the projector's adjoint.

    Arrays: per mode ``fused-MODE`` and ``adjoint-MODE`` (y x, dimensionless), ``truth`` (y x, HU); values ``modes``,
    ``percent`` (relative L2 difference over the volume, by mode).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(8.2, 5.2, len(v["modes"]), 4)
    high = float(np.quantile(np.stack([a[f"fused-{mode}"] for mode in v["modes"]]), 0.999))
    scale = Scale("mean line integral", 0, round(high, 1))
    limit = 0.2
    difference = Scale("difference", -limit, limit, "RdBu_r")
    for i, mode in enumerate(v["modes"]):
        fused, adjoint = (a[f"{kind}-{mode}"].astype(np.float32) for kind in ("fused", "adjoint"))
        show_image(axes[i, 0], a["truth"].astype(np.float32), CT)
        image = show_image(axes[i, 1], fused, scale)
        show_image(axes[i, 2], adjoint, scale)
        shown = show_image(axes[i, 3], fused - adjoint, difference)
        axes[i, 0].set_ylabel(f"{mode} beam", fontsize=10)
        axes[i, 3].set_xlabel(f"{v['percent'][mode]:.1f} %", fontsize=9)
        mark_sides(axes[i, 0], "axial")
    titles = ("the chest", "Eq. 10", "back-projection Aᵀy / Aᵀ1", "difference")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    colour_bar(figure, image, axes[:, 1:3].ravel().tolist(), scale.label, "bottom")
    colour_bar(figure, shown, axes[:, 3].tolist(), difference.label, "bottom")
    return finish(figure, result, "The mean over views is unfiltered back-projection")


@styled
def ramp_filter(result: Result) -> Figure:
    """What a filter before the mean does, with few and with many views.

    Arrays: ``truth`` (y x, HU), ``plain`` and ``filtered`` (count y x, as HU); values ``counts``, ``row``,
    ``spacing_mm``.
    """
    a, v = result.arrays, result.values
    counts = v["counts"]
    figure, axes = new_figure(9.2, 5.6, len(counts), 4, gridspec_kw={"width_ratios": [1, 1, 1, 1.5]})
    x = (np.arange(a["truth"].shape[1]) - (a["truth"].shape[1] - 1) / 2) * v["spacing_mm"]
    for i, count in enumerate(counts):
        plain, filtered = a["plain"][i].astype(np.float32), a["filtered"][i].astype(np.float32)
        image = show_image(axes[i, 0], a["truth"].astype(np.float32), CT)
        mark_sides(axes[i, 0], "axial")
        show_image(axes[i, 1], plain, CT)
        show_image(axes[i, 2], filtered, CT)
        axes[i, 0].axhline(v["row"], color=COLOURS["yellow"], lw=1)
        axes[i, 0].set_ylabel(f"{count} views", fontsize=10)
        plot = axes[i, 3]
        for picture, name, colour in (
            (a["truth"], "chest", "black"), (plain, "mean", "blue"), (filtered, "ramp, then mean", "red"),
        ):  # fmt: skip
            plot.plot(x, picture[v["row"]], color=COLOURS[colour], lw=1.3, label=name)
        plot.set_ylim(-1700, 1100)
        plot.yaxis.tick_right()
        plot.yaxis.set_label_position("right")
        plot.spines["left"].set_visible(False)
        plot.spines["right"].set_visible(True)
        plot.set_ylabel("HU")
        plot.grid(axis="y")
    axes[0, 3].legend(loc="lower center", ncols=3, fontsize=8, handlelength=1, columnspacing=1)
    axes[-1, 3].set_xlabel("x along the yellow line, mm")
    for ax, title in zip(axes[0], ("the chest", "mean of x-rays", "ramp, then mean", "one line"), strict=True):
        ax.set_title(title)
    colour_bar(figure, image, axes[:, :3].ravel().tolist(), CT.label, "bottom")
    return finish(figure, result, "A filter before the mean turns a blur into a picture, given enough views")


@styled
def mistakes(result: Result) -> Figure:
    """The star of a point when fusion assumes a geometry that is not the x-rays'.

    Arrays: ``fused`` (mistake y x); values ``names``, ``error_mm``, ``peak_percent`` (height of the maximum against
    the right geometry's), ``point_index`` (y, x).
    """
    a, v = result.arrays, result.values
    figure, axes = new_figure(1.95 * len(v["names"]) + 0.6, 3.05, 1, len(v["names"]))
    highest = float(a["fused"][0].max())
    for k, (ax, name) in enumerate(zip(axes[0], v["names"], strict=True)):
        image = show_image(ax, a["fused"][k].astype(np.float32) / highest, SHARE)
        ax.plot(v["point_index"][1], v["point_index"][0], "o", mfc="none", mec="white", ms=12, mew=1.2)
        ax.set_title(name, fontsize=9.5)
        ax.set_xlabel(f"{v['error_mm'][k]:.0f} mm off, peak {v['peak_percent'][k]:.0f} %", fontsize=9)
    mark_sides(axes[0, 0], "axial")
    colour_bar(figure, image, axes[0].tolist(), SHARE.label, "right")
    return finish(figure, result, "Wrong geometry gives no error message, only a wrong star (circle: the point)")
