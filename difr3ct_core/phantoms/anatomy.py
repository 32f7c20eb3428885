"""The shapes that several organs of the synthetic thorax share: rib cage, domes, torso, breasts, heart, lungs.

All lengths are canonical mm: those of a patient of mean size, +x Left, +y Posterior, +z Superior, origin at
mid-chest. Levels follow the usual surface anatomy: T1 at z = 118, one vertebra every 22.5 mm, jugular notch at
T2/3, sternal angle at T4/5, xiphisternal joint at T9, tracheal bifurcation at T5, right dome of the diaphragm
about T9 and 10 mm above the left. Where a shape has no such source it was drawn by eye from chest CT: our choice.
"""

from __future__ import annotations

import numpy as np

from .canvas import EVERYWHERE, Array, Canvas, Profile, Slices, ellipsoid, frame, smooth_min, superellipse

_NAMES = (
    *("air", "skin", "fat", "muscle", "breast_left", "breast_right", "lung_left", "lung_right", "airways"),
    *("lung_vessels", "heart", "aorta", "great_vessels", "vertebrae", "discs", "spinal_canal", "ribs"),
    *("costal_cartilage", "sternum", "scapulae", "clavicles", "diaphragm", "liver", "spleen", "stomach"),
    *("stomach_gas", "oesophagus", "nodule", "kidneys", "bowel", "humeri"),
)
#: Organ names and their numbers in a label map.
LABELS: dict[str, int] = {name: number for number, name in enumerate(_NAMES)}
#: The organs that pictures show in colour → their numbers, under the names of ``ct.TOTALSEGMENTATOR``.
ORGANS: dict[str, tuple[int, ...]] = {
    "lungs": (LABELS["lung_left"], LABELS["lung_right"]),
    "spinal_cord": (LABELS["spinal_canal"],),
    **{name: (LABELS[name],) for name in ("vertebrae", "heart", "aorta", "ribs", "sternum", "liver", "scapulae")},
}

T1_Z, VERTEBRA = 118.0, 22.5

# Pleural envelope (inner surface of the rib cage): half-axes and centre of its axial sections.
_Z = (-190, -170, -120, -80, -40, 0, 40, 70, 95, 112, 123)
CAGE_A = Profile(_Z, (121, 123, 127, 128, 126, 120, 108, 93, 71, 44, 3))
CAGE_B = Profile(_Z, (80, 83, 88, 91, 92, 91, 84, 71, 52, 30, 3))
CAGE_Y = Profile(_Z, (1, 2, 2, 2, 2, 3, 6, 10, 15, 20, 22))
# Torso outline, with 14 mm of subcutaneous fat.
_ZB = (-190, -170, -120, -80, -40, 0, 40, 80, 110, 135, 160, 190)
BODY_A = Profile(_ZB, (146, 148, 152, 154, 156, 158, 160, 156, 140, 110, 82, 66))
BODY_B = Profile(_ZB, (104, 106, 109, 111, 113, 113, 109, 98, 81, 62, 56, 54))
BODY_Y = Profile(_ZB, (0, 0, 0, 0, 0, 1, 3, 7, 14, 21, 22, 20))
SPINE_Y = Profile((-190, -170, -120, -80, 0, 60, 100, 125, 160, 190), (35, 38, 45, 50, 54, 49, 38, 27, 12, 6))
SPINE_RX = Profile((-190, -130, 0, 118, 190), (21, 20, 16.5, 14, 12))
SPINE_RY = Profile((-190, -130, 0, 118, 190), (16, 15.5, 14.5, 10.5, 8.5))
# Half-width of the mediastinum against the distance behind the vertebral centre.
MEDIASTINUM = Profile((-170, -135, -118, -92, -62, -35, -10, 4, 20, 45), (9, 9, 4, 4, 10, 16, 20, 23, 35, 56))


class Thorax:
    """One patient on a canvas: the parameters, and the shapes that organs share.

    Args:
        canvas: where to paint.
        parameters: the patient, see ``DISTRIBUTION``.
        seed: for what has no parameter of its own: branches, nodules.
        blotches: random field of the grid, unit variance, 10 to 40 mm.
        grain: random field of the grid, unit variance, 5 mm.
    """

    def __init__(self, canvas: Canvas, parameters: dict[str, float], seed: int, blotches: Array, grain: Array) -> None:
        self.canvas, self.p, self.seed = canvas, parameters, seed
        self.blotches, self.grain = blotches, grain
        x, y, z = canvas.x, canvas.y, canvas.z
        self.cage = self.cage_distance(x, y, z)
        self.dome = self.dome_height(x, y)
        self.torso, self.fat_mm = self.torso_distance(x, y, z)
        self.skin = self.torso
        self.breasts: dict[int, Array] = {}
        for side in (1, -1):
            if (shape := self.breast_distance(side)) is not None:
                self.breasts[side] = shape
                self.skin = smooth_min(self.skin, shape, 22.0)
        self.heart_part: Slices = canvas.box((-95, -105, -135), (120, 60, 40))
        part = self.heart_part
        self.heart = self.heart_chambers(*canvas.at(part))[0]
        self.heart = np.maximum(self.heart, (self.dome[part] + 4 - canvas.z[part]) * 0.85)
        self.heart = np.maximum(self.heart, self.cage[part] + 3)

    def rng(self, stream: int) -> np.random.Generator:
        """Random numbers of one organ: independent of those of the others, and of the grid."""
        return np.random.default_rng([self.seed, 100 + stream])

    def bone(self, part: Slices, distance: Array, shell_mm: float, label: str) -> None:
        """Paint bone: a cortical shell of ``shell_mm`` around trabecular bone."""
        c, p = self.canvas, self.p
        c.paint(part, c.soft(distance), p["trabecular_hu"] + 25 * self.grain[part], LABELS[label])
        c.paint(part, c.sheet(distance + shell_mm / 2, shell_mm), p["cortical_hu"], 0)

    def thin_bone(self, share: Array, cortical: float, label: str) -> None:
        """Paint bone too slender to show its marrow, ``cortical`` being the share of compact bone."""
        value = cortical * self.p["cortical_hu"] + (1 - cortical) * self.p["trabecular_hu"]
        self.canvas.paint(EVERYWHERE, share, value, LABELS[label])

    def cage_distance(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the pleural envelope of both lungs together."""
        d = superellipse(x, y - CAGE_Y(z), CAGE_A(z), CAGE_B(z), 2.3)
        # The envelope closes towards the apex: the nearest wall is above, not beside.
        return d / np.sqrt(1 + np.minimum(CAGE_A.slope(z) ** 2, 9.0))

    def cage_point(self, phi: float, z: float, out: float, side: int) -> tuple[float, float, float]:
        """The point at angle ``phi`` (0 posterior) and height ``z``, ``out`` mm outside the pleura."""
        a, b, yc = (float(f(np.float32(z))) for f in (CAGE_A, CAGE_B, CAGE_Y))
        n, cos = 2 / 2.3, float(np.cos(phi))
        return side * (a + out) * abs(np.sin(phi)) ** n, yc + (b + out) * np.sign(cos) * abs(cos) ** n, z

    def dome_height(self, x: Array, y: Array) -> Array:
        """z of the diaphragm: two domes that fall off to the sides and, most, to the back."""
        p = self.p

        def dome(cx: float, cy: float, top: float, lateral: Array) -> Array:
            dx = x - np.float32(cx)
            u = np.where(lateral, 58 * (dx / 64) ** 2, 16 * (dx / 64) ** 2)
            dy = y - np.float32(cy)
            v = np.where(dy > 0, 62 * (dy / 92) ** 2, 24 * (dy / 76) ** 2)
            return np.maximum(np.float32(top) - u - v, -152)

        right = dome(-62, -10, p["dome_right_z_mm"], x < -62)
        left = dome(66, -8, p["dome_right_z_mm"] - p["dome_drop_left_mm"], x > 66)
        mix = np.clip(0.5 + x / 24, 0, 1)
        return right + mix * (left - right)

    def torso_distance(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        """Signed distance to the torso without breasts, and the thickness of the fat under the skin, mm."""
        p = self.p
        fat = np.float32(p["fat_mm"])
        grow = fat - 14 + np.float32(p["muscle_mm"])
        d = superellipse(x, y - BODY_Y(z), BODY_A(z) + grow, BODY_B(z) + 0.85 * grow, p["outline_exponent"])
        # Grooves over the spine and the sternum.
        d = d + np.where(y > 0, 6 * np.exp(-((x / 20) ** 2)), 3 * np.exp(-((x / 24) ** 2)))
        back = np.clip(y / 100, -1, 1)
        low = np.clip(-(z + 20) / 120, -0.5, 1)
        thickness = fat * (1 + 0.15 * back + 0.15 * low * (1 - back))
        if side := p["mastectomy_side"]:
            flat = np.exp(-(((x - side * 78) / 55) ** 2) - ((z + 8) / 60) ** 2) * (y < 0)
            lost = 0.55 * fat * flat
            d, thickness = d + lost, thickness - lost
        # Arms are raised: the shoulders rise beside the neck and leave the field.
        for side in (1, -1):
            part = self.canvas.box((side * 120 - 70, -60, 40), (side * 120 + 70, 75, 200))
            xs, ys, zs = x[part] - np.float32(side * 84), y[part] - 22, z[part] - 84
            t = np.clip((xs * side * 62 + zs * 70) / (62**2 + 70**2), 0, 1.6)
            shoulder = np.sqrt((xs - t * side * 62) ** 2 + (ys * 1.05) ** 2 + (zs - t * 70) ** 2) - (44 + 0.8 * grow)
            d[part] = smooth_min(d[part], shoulder, 30)
        return d, thickness

    def breast_distance(self, side: int) -> Array | None:
        """Signed distance to one breast (+1 left, -1 right), or None where there is none."""
        p, c = self.p, self.canvas
        if p["breast_depth_mm"] <= 0 or p["mastectomy_side"] == side:
            return None
        size = p["breast_radius_mm"] * (1 + 0.04 * side * p["breast_asymmetry"])
        # Lying on the back, the breast falls to the side.
        tilt = frame((np.cos(0.35), side * np.sin(0.35), 0))
        axes = (size, p["breast_depth_mm"] + 12, size * 1.02)
        return ellipsoid(c.x, c.y, c.z, self.breast_centre(side), axes, tilt)

    def breast_centre(self, side: int) -> tuple[float, float, float]:
        """Where the breast lies on the chest wall."""
        p = self.p
        front = -float(BODY_B(np.float32(-10))) * 0.86 - p["fat_mm"] + 26
        return side * (70 + 0.25 * p["breast_radius_mm"]), front, -14 + p["breast_z_mm"]

    def heart_chambers(self, x: Array, y: Array, z: Array) -> tuple[Array, ...]:
        """Signed distances to the heart, and to its left and right ventricle, right and left atrium."""
        p, s = self.p, self.p["heart_scale"]
        self.heart_origin = (8 + p["heart_x_mm"], -24 + p["heart_y_mm"], -48 + 0.5 * (p["dome_right_z_mm"] + 72))
        axis = np.radians(p["heart_axis_deg"])
        long = frame((np.cos(axis) * 0.86, -np.sin(axis) * 0.86, -0.5))

        def chamber(offset: tuple[float, ...], axes: tuple[float, ...], turn: Array | None = None) -> Array:
            centre = np.add(self.heart_origin, np.multiply(offset, s))
            return ellipsoid(x, y, z, centre, np.multiply(axes, s), turn)

        left_ventricle = chamber((26, -4, -8), (47, 33, 33), long)
        right_ventricle = chamber((2, -26, -4), (42, 24, 35), long)
        right_atrium = chamber((-34, 0, 6), (24, 28, 34))
        left_atrium = chamber((-2, 27, 18), (33, 20, 24))
        ventricles = smooth_min(left_ventricle, right_ventricle, 14)
        heart = smooth_min(ventricles, smooth_min(right_atrium, left_atrium, 14), 14)
        return heart, left_ventricle, right_ventricle, right_atrium, left_atrium

    def lung_distance(self, x: Array, y: Array, z: Array, cage: Array, dome: Array, wobble: Array | float = 0) -> Array:
        """Signed distance to the lungs before the heart is taken out of them."""
        behind = y - SPINE_Y(z)
        width = MEDIASTINUM(behind) * np.float32(self.p["mediastinum_scale"]) + wobble
        upper = np.clip((z - 45) / 30, 0, 1) * np.clip((behind + 90) / 25, 0, 1) * np.clip(-behind / 20, 0, 1)
        front = np.clip((-behind - 40) / 60, 0, 1)  # in front the lungs meet left of the midline
        wedge = (width + 12 * upper - np.abs(x - 1.5 - 5 * front)) * 0.9
        return np.maximum(np.maximum(cage, wedge), (dome - z) * 0.8)

    def inside_lung(self, points: Array, margin_mm: float) -> Array:
        """Which of the points (n, 3) lie at least ``margin_mm`` inside a lung, and not in the heart."""
        x, y, z = points.astype(np.float32).T
        d = self.lung_distance(x, y, z, self.cage_distance(x, y, z), self.dome_height(x, y))
        return np.maximum(d, 4 - self.heart_chambers(x, y, z)[0]) < -margin_mm
