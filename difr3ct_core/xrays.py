"""X-rays as files: PNG (8 and 16 bit), NPZ and DICOM in, line integrals and views out; and back to PNG or NPZ.

A set of x-rays is one file per view (or one NPZ with all) and a JSON with the views and the meaning of the numbers:

    {"format": "difr3ct-views", "version": 1, "views": [...],
     "intensity": {"meaning": "line_integrals", "per_count": 0.0001, "zero_count": 0}}

- ``line_integrals``: p = (number - zero_count) · per_count; ``zero_count`` may be left out.
- ``transmission``: p = -log(number / i0), with ``"i0"`` the number in the open beam. A whole number of 0 counts as ½.

PNG and DICOM store the superior row first, as it is displayed; arrays have row 0 inferior, as everywhere in the
project. They are flipped here, and only here. Columns are never flipped: column k is detector index u = k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .checks import number
from .files import InputError, atomic_path, read_json, write_json, write_npz
from .geometry import View, check_views, views_from_json, views_to_json
from .xray_files import read_image

VIEWS_FILE = "views.json"
_LARGEST_COUNT = 65535
#: A line integral beyond these is a misread image: -0.5 is 65 % more than the open beam, 100 is 5 m of water.
_PLAUSIBLE = (-0.5, 100.0)


@dataclass(frozen=True)
class XraySet:
    """X-rays of one patient.

    Attributes:
        images: line integrals, dimensionless; row 0 is inferior.
        views: one per image.
        meta: what the JSON says besides (patient, source, detector model, ...), and ``files``, ``intensity``.
    """

    images: Float[Tensor, "view v u"]
    views: tuple[View, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intensity:
    """What a stored number means; see the module's text."""

    meaning: str
    per_count: float = 1.0
    zero_count: float = 0.0
    i0: float = math.nan

    @classmethod
    def from_json(cls, values: Any, where: str) -> Intensity:
        """Checked, from the JSON object ``intensity``.

        Raises:
            InputError: absent, or a field is missing, unknown or not positive.
        """
        place = f"{where}.intensity"
        if not isinstance(values, dict) or values.get("meaning") not in ("line_integrals", "transmission"):
            raise InputError(
                f'{place}: found {values!r}, expected {{"meaning": "line_integrals", "per_count": number}} or '
                '{"meaning": "transmission", "i0": number in the open beam}; add what the pixel values mean.'
            )
        needed = "per_count" if values["meaning"] == "line_integrals" else "i0"
        allowed = {"meaning", needed} | ({"zero_count"} if needed == "per_count" else set())
        if needed not in values or set(values) - allowed:
            raise InputError(
                f"{place}: found the fields {sorted(values)}, expected 'meaning' and {needed!r} for "
                f"{values['meaning']}; mend the JSON."
            )
        found = {needed: number(f"{place}.{needed}", values[needed], "counts", positive=True)}
        if "zero_count" in values:
            found["zero_count"] = number(f"{place}.zero_count", values["zero_count"], "counts")
        return cls(values["meaning"], **found)

    def to_json(self) -> dict[str, Any]:
        if self.meaning == "transmission":
            return {"meaning": self.meaning, "i0": self.i0}
        return {"meaning": self.meaning, "per_count": self.per_count, "zero_count": self.zero_count}

    def line_integrals(self, counts: np.ndarray, where: str) -> Float[np.ndarray, "n v u"]:
        """Stored numbers as line integrals, checked.

        Raises:
            InputError: NaN, constant, negative counts, or line integrals that no patient has.
        """
        whole = np.issubdtype(counts.dtype, np.integer)
        counts = counts.astype(np.float64)
        if not np.isfinite(counts).all():
            bad = int((~np.isfinite(counts)).sum())
            raise InputError(
                f"{where}: {bad} pixels are NaN or infinite, expected numbers; mend or leave out the image."
            )
        for image in counts:
            if image.size and image.min() == image.max():
                raise InputError(
                    f"{where}: every pixel is {image.flat[0]:g}, expected the image of a patient; is it blank?"
                )
        if self.meaning == "transmission":
            if counts.min() < 0 or (not whole and counts.min() == 0):
                raise InputError(
                    f"{where}: found intensities down to {counts.min():g}, expected positive ones, since their "
                    "logarithm is taken; are these line integrals?"
                )
            result = -np.log(np.maximum(counts, 0.5 if whole else 0.0) / self.i0)
        else:
            result = (counts - self.zero_count) * self.per_count
        low, high = float(result.min()), float(result.max())
        if low < _PLAUSIBLE[0] or high > _PLAUSIBLE[1]:
            what = "i0" if self.meaning == "transmission" else "per_count, zero_count"
            raise InputError(
                f"{where}: gives line integrals from {low:.3g} to {high:.3g}, expected 0 to about 20 (a patient); "
                f"check the meaning of the pixel values in the JSON ({self.meaning}, {what})."
            )
        return result


def read_xrays(paths: str | Path | Sequence[str | Path], views_json: str | Path | None = None) -> XraySet:
    """Read the x-rays of one patient.

    Args:
        paths: PNG or DICOM files in the order of the views, or an NPZ (array ``xrays`` of shape (view, v, u), row 0
            inferior); or a folder that :func:`write_xrays` wrote.
        views_json: views and intensities; by default ``views.json`` in the folder of the first path.

    Returns:
        line integrals (float32), views, and what else the JSON holds.

    Raises:
        InputError: a file is missing, damaged or of another kind, or does not match its view; the message names it.
    """
    given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    if not given:
        raise InputError("xrays: found no file, expected one PNG or DICOM per view, or an NPZ with all.")
    folder = given[0] if given[0].is_dir() else given[0].parent
    source = Path(views_json) if views_json is not None else folder / VIEWS_FILE
    record = read_json(source, "the views of the x-rays as JSON (see write_xrays)")
    views = views_from_json(record, str(source))
    intensity = Intensity.from_json(record.get("intensity"), str(source))
    if len(given) == 1 and given[0].is_dir():
        names = record.get("files")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{source}: lists no files of x-rays; give the images one by one instead of the folder.")
        given = [given[0] / name for name in names]

    images, origins = [], []
    for path in given:
        stack = read_image(path, grows_with_attenuation=intensity.meaning == "line_integrals")
        images.extend(intensity.line_integrals(stack, str(path)))
        origins.extend([path] * len(stack))
    if len(images) != len(views):
        raise InputError(
            f"xrays: found {len(images)} images in {len(given)} files, but {source} has {len(views)} views; give one "
            "image per view, in the same order."
        )
    for index, (image, path, view) in enumerate(zip(images, origins, views, strict=True)):
        _check_size(image.shape, view, path, f"view {index} ({view.angle_deg:g} degrees) of {source}")
    meta = {key: value for key, value in record.items() if key not in ("format", "version", "units", "views")}
    meta["files"] = [str(path) for path in given]
    return XraySet(torch.from_numpy(np.stack(images)).float(), views, meta)


def _check_size(found: tuple[int, ...], view: View, path: Path, place: str) -> None:
    if tuple(found) == view.detector_shape:
        return
    (rows, columns), (v, u) = found, view.detector_shape
    if (columns, rows) == (v, u):
        advice = "the image seems to lie on its side: turn it"
    elif rows * u == columns * v:
        pixel = f"[{view.pixel_mm[0] * v / rows:g}, {view.pixel_mm[1] * u / columns:g}]"
        advice = f"resample it, or set detector_shape [{rows}, {columns}] and pixel_mm {pixel} there"
    else:
        advice = "crop or pad it to the detector, or mend the JSON"
    raise InputError(
        f"{path}: has {rows} x {columns} pixels (rows x columns), but {place} has a detector of {v} x {u}; {advice}."
    )


def write_xrays(
    folder: str | Path,
    images: Float[Tensor, "view v u"],
    views: Sequence[View],
    file_format: str = "png",
    meta: dict[str, Any] | None = None,
    per_count: float | None = None,
) -> Path:
    """Write x-rays and their views so that :func:`read_xrays` reads them.

    Args:
        folder: is made if missing; an earlier set in it is replaced.
        images: line integrals; row 0 is inferior.
        views: one per image.
        file_format: ``"png"`` (16 bit, one file per view, superior row first) or ``"npz"`` (exact, one file).
        meta: more entries for the JSON, of JSON types.
        per_count: line integral per count of a PNG; by default the largest value takes 65535. The error of reading
            back is at most half of it.

    Returns:
        the path of the JSON, which is written last: it is there only if every image is.

    Raises:
        InputError: images and views do not match, values are not finite, or do not fit into 16 bits.
    """
    views = check_views(views)
    if file_format not in ("png", "npz"):
        raise InputError(f"file_format: found {file_format!r}, expected 'png' or 'npz'.")
    if tuple(images.shape) != (len(views), *views[0].detector_shape):
        raise InputError(
            f"images: found shape {tuple(images.shape)}, expected {(len(views), *views[0].detector_shape)} for "
            "these views."
        )
    array = images.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise InputError("images: found NaN or infinity, expected finite line integrals.")
    record = dict(meta or {})
    if reserved := {"format", "version", "units", "views", "files", "intensity"} & record.keys():
        raise InputError(f"meta: holds the reserved names {sorted(reserved)}; choose others.")

    folder = Path(folder)
    (folder / VIEWS_FILE).unlink(missing_ok=True)  # until the new one stands, no JSON points at a mixture
    if file_format == "npz":
        intensity, names = Intensity("line_integrals"), ["xrays.npz"]
        write_npz(folder / names[0], xrays=array.astype(np.float32))
    else:
        intensity = _choose_counts(array, per_count)
        names = [f"view_{index:03d}.png" for index in range(len(views))]
        counts = np.rint(array / intensity.per_count + intensity.zero_count).astype(np.uint16)
        for name, image in zip(names, counts, strict=True):
            with atomic_path(folder / name) as temporary:
                Image.fromarray(np.ascontiguousarray(image[::-1])).save(temporary, format="PNG")
    record |= views_to_json(views) | {"intensity": intensity.to_json(), "files": names}
    write_json(folder / VIEWS_FILE, record)
    return folder / VIEWS_FILE


def _choose_counts(array: np.ndarray, per_count: float | None) -> Intensity:
    """A scale on which the values fit into 16 bits; noise below zero moves the zero up."""
    low, high = min(0.0, float(array.min())), max(0.0, float(array.max()))
    if per_count is None:
        # Two counts of slack for rounding at both ends; an empty image may have any scale.
        per_count = (high - low) / (_LARGEST_COUNT - 2) or 1.0
    else:
        per_count = number("per_count", per_count, "line integral per count", positive=True)
    zero = math.ceil(-low / per_count)
    if zero + high / per_count > _LARGEST_COUNT + 0.5:
        raise InputError(
            f"per_count: found {per_count:g}, but values from {low:.4g} to {high:.4g} need more than 65535 such "
            f"counts; use at least {(high - low) / (_LARGEST_COUNT - 2):.3g}."
        )
    return Intensity("line_integrals", per_count, float(zero))
