"""Frames for sliders: posterior samples against their number, the views, the guidance scale, and the height.

Each function takes a saved result and returns pictures of one size with a label each, for
:func:`difr3ct_core.interactive.frame_slider`. The docstring names the arrays that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import InputError
from ..results import Result
from .samples import STD
from .style import CT, XRAY, Frames, Scale, frame_pixels, mark_sides, plane_of, show_image, show_xray, styled, top

#: Frames of a slider over slices: more would make the page heavy.
MOST_SLICES = 24
_DPI = 100


@dataclass(frozen=True)
class Panel:
    """One picture of a frame: rows from top to bottom, as :func:`plane_of` gives them."""

    title: str
    picture: np.ndarray
    scale: Scale = CT
    note: str = ""  # under the picture
    sides: str = ""  # plane of the letters at its edges
    xray_deg: float | None = None  # the picture is an x-ray (v u), shown as one
    line: float | None = None  # row where a line crosses the picture


def _frame(figure: Figure, panels: Sequence[Panel]) -> np.ndarray:
    """Panels side by side; neighbours of one scale share a colour bar below."""
    figure.clear()
    width, height = figure.get_size_inches()
    share, n = 1 / len(panels), len(panels)
    edge = (share - 0.008) * width / height
    base = 1 - 0.27 / height - edge
    start = 0
    for j, panel in enumerate(panels):
        ax = figure.add_axes((j * share + 0.004, base, share - 0.008, edge))
        if panel.xray_deg is None:
            image = show_image(ax, panel.picture, panel.scale)
        else:
            image = show_xray(ax, panel.picture, panel.xray_deg, panel.scale)
        if panel.sides:
            mark_sides(ax, panel.sides)
        if panel.line is not None:
            ax.axhline(panel.line, color="#F0E442", linewidth=1.2)
        ax.set_title(panel.title, fontsize=10, pad=3)
        figure.text((j + 0.5) * share, base - 0.04 / height, panel.note, fontsize=8.5, ha="center", va="top")
        if j + 1 == n or panels[j + 1].scale != panel.scale:
            span = min(j + 1 - start, 2) * share  # a bar as long as two pictures says enough
            middle = (start + j + 1) / 2 * share
            under = figure.add_axes((middle - 0.34 * span, 0.29 / height, 0.68 * span, 0.08 / height))
            bar = figure.colorbar(image, cax=under, orientation="horizontal")
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.tick_params(labelsize=8, length=2, pad=1)
            bar.locator = mpl.ticker.MaxNLocator(3)  # type: ignore[assignment]
            bar.update_ticks()
            figure.text(middle + 0.37 * span, 0.33 / height, _unit(panel.scale), fontsize=8, ha="left", va="center")
            start = j + 1
    return frame_pixels(figure)


def _unit(scale: Scale) -> str:
    return "" if scale.label == XRAY.label else "HU"


def _figure(panels: int, panel_in: float = 1.6) -> Figure:
    """A figure for frames of so many panels, with room for titles, notes and bars."""
    figure = Figure(figsize=(panels * panel_in, panel_in + 0.92), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _rms(picture: np.ndarray) -> str:
    return f"RMS {np.sqrt(np.mean(np.square(picture, dtype=np.float64))):.0f} HU"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number > 1 else ''}"


@styled
def sample_count_frames(result: Result) -> Frames:
    """Mean and spread of the first 1, 2, 3, ... posterior samples of one patient.

    Arrays: ``truth`` (z x), ``slices`` (sample z x), coronal, HU, rows from inferior to superior; ``shown`` (numbers
    of samples, one a frame). The spread is the population standard deviation, 0 for one sample.

    Raises:
        InputError: a number that is not from 1 to the number of samples.
    """
    truth, slices = (result.arrays[key].astype(np.float64)[..., ::-1, :] for key in ("truth", "slices"))
    figure, frames, labels = _figure(4), [], []
    for n in map(int, result.arrays["shown"]):
        if not 1 <= n <= len(slices):
            raise InputError(f"{result.name}.shown: found {n}, expected numbers from 1 to {len(slices)} samples.")
        mean, spread = slices[:n].mean(0), slices[:n].std(0)
        panels = (
            Panel("truth", truth, sides="coronal"),
            Panel(f"mean of {n}" if n > 1 else "one sample", mean),
            Panel("standard deviation", spread, STD, _rms(spread) if n > 1 else "one sample has none"),
            Panel("|mean − truth|", np.abs(mean - truth), STD, _rms(mean - truth)),
        )
        frames.append(_frame(figure, panels))
        labels.append(_counted(n, "sample"))
    return Frames(frames, result, labels)


@styled
def view_count_frames(result: Result) -> Frames:
    """Reconstructions of one patient from more and more x-rays.

    Arrays: ``truth`` (z x), ``mean``, ``std`` (frame z x), coronal, HU, rows from inferior to superior; ``xrays``
    (frame v u), the x-ray that was added last. Values: ``counts`` (views, one a frame), ``added_deg`` (angle of that
    x-ray), ``n_samples``.
    """
    a, v = result.arrays, result.values
    truth, mean, std = (a[key].astype(np.float64)[..., ::-1, :] for key in ("truth", "mean", "std"))
    xrays = a["xrays"].astype(np.float32)
    scale = Scale(XRAY.label, 0, top(xrays, 0.999))
    figure, frames, labels = _figure(5, 1.5), [], []
    for k, (count, angle) in enumerate(zip(v["counts"], v["added_deg"], strict=True)):
        panels = (
            Panel(f"x-ray {count}: {angle:g}°", xrays[k], scale, scale.label, xray_deg=angle),
            Panel(f"mean of {v['n_samples']}", mean[k]),
            Panel("truth", truth, sides="coronal"),
            Panel("standard deviation", std[k], STD, _rms(std[k])),
            Panel("|mean − truth|", np.abs(mean[k] - truth), STD, _rms(mean[k] - truth)),
        )
        frames.append(_frame(figure, panels))
        labels.append(_counted(count, "view"))
    return Frames(frames, result, labels)


@styled
def guidance_frames(result: Result) -> Frames:
    """One patient at each guidance scale: a sample, the mean and the spread of several.

    Arrays: ``guidance`` (n,), ``guided_picture`` (n z y x, HU), ``guided_truth`` (z x), ``guided_slice_mean``,
    ``guided_slice_std`` (n z x), coronal, HU, rows from inferior to superior. Values: ``per_patient`` (samples).
    """
    a = result.arrays
    truth, mean, std = (
        a[key].astype(np.float64)[..., ::-1, :] for key in ("guided_truth", "guided_slice_mean", "guided_slice_std")
    )
    figure, frames, labels = _figure(4), [], []
    for k, scale in enumerate(a["guidance"]):
        panels = (
            Panel("truth", truth, sides="coronal"),
            Panel("one sample", plane_of(a["guided_picture"][k], "coronal")),
            Panel(f"mean of {result.values['per_patient']}", mean[k], CT, f"error: {_rms(mean[k] - truth)}"),
            Panel("standard deviation", std[k], STD, _rms(std[k])),
        )
        frames.append(_frame(figure, panels))
        labels.append(f"s = {scale:g}")
    return Frames(frames, result, labels)


@styled
def slice_frames(result: Result) -> Frames:
    """Axial slices of truth, mean, spread and error, from the lowest to the highest; a line shows where each lies.

    Arrays: ``truth``, ``mean``, ``std`` (z y x, HU), ``samples`` (n z y x). Values: ``spacing_mm``.
    """
    truth, mean, std = (result.arrays[key].astype(np.float32) for key in ("truth", "mean", "std"))
    n, spacing = len(truth), result.values["spacing_mm"]
    coronal = plane_of(truth, "coronal")
    figure, frames, labels = _figure(5, 1.5), [], []
    step = math.ceil(n / MOST_SLICES)
    for z in range(step // 2, n, step):
        panels = (
            Panel("where", coronal, sides="coronal", line=n - 1 - z),
            Panel("truth", truth[z], sides="axial"),
            Panel(f"mean of {len(result.arrays['samples'])}", mean[z]),
            Panel("standard deviation", std[z], STD, _rms(std[z])),
            Panel("|mean − truth|", np.abs(mean[z] - truth[z]), STD, _rms(mean[z] - truth[z])),
        )
        frames.append(_frame(figure, panels))
        labels.append(f"z = {(z - (n - 1) / 2) * spacing:+.1f} mm")
    return Frames(frames, result, labels)
