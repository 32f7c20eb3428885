"""Where the x-ray source and the detector of each view stand, and the file that says so.

World coordinates are (x, y, z) in mm: +x patient Left, +y Posterior, +z Superior. A view at angle θ looks along the
central ray -n, n = (cos θ, sin θ, 0) pointing to the source; its detector has the axes e_u = (-sin θ, cos θ, 0) and
e_v = +z. Hence 0° is lateral and 90° frontal, and the source turns counter-clockwise about +z. :func:`view_frame` is
the only place where an angle becomes vectors.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import number, pair, shape
from .files import InputError
from .presets import VIEW_SETS

MODES = ("parallel", "cone")
#: Source to rotation axis and source to detector, mm: those of a common clinical cone-beam gantry.
DSO_MM, DSD_MM = 1000.0, 1500.0


@dataclass(frozen=True)
class View:
    """One x-ray: source, detector and kind of beam. Lengths in mm, angle in degrees.

    Attributes:
        angle_deg: rotation about +z; 0 is lateral (source on the patient's left), 90 frontal (source behind).
        detector_shape: pixels (v, u): rows along +z, columns along e_u.
        pixel_mm: pixel size (v, u).
        mode: "parallel" or "cone".
        offset_mm: shift (v, u) of the detector's centre from the central ray.
        dso_mm: source to rotation axis. Means nothing in parallel mode, nor does ``dsd_mm``.
        dsd_mm: source to detector.

    Raises:
        InputError: a field has the wrong type, is not finite, not positive where it must be, or DSO >= DSD.
    """

    angle_deg: float
    detector_shape: tuple[int, int]
    pixel_mm: tuple[float, float]
    mode: str = "parallel"
    offset_mm: tuple[float, float] = (0.0, 0.0)
    dso_mm: float = DSO_MM
    dsd_mm: float = DSD_MM

    def __post_init__(self) -> None:
        def fix(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.mode not in MODES:
            raise InputError(f"view.mode: found {self.mode!r}, expected 'parallel' or 'cone'; choose one of them.")
        fix("angle_deg", number("view.angle_deg", self.angle_deg, "degrees"))
        for name in ("pixel_mm", "offset_mm"):
            fix(name, pair(f"view.{name}", getattr(self, name), positive=name == "pixel_mm"))
        fix("detector_shape", shape("view.detector_shape", self.detector_shape, "(v, u)"))
        fix("dso_mm", number("view.dso_mm", self.dso_mm, "mm", positive=True))
        fix("dsd_mm", number("view.dsd_mm", self.dsd_mm, "mm", positive=True))
        if self.dso_mm >= self.dsd_mm:
            raise InputError(
                f"view: found dso_mm = {self.dso_mm:g} and dsd_mm = {self.dsd_mm:g}, expected the rotation axis nearer "
                "to the source than the detector is (dso_mm < dsd_mm); are the two exchanged?"
            )

    @property
    def to_source(self) -> Float[Tensor, " 3"]:
        """Unit vector n from the rotation axis to the source (x, y, z), float64; the central ray runs along -n."""
        return view_frame(self).to_source

    @property
    def source_mm(self) -> Float[Tensor, " 3"]:
        """Position of the source (x, y, z) in mm, float64. In parallel mode it is at infinity: use `to_source`."""
        return view_frame(self).source

    @property
    def e_u(self) -> Float[Tensor, " 3"]:
        """Unit vector (x, y, z) along increasing detector column, float64."""
        return view_frame(self).e_u

    @property
    def e_v(self) -> Float[Tensor, " 3"]:
        """Unit vector (x, y, z) along increasing detector row: +z, float64."""
        return view_frame(self).e_v


@dataclass(frozen=True)
class Pose:
    """How far views stand from where they should: what pose recovery estimates, and what pose jitter draws.

    Attributes:
        angle_deg: added to each view's angle, degrees.
        shift_mm: translation (x, y, z) of source and detector together, mm.
    """

    angle_deg: Float[Tensor, "*view"]
    shift_mm: Float[Tensor, "*view 3"]

    def __getitem__(self, index: int) -> Pose:
        return Pose(self.angle_deg[index], self.shift_mm[index])


class Frame(NamedTuple):
    """Origin (the point the view turns about), source and axes of a view, each (x, y, z)."""

    origin: Tensor
    source: Tensor
    to_source: Tensor
    e_u: Tensor
    e_v: Tensor


def view_frame(view: View, pose: Pose | None = None, dtype: torch.dtype = torch.float64) -> Frame:
    """Source and axes of a view: the one place where an angle becomes vectors.

    Args:
        view: the view.
        pose: deviation of this one view (scalar angle, shift of shape (3,)); the result is differentiable in it.
        dtype: of the result; its device is that of ``pose``, or the CPU.
    """
    if pose is None:
        # Quarter turns come out exact, so that 0 and 90 degrees give weights of exactly one.
        turn = math.radians(math.remainder(view.angle_deg, 360.0))
        cos, sin = (0.0 if abs(value) < 1e-15 else value for value in (math.cos(turn), math.sin(turn)))
        to_source = torch.tensor([cos, sin, 0.0], dtype=dtype)
        e_u = torch.tensor([-sin, cos, 0.0], dtype=dtype)
        origin = torch.zeros(3, dtype=dtype)
    else:
        angle = torch.deg2rad(pose.angle_deg.to(dtype) + view.angle_deg)
        cos_t, sin_t, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
        to_source = torch.stack([cos_t, sin_t, zero])
        e_u = torch.stack([-sin_t, cos_t, zero])
        origin = pose.shift_mm.to(dtype)
    e_v = torch.zeros_like(e_u)
    e_v[2] = 1.0
    return Frame(origin, origin + view.dso_mm * to_source, to_source, e_u, e_v)


def standard_views(
    angles: str | Sequence[float],
    detector_size: int | tuple[int, int],
    fov_mm: float,
    mode: str = "parallel",
    dso_mm: float = DSO_MM,
    dsd_mm: float = DSD_MM,
) -> tuple[View, ...]:
    """The views of §V-B: a square detector that sees the field of view (a cylinder as wide and as high as ``fov_mm``).

    Args:
        angles: the name of a set in :data:`~difr3ct_core.presets.VIEW_SETS` ("8view", "2view", ...), or degrees.
        detector_size: pixels per edge, or (v, u).
        fov_mm: edge of the prepared volume. In parallel mode it is the detector's edge as well; in cone mode the
            detector is larger by the magnification of the part of the cylinder that is nearest to the source.
        mode: "parallel" or "cone".
        dso_mm: source to rotation axis.
        dsd_mm: source to detector.

    Raises:
        InputError: unknown name, no angle, or an impossible geometry.
    """
    if isinstance(angles, str):
        if angles not in VIEW_SETS:
            raise InputError(f"views: found {angles!r}, expected one of {', '.join(VIEW_SETS)}, or angles in degrees.")
        angles = VIEW_SETS[angles]
    size = (detector_size, detector_size) if isinstance(detector_size, int) else detector_size
    n_v, n_u = shape("detector_size", size, "(v, u)")
    fov = number("fov_mm", fov_mm, "mm", positive=True)
    edge_v = edge_u = fov
    if mode == "cone":
        if dso_mm <= fov / 2:
            raise InputError(
                f"dso_mm: found {dso_mm:g} mm, but the field of view reaches {fov / 2:g} mm from the axis; "
                "move the source outside it."
            )
        edge_v = fov * dsd_mm / (dso_mm - fov / 2)
        edge_u = fov * dsd_mm / math.sqrt(dso_mm**2 - fov**2 / 4)  # tangents to the cylinder
    pixel = max(edge_v / n_v, edge_u / n_u)
    views = tuple(View(angle, (n_v, n_u), (pixel, pixel), mode, (0.0, 0.0), dso_mm, dsd_mm) for angle in angles)
    return check_views(views)


def check_views(views: Sequence[View]) -> tuple[View, ...]:
    """The views as a tuple, if they can make one stack of x-rays.

    Warns:
        UserWarning: the angles look like radians: several, and all nonzero ones below 2π.

    Raises:
        InputError: none, not views, or of differing modes or detector shapes.
    """
    views = (views,) if isinstance(views, View) else tuple(views)
    if not views:
        raise InputError("views: found none, expected at least one View; see standard_views.")
    for view in views:
        if not isinstance(view, View):
            raise InputError(f"views: found {type(view).__name__}, expected View; see standard_views.")
    for name in ("mode", "detector_shape"):
        found = sorted({getattr(view, name) for view in views})
        if len(found) > 1:
            raise InputError(f"views: found {name} {found}, expected the same in all views; project them one by one.")
    angles = [view.angle_deg for view in views]
    if len(views) > 1 and any(angles) and all(abs(angle) < 2 * math.pi for angle in angles):
        warnings.warn(
            f"views: all {len(views)} angles lie below 2π ({min(angles):g} to {max(angles):g}); they are taken as "
            "degrees. If they are radians, convert them with math.degrees.",
            stacklevel=3,
        )
    return views


def views_to_json(views: Sequence[View]) -> dict[str, Any]:
    """Views as JSON types; :func:`views_from_json` reads them back."""
    return {
        "format": "difr3ct-views",
        "version": 1,
        "units": {"angle": "degree", "length": "mm", "pairs": "(v, u)"},
        "views": [dataclasses.asdict(view) for view in views],
    }


def views_from_json(values: Any, where: str = "views") -> tuple[View, ...]:
    """Views from :func:`views_to_json`, possibly edited by hand.

    Args:
        values: the parsed JSON.
        where: file name for the error message.

    Raises:
        InputError: not an object of this format, or a field is missing, unknown, of a wrong type or impossible.
    """
    if not isinstance(values, Mapping) or values.get("format") != "difr3ct-views":
        raise InputError(f'{where}: is not a file of views, expected an object with "format": "difr3ct-views".')
    if values.get("version") != 1:
        raise InputError(f"{where}: found version {values.get('version')!r}, expected 1; update this program.")
    items = values.get("views")
    if not isinstance(items, list):
        raise InputError(f"{where}.views: found {type(items).__name__}, expected a list of views.")
    names = [field.name for field in dataclasses.fields(View)]
    views = []
    for index, item in enumerate(items):
        place = f"{where}.views[{index}]"
        if not isinstance(item, Mapping):
            raise InputError(f"{place}: found {type(item).__name__}, expected an object with the fields {names}.")
        if unknown := sorted(set(item) - set(names)):
            raise InputError(f"{place}: unknown fields {unknown}, expected some of {names}.")
        # A file must say what it means: nothing that shapes the image has a default here.
        required = ["angle_deg", "detector_shape", "pixel_mm", "mode"]
        required += ["dso_mm", "dsd_mm"] if item.get("mode") == "cone" else []
        if missing := [name for name in required if name not in item]:
            raise InputError(f"{place}: lacks {missing}, expected all of {required}; add them.")
        try:
            views.append(View(**item))
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
    try:
        return check_views(views)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
