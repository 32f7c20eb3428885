"""Lungs with their vessels and airways, heart, and the vessels and tubes of the mediastinum."""

from __future__ import annotations

import numpy as np

from .anatomy import LABELS, SPINE_Y, Thorax
from .canvas import EVERYWHERE, Array, ellipsoid, spline_points

Curve = tuple[list[tuple[float, float, float]], list[float], int]


def draw_lungs(body: Thorax) -> None:
    """Parenchyma with its gravity gradient and texture, and the fissures."""
    c, p = body.canvas, body.p
    part = body.lung_part = c.box((-140, -105, -156), (140, 110, 126))
    x, y, z = c.at(part)
    blotches, grain = body.blotches[part], body.grain[part]
    d = body.lung = body.lung_distance(x, y, z, body.cage[part], body.dome[part], 1.6 * blotches)
    value = p["lung_hu"] + p["lung_gradient_hu"] * (y / 85) + 12 * np.clip(-z / 100, -1, 1)
    value = value + p["lung_texture_hu"] * (0.75 * blotches + 0.65 * grain)
    share = c.soft(d)
    for side, name in ((1, "lung_left"), (-1, "lung_right")):
        c.paint(part, share * (x * side > 0), value, LABELS[name])
    # Fissures: two oblique ones, and the horizontal one of the right lung; never complete.
    oblique = (z + 12 - 0.95 * (y - 5) - 6 * np.sin(x / 30)) * 0.72
    horizontal = z - 6 + 0.12 * y + 4 * np.cos(x / 25)
    sheet = np.maximum(c.sheet(oblique, 0.6), c.sheet(horizontal, 0.5) * ((x < 0) & (oblique > 0)))
    c.paint(part, sheet * c.soft(d + 2) * np.clip(0.45 + 0.35 * blotches, 0, 1), -300.0, 0)


def draw_lung_vessels(body: Thorax) -> None:
    """Arteries and veins that branch from the hila through the lungs."""
    c, p = body.canvas, body.p
    out = c.empty()
    for side in (1, -1):
        for stream, root, n in ((10, (side * 36, 10, 12), 120), (20, (side * 30, 10, -22), 90)):
            c.tubes(*grow_tree(body, body.rng(stream + side), side, root, n, p["vessel_leaf_mm"], 1.0), out)
    out[body.heart_part] *= c.soft(4 - body.heart)
    part = body.lung_part
    c.paint(part, out[part] * c.soft(body.lung + 0.5), p["blood_hu"], LABELS["lung_vessels"])


def grow_tree(
    body: Thorax,
    rng: np.random.Generator,
    side: int,
    root: tuple[float, float, float],
    n: int,
    leaf: float,
    reach: float,
) -> tuple[Array, Array, Array, Array]:
    """A tree from ``root`` to about ``n`` random points of one lung, as tapering capsules.

    Each point is joined to the nearest node of the tree, with a fine on the path from the root, so that branches
    run outwards (Cuntz et al. 2010, "One rule to grow them all"). Radii follow Murray's law with exponent 2.7:
    r_parent^2.7 is the sum over the children.

    Returns:
        starts, ends (segments, 3) and the radii at both, mm; ``reach`` is the share of the way that is grown.
    """
    low, high = np.array([12, -90, -148]), np.array([127, 94, 119])
    points = rng.uniform(low, high, (6 * n, 3)) * (side, 1, 1)
    start = np.asarray(root, dtype=np.float64)
    points = start + reach * (points[body.inside_lung(points, 3.0)][:n] - start)
    points = points[np.argsort(((points - start) ** 2).sum(1))]
    cloud, path, parent, count = np.zeros((12 * n + 8, 3)), np.zeros(12 * n + 8), [-1], 1
    cloud[0] = start
    for target in points:
        gap = np.sqrt(((cloud[:count] - target) ** 2).sum(1))
        at = int(np.argmin(gap + 0.45 * path[:count]))
        pieces = int(np.clip(round(gap[at] / 20), 1, 10))
        bend = rng.normal(0, 0.06 * gap[at], 3)
        for k in range(1, pieces + 1):
            t = k / pieces
            cloud[count] = cloud[at] + t * (target - cloud[at]) + bend * 4 * t * (1 - t)
            path[count] = path[at] + t * gap[at]
            parent.append(at if k == 1 else count - 1)
            count += 1
    flow = np.zeros(count)
    flow[np.bincount(parent[1:], minlength=count) == 0] = leaf**2.7
    for i in range(count - 1, 0, -1):  # a node always comes after its parent
        flow[parent[i]] += flow[i]
    radius, up = flow ** (1 / 2.7), np.asarray(parent[1:])
    return cloud[up], cloud[1:count], np.minimum(radius[up], radius[1:] * 1.25), radius[1:]


def draw_heart(body: Thorax) -> None:
    """Four chambers under their fat, slightly brighter than muscle; they notch the left lung."""
    c, p = body.canvas, body.p
    part = body.heart_part
    x, y, z = c.at(part)
    _, left_ventricle, right_ventricle, right_atrium, left_atrium = body.heart_chambers(x, y, z)
    cage, floor = body.cage[part], (body.dome[part] - z) * 0.85
    fat = p["heart_fat_mm"] * (1 + 0.6 * np.clip(-(y + 35) / 30, 0, 1)) + 1.5 * body.blotches[part]
    pads = ellipsoid(x, y, z, (58, -60, -84), (28, 20, 15))
    pads = np.minimum(pads, ellipsoid(x, y, z, (-30, -56, -82), (18, 18, 13)))
    coat = np.maximum(np.maximum(np.minimum(body.heart - fat, pads), floor), cage + 1)
    c.paint(part, c.soft(coat), p["fat_hu"] + 10, LABELS["fat"])
    c.paint(part, c.soft(body.heart), p["myocardium_hu"], LABELS["heart"])
    cavity = np.minimum(left_ventricle + 11, right_ventricle + 5)
    cavity = np.minimum(cavity, np.minimum(right_atrium, left_atrium) + 4)
    c.paint(part, c.soft(np.maximum(cavity, body.heart + 4)), p["blood_hu"] + 3, LABELS["heart"])
    # Fat in the groove between atria and ventricles, near the surface.
    groove = c.sheet(np.minimum(left_ventricle, right_ventricle) - np.minimum(right_atrium, left_atrium), 4.0)
    radius = np.sqrt(sum((v - o) ** 2 for v, o in zip((x, y, z), body.heart_origin, strict=True)))
    c.paint(part, groove * c.soft(body.heart) * np.clip((radius - 32) / 10, 0, 0.8), p["fat_hu"] + 20, 0)


def _tubes(body: Thorax, curves: list[Curve], value: float, label: str, wall: float = 0.0) -> Array:
    """Paint smooth tubes given by points, their radii and a number of pieces; returns their membership.

    Fat is not painted into the heart.
    """
    out = body.canvas.empty()
    for points, radii, n in curves:
        q = spline_points([(*point, r) for point, r in zip(points, radii, strict=True)], n)
        body.canvas.polyline(q[:, :3], q[:, 3] + wall, out)
    if label == "fat":
        out[body.heart_part] *= body.canvas.soft(2 - body.heart)
    body.canvas.paint(EVERYWHERE, out, value, LABELS[label] if label else 0)
    return out


def draw_mediastinum(body: Thorax) -> None:
    """Oesophagus, great vessels and aorta."""
    p = body.p
    blood, r, arch = p["blood_hu"], p["aorta_radius_mm"], p["arch_z_mm"]
    dx, dy = p["heart_x_mm"], p["heart_y_mm"]

    def spine(z: float, before: float) -> float:
        return float(SPINE_Y(np.float32(z))) - before

    gullet = [(2, spine(165, 15), 165)] + [(2, spine(z, 22), z) for z in (125, 60, 0)] + [(12, 28, -60), (20, 18, -98)]
    _tubes(body, [(gullet, [7, 7, 7, 7, 8, 9], 13)], 38.0, "oesophagus")
    veins: list[Curve] = [
        ([(-27, -16, 92), (-25, -18, 55), (-26 + dx, -16, 0), (-28 + dx, -10, -25)], [8, 9.5, 10, 11], 8),
        ([(-22 + dx, -4, -68), (-22, 4, -95), (-22, 14, -165)], [12, 12, 11], 6),
        ([(36, -28, 92), (10, -38, 78), (-25, -22, 70)], [6, 6.5, 7], 6),
        ([(-30, -22, 96), (-32, -8, 150)], [6, 5.5], 4),
        ([(36, -28, 92), (32, -6, 150)], [6, 5.5], 4),
        ([(-9, spine(40, 10), 46), (-9, spine(-40, 20), -40), (-8, spine(-110, 20), -110)], [3.2, 3, 2.6], 6),  # azygos
        ([(-20 + dx, 8, -22), (-40, 12, -24)], [9, 6], 3),
        ([(14 + dx, 12, -20), (38, 14, -22)], [9, 6], 3),
    ]
    arteries: list[Curve] = [
        ([(18 + dx, -44 + dy, -14), (22 + dx, -40, 14), (22, -22, 30)], [14.5, 14, 12.5], 6),
        ([(22, -22, 30), (38, 6, 30), (46, 18, 16), (50, 24, -4)], [12, 10.5, 8.5, 6.5], 6),
        ([(20, -16, 28), (-8, -6, 24), (-34, 4, 14), (-44, 12, -4)], [11, 10.5, 9.5, 7], 8),
        ([(-6, -14, arch - 2), (-16, -10, 92), (-32, -12, 122), (-40, -4, 150)], [6.5, 6, 4.5, 4], 7),
        ([(-20, -11, 100), (-18, 0, 150)], [4, 3.6], 3),
        ([(5, -2, arch), (10, -4, 98), (18, 2, 150)], [4.5, 4, 3.6], 6),
        ([(16, 10, arch), (24, 10, 98), (40, 2, 122)], [5, 5, 4], 6),
    ]
    # Fat fills the hollows between the vessels, and keeps the lung off the superior vena cava.
    _tubes(body, [veins[0], veins[2], arteries[0], arteries[3]], p["fat_hu"] + 10, "fat", wall=3.5)
    _tubes(body, veins + arteries, blood, "great_vessels")
    course = [(2 + dx, -24 + dy, -16), (-16 + dx, -36 + dy, 14), (-18, -30, 40), (-8, -16, arch - 6), (6, 2, arch)]
    course += [(20, 26, arch - 10), (26, 38, 34), (26, spine(0, 8), 0), (24, spine(-60, 10), -60)]
    course += [(16, spine(-115, 20), -115), (6, spine(-170, 26), -170)]
    taper = [1.18, 1.2, 1.15, 1.08, 1.02, 1, 0.96, 0.94, 0.92, 0.86, 0.82]
    _tubes(body, [(course, [r * t for t in taper], 44)], blood + 2, "aorta")


def draw_airways(body: Thorax) -> None:
    """Trachea and bronchi with their walls, then segmental branches inside the lungs."""
    c, tr = body.canvas, body.p["trachea_radius_mm"]
    carina = (3, 26, 40)
    tracks: list[Curve] = [
        ([(0, -19, 180), (0, -16, 160), (0, 6, 120), (1, 21, 80), carina], [tr] * 5, 12),
        ([carina, (-20, 24, 20), (-34, 22, 4), (-40, 26, -22)], [tr * 0.85, tr * 0.8, tr * 0.65, tr * 0.5], 9),
        ([(-22, 24, 18), (-44, 18, 28)], [tr * 0.6, tr * 0.45], 3),
        ([carina, (30, 28, 18), (44, 28, 4), (50, 34, -16)], [tr * 0.8, tr * 0.72, tr * 0.6, tr * 0.45], 9),
        ([(42, 27, 8), (60, 12, 12)], [tr * 0.55, tr * 0.4], 3),
    ]
    wall, lumen = c.empty(), c.empty()
    roots = ((-1, (-40, 26, -20)), (-1, (-44, 18, 28)), (1, (50, 34, -15)), (1, (60, 12, 12)))
    for stream, (side, root) in enumerate(roots):
        starts, ends, r0, r1 = grow_tree(body, body.rng(40 + stream), side, root, 7, 1.25, 0.62)
        c.tubes(starts, ends, r0 + 1.0, r1 + 0.9, wall)
        c.tubes(starts, ends, r0, r1, lumen)
    outside = c.soft(3 - body.heart)
    for share in (wall, lumen):
        share[body.heart_part] *= outside
    main = _tubes(body, tracks, 20.0, "", wall=1.6)
    c.paint(EVERYWHERE, wall * (1 - main), -60.0, 0)
    _tubes(body, tracks, -985.0, "airways")
    c.paint(EVERYWHERE, lumen, -960.0, LABELS["airways"])


def draw_nodules(body: Thorax, count: int) -> None:
    """Solid round nodules inside the lungs, diameter 5 to 25 mm (log-normal, median 11 mm)."""
    c, rng = body.canvas, body.rng(7)
    points = rng.uniform((-120, -80, -130), (120, 85, 105), (400, 3))
    points = points[body.inside_lung(points, 12.0)]
    diameters = np.clip(rng.lognormal(np.log(11), 0.4, len(points)), 5, 25)
    for centre, diameter in list(zip(points, diameters, strict=True))[:count]:
        axes = diameter / 2 * rng.uniform(0.85, 1.15, 3)
        part = c.box(centre - axes, centre + axes)
        d = ellipsoid(*c.at(part), centre, axes) + 0.06 * diameter * body.blotches[part]
        c.paint(part, c.soft(d), float(rng.normal(35, 20)), LABELS["nodule"])
