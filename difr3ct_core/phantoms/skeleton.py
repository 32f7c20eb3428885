"""Spine, ribs, sternum, shoulder girdle."""

from __future__ import annotations

import numpy as np

from .anatomy import BODY_Y, CAGE_A, CAGE_B, CAGE_Y, LABELS, SPINE_RX, SPINE_RY, SPINE_Y, T1_Z, VERTEBRA, Thorax
from .canvas import Array, Profile, spline_points, superellipse

# Surface of the shoulder blades: half-axes of its axial sections.
_ZS = (-60, -30, 20, 60, 90, 130)
BLADE_A = Profile(_ZS, (140, 140, 136, 132, 128, 122))
BLADE_B = Profile(_ZS, (108, 108, 104, 94, 82, 66))
# Ribs: share of the drop, and of the cartilage's rise, at angle phi in radians (0 posterior, pi anterior).
RIB_DROP = Profile((0, 0.2, 0.5, 1.0, 1.6, 2.2, 2.5, 3.15), (0, 0.01, 0.1, 0.3, 0.63, 0.94, 1, 1), step=0.01)
RIB_RISE = Profile((0, 2.1, 2.5, 2.9, 3.15), (0, 0, 0.25, 0.9, 1), step=0.01)
# Angle at which the bone of each rib ends, and its cartilage.
RIB_END = np.array([2.72, 2.6, 2.52, 2.45, 2.38, 2.3, 2.2, 2.05, 1.9, 1.75, 1.35, 0.85], dtype=np.float32)
CARTILAGE_END = np.array([3.2] * 7 + [2.55, 2.4, 2.25, 0, 0], dtype=np.float32)


def draw_spine(body: Thorax) -> None:
    """Vertebral bodies, discs, canal, arches, transverse and spinous processes."""
    c, p = body.canvas, body.p
    part = c.box((-45, -20, -200), (45, 125, 200))
    x, y, z = c.at(part)
    x = x - np.float32(p["scoliosis_mm"]) * np.sin(z / 75)
    back, rx, ry = y - SPINE_Y(z), SPINE_RX(z), SPINE_RY(z)
    level = (np.float32(T1_Z) - z) / np.float32(VERTEBRA)
    off = np.abs(level - np.round(level)) * np.float32(VERTEBRA)
    column = superellipse(x, back, rx, ry, 2.5)
    c.paint(part, c.soft(column - 0.5), p["disc_hu"], LABELS["discs"])
    waist = np.maximum(2.2 * (1 - (off / 9) ** 2), 0)
    body.bone(part, np.maximum(column + waist, off - 9.2), 1.3, "vertebrae")
    canal = np.sqrt((x / 1.12) ** 2 + (back - ry - 8.5) ** 2)
    # Pedicles beside the canal, laminae behind it; between levels the ring is open.
    ring = np.maximum(canal - 13.5, np.where(back > ry + 6, off - 7.0, off - 4.5))
    body.bone(part, np.maximum(ring, 0.5 * ry + 2 - back), 2.5, "vertebrae")
    spikes, wings = c.empty(), c.empty()
    for i in range(-3, 14):
        h = T1_Z - VERTEBRA * i
        yc = float(SPINE_Y(np.float32(h)) + SPINE_RY(np.float32(h))) + 8.5
        xb = float(p["scoliosis_mm"] * np.sin(h / 75))
        low = 24 if 2 <= i <= 9 else 12  # steep in mid-chest
        c.polyline([(xb, yc + 11, h - 2), (xb, yc + 30, h - low)], [3.4, 3.0], spikes)
        for side in (1, -1):
            out = 31 if i < 9 else 26
            c.polyline([(xb + side * 11, yc + 1, h), (xb + side * out, yc + 12, h + 1)], [3.8, 3.4], wings)
    inside = c.soft(body.torso + 0.75 * body.fat_mm)  # no process pierces the skin
    body.thin_bone(np.maximum(spikes, wings) * inside, 0.55, "vertebrae")
    c.paint(part, c.soft(canal - 8.3), 25.0, LABELS["spinal_canal"])


def draw_ribs(body: Thorax) -> None:
    """Twelve pairs that slope down from the spine, their cartilage rising to the sternum.

    Seen from the axis of the cage, rib k runs at z(phi) = z0 - pitch k - (40 + 8k) drop(phi) + 8(k-1) rise(phi),
    linear in k: solved for k, it gives for every voxel of the wall the nearest rib, all ribs at once.
    """
    c, p = body.canvas, body.p
    part = c.box((-145, -110, -200), (145, 115, 130))
    near = np.abs(body.cage[part] - 4.5) < 6 + c.edge
    x, y, z = (v[near] for v in c.at(part))
    out = body.cage[part][near] - 4.5
    phi = np.arctan2(np.abs(x) / CAGE_A(z), (y - CAGE_Y(z)) / CAGE_B(z))
    slope = np.float32(p["rib_slope"])
    drop, rise = RIB_DROP(phi), RIB_RISE(phi)
    step = VERTEBRA + slope * 8 * drop - 8 * rise
    k = (np.float32(T1_Z - 2) - z - slope * 40 * drop - 8 * rise) / step
    nearest = np.clip(np.round(k), 0, 11).astype(np.intp)
    jitter = body.rng(3).normal(0, 1.3, (2, 12)).astype(np.float32)[(x > 0).astype(np.intp), nearest]
    dz = (k - nearest) * step + jitter * np.clip(phi, 0, 1)
    high = np.where(nearest == 0, np.float32(4.5), np.float32(6.4))
    q = np.sqrt((dz / high) ** 2 + (out / 3.9) ** 2 + 1e-6)
    tube = (q - 1) * q / np.sqrt((dz / high**2) ** 2 + (out / 3.9**2) ** 2 + 1e-6)
    arc = (phi - RIB_END[nearest]) * 105
    bone = np.maximum(np.maximum(tube, arc), np.where(phi > 1.5, -50, 31 - np.abs(x)))
    gristle = np.maximum(np.maximum(tube + 0.6, -arc), (phi - CARTILAGE_END[nearest]) * 105)
    gristle = np.maximum(gristle, 14 - np.abs(x))

    def spread(values: Array) -> Array:
        full = np.full(near.shape, 50.0, dtype=np.float32)
        full[near] = values
        return full

    c.paint(part, c.soft(spread(gristle)), p["cartilage_hu"] + 25 * body.grain[part], LABELS["costal_cartilage"])
    body.bone(part, spread(bone), 1.4, "ribs")
    necks = c.empty()
    for i in range(12):
        h = T1_Z - 2 - VERTEBRA * i
        ys, rx = float(SPINE_Y(np.float32(h))), float(SPINE_RX(np.float32(h)))
        for side in (1, -1):
            end = body.cage_point(0.36, h - 1.5, 4.5, side) if i else (side * 32, ys + 20, h)
            middle = (side * 32, (ys + 7 + end[1]) / 2 + 4, h)
            c.polyline([(side * (rx + 2), ys + 7, h + 1), middle, end], [3.6, 3.6, 4.0], necks)
    body.thin_bone(necks, 0.5, "ribs")


def draw_girdle(body: Thorax) -> None:
    """Sternum, collar bones, shoulder blades and the heads of the raised upper arms."""
    c = body.canvas
    part = c.box((-40, -125, -95), (40, -30, 95))
    x, y, z = c.at(part)
    depth = y - (CAGE_Y(z) - CAGE_B(z) - 6.0)
    half = np.where(z > 39, 15 + 0.36 * (z - 39), 14 + 4.5 * np.exp(-(((z + 45) / 30) ** 2)))
    half = np.minimum(half, 29) * np.clip((z + 92) / 14, 0.2, 1)
    plate = superellipse(x, depth, half, np.float32(5.4), 3.0)
    plate = np.maximum(plate, np.maximum(z - 80 - 0.15 * np.abs(x), -86 - z))
    body.bone(part, np.maximum(plate, 1.8 - np.abs(z - 39)), 1.2, "sternum")  # cartilage at the sternal angle
    bars, blades, arms = c.empty(), c.empty(), c.empty()
    for side in (1, -1):
        course = [(side * 22, -56, 82), (side * 52, -54, 95), (side * 88, -30, 112), (side * 118, -2, 124)]
        c.polyline(spline_points(course, 10), [7.5, 6.5, 6, 5.5, 5.5, 5.5, 6, 6, 6.5, 6.5], bars)
        # Spine of the shoulder blade and acromion; neck and socket; coracoid.
        ridge = [(side * 80, 86, 60), (side * 108, 76, 82), (side * 126, 46, 108), (side * 124, 18, 124)]
        c.polyline(ridge, [2.5, 4, 5, 6], blades)
        c.polyline([(side * 116, 46, 90), (side * 122, 34, 100)], [7, 12], blades)
        c.polyline([(side * 116, 30, 104), (side * 108, 4, 104)], [5.5, 4.5], blades)
        c.polyline([(side * 142, 26, 112), (side * 146, 24, 118)], [21, 21], arms)
        c.polyline([(side * 146, 24, 118), (side * 156, 20, 142), (side * 178, 14, 185)], [17, 13, 12], arms)
    body.thin_bone(bars, 0.5, "clavicles")
    inside = c.soft(body.torso + 0.6 * body.fat_mm + 2)
    heads = arms * inside
    top = c.box((-200, -40, 70), (200, 80, 200))
    body.thin_bone(heads, 0.15, "humeri")
    c.paint(top, (heads * (1 - np.clip(2 * heads - 1, 0, 1)))[top], body.p["cortical_hu"], 0)
    _shoulder_blades(body, blades * inside)


def _shoulder_blades(body: Thorax, ridges: Array) -> None:
    """A thin triangular plate on the back of the cage, thick at its outer margin, with its ridges."""
    c = body.canvas
    part = c.box((-150, -40, -60), (150, 118, 130))
    x, y, z = c.at(part)
    sheet = superellipse(x, y - BODY_Y(z), BLADE_A(z), BLADE_B(z), 2.3)
    arc = 118 * np.arctan2(np.abs(x) / BLADE_A(z), (y - BODY_Y(z)) / BLADE_B(z))
    # Corners (arc length from the midline, z); arms raised: the lower angle swings outwards.
    corners = [(84.0, 92.0), (128.0 + body.p["scapula_turn_mm"], -24.0), (184.0, 92.0)]
    flat = np.full(x.shape, -1e3, dtype=np.float32)
    for (s0, z0), (s1, z1) in zip(corners, corners[1:] + corners[:1], strict=True):
        normal = np.array([-(z1 - z0), s1 - s0]) / np.hypot(s1 - s0, z1 - z0)  # corners run counter-clockwise
        flat = np.maximum(flat, -((arc - s0) * np.float32(normal[0]) + (z - z0) * np.float32(normal[1])))
    rim = np.clip(1 + flat / 12, 0, 1)
    thick = 3.2 + 1.5 * rim + 4.5 * rim * (arc > 140)
    plate = c.sheet(sheet, thick) * c.soft(flat) * c.soft(9 - body.cage[part])
    plate = plate * c.soft((body.torso + 0.7 * body.fat_mm)[part])
    np.maximum(ridges[part], plate, out=ridges[part])
    body.thin_bone(ridges, 0.65, "scapulae")
