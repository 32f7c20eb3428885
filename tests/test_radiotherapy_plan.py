"""Beam's-eye view, search and dose: geometry in closed form, symmetry, depth dose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from radiotherapy_toys import toy_chest

from difr3ct_core.ct_io import CTVolume
from difr3ct_core.files import InputError
from difr3ct_core.radiotherapy import NotPlannable, Structures, add_target, get_prescription, search_tangents
from difr3ct_core.radiotherapy.plan import (
    Field,
    Prescription,
    TangentPlan,
    fit_aperture,
    in_aperture,
    points_of,
    project,
)
from difr3ct_core.radiotherapy.structures import check_plannable


def test_projection_magnifies_and_turns_as_the_gantry() -> None:
    origin = np.zeros(3)
    # 100 mm towards a source in front (gantry 0, -y): magnified by 1000 / 900.
    assert np.allclose(project(np.array([[10.0, -100.0, 20.0]]), origin, 0.0), [[10 / 0.9, 20 / 0.9]])
    # From the patient's left (gantry 90), u points to the back.
    assert np.allclose(project(np.array([[0.0, 10.0, 5.0]]), origin, 90.0), [[10.0, 5.0]])
    assert np.allclose(project(np.array([[100.0, 10.0, 0.0]]), origin, 90.0), [[10 / 0.9, 0.0]])


def test_aperture_covers_the_target_and_flashes_in_front_only() -> None:
    uv = np.stack(np.meshgrid(np.arange(-40.0, 41), np.arange(-30.0, 31)), -1).reshape(-1, 2)
    leaves, rows = fit_aperture(uv, front=1.0, margin_mm=7.0)
    assert in_aperture(uv, leaves, rows).all()
    middle = leaves[np.searchsorted(rows, 0.0)]
    assert middle.tolist() == [-47.0, 60.0]
    closed = (rows > 40) | (rows < -45)
    assert (leaves[closed] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_mirrored_patient_gets_mirrored_angles(side: str) -> None:
    other = "right" if side == "left" else "left"
    straight = search_tangents(add_target(toy_chest()[1], side), side)
    mirrored = search_tangents(add_target(toy_chest(mirrored=True)[1], other), other)
    assert np.allclose(np.add(straight, mirrored) % 360, 0)
    assert abs((straight[1] - straight[0]) % 360 - 180) <= 8


def test_target_begins_below_the_skin() -> None:
    structures = add_target(toy_chest(4.0)[1], "left")
    assert not (structures["target"] & ~structures["breast_left"]).any()
    skin = structures["breast_left"] & ~structures["target"]
    assert 0.05 < skin.sum() / structures["breast_left"].sum() < 0.4


def test_contours_that_cannot_be_planned_say_why() -> None:
    _, good = toy_chest()
    planned = add_target(good, "left")
    check_plannable(planned)

    def changed(**masks: np.ndarray) -> Structures:
        return Structures({**planned.masks, **masks}, planned.affine, "case")

    empty = np.zeros_like(planned["heart"])
    with pytest.raises(NotPlannable, match="heart is empty"):
        check_plannable(changed(heart=empty))
    with pytest.raises(NotPlannable, match="share"):
        check_plannable(changed(heart=planned["heart"] | planned["target"]))
    with pytest.raises(NotPlannable, match="outside the body"):
        check_plannable(changed(target=np.roll(planned["target"], -8, axis=1)))
    with pytest.raises(NotPlannable, match="no contour of breast_left"):
        add_target(Structures({"body": good["body"]}, good.affine), "left")
    with pytest.raises(InputError, match="'left' or 'right'"):
        add_target(good, "both")
    with pytest.raises(InputError, match=r"40\.05/15"):
        get_prescription("60/30")


def water(n: int = 48, spacing: float = 5.0) -> tuple[CTVolume, Structures]:
    """A block of water of 200 mm, in air."""
    axis = (np.arange(n) - (n - 1) / 2) * spacing
    inside = np.abs(axis) < 100
    body = inside[:, None, None] & inside[:, None] & inside
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = axis[0]
    hu = torch.from_numpy(np.where(body, 0.0, -1000.0)).float()
    return CTVolume(hu, affine, "water"), Structures({"body": body}, affine)


def open_field(u: tuple[float, float], v: tuple[float, float], *gantry: float) -> TangentPlan:
    rows = 5.0 * np.arange(-36, 36)
    leaves = np.zeros((1, len(rows), 2))
    leaves[0, (rows >= v[0]) & (rows < v[1])] = u
    fields = tuple(Field(g, leaves, rows, np.ones(1)) for g in gantry)
    return TangentPlan("left", Prescription(40.0, 15), np.zeros(3), fields, "water")


def test_dose_lies_where_the_lop_sided_field_is_and_falls_with_depth() -> None:
    pytest.importorskip("pyRadPlan", reason="extra rt is not installed")
    from difr3ct_core.radiotherapy.dose import segment_doses

    ct, structures = water()
    front, left = segment_doses(open_field((10.0, 70.0), (20.0, 60.0), 0.0, 90.0), ct, structures)
    axis = np.diag(ct.affine)[0] * np.arange(48) + ct.affine[0, 3]
    middle = 24
    # In the plane of the iso-centre the field is where the leaves are: x (or y) 10 to 70, z 20 to 60.
    for plane in (front[:, middle, :], left[:, :, middle]):
        weights = plane * (plane > 0.5 * plane.max())
        z, across = np.average(axis, weights=weights.sum(1)), np.average(axis, weights=weights.sum(0))
        assert abs(z - 40) < 3 and abs(across - 40) < 3
        assert abs((plane[:, np.argmin(abs(axis - 40))] > 0.5 * plane.max()).sum() * 5 - 40) <= 5
        assert abs((plane[np.argmin(abs(axis - 40))] > 0.5 * plane.max()).sum() * 5 - 60) <= 5
    # 6 MV: 10 cm deep about two thirds of the maximum are left; from the left it enters at +x.
    ray = front[np.argmin(abs(axis - 40)), :, np.argmin(abs(axis - 40))]
    assert 0.5 < ray[np.argmin(abs(axis + 0))] / ray.max() < 0.8
    assert ray[:14].max() == ray.max()
    ray = left[np.argmin(abs(axis - 40)), np.argmin(abs(axis - 40))]
    assert ray[-14:].max() == ray.max()
    assert (front[~structures["body"]] == 0).all()


def test_plan_meets_the_prescription_on_the_toy_and_nothing_is_planned_in_air() -> None:
    pytest.importorskip("pyRadPlan", reason="extra rt is not installed")
    from difr3ct_core.radiotherapy.dose import calculate_dose, plan_on

    ct, structures = toy_chest(8.0)
    plan, dose = plan_on(ct, structures, "left", Prescription(40.05, 15))
    target = add_target(structures, "left")
    inside = dose.inside(target, "target")
    assert inside.mean() == pytest.approx(40.05, rel=1e-4)
    assert (inside > 0.9 * 40.05).mean() > 0.85
    assert 3 * dose.inside(target, "lung_right").mean() < dose.inside(target, "lung_left").mean() < 20.0
    assert np.allclose(calculate_dose(plan, ct, structures).gy, dose.gy, rtol=1e-4, atol=1e-4)
    assert np.allclose(plan.isocentre_mm, points_of(target, "target").mean(0))
    with pytest.raises(InputError, match="resample"):
        plan_on(CTVolume(ct.hu[1:], ct.affine), structures, "left", Prescription(40.05, 15))
