"""Geometry of the views. Expected values are worked out by hand: the module under test is never its own oracle."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difr3ct_core.files import InputError
from difr3ct_core.geometry import (
    Pose,
    View,
    check_views,
    pixel_rays,
    spacing_zyx,
    standard_views,
    view_frame,
    views_from_json,
    views_to_json,
    voxel_centres,
    world_to_detector,
)
from difr3ct_core.presets import VIEW_SETS

POINT = torch.tensor([30.0, -20.0, 12.0], dtype=torch.float64)  # (x, y, z): left, anterior, superior


@st.composite
def views(draw):
    number = st.floats(-20, 20, allow_nan=False)
    dso = draw(st.floats(200, 1000))
    return View(
        angle_deg=draw(st.floats(-400, 400)),
        detector_shape=(draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        pixel_mm=(draw(st.floats(0.1, 5)), draw(st.floats(0.1, 5))),
        mode=draw(st.sampled_from(["parallel", "cone"])),
        offset_mm=(draw(number), draw(number)),
        dso_mm=dso,
        dsd_mm=dso * draw(st.floats(1.05, 3)),
    )


@pytest.mark.parametrize(
    ("angle", "u"),
    # u = p·e_u with e_u = (-sin, cos, 0), worked out by hand for p = (30, -20).
    [
        (0, -20.0),
        (90, -30.0),
        (180, 20.0),
        (270, 30.0),
        (-90, 30.0),
        (45, -50 / math.sqrt(2)),
        (135, -10 / math.sqrt(2)),
    ],
)
def test_parallel_image_of_a_point(angle, u):
    view = View(angle, (5, 7), (2.0, 4.0))
    expected = torch.tensor([12 / 2.0 + 2, u / 4.0 + 3], dtype=torch.float64)
    torch.testing.assert_close(world_to_detector(POINT, view), expected)


@pytest.mark.parametrize(("angle", "depth", "u"), [(0, 1000 - 30, -20.0), (90, 1000 + 20, -30.0), (180, 1030, 20.0)])
def test_cone_image_is_magnified_by_depth(angle, depth, u):
    view = View(angle, (5, 7), (2.0, 4.0), "cone", (1.0, -3.0), 1000.0, 1500.0)
    scale = 1500.0 / depth
    expected = torch.tensor([(12 * scale - 1.0) / 2 + 2, (u * scale + 3.0) / 4 + 3], dtype=torch.float64)
    torch.testing.assert_close(world_to_detector(POINT, view), expected)


def test_the_axis_lands_in_the_middle_and_rows_rise_with_z():
    for view in standard_views("8view", (6, 9), 320.0, "cone"):
        middle, higher = world_to_detector(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]]), view)
        torch.testing.assert_close(middle, torch.tensor([2.5, 4.0]))
        assert higher[0] > middle[0]


def test_axes_are_right_handed_and_exact_at_quarter_turns():
    for angle in (0.0, 90.0, 180.0, 270.0, 33.0):
        view = View(angle, (2, 3), (1.0, 1.0))
        # Seen from the source, e_u x e_v points back to it.
        torch.testing.assert_close(torch.linalg.cross(view.e_u, view.e_v), view.to_source)
        torch.testing.assert_close(view.source_mm, view.dso_mm * view.to_source)
    assert View(90.0, (2, 3), (1.0, 1.0)).to_source.tolist() == [0.0, 1.0, 0.0]
    assert View(270.0, (2, 3), (1.0, 1.0)).e_u.tolist() == [1.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(view=views(), distance=st.floats(1, 190))
def test_every_point_of_a_pixels_ray_falls_on_that_pixel(view, distance):
    origin, direction = pixel_rays(view)
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(view.detector_shape, dtype=torch.float64))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in view.detector_shape), indexing="ij")
    pixels = world_to_detector(origin + distance * direction, view)
    torch.testing.assert_close(pixels, torch.stack([rows, columns], -1), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(view=views(), turn=st.floats(-20, 20))
def test_a_pose_that_only_turns_is_a_view_at_another_angle(view, turn):
    pose = Pose(torch.tensor(turn, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    turned = View(
        view.angle_deg + turn, view.detector_shape, view.pixel_mm, view.mode, view.offset_mm, view.dso_mm, view.dsd_mm
    )
    torch.testing.assert_close(world_to_detector(POINT, view, pose), world_to_detector(POINT, turned))


def test_a_pose_that_shifts_moves_the_patient_the_other_way_and_has_the_right_gradient():
    view = View(30.0, (5, 7), (2.0, 3.0), "cone")
    shift = torch.tensor([3.0, -4.0, 5.0], dtype=torch.float64)
    pose = Pose(torch.zeros((), dtype=torch.float64), shift)
    torch.testing.assert_close(world_to_detector(POINT, view, pose), world_to_detector(POINT - shift, view))

    def image(angle, shift):
        return world_to_detector(POINT, view, Pose(angle, shift))

    angle = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(image, (angle, shift.requires_grad_()))
    assert view_frame(view, Pose(angle, shift)).source.requires_grad


def test_points_behind_the_source_have_no_image():
    view = View(0.0, (5, 7), (2.0, 3.0), "cone", dso_mm=100.0, dsd_mm=150.0)
    pixels = world_to_detector(torch.tensor([[100.0, 5.0, 5.0], [170.0, 5.0, 5.0], [99.0, 0.0, 0.0]]), view)
    assert torch.isinf(pixels[:2]).all()
    assert torch.isfinite(pixels[2]).all()


def test_voxel_centres():
    centres = voxel_centres((2, 3, 4), (5.0, 3.0, 2.0))
    assert centres.shape == (2, 3, 4, 3)
    assert centres[0, 0, 0].tolist() == [-3.0, -3.0, -2.5]
    assert centres[1, 2, 3].tolist() == [3.0, 3.0, 2.5]
    assert centres[1, 0, 1].tolist() == [-1.0, -3.0, 2.5]


@pytest.mark.parametrize("name", VIEW_SETS)
@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_standard_views_see_the_whole_cylinder_and_no_more(name, mode):
    fov = 320.0
    stack = standard_views(name, 16, fov, mode)
    assert tuple(view.angle_deg for view in stack) == VIEW_SETS[name]
    turn = torch.linspace(0, 2 * math.pi, 721)[:-1]
    rim = torch.stack([fov / 2 * turn.cos(), fov / 2 * turn.sin(), torch.full_like(turn, fov / 2)], -1)
    for view in stack:
        pixels = world_to_detector(rim, view)
        assert pixels.max() <= 15.5 + 1e-4
        assert pixels.max() > 15.5 - 0.01  # the rim touches the edge


def test_json_round_trip_and_text():
    stack = (
        View(12.5, (4, 6), (1.5, 2.5), "cone", (3.0, -1.0), 700.0, 1100.0),
        View(102.5, (4, 6), (1.0, 2.0), "cone", (0.0, 0.0), 700.0, 1200.0),
    )
    assert views_from_json(json.loads(json.dumps(views_to_json(stack)))) == stack


def broken(**changes):
    values = views_to_json([View(12.5, (4, 6), (1.5, 2.5), "cone")])
    for key, value in changes.items():
        if value is None:
            del values["views"][0][key]
        else:
            values["views"][0][key] = value
    return values


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "not a file of views"),
        ({"views": []}, "not a file of views"),
        ({"format": "difr3ct-views", "version": 2, "views": []}, "version"),
        ({"format": "difr3ct-views", "version": 1, "views": {}}, "list of views"),
        ({"format": "difr3ct-views", "version": 1, "views": []}, "found none"),
        ({"format": "difr3ct-views", "version": 1, "views": [3]}, r"views\[0\]"),
        (broken(angle_deg=None), "angle_deg"),
        (broken(pixel_mm=None), "pixel_mm"),
        (broken(dso_mm=None), "dso_mm"),
        (broken(angel=3), "angel"),
        (broken(angle_deg="90"), "angle_deg"),
        (broken(angle_deg=True), "angle_deg"),
        (broken(angle_deg=math.nan), "angle_deg"),
        (broken(detector_shape=[4, 6.0]), "detector_shape"),
        (broken(detector_shape=[4, 0]), "detector_shape"),
        (broken(detector_shape=5), "detector_shape"),
        (broken(detector_shape=[4, 6, 1]), "detector_shape"),
        (broken(pixel_mm=[1.0, -1.0]), "pixel_mm"),
        (broken(pixel_mm=[1.0, math.inf]), "pixel_mm"),
        (broken(pixel_mm="ab"), "pixel_mm"),
        (broken(offset_mm=[0, "x"]), "offset_mm"),
        (broken(mode="fan"), "mode"),
        (broken(mode=["cone"]), "mode"),
        (broken(dso_mm=1500.0), "exchanged"),
        (broken(dso_mm=-5), "dso_mm"),
    ],
)
def test_json_that_is_wrong_is_refused_with_its_place(values, words):
    with pytest.raises(InputError, match=words) as caught:
        views_from_json(values, "scan.json")
    assert "scan.json" in str(caught.value)


def test_a_parallel_file_needs_no_distances():
    values = views_to_json([View(0.0, (4, 6), (1.5, 2.5))])
    del values["views"][0]["dso_mm"], values["views"][0]["dsd_mm"], values["views"][0]["offset_mm"]
    assert views_from_json(values) == (View(0.0, (4, 6), (1.5, 2.5)),)


def test_angles_in_radians_are_noticed_and_degrees_are_not():
    radians = [View(math.radians(a), (2, 3), (1.0, 1.0)) for a in VIEW_SETS["8view"]]
    with pytest.warns(UserWarning, match="radians"):
        check_views(radians)
    with pytest.warns(UserWarning, match="radians"):
        standard_views((0.0, math.pi / 2), 8, 100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_views(radians[2:3])  # one small angle is as good as any
        check_views([View(0.0, (2, 3), (1.0, 1.0))] * 2)
        standard_views("2view", 8, 100.0)


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ([], "found none"),
        ([90.0], "expected View"),
        ([View(0, (2, 3), (1, 1)), View(9, (2, 3), (1, 1), "cone")], "mode"),
        ([View(0, (2, 3), (1, 1)), View(9, (3, 2), (1, 1))], "detector_shape"),
    ],
)
def test_stacks_that_cannot_be_one(stack, words):
    with pytest.raises(InputError, match=words):
        check_views(stack)


@pytest.mark.parametrize("spacing", [0.0, -1.0, math.nan, (1.0, 2.0), (1.0, 0.0, 1.0), (1.0, 1.0, math.inf), "1", True])
def test_spacing_must_be_positive(spacing):
    with pytest.raises(InputError, match="spacing_mm"):
        spacing_zyx(spacing)


def test_standard_views_refuse_the_impossible():
    with pytest.raises(InputError, match="9view"):
        standard_views("9view", 8, 320.0)
    with pytest.raises(InputError, match="dso_mm"):
        standard_views("2view", 8, 320.0, "cone", dso_mm=150.0, dsd_mm=400.0)
    with pytest.raises(InputError, match="exchanged"):
        standard_views("2view", 8, 320.0, "cone", dso_mm=1500.0, dsd_mm=1000.0)
    with pytest.raises(InputError, match="fov_mm"):
        standard_views("2view", 8, 0.0)
    with pytest.raises(InputError, match="detector_size"):
        standard_views("2view", 0, 320.0)
