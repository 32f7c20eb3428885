"""A CT that the reader turns and slices: :func:`show_volume`, in JupyterLab and in the static book.

**In the book** the figure is a picture of three planes at once; buttons load a 3D viewer into its place, without a
kernel and without a network. The voxels are embedded in the page (int16 HU, gzip, base64) and handed to a page of the
book's own, ``_static/viewer.html``, which holds one of two engines:

- ``itk-vtk-viewer``, the engine that itkwidgets wraps: volume rendering, slices, window and level, organs;
- ``niivue``, the light one: three slices and a rendering side by side. It also steps in where the first one fails.

Where both fail, or without JavaScript, the picture stays.

**In JupyterLab** the same call gives a live widget: itkwidgets where it can work, else ipyniivue. itkwidgets loads its
front end from a network, and where there is none it waits for ever; under papermill its mere import loses all later
outputs without an error. So it is imported last, in a live kernel only, and only after a probe of the network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from .ct_grid import apply_to_axes, axis_weights
from .figures.style import CT, PLANES, plane_of
from .files import InputError

#: Voxels in a page: 96³ cost about 1.2 MB. From 2,000,000 on itk-vtk-viewer starts a worker, which file:// forbids.
MAX_VOXELS = 96**3
WORKER_VOXELS = 2_000_000
#: itk-vtk-viewer gives the n-th label the n-th colour of the table that viewer.js names (glasbey_light).
#: These are its first ones, so that picture, legend and both engines agree.
PALETTE = (
    (215, 0, 0), (2, 136, 0), (182, 0, 255), (6, 172, 198), (152, 255, 0), (255, 165, 48),
    (255, 143, 200), (121, 82, 95), (0, 254, 207), (176, 165, 255), (148, 173, 132), (154, 105, 0),
)  # fmt: skip
#: What itkwidgets loads its front end from.
_ITK_HOST = ("cdn.jsdelivr.net", 443)
_PROBE_S = 2.0
_COUNT = itertools.count()
# Edge of the large plane in the picture, and the gap between planes, in pixels.
_LARGE, _GAP = 480, 6

# Style and behaviour are book/static/book.css and volume_figure.js; without them the picture and the legend stand.
_TEMPLATE = """<figure class="volume-figure" id="{id}">
<div class="volume-stage">
<img class="dark-light" src="{src}" alt="{alt}" width="{width}" height="{height}" \
style="display:block;max-width:100%;height:auto;background:#000">
</div>
<div class="volume-bar" hidden>
<button type="button" data-engine="itk" aria-label="Explore in 3D: {title}">Explore in 3D</button>
<button type="button" data-engine="niivue" aria-label="Light viewer: {title}">Light viewer</button>
<button type="button" data-engine="" hidden>Back to the picture</button>
<span class="volume-status" role="status"></span>
</div>
{legend}
<figcaption>{title}, {size}</figcaption>
<script type="application/json" class="volume-spec">{spec}</script>
<script type="text/plain" class="volume-data">{data}</script>
</figure>"""


@dataclass(frozen=True)
class VolumeFigure:
    """The static figure: HTML that a notebook shows as it is."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def show_volume(
    volume: np.ndarray | torch.Tensor,
    spacing: float | Sequence[float],
    labels: np.ndarray | torch.Tensor | None = None,
    *,
    organs: Mapping[str, int | Sequence[int]] | None = None,
    title: str = "CT",
    alt: str = "",
    window: tuple[float, float] = (CT.low, CT.high),
    max_voxels: int = MAX_VOXELS,
) -> Any:
    """Show a volume: a live widget in JupyterLab, else a picture with 3D viewers a click away.

    Args:
        volume: HU (z, y, x), LPS axes.
        spacing: mm of a voxel, one number or (z, y, x).
        labels: organ numbers (z, y, x) on the grid of the volume; 0 is no organ.
        organs: name → number or numbers in ``labels``, at most 12 organs; other numbers are not shown. By default
            each number is an organ of its own.
        title: what is shown, for the caption and the names of the buttons.
        alt: text in place of the picture; by default made of title, size and organs.
        window: HU that are shown black and white.
        max_voxels: a larger volume is averaged over coarser voxels before it is embedded or sent.

    Returns:
        an object that a notebook cell shows: a widget, or a :class:`VolumeFigure`.

    Raises:
        InputError: shapes, spacing, window or organs that do not fit, or values that are not finite.
    """
    values, spacing_mm = _check_volume(volume, spacing)
    if not (np.isfinite(window).all() and window[0] < window[1]):
        raise InputError(f"window: found {window}, expected two HU values, the lower one first.")
    if not 8 <= max_voxels < WORKER_VOXELS:
        raise InputError(f"max_voxels: found {max_voxels}, expected at least 8 and less than {WORKER_VOXELS}.")
    names, numbers = _number_organs(labels, organs, values.shape)
    values, numbers, spacing_mm = _reduce(values, numbers, spacing_mm, max_voxels)
    voxels = np.rint(values).clip(-32768, 32767).astype("<i2")
    if (widget := _live(voxels, numbers, spacing_mm, names, window, title)) is not None:
        return widget
    return VolumeFigure(_figure(voxels, numbers, spacing_mm, names, window, title, alt))


def _check_volume(
    volume: np.ndarray | torch.Tensor, spacing: float | Sequence[float]
) -> tuple[np.ndarray, tuple[float, float, float]]:
    values = np.asarray(volume.detach().cpu() if isinstance(volume, torch.Tensor) else volume)
    if values.ndim != 3 or min(values.shape) < 2 or values.dtype.kind not in "iuf":
        raise InputError(
            f"volume: found {values.dtype} with shape {values.shape}, expected numbers (z, y, x) with at least two "
            "voxels along each axis; choose one sample with an index."
        )
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("volume: found values that are not finite, expected HU everywhere.")
    mm = np.broadcast_to(np.asarray(spacing, dtype=float), (3,)) if np.size(spacing) in (1, 3) else np.zeros(3)
    if not (np.isfinite(mm).all() and (mm > 0).all()):
        raise InputError(f"spacing: found {spacing}, expected one positive number of mm or three (z, y, x).")
    return values, (float(mm[0]), float(mm[1]), float(mm[2]))


def _number_organs(
    labels: np.ndarray | torch.Tensor | None, organs: Mapping[str, int | Sequence[int]] | None, shape: tuple[int, ...]
) -> tuple[list[str], np.ndarray | None]:
    """Names of the organs that are there, and the labels with the n-th of them as n, uint8."""
    if labels is None:
        if organs:
            raise InputError("organs: found names but no labels, expected labels on the grid of the volume.")
        return [], None
    given = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if given.shape != shape or given.dtype.kind not in "iub":
        raise InputError(
            f"labels: found {given.dtype} with shape {given.shape}, expected whole numbers with the volume's {shape}."
        )
    present = set(np.unique(given).tolist()) - {0}
    if organs is None:
        organs = {f"label {number}": int(number) for number in sorted(present)}
    numbers, names = np.zeros(shape, np.uint8), []
    for name, ids in organs.items():
        own = np.isin(given, np.atleast_1d(np.asarray(ids, dtype=np.int64)))
        if own.any():  # an organ outside this volume gets no colour
            names.append(name)
            if len(names) > len(PALETTE):
                raise InputError(f"organs: found more than {len(PALETTE)}, expected at most so many; group them.")
            numbers[own] = len(names)
    return names, numbers


def _reduce(
    values: np.ndarray, numbers: np.ndarray | None, spacing: tuple[float, float, float], max_voxels: int
) -> tuple[np.ndarray, np.ndarray | None, tuple[float, float, float]]:
    """The same field of view with at most ``max_voxels``: HU averaged, labels taken from the nearest voxel.

    The coarsest axes keep their voxels; the others are brought to one spacing.
    """
    if values.size <= max_voxels:
        return values, numbers, spacing
    extent = np.array(values.shape) * np.array(spacing)
    low, high = min(spacing), float(extent.max())
    for _ in range(60):  # the smallest spacing that keeps within the limit
        middle = (low + high) / 2
        shape = _coarse_shape(values.shape, extent, middle)
        low, high = (low, middle) if np.prod(shape) <= max_voxels else (middle, high)
    shape = _coarse_shape(values.shape, extent, high)
    new = extent / shape
    # The operators are given for x, y, z.
    operators = [
        axis_weights(values.shape[k], spacing[k], 0.0, shape[k], float(new[k]), 0.0) for k in (2, 1, 0)
    ]  # fmt: skip
    coarse = apply_to_axes(torch.from_numpy(values), operators, 0.0).numpy()
    if numbers is not None:
        nearest = [((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(shape, numbers.shape, strict=True)]
        numbers = numbers[np.ix_(*nearest)]
    return coarse, numbers, (float(new[0]), float(new[1]), float(new[2]))


def _coarse_shape(shape: tuple[int, ...], extent: np.ndarray, spacing: float) -> tuple[int, ...]:
    return tuple(min(n, max(2, int(mm / spacing))) for n, mm in zip(shape, extent, strict=True))


# ---------------------------------------------------------------------------------------------- the live widget


def is_live() -> bool:
    """Whether a notebook front end with widgets listens: a Jupyter session, and not the making of the book."""
    return bool(os.environ.get("JPY_SESSION_NAME")) and not os.environ.get("BOOK_STATIC")


def _online() -> bool:
    """Whether the server of itkwidgets' front end can be reached."""
    try:
        with socket.create_connection(_ITK_HOST, timeout=_PROBE_S):
            return True
    except OSError:
        return False


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _live(
    voxels: np.ndarray,
    numbers: np.ndarray | None,
    spacing: tuple[float, float, float],
    names: list[str],
    window: tuple[float, float],
    title: str,
) -> Any | None:
    """A widget, or None where the static figure is the right one. Order: nothing is imported before it is safe."""
    if not is_live():
        return None
    if _installed("itkwidgets") and _online():
        from itkwidgets import view  # type: ignore[import-not-found]

        image = _itk_image(voxels, spacing)
        shown = {} if numbers is None else {"label_image": _itk_image(numbers, spacing), "label_lut": "glasbey_light"}
        return view(image=image, rotate=False, ui_collapsed=False, **shown)
    if _installed("ipyniivue"):
        from ipyniivue import NiiVue, Volume  # type: ignore[import-not-found]

        widget = NiiVue(height=480)
        layers = [
            Volume(
                name=f"{title}.nii", data=_nifti(voxels, spacing), colormap="gray",
                cal_min=float(window[0]), cal_max=float(window[1]),
            )
        ]  # fmt: skip
        if numbers is not None:
            layers.append(Volume(name="organs.nii", data=_nifti(numbers, spacing), colormap="random", opacity=0.4))
        widget.load_volumes(layers)
        if numbers is not None:
            widget.volumes[1].set_colormap_label(label_colours(names))
        return widget
    return None


def label_colours(names: Sequence[str]) -> dict[str, list[Any]]:
    """The organs' colours in niivue's form; entry 0 is clear."""
    colours = [(0, 0, 0), *PALETTE[: len(names)]]
    channels = {key: [colour[k] for colour in colours] for k, key in enumerate("RGB")}
    opacity = [0, *[255] * len(names)]
    return {**channels, "A": opacity, "I": list(range(len(colours))), "labels": ["", *names]}


def _itk_image(array: np.ndarray, spacing: tuple[float, float, float]) -> Any:
    from itkwasm import image_from_array  # type: ignore[import-not-found]  # comes with itkwidgets

    image = image_from_array(array)
    image.spacing = list(spacing[::-1])  # x, y, z
    return image


def _nifti(array: np.ndarray, spacing: tuple[float, float, float]) -> bytes:
    """A NIfTI file in memory, x first and on RAS axes as that format has it."""
    import nibabel as nib

    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    return nib.Nifti1Image(array.transpose(2, 1, 0), affine).to_bytes()


# ----------------------------------------------------------------------------------------------- the static figure


def poster(
    voxels: np.ndarray, numbers: np.ndarray | None, spacing: tuple[float, float, float], window: tuple[float, float]
) -> bytes:
    """Middle slices as a PNG: coronal large on the left, axial and sagittal on the right; organs in colour.

    Args:
        voxels: HU (z, y, x), LPS.
        numbers: organs as numbers from 1, or None.
        spacing: mm (z, y, x).
        window: HU of black and white.
    """
    small = (_LARGE - _GAP) // 2
    sheet = Image.new("RGB", (_LARGE + _GAP + small, _LARGE))
    draw = ImageDraw.Draw(sheet)
    places = {"coronal": (0, 0, _LARGE), "axial": (_LARGE + _GAP, 0, small)}
    places["sagittal"] = (_LARGE + _GAP, small + _GAP, small)
    longest = max(n * mm for n, mm in zip(voxels.shape, spacing, strict=True))
    for plane, (left, top, edge) in places.items():
        rows, columns = (k for k in range(3) if k != PLANES.index(plane))
        grey = (plane_of(voxels, plane).astype(float) - window[0]) * (255 / (window[1] - window[0]))
        size = [round(edge * voxels.shape[k] * spacing[k] / longest) for k in (columns, rows)]
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        picture = picture.convert("RGB")
        if numbers is not None:
            shown = np.asarray(Image.fromarray(plane_of(numbers, plane)).resize(size, Image.Resampling.NEAREST))
            colours = np.array([(0, 0, 0), *PALETTE], dtype=float)[shown]
            mixed = np.asarray(picture, dtype=float) * 0.65 + colours * 0.35
            picture = Image.fromarray(np.where(shown[..., None] > 0, mixed, np.asarray(picture)).astype(np.uint8))
        sheet.paste(picture, (left + (edge - size[0]) // 2, top + (edge - size[1]) // 2))
        first, last = "AP" if plane == "sagittal" else "RL"
        style = {"fill": "white", "stroke_width": 1, "stroke_fill": "black", "font_size": 15 if edge == small else 20}
        draw.text((left + 6, top + 4), first, **style)
        draw.text((left + edge - 6, top + 4), last, anchor="ra", **style)
    stream = io.BytesIO()
    # 128 colours are more than a grey wedge with a few tints needs, and a quarter of the bytes.
    sheet.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(
    voxels: np.ndarray,
    numbers: np.ndarray | None,
    spacing: tuple[float, float, float],
    names: list[str],
    window: tuple[float, float],
    title: str,
    alt: str,
) -> str:
    """The figure of the static book as HTML."""
    size = " × ".join(str(n) for n in voxels.shape[::-1])
    if not alt:
        tinted = f"; in colour: {_words(', '.join(names))}" if names else ""
        alt = f"{title}: coronal, axial and sagittal slice through the middle{tinted}."
    picture = poster(voxels, numbers, spacing, window)
    width, height = Image.open(io.BytesIO(picture)).size
    raw = voxels.tobytes() + (b"" if numbers is None else numbers.tobytes())
    packed = base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode()
    spec = {
        "title": title,
        "shape": list(voxels.shape),
        "spacing": [round(mm, 6) for mm in spacing],
        "window": [float(hu) for hu in window],
        "organs": names,
        "colours": label_colours(names) if names else None,
    }
    chips = "".join(
        f'<li><span style="background:rgb{colour}"></span>{html.escape(name.replace("_", " "))}</li>'
        for name, colour in zip(names, PALETTE, strict=False)
    )
    digest = hashlib.sha256(raw + title.encode()).hexdigest()[:10]
    return _TEMPLATE.format(
        id=f"volume-{digest}-{next(_COUNT)}",  # the count tells two equal figures on one page apart
        src=f"data:image/png;base64,{base64.b64encode(picture).decode()}",
        alt=html.escape(alt, quote=True),
        width=width,
        height=height,
        title=html.escape(title, quote=True),
        size=f"{size} voxels",
        legend=f'<ul class="volume-legend" aria-label="organs">{chips}</ul>' if chips else "",
        data=packed,
        spec=json.dumps(spec).replace("<", "\\u003c"),
    )
