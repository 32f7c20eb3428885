"""The drawing board of the phantoms: coordinates, implicit shapes with soft edges, and noise on a fixed lattice.

A phantom is drawn in *canonical* coordinates, those of a mean patient in mm (+x Left, +y Posterior,
+z Superior, origin mid-chest). A canvas knows, for every voxel of the grid, its canonical position: the
inverse of scale, rotation, shift and a smooth random warp. Shapes are signed distances (mm, negative
inside) evaluated on the part of the grid where they can be, and turned into a share of the voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator

Slices = tuple[slice, slice, slice]
Array = np.ndarray
#: Edge of the cube on which random fields are drawn, whatever the field of view.
LATTICE_MM = 320.0
EVERYWHERE: Slices = (slice(None), slice(None), slice(None))


class Profile:
    """A smooth function of one coordinate through given knots (monotone cubic), looked up in a fine table.

    A table of steps of 0.5 (mm) is ten times faster than interpolating 128³ numbers, and exact to well below a voxel.
    """

    def __init__(self, knots: Sequence[float], values: Sequence[float], step: float = 0.5) -> None:
        self.low, self.step = float(knots[0]), step
        grid = np.arange(knots[0], knots[-1] + step, step)
        spline = PchipInterpolator(knots, values)
        inside = np.clip(grid, knots[0], knots[-1])
        self.table = spline(inside).astype(np.float32)
        self.slopes = spline.derivative()(inside).astype(np.float32)

    def index(self, x: Array) -> Array:
        """Where in the table ``x`` is (clamped to its ends)."""
        index = (x - self.low) * np.float32(1 / self.step) + np.float32(0.5)
        return np.clip(index, 0, len(self.table) - 1).astype(np.intp)

    def __call__(self, x: Array) -> Array:
        return self.table[self.index(np.asarray(x, dtype=np.float32))]

    def slope(self, x: Array) -> Array:
        """Derivative at ``x``."""
        return self.slopes[self.index(np.asarray(x, dtype=np.float32))]


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Union of two signed distances whose seam is rounded over about ``k`` mm."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * (0.25 / k)


def ellipsoid(
    x: Array, y: Array, z: Array, centre: Sequence[float], axes: Sequence[float], rotation: Array | None = None
) -> Array:
    """Signed distance (first order) to an ellipsoid; ``rotation`` has the axes' directions as rows."""
    x, y, z = x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2])
    if rotation is not None:
        r = rotation.astype(np.float32)
        x, y, z = (r[i, 0] * x + r[i, 1] * y + r[i, 2] * z for i in range(3))
    a, b, c = (np.float32(1 / v) for v in axes)
    x, y, z = x * a, y * b, z * c
    rho = np.sqrt(x * x + y * y + z * z)
    gradient = np.sqrt((x * a) ** 2 + (y * b) ** 2 + (z * c) ** 2)
    return rho * (rho - 1) / np.maximum(gradient, 1e-6)


def superellipse(x: Array, y: Array, a: Array, b: Array, exponent: float) -> Array:
    """Signed distance (first order) to |x/a|^n + |y/b|^n = 1 in the plane; ``a`` and ``b`` may vary by voxel."""
    u, v = np.abs(x) / a + 1e-4, np.abs(y) / b + 1e-4
    un, vn = u ** np.float32(exponent - 1), v ** np.float32(exponent - 1)
    total = un * u + vn * v
    rho = total ** np.float32(1 / exponent)
    gradient = rho / total * np.sqrt((un / a) ** 2 + (vn / b) ** 2)
    return (rho - 1) / np.maximum(gradient, 1e-6)


def frame(direction: Sequence[float]) -> Array:
    """An orthonormal frame (rows) whose first row is ``direction``."""
    d = np.asarray(direction, dtype=np.float64)
    d = d / np.linalg.norm(d)
    helper = np.array([0.0, 0.0, 1.0]) if abs(d[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    e = np.cross(helper, d)
    e /= np.linalg.norm(e)
    return np.stack([d, e, np.cross(d, e)])


def rotation_xyz(degrees: Sequence[float]) -> Array:
    """Rotation about x, then y, then z."""
    cx, cy, cz = np.cos(np.radians(degrees))
    sx, sy, sz = np.sin(np.radians(degrees))
    rx = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    ry = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    rz = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return rz @ ry @ rx


def lattice_matrix(size: int, nodes: int, ratio: float = 1.0) -> Float[Array, "size nodes"]:
    """Weights that carry values at the centres of ``nodes`` equal cells to the centres of ``size`` equal voxels.

    Linear interpolation to a finer grid, area averages to a coarser one: the same lattice of random numbers
    gives the same texture at every resolution. The voxels cover ``ratio`` times the length of the lattice, about
    the same centre; beyond the lattice its last value goes on.
    """
    edges = ((np.arange(size + 1) / size - 0.5) * ratio + 0.5) * nodes
    if edges[1] - edges[0] > 1:
        low, high = np.clip(edges[:-1, None], 0, nodes - 1), np.clip(edges[1:, None], 1, nodes)
        cell = np.arange(nodes)[None]
        overlap = np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, None)
        return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
    position = np.clip((edges[:-1] + edges[1:]) / 2 - 0.5, 0, nodes - 1)
    return np.clip(1 - np.abs(position[:, None] - np.arange(nodes)[None]), 0, None).astype(np.float32)


def _apply(m: Array, values: Float[Array, "n n n"]) -> Float[Array, "s s s"]:
    """The same weights along each axis."""
    out = values.astype(np.float32, copy=False) @ m.T
    return np.tensordot(m, np.matmul(m, out), axes=(1, 0))


def resample_lattice(values: Float[Array, "n n n"], size: int, ratio: float = 1.0) -> Float[Array, "s s s"]:
    """Carry a cubic lattice of values to a grid of ``size``³ voxels, see :func:`lattice_matrix`."""
    return _apply(lattice_matrix(size, values.shape[-1], ratio), values)


def smooth_lattice(values: Float[Array, "n n n"], size: int, ratio: float = 1.0) -> Float[Array, "s s s"]:
    """As :func:`resample_lattice`, without kinks: quadratic B-spline weights, for a warp that bends gently."""
    n = values.shape[-1]
    position = np.clip((((np.arange(size) + 0.5) / size - 0.5) * ratio + 0.5) * n - 0.5, 0, n - 1)
    t = np.abs(position[:, None] - np.arange(n)[None])
    m = np.where(t < 0.5, 0.75 - t * t, np.where(t < 1.5, 0.5 * (1.5 - t) ** 2, 0))
    return _apply((m / m.sum(1, keepdims=True)).astype(np.float32), values)


class Canvas:
    """HU and labels of a growing phantom, with the canonical coordinates of its voxels.

    Args:
        size: voxels per edge.
        fov_mm: edge of the cube, mm.
        scale: canonical to world along x, y, z.
        rotation: canonical to world, 3x3.
        shift_mm: world position of the canonical origin.
        warp: displacements of a coarse lattice over the cube of ``LATTICE_MM``, mm, (3, n, n, n), or None.
        air_hu: initial value.
    """

    def __init__(
        self,
        size: int,
        fov_mm: float,
        scale: Sequence[float],
        rotation: Array,
        shift_mm: Sequence[float],
        warp: Array | None,
        air_hu: float = -1000.0,
    ) -> None:
        self.size, self.fov = size, fov_mm
        self.voxel = fov_mm / size
        # Membership changes from 1 to 0 over one voxel, measured in canonical mm.
        self.edge = np.float32(self.voxel / float(np.mean(scale)))
        self.forward = rotation @ np.diag(scale)
        self.shift = np.asarray(shift_mm, dtype=np.float64)
        inverse = np.linalg.inv(self.forward).astype(np.float32)
        axis = ((np.arange(size) + 0.5) * self.voxel - fov_mm / 2).astype(np.float32)
        x = (axis - np.float32(self.shift[0]))[None, None, :]
        y = (axis - np.float32(self.shift[1]))[None, :, None]
        z = (axis - np.float32(self.shift[2]))[:, None, None]
        coordinates = [inverse[i, 0] * x + inverse[i, 1] * y + inverse[i, 2] * z for i in range(3)]
        self.margin = self.voxel
        if warp is not None:
            for i in range(3):
                coordinates[i] += smooth_lattice(warp[i], size, fov_mm / LATTICE_MM)
            self.margin += 1.1 * float(np.abs(warp).max()) * float(np.max(scale))
        self.x, self.y, self.z = coordinates
        self.hu = np.full((size,) * 3, air_hu, dtype=np.float32)
        self.labels = np.zeros((size,) * 3, dtype=np.uint8)

    def boxes(self, low: Float[Array, "n 3"], high: Float[Array, "n 3"]) -> list[Slices]:
        """Parts of the grid that hold canonical boxes given by their corners (x, y, z)."""
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        centre = (low + high) / 2 @ self.forward.T + self.shift
        half = (high - low) / 2 @ np.abs(self.forward).T + self.margin
        first = np.clip(np.floor((centre - half + self.fov / 2) / self.voxel), 0, self.size).astype(int)
        last = np.clip(np.ceil((centre + half + self.fov / 2) / self.voxel), 0, self.size).astype(int)
        return [
            (slice(f[2], t[2]), slice(f[1], t[1]), slice(f[0], t[0]))
            for f, t in zip(first.tolist(), last.tolist(), strict=True)
        ]

    def box(self, low: Sequence[float], high: Sequence[float]) -> Slices:
        """The part of the grid that holds one canonical box."""
        return self.boxes(np.array([low]), np.array([high]))[0]

    def at(self, part: Slices) -> tuple[Array, Array, Array]:
        """Canonical x, y, z of a part of the grid."""
        return self.x[part], self.y[part], self.z[part]

    def soft(self, distance: Array) -> Array:
        """Share of each voxel inside a signed distance: 1 to 0 over one voxel."""
        return np.clip(0.5 - distance / self.edge, 0, 1)

    def sheet(self, distance: Array, thickness: float | Array) -> Array:
        """Share of each voxel inside a sheet about ``distance == 0``; thin sheets keep their mass."""
        wide = np.maximum(thickness, self.edge)
        return self.soft(np.abs(distance) - wide / 2) * (thickness / wide)

    def paint(self, part: Slices, share: Array, value: float | Array, label: int) -> None:
        """Blend ``value`` into the HU by ``share``; voxels more than half covered take ``label`` (0 keeps theirs)."""
        hu = self.hu[part]
        hu += share * (value - hu)
        if label:
            self.labels[part][share > 0.5] = label

    def tubes(
        self,
        starts: Float[Array, "n 3"],
        ends: Float[Array, "n 3"],
        radii0: Float[Array, " n"],
        radii1: Float[Array, " n"],
        out: Array,
    ) -> Array:
        """Union of capsules, written into the membership ``out`` (whole grid) by maximum.

        The mass of a tube, which is what an x-ray sees, is kept on every grid: an edge that falls from 1 to 0
        over a width h adds pi h²/12 to the cross-section, so the radius drawn is sqrt(r² - h²/12); a tube too
        thin for that is drawn one voxel wide (cross-section pi h²/3) and fainter.
        """
        reach = np.maximum(np.maximum(radii0, radii1), 0.5 * self.edge)[:, None] + self.edge / 2
        h2 = np.float32(self.edge**2)
        parts = self.boxes(np.minimum(starts, ends) - reach, np.maximum(starts, ends) + reach)
        along = (ends - starts).astype(np.float32)
        norms = np.maximum((along**2).sum(1), 1e-6)
        for part, a, d, n2, r0, r1 in zip(
            parts,
            starts.astype(np.float32),
            along,
            norms,
            radii0.astype(np.float32),
            radii1.astype(np.float32),
            strict=True,
        ):
            if any(s.stop <= s.start for s in part):
                continue
            x, y, z = self.x[part] - a[0], self.y[part] - a[1], self.z[part] - a[2]
            t = np.clip((x * d[0] + y * d[1] + z * d[2]) / n2, 0, 1)
            distance = np.sqrt((x - t * d[0]) ** 2 + (y - t * d[1]) ** 2 + (z - t * d[2]) ** 2)
            square = (r0 + t * (r1 - r0) if r0 != r1 else r0) ** 2
            wide = np.maximum(square - h2 / 12, h2 / 4)
            share = np.clip(0.5 + (np.sqrt(wide) - distance) / self.edge, 0, 1)
            if r0 * r0 < h2 / 3 or r1 * r1 < h2 / 3:
                share *= np.minimum(square / (wide + h2 / 12), 1)
            view = out[part]
            np.maximum(view, share, out=view)
        return out

    def polyline(self, points: Sequence[Sequence[float]], radii: Sequence[float] | float, out: Array) -> Array:
        """A tube through ``points`` with a radius per point, as :meth:`tubes`."""
        p = np.asarray(points, dtype=np.float64)
        r = np.broadcast_to(np.asarray(radii, dtype=np.float64), (len(p),))
        return self.tubes(p[:-1], p[1:], r[:-1], r[1:], out)

    def empty(self) -> Array:
        """A membership of zeros over the whole grid."""
        return np.zeros_like(self.hu)


def spline_points(points: Sequence[Sequence[float]], n: int) -> Float[Array, "n 3"]:
    """``n`` points of a smooth curve (monotone cubic in the index) through ``points``."""
    p = np.asarray(points, dtype=np.float64)
    return PchipInterpolator(np.arange(len(p)), p)(np.linspace(0, len(p) - 1, n))
