"""Contours of the chest from a CT alone, by HU threshold and morphology.

For planning studies on reconstructions, where nobody draws: the same rules run on the truth and on every sample. They
hold for adult chest CT on grids of 1 to 10 mm. A rule that finds nothing plausible says why
(:attr:`Structures.missing`), and what needs that structure then raises :class:`NotPlannable`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage
from skimage.measure import label as components
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed

from ..ct_io import CTVolume, read_labels, write_nifti
from ..files import InputError
from .structures import (
    NAMES,
    TOTALSEGMENTATOR,
    NotPlannable,
    Structures,
    resample_structures,
    structures_from_labels,
)

Mask = Bool[np.ndarray, "z y x"]

_TISSUE_HU = -400.0  # halfway between lung or air and soft tissue
_LUNG_CM3 = (300.0, 6000.0)  # of one lung; adults 1000 to 4500
_HEART_CM3 = (150.0, 1600.0)
_BREAST_CM3 = (220.0, 3000.0)  # less is fat under the skin of a flat chest, as the rule cannot tell them apart
_BONE_HU = 150.0
_WALL_MM = 15.0  # ribs and muscle outside the lungs
_STANDS_OUT_MM = 12.0


def contour_ct(ct: CTVolume) -> Structures:
    """Draw body, lungs, heart, breasts and spine.

    Args:
        ct: chest CT on LPS axes, breasts in front (lying on the back).

    Returns:
        the structures; those that could not be made are in ``missing`` with the reason.

    Raises:
        NotPlannable: there is no body (all air), or it has no two lungs.
        InputError: values that are not finite.
    """
    hu = ct.hu.numpy()
    if not np.isfinite(hu).all():
        raise InputError(f"{ct.name}: {int((~np.isfinite(hu)).sum())} voxels are NaN or infinite; check the CT.")
    grid = _Grid(np.array(ct.spacing_mm))
    masks: dict[str, Mask] = {"body": _body(hu, grid, ct.name)}
    masks["lung_left"], masks["lung_right"] = _lungs(hu, masks["body"], grid, ct.name)
    lungs = masks["lung_left"] | masks["lung_right"]
    cage = _slice_hulls(lungs)
    missing: dict[str, str] = {}

    def attempt(name: str, draw: Callable[[], Mask]) -> None:
        try:
            masks[name] = draw()
        except NotPlannable as error:
            missing[name] = str(error)

    attempt("spine", lambda: _spine(hu, masks["body"], cage, grid))
    attempt("heart", lambda: _heart(hu, cage, lungs, masks, grid))
    for side in ("left", "right"):
        attempt(f"breast_{side}", lambda side=side: _breast(masks, cage, side, grid))
    return Structures(masks, ct.affine, f"automatic contours of {ct.name}", missing)


class _Grid:
    """Morphology in mm on a grid of given spacing, by distance transforms (a ball whatever the voxel)."""

    def __init__(self, spacing: Float[np.ndarray, "3"]) -> None:
        self.spacing = spacing
        self.cm3 = float(np.prod(spacing)) / 1000.0

    def dilate(self, mask: Mask, mm: float) -> Mask:
        window = self._around(mask, mm)
        out = np.zeros_like(mask)
        if window:
            out[window] = ndimage.distance_transform_edt(~mask[window], sampling=self.spacing) <= mm
        return out

    def erode(self, mask: Mask, mm: float) -> Mask:
        """Outside the volume counts as inside: the patient goes on above and below the scan."""
        window = self._around(mask, 1e-3)
        out = np.zeros_like(mask)
        if window:
            part = mask[window]
            out[window] = True if part.all() else ndimage.distance_transform_edt(part, sampling=self.spacing) > mm
        return out

    def _around(self, mask: Mask, mm: float) -> tuple[slice, ...] | None:
        """The box around ``mask`` and ``mm`` more: distances are slow, and most of a volume is far from any border."""
        found = ndimage.find_objects(mask.astype(np.uint8))
        if not found:
            return None
        reach = np.ceil(mm / self.spacing).astype(int)
        box = zip(found[0], reach, mask.shape, strict=True)
        return tuple(slice(max(0, s.start - r), min(n, s.stop + r)) for s, r, n in box)

    def opening(self, mask: Mask, mm: float) -> Mask:
        return self.dilate(self.erode(mask, mm), mm) & mask

    def closing(self, mask: Mask, mm: float) -> Mask:
        return self.erode(self.dilate(mask, mm), mm) | mask

    def volume(self, mask: Mask) -> float:
        return float(mask.sum()) * self.cm3


def _largest(mask: Mask) -> Mask:
    parts = components(mask, connectivity=1)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if parts.any() else mask


def _slice_hulls(mask: Mask) -> Mask:
    """The convex hull of each axial slice."""
    hulls = np.zeros_like(mask)
    for z in np.flatnonzero(mask.any((1, 2))):
        # Degenerate slices (a voxel, a line) have no hull.
        hulls[z] = convex_hull_image(mask[z]) if np.ptp(np.argwhere(mask[z]), axis=0).min() > 0 else mask[z]
    return hulls


def _body(hu: np.ndarray, grid: _Grid, name: str) -> Mask:
    tissue = _largest(grid.opening(hu > _TISSUE_HU, 1.2 * grid.spacing[2]))
    body = np.stack([ndimage.binary_fill_holes(plane) for plane in tissue])
    if grid.volume(body) < 2000.0:
        raise NotPlannable(
            f"{name}: found {grid.volume(body):.0f} cm³ of tissue above {_TISSUE_HU:g} HU, expected a chest of at "
            "least 2000 cm³; the CT is air or its HU scale is wrong"
        )
    return body


def _lungs(hu: np.ndarray, body: Mask, grid: _Grid, name: str) -> tuple[Mask, Mask]:
    middle = _middle(body, grid.spacing[2])
    air = (hu < -500.0) & body
    # Airways: small, dark, near the midline in a slice. Gas below the lungs is a part of its own, and small.
    slices = np.stack([components(plane, connectivity=1) for plane in air])
    area, x = grid.spacing[1] * grid.spacing[2] / 100.0, np.arange(hu.shape[2]) * grid.spacing[2]
    for z, plane in enumerate(slices):
        for number in range(1, plane.max() + 1):
            part = plane == number
            centre = x[np.nonzero(part)[1]].mean() - middle
            if part.sum() * area < 8.0 and abs(centre) < 30.0 and hu[z][part].mean() < -850.0:
                air[z][part] = False
    parts = components(air, connectivity=1)
    sizes = np.bincount(parts.ravel()) * grid.cm3
    sizes[0] = 0.0
    lungs = np.isin(parts, np.flatnonzero(sizes > 0.12 * sizes.max())) if parts.any() else air
    sides = _split(lungs, middle, grid)
    for side, lung in zip(("left", "right"), sides, strict=True):
        if not _LUNG_CM3[0] <= grid.volume(lung) <= _LUNG_CM3[1]:
            raise NotPlannable(
                f"{name}: the {side} lung has {grid.volume(lung):.0f} cm³, expected "
                f"{_LUNG_CM3[0]:g} to {_LUNG_CM3[1]:g}; it is missing, collapsed or touches air outside"
            )
    # Vessels belong to the lung, and a lung ends where the other begins.
    left, right = (grid.closing(side, 4.0) & body & (hu < 200.0) for side in sides)
    return left & ~sides[1], right & ~sides[0] & ~left


def _split(lungs: Mask, middle: float, grid: _Grid) -> tuple[Mask, Mask]:
    """Left and right, also where they touch: watershed of the depth inside from one seed on each side."""
    depth = ndimage.distance_transform_edt(lungs, sampling=grid.spacing)
    x = np.arange(lungs.shape[2]) * grid.spacing[2] - middle
    seeds = np.zeros(lungs.shape, np.int32)
    for number, side in ((1, x > 25.0), (2, x < -25.0)):
        half = depth * side
        seeds[(half > 0.5 * half.max()) & (half > 0)] = number
    if seeds.max() < 2 or not (seeds == 1).any():
        return lungs & (x > 0), lungs & (x <= 0)
    owner = watershed(-depth, seeds, mask=lungs)
    return owner == 1, owner == 2


def _middle(body: Mask, spacing_x: float) -> float:
    """x of the midline in mm from the first voxel: the median over axial slices of the middle of the body."""
    spans = [np.flatnonzero(plane.any(0)) for plane in body]
    return float(np.median([(span[0] + span[-1]) / 2 for span in spans if len(span)])) * spacing_x


def _spine(hu: np.ndarray, body: Mask, cage: Mask, grid: _Grid) -> Mask:
    """Bone in the midline of the back, and the canal that it surrounds."""
    middle = _middle(body, grid.spacing[2])
    x = np.arange(hu.shape[2]) * grid.spacing[2] - middle
    rows = np.flatnonzero(cage.any((0, 2)))
    y = np.arange(hu.shape[1])
    behind = y > rows[0] + 0.62 * (rows[-1] - rows[0])
    region = body & behind[None, :, None] & (np.abs(x) < 32.0)
    threshold = _BONE_HU if grid.spacing.max() < 8 else 0.6 * _BONE_HU  # thick voxels mix bone with muscle
    bone = _largest(grid.closing((hu > threshold) & region, 7.0) & region)
    if grid.volume(bone) < 50.0:
        raise NotPlannable(f"found {grid.volume(bone):.0f} cm³ of bone in the midline of the back, expected 50 or more")
    return np.stack([ndimage.binary_fill_holes(plane) for plane in bone])


def _heart(hu: np.ndarray, cage: Mask, lungs: Mask, masks: dict[str, Mask], grid: _Grid) -> Mask:
    """Soft tissue between the lungs, from the domes of the diaphragm up to a third of the height of the lungs.

    Where diaphragm and heart touch, no threshold finds the border: the domes beside the heart are joined by a plane.
    Great vessels fall off by an opening with a ball of 14 mm, or less if that leaves no heart; liver by the plane.
    """
    dy, dx = grid.spacing[1:]
    z, y, x = (np.arange(n) * d for n, d in zip(hu.shape, grid.spacing, strict=True))
    domes = []
    for name, outward, share in (("lung_right", -1.0, 65), ("lung_left", 1.0, 50)):
        lung = masks[name]
        footprint = np.argwhere(lung.any(0)) * (dy, dx)
        centre = footprint.mean(0) + ((0.0, 0.0) if outward < 0 else (10.0, 12.0))
        lowest = np.where(lung.any(0), z[np.argmax(lung, axis=0)], np.nan)
        near = (y[:, None] - centre[0]) ** 2 + (x[None] - centre[1]) ** 2 < 28.0**2
        domes.append((centre[1], float(np.nanpercentile(lowest[near], share))))
    (x_right, z_right), (x_left, z_left) = domes
    across = np.clip((x - x_right) / (x_left - x_right), 0, 1)
    floor = z_right + across * (z_left - z_right)
    apex = z[np.flatnonzero(lungs.any((1, 2)))[-1]]
    top = z_right + np.clip(0.36 * (apex - z_right), 45.0, 75.0)
    between = cage & ~lungs & (hu > -50.0) & (z[:, None, None] > floor) & (z[:, None, None] < top)
    rows = np.flatnonzero(cage.any((0, 2)))
    between &= (y < y[rows[0]] + 0.72 * (y[rows[-1]] - y[rows[0]]))[None, :, None]  # in front of the spine
    for radius in (14.0, 11.0, 8.0):  # a blurred or small heart does not hold the larger ball
        heart = _largest(grid.opening(between, radius))
        if grid.volume(heart) >= _HEART_CM3[0]:
            break
    if not _HEART_CM3[0] <= grid.volume(heart) <= _HEART_CM3[1]:
        raise NotPlannable(
            f"found {grid.volume(heart):.0f} cm³ of soft tissue between the lungs, expected a heart of "
            f"{_HEART_CM3[0]:g} to {_HEART_CM3[1]:g}"
        )
    return grid.closing(heart, 8.0) & ~lungs


def _breast(masks: dict[str, Mask], cage: Mask, side: str, grid: _Grid) -> Mask:
    """What stands out in front of the chest wall, and the tissue beneath it.

    The chest wall is the hull of the lungs and 15 mm; a breast is where the skin is more than 12 mm farther from it
    than over the sternum, in the front third of the chest.
    """
    body = masks["body"]
    middle = _middle(body, grid.spacing[2])
    x = np.arange(body.shape[2]) * grid.spacing[2] - middle
    # Below its widest slice the cage does not narrow in front, where the lungs do.
    area = cage.sum((1, 2))
    wall = cage.copy()
    for z in range(int(np.argmax(area)) - 1, -1, -1):
        wall[z] |= wall[z + 1] & body[z]
    wall = grid.dilate(wall, _WALL_MM)
    rows = np.flatnonzero(cage.any((0, 2)))
    front = np.arange(body.shape[1]) < rows[0] + 0.3 * (rows[-1] - rows[0])
    levels = np.flatnonzero(area > 0.6 * area.max())
    tall = np.zeros(len(area), bool)
    tall[max(0, levels[0] - int(30 / grid.spacing[0])) : levels[-1] + 1] = True
    outside = body & ~wall & front[None, :, None] & tall[:, None, None]
    distance = ndimage.distance_transform_edt(~wall, sampling=grid.spacing)
    sternum = (outside * distance)[:, :, np.abs(x) < 12.0][area > 0.8 * area.max()]
    base = float(np.median(sternum.max(1))) if sternum.size else 0.0
    own = (x > 8.0) if side == "left" else (x < -8.0)
    core = _largest(outside & (distance > base + _STANDS_OUT_MM) & own)
    breast = _largest(grid.dilate(core, base + 10.0) & outside & own)
    if grid.volume(core) < 20.0 or not _BREAST_CM3[0] <= grid.volume(breast) <= _BREAST_CM3[1]:
        raise NotPlannable(
            f"found {grid.volume(core):.0f} cm³ that stand out by more than {_STANDS_OUT_MM:g} mm in front of the "
            f"{side} chest wall, expected 20 or more, in a breast of {_BREAST_CM3[0]:g} to {_BREAST_CM3[1]:g} cm³"
        )
    return breast


def contour_from_file(
    path: str | Path, ct: CTVolume, numbers: Mapping[str, tuple[int, ...]] = TOTALSEGMENTATOR
) -> Structures:
    """Contours from a mask file on the grid of ``ct``; what the file lacks is drawn by the rules.

    Args:
        path: a NIfTI label map (``numbers`` says what its labels mean), or an RTSTRUCT whose ROIs are named as in
            :data:`.structures.NAMES`.
        ct: on LPS axes.
        numbers: structure → label numbers, for NIfTI.

    Raises:
        InputError: the file cannot be read, or does not overlap the CT.
        NotPlannable: see :func:`contour_ct`.
    """
    if str(path).lower().endswith((".nii", ".nii.gz")):
        given = resample_structures(structures_from_labels(read_labels(path), numbers), ct)
        if not any(mask.any() for mask in given.masks.values()):
            raise InputError(f"{path}: does not overlap {ct.name}, expected labels of the same scan; check the files.")
    else:
        from .dicom import read_rtstruct

        given = read_rtstruct(path, ct, {name: name for name in NAMES})
    return complete(given, ct)


def contour_with_totalsegmentator(ct: CTVolume) -> Structures:
    """Lungs, heart and spine by TotalSegmentator, body and breasts by the rules here.

    Raises:
        InputError: TotalSegmentator is not installed; this project does not install it (it downloads weights).
    """
    try:
        from totalsegmentator.python_api import totalsegmentator
    except ImportError as error:
        raise InputError("contours: TotalSegmentator is not installed; install it, or use contour_ct.") from error
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "ct.nii.gz", Path(folder) / "labels.nii.gz"
        write_nifti(source, ct.hu, ct.affine)
        totalsegmentator(source, target, ml=True)
        return contour_from_file(target, ct)


def complete(given: Structures, ct: CTVolume) -> Structures:
    """``given`` with what it lacks drawn by :func:`contour_ct`; where both claim a voxel, ``given`` has it."""
    given.require_grid(ct)
    if all(name in given for name in NAMES):
        return given
    drawn = contour_ct(ct)
    masks = {name: mask for name, mask in given.masks.items() if mask.any()}
    taken = np.logical_or.reduce(
        [mask for name, mask in masks.items() if name != "body"] or [np.zeros(ct.hu.shape, bool)]
    )
    for name, mask in drawn.masks.items():
        if name not in masks:
            masks[name] = mask if name == "body" else mask & ~taken
    missing = {name: reason for name, reason in drawn.missing.items() if name not in masks}
    return Structures(masks, ct.affine, given.source, missing)
