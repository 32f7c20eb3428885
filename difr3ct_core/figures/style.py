"""How every figure of the project looks: windows, orientation, colours, and the line that says where it is from.

Slices are shown as radiologists show them: the patient's right on the image's left, anterior up in an axial slice,
superior up in the others. Grey means HU in one fixed window, so that two pictures can always be compared.
"""

from __future__ import annotations

import functools
import html
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib as mpl
import matplotlib.patheffects
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..results import Result

P = ParamSpec("P")

#: Colours that people with any common colour blindness can tell apart (Okabe & Ito 2008).
COLOURS: dict[str, str] = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "black": "#000000",
    "grey": "#767676",
}
#: One colour per set of views, in every chapter.
VIEW_COLOURS: dict[str, str] = {
    "8view": COLOURS["blue"],
    "4view": COLOURS["green"],
    "2view": COLOURS["red"],
    "1view_frontal": COLOURS["purple"],
    "1view_lateral": COLOURS["orange"],
}
VIEW_NAMES: dict[str, str] = {
    "8view": "8 views",
    "4view": "4 views",
    "2view": "2 views",
    "1view_frontal": "1 view (frontal)",
    "1view_lateral": "1 view (lateral)",
}
PLANES = ("axial", "coronal", "sagittal")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
    "axes.prop_cycle": mpl.cycler(color=[COLOURS[c] for c in ("blue", "red", "green", "purple", "orange", "sky")]),
    "font.family": "DejaVu Sans",
}


@dataclass(frozen=True)
class Scale:
    """Colour map and limits of a picture, with the words at its colour bar."""

    label: str
    low: float
    high: float
    cmap: str = "gray"


#: Air to bone. The range of the data is wider; values beyond it are shown as the nearest end.
CT = Scale("HU", -1000, 500)
#: X-rays: line integrals of µ, dimensionless; bone is white, as on film.
XRAY = Scale("line integral of µ", 0, 6)


def origin_html(result: Result) -> str:
    """The line under a figure that leads to where it is from: run, commit, preset, data, seed, device, time, file.

    In a page of the book (``BOOK_STATIC``) the link leads to the copy of the result beside the pages, in JupyterLab to
    the file in the run folder, seen from ``notebooks/``.
    """
    origin, values = result.provenance, result.values
    name = f"{result.name}.json"
    link = f"../results/{name}"
    if result.path is not None and not os.environ.get("BOOK_STATIC"):
        path = result.path.resolve()
        beside = (folder / "notebooks" for folder in path.parents if (folder / "notebooks").is_dir())
        link = os.path.relpath(path, next(beside, path.parent))
    # Chapters that open no cohort say in their values whom they show, if anyone.
    people = [name for name in values.get("names", []) if "phantom" in name or "LIDC" in name]
    shown = origin.get("data") or people or [values.get("patient", "computed in the chapter")]
    seconds = origin.get("wall_s")
    parts = [
        f"run <code>{html.escape(str(origin.get('run', '?')))}</code>",
        f"commit <code>{html.escape(str(origin.get('commit', '?')))}</code>",
        *(
            html.escape(text)
            for text in (
                f"preset {origin.get('preset', '?')}",
                f"data: {', '.join(map(str, shown))}",
                f"seed {origin.get('seed', '?')}",
                str(origin.get("device", "?")),
                "time ?" if seconds is None else f"{seconds:.0f} s",
            )
        ),
        f'<a href="{html.escape(link, quote=True)}">{html.escape(name)}</a>',
    ]
    return f'<p class="origin">{" · ".join(parts)}</p>'


class Frames(list):
    """Frames of a slider, with a label each where the figure knows them, and the line about their origin."""

    def __init__(self, frames: Sequence[np.ndarray], result: Result, labels: Sequence[str] = ()) -> None:
        super().__init__(frames)
        self.labels = list(labels)
        self.origin = origin_html(result)


class TalkFigure(Figure):
    """A Figure that a notebook shows by itself, with or without pyplot, and under it the line about its origin."""

    origin = ""  # HTML, set by finish()

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, Image, display

        # Two outputs: a picture beside HTML in one output would be shown by only one of the two.
        display(Image(self._repr_png_(), format="png"))
        if self.origin:
            display(HTML(self.origin))

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=130, bbox_inches="tight", pad_inches=0.08, facecolor="white")
        return stream.getvalue()


def styled(function: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the project's style, without changing anyone else's."""

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return function(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, np.ndarray]:
    """An empty figure (inches) and its axes as a (rows, columns) array."""
    figure = TalkFigure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.04, wspace=0.02, hspace=0.02)  # type: ignore[union-attr]
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, axes


def provenance_line(result: Result) -> str:
    """Commit, preset, seed, device and time of a result, in one line."""
    origin = result.provenance
    parts = [
        f"{result.name}: preset {origin.get('preset', '?')}, seed {origin.get('seed', '?')}",
        f"commit {origin.get('commit', '?')}",
        str(origin.get("device", "?")),
        f"{origin.get('wall_s', math.nan):.0f} s",
        str(origin.get("finished", "?"))[:10],
    ]
    return " · ".join(parts)


def finish(figure: Figure, result: Result, title: str) -> Figure:
    """Add the message at the top and the provenance at the bottom."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(provenance_line(result), x=0.01, ha="left", fontsize=7, color=COLOURS["grey"])
    figure.origin = origin_html(result)  # type: ignore[attr-defined]
    return figure


def plane_of(volume: np.ndarray, plane: str, index: int | None = None) -> np.ndarray:
    """One slice of a (z, y, x) volume as rows from top to bottom of the picture.

    Args:
        volume: LPS axes.
        plane: "axial" (anterior up), "coronal" or "sagittal" (superior up).
        index: of the slice; by default the middle one.
    """
    axis = PLANES.index(plane)
    picture = np.take(volume, volume.shape[axis] // 2 if index is None else index, axis=axis)
    return picture if plane == "axial" else picture[::-1]


def show_image(ax: Axes, picture: np.ndarray, scale: Scale = CT) -> AxesImage:
    """A picture without axes, pixels square."""
    image = ax.imshow(np.asarray(picture, dtype=np.float32), cmap=scale.cmap, vmin=scale.low, vmax=scale.high)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def mark_sides(ax: Axes, plane: str, colour: str = "white") -> None:
    """Letters at the picture's edges: R and L of the patient, or anterior and posterior."""
    _letters(ax, "AP" if plane == "sagittal" else "RL", colour)


def _letters(ax: Axes, pair: str, colour: str) -> None:
    outline = [mpl.patheffects.withStroke(linewidth=1.5, foreground="black" if colour == "white" else "white")]
    for x, text, align in ((0.03, pair[0], "left"), (0.97, pair[1], "right")):
        shown = ax.text(x, 0.97, text, transform=ax.transAxes, color=colour, fontsize=8, ha=align, va="top")
        shown.set_path_effects(outline)


def show_slice(
    ax: Axes,
    volume: np.ndarray,
    plane: str,
    index: int | None = None,
    scale: Scale = CT,
    marks: bool = False,
) -> AxesImage:
    """A slice of a (z, y, x) volume in the radiological orientation; see :func:`plane_of`."""
    image = show_image(ax, plane_of(volume, plane, index), scale)
    if marks:
        mark_sides(ax, plane)
    return image


def show_xray(
    ax: Axes, xray: np.ndarray, angle_deg: float, scale: Scale = XRAY, marks: bool = True, mirror: bool | None = None
) -> AxesImage:
    """An x-ray (v, u) with superior up.

    Args:
        ax: where.
        xray: line integrals; row 0 is inferior.
        angle_deg: of the view: 0 lateral, 90 frontal.
        scale: see :data:`XRAY`.
        marks: letters for the sides of the patient at the two edges.
        mirror: show columns from last to first. By default views nearer to frontal than to lateral are mirrored,
            so that the patient's right is on the left as in a coronal slice, and lateral views have anterior left.
    """
    sine, cosine = math.sin(math.radians(angle_deg)), math.cos(math.radians(angle_deg))
    frontal = abs(sine) > abs(cosine) + 1e-9
    mirror = frontal if mirror is None else mirror
    picture = np.asarray(xray)[::-1]
    image = show_image(ax, picture[:, ::-1] if mirror else picture, scale)
    if marks:
        # Columns rise along (-sin, cos) in (left, posterior).
        first, last = ("LR" if sine > 0 else "RL") if frontal else ("AP" if cosine > 0 else "PA")
        if mirror:
            first, last = last, first
        _letters(ax, first + last, "white")
    return image


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str, location: str = "bottom") -> None:
    """A thin colour bar for some axes."""
    bar = figure.colorbar(image, ax=list(axes), location=location, fraction=0.05, pad=0.015, aspect=26, shrink=0.85)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.locator = mpl.ticker.MaxNLocator(4)  # type: ignore[assignment]
    bar.update_ticks()


@dataclass(frozen=True)
class Column:
    """One volume shown in every row of :func:`slice_grid`."""

    title: str
    volume: np.ndarray
    scale: Scale = CT
    note: str = ""  # under the lowest slice


def slice_grid(
    columns: Sequence[Column],
    planes: Sequence[str] = ("coronal", "axial"),
    index: Mapping[str, int] | None = None,
    panel: float = 1.75,
) -> tuple[Figure, np.ndarray]:
    """Volumes side by side, one plane per row; neighbours with the same scale share a colour bar below.

    Args:
        columns: what to show.
        planes: rows.
        index: slice of each plane; the middle one by default.
        panel: edge of one picture in inches.

    Returns:
        the figure, without title and provenance, and its axes (plane, column).
    """
    figure, axes = new_figure(panel * len(columns) + 0.3, panel * len(planes) + 1.15, len(planes), len(columns))
    images = {}
    for j, column in enumerate(columns):
        for i, plane in enumerate(planes):
            images[j] = show_slice(
                axes[i, j], column.volume, plane, (index or {}).get(plane), column.scale, marks=j == 0
            )
            if j == 0:
                axes[i, 0].set_ylabel(plane, fontsize=9)
        axes[0, j].set_title(column.title)
        if column.note:
            axes[-1, j].set_xlabel(column.note, fontsize=9)
    start = 0
    for j in range(1, len(columns) + 1):
        if j == len(columns) or columns[j].scale != columns[start].scale:
            scale = columns[start].scale
            colour_bar(figure, images[start], axes[:, start:j].ravel().tolist(), scale.label)
            start = j
    return figure, axes


def top(values: np.ndarray, share: float = 0.995) -> float:
    """An upper limit for a colour scale that a few extreme voxels do not decide, rounded to two digits."""
    limit = float(np.quantile(np.asarray(values, dtype=np.float64), share))
    if not limit > 0:
        return 1.0
    digits = 10 ** (math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / digits) * digits


def frame_pixels(figure: Figure) -> np.ndarray:
    """A figure with an Agg canvas as uint8 (row, column, 3), at its own size and resolution."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
