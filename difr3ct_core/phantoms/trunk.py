"""Skin, fat and muscle of the trunk, breasts, and what lies under the diaphragm."""

from __future__ import annotations

import numpy as np

from .anatomy import LABELS, SPINE_Y, Thorax
from .canvas import EVERYWHERE, Array, ellipsoid, frame, smooth_min, spline_points


def draw_wall(body: Thorax) -> None:
    """Skin, fat, breasts and muscles, then the fat inside the rib cage."""
    c, p = body.canvas, body.p
    c.paint(EVERYWHERE, c.soft(body.skin), p["fat_hu"] + 4 * body.blotches, LABELS["fat"])
    for side, shape in body.breasts.items():
        _breast(body, side, shape)
    muscle = _muscle_distance(body)
    # Muscle is streaked with fat.
    streaks = np.clip(0.45 * body.blotches - 0.5 + p["muscle_fat"] * 2, 0, 0.7)
    value = p["muscle_hu"] + streaks * (p["fat_hu"] - p["muscle_hu"])
    c.paint(EVERYWHERE, c.soft(muscle), value, LABELS["muscle"])
    # Planes of fat between the layers: under the pectoral muscle, under and over the shoulder blade.
    for depth in (12.5, 29.0):
        plane = c.sheet(body.cage - depth - 1.5 * body.blotches, 2.2) * (np.abs(c.x) > 38) * (c.z < 112)
        c.paint(EVERYWHERE, plane * c.soft(muscle + 2) * 0.75, p["fat_hu"] + 10, 0)
    # Kept inside the outline: on a coarse grid a sheet as wide as a voxel would thicken the patient.
    c.paint(EVERYWHERE, c.sheet(body.skin + 1.0, 2.0) * c.soft(body.skin), 20.0, LABELS["skin"])
    # Skin thinner than a voxel still is the outermost voxel of the body.
    c.labels[(np.abs(body.skin + 0.5 * c.edge) < 0.5 * c.edge) & (c.labels != LABELS["skin"])] = LABELS["skin"]
    part = c.box((-140, -105, -200), (140, 110, 126))
    x, y, z = c.at(part)
    inside = c.soft(body.cage[part])
    c.paint(part, inside, p["fat_hu"] + 8, LABELS["fat"])
    # The muscles of the back beside and behind the vertebrae reach into the pleural envelope.
    behind = y - SPINE_Y(z)
    back = np.maximum(8 - behind, (np.abs(x) - 22 - 0.8 * behind) * 0.75)
    psoas = np.hypot(np.abs(x) - 27, behind - 2) - np.clip(-(z + 105) / 5, 0, 11)
    c.paint(part, inside * c.soft(np.minimum(back, psoas)), p["muscle_hu"], LABELS["muscle"])


def _breast(body: Thorax, side: int, shape: Array) -> None:
    """Fat with islands of gland behind the nipple."""
    c, p = body.canvas, body.p
    x, y, z = body.breast_centre(side)
    r, depth = p["breast_radius_mm"], p["breast_depth_mm"]
    reach = 1.3 * max(r, depth) + 15
    part = c.box((x - reach, y - reach, z - reach), (x + reach, y + reach, z + reach))
    outside = 2 - (body.torso + body.fat_mm)[part]  # in front of the muscle
    share = c.soft(np.maximum(np.maximum(shape, body.skin)[part], outside))
    gland = ellipsoid(*c.at(part), (x + side * 4, y - 0.35 * depth, z - 2), (0.68 * r, 0.8 * depth, 0.66 * r))
    gland = c.soft(np.maximum(gland + 4 * body.blotches[part], body.skin[part] + 5))
    mix = np.clip(p["breast_density"] * 2.0 + 0.5 * body.blotches[part] - 0.15, 0, 1) * gland
    value = p["fat_hu"] + mix * (p["gland_hu"] - p["fat_hu"])
    c.paint(part, share, value, LABELS["breast_left" if side > 0 else "breast_right"])


def _muscle_distance(body: Thorax) -> Array:
    """Muscles as a thickness over the rib cage: intercostal, pectoral, latissimus and shoulder, back; neck above."""
    c, p = body.canvas, body.p
    x, y, z = np.abs(c.x), c.y, c.z
    extra = np.float32(p["muscle_mm"] + (3 if p["male"] else 0))
    front, rear = np.clip(-y / 40, 0, 1), np.clip((y + 10) / 40, 0, 1)
    pectoral = front * np.exp(-(((x - 62) / 46) ** 4) - ((z - 52) / 44) ** 2)
    blade = rear * np.exp(-(((x - 112) / 48) ** 2) - ((z - 58) / 58) ** 2)
    wing = np.exp(-(((x - 120) / 40) ** 2) - ((y - 25) / 45) ** 2 - ((z + 20) / 60) ** 2)
    erector = rear * np.clip((62 - x) / 20, 0, 1)
    thickness = 9.5 + (15 + extra) * pectoral + (30 + extra) * blade + (8 + extra) * wing + (24 + extra) * erector
    muscle = body.cage - thickness
    # Neck and shoulders: muscles of the spine, the straps in front, trapezius under the skin, the shoulder cap.
    neck = ellipsoid(x, y - SPINE_Y(z), z, (0, 20, 150), (52, 38, 80))
    muscle = smooth_min(muscle, neck, 8)
    top = c.box((-200, -70, 70), (200, 120, 200))
    out = c.empty()
    for side in (1, -1):
        straps = [(side * 20, -40, 92), (side * 32, -20, 122), (side * 46, 2, 165)], [6, 9, 9]
        scalene = [(side * 36, 4, 106), (side * 26, 12, 165)], [9, 9]
        deltoid = [(side * 84, 34, 96), (side * 118, 24, 118), (side * 160, 18, 165)], [24, 33, 34]
        for points, radii in (straps, scalene, deltoid):
            c.polyline(points, radii, out)
    muscle[top] = np.minimum(muscle[top], (0.5 - out[top]) * c.edge)
    trapezius = np.maximum(np.abs(body.torso + body.fat_mm + 8) - 8, np.maximum(18 - y, 70 - z))
    muscle = np.minimum(muscle, np.maximum(trapezius, x - 110))
    return np.maximum(muscle, body.torso + 0.75 * body.fat_mm)


def draw_abdomen(body: Thorax) -> None:
    """Diaphragm, liver, spleen, stomach with its gas bubble, kidneys and bowel."""
    c, p = body.canvas, body.p
    part = c.box((-140, -105, -200), (140, 110, p["dome_right_z_mm"] + 12))
    x, y, z = c.at(part)
    cage, below = body.cage[part], (z - body.dome[part]) * 0.8
    blotches = body.blotches[part]
    behind = y - SPINE_Y(z)
    # Kept free for the spine and the muscles beside it.
    column = np.minimum(np.hypot(x, behind - 2) - 36, np.maximum(10 - behind, np.abs(x) - 40 - 0.4 * behind))
    sheet = np.maximum(cage, np.maximum(below, -below - 4))
    c.paint(part, c.soft(np.maximum(sheet, -column)), p["muscle_hu"], LABELS["diaphragm"])
    cavity = np.maximum(np.maximum(cage + 3, below + 3), -column)

    def organ(distance: Array, value: float | Array, name: str) -> Array:
        distance = np.maximum(distance, cavity)
        c.paint(part, c.soft(distance), value, LABELS[name])
        return distance

    for side, low in ((1, -150), (-1, -162)):
        centre = (side * 58, 44, low)
        kidney = ellipsoid(x, y, z, centre, (27, 24, 50), frame((1, side * 0.5, side * 0.2)))
        sinus = ellipsoid(x, y, z, (side * 52, 40, low), (11, 9, 26))
        organ(kidney, 34.0, "kidneys")
        c.paint(part, c.soft(np.maximum(sinus, cavity)), p["fat_hu"] + 25, 0)
    _bowel(body, part, cavity)
    spleen = ellipsoid(x, y, z, (97, 38, -118), (24, 44, 42), frame((1, 0.35, 0)))
    spleen = organ(np.maximum(spleen, 34 - np.hypot(x - 60, y - 20)), p["spleen_hu"], "spleen")
    axes = np.multiply((42, 46, 40), p["stomach_scale"])
    stomach = ellipsoid(x, y, z, (58, -14, -119), axes, frame((1, -0.5, -0.35)))
    stomach = organ(smooth_min(stomach, ellipsoid(x, y, z, (26, -46, -150), (40, 20, 17)), 16), 45.0, "stomach")
    inner = stomach + 3.5
    food = 18 + 14 * np.clip(blotches, -1, 1)
    c.paint(part, c.soft(inner), food, 0)
    level = np.float32(-18 - p["stomach_level_mm"])  # gas rises to the front of a patient on the back
    c.paint(part, c.soft(np.maximum(inner, y - level)), -960.0, LABELS["stomach_gas"])
    edge = (x + 0.65 * (y + 42) + 5 * np.sin(y / 13) - np.float32(28 + p["liver_left_mm"])) * 0.8
    # The lower face rises to the left.
    under = (-172 + 0.28 * (x + 110) + 0.12 * y + 5 * np.sin(x / 17) - z) * 0.9
    liver = np.maximum(edge, under)
    liver = np.maximum(liver, -smooth_min(stomach, spleen, 4) + 2)
    organ(liver, p["liver_hu"] + 5 * blotches, "liver")


def _bowel(body: Thorax, part: tuple[slice, slice, slice], cavity: Array) -> None:
    """Loops of bowel with pockets of gas, the colon along the left flank and in front."""
    c, rng = body.canvas, body.rng(8)
    loops = c.empty()
    colon = [(100, 10, -185), (98, -15, -150), (88, -42, -128), (60, -70, -138), (20, -78, -158), (-40, -76, -170)]
    wobble = rng.normal(0, 5, (6, 3))
    q = spline_points(np.add(colon, wobble), 14)
    c.polyline(q, 15 + 2.5 * rng.uniform(-1, 1, 14), loops)
    for _ in range(16):
        start = np.array([rng.uniform(-70, 78), rng.uniform(-66, 12), rng.uniform(-190, -138)])
        c.polyline([start, start + rng.normal(0, 18, 3)], rng.uniform(9, 13), loops)
    share = loops[part] * c.soft(cavity + 2)
    gas = np.clip(1.6 * body.blotches[part] - 1.5, 0, 1) + 0.25 * np.clip(body.grain[part], 0, 1)
    c.paint(part, share, 32 - 700 * np.clip(gas, 0, 1) * np.clip(loops[part] * 2 - 1, 0, 1), LABELS["bowel"])
