"""Pose recovery: known displacements are found, and what they mean agrees with the projector."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from difr3ct_core import ct
from difr3ct_core.drr import project, project_rays
from difr3ct_core.files import InputError
from difr3ct_core.geometry import Pose, standard_views
from difr3ct_core.phantoms import make_phantom
from difr3ct_core.pose import moved_together, moved_view, recover_views

ANGLES = (0.0, 45.0, 90.0)
SPACING = 10.0


@pytest.fixture(scope="module")
def mu():
    hu = make_phantom(5, 32).hu.clamp(-1000, 1500)
    return ct.hu_to_mu(hu, 0.02)


def test_a_moved_view_is_the_pose_of_source_and_detector_together(mu):
    view = standard_views((30.0,), 32, 320.0)[0]
    moved = moved_view(view, 3.0, 7.0, -4.0)
    frame = dataclasses.replace(view, angle_deg=33.0)
    pose = Pose(torch.tensor([3.0]), (7.0 * frame.e_u - 4.0 * frame.e_v)[None].float())
    one, other = project_rays(mu[None, None], [moved], SPACING), project_rays(mu[None, None], [view], SPACING, pose)
    assert float((one - other).norm() / one.norm()) < 1e-3


def test_known_displacements_are_found(mu):
    views = standard_views(ANGLES, 32, 320.0)
    off = ((4.0, -8.0, 6.0), (-3.0, 9.0, 0.0), (1.0, 3.0, -9.0))
    true = [moved_view(view, *values) for view, values in zip(views, off, strict=True)]
    xrays = project(mu[None, None], true, SPACING)[0, 0]
    found = recover_views(mu, xrays, views, SPACING, coarse=1)
    for view, goal in zip(found, true, strict=True):
        assert view.angle_deg == pytest.approx(goal.angle_deg, abs=0.3)
        assert view.offset_mm == pytest.approx(goal.offset_mm, abs=0.5)
        assert (view.detector_shape, view.pixel_mm) == (goal.detector_shape, goal.pixel_mm)


def test_views_that_are_right_stay(mu):
    views = standard_views(ANGLES, 32, 320.0)
    xrays = project(mu[None, None], views, SPACING)[0, 0]
    for view, goal in zip(recover_views(mu, xrays, views, SPACING, coarse=1), views, strict=True):
        assert view.angle_deg == pytest.approx(goal.angle_deg, abs=0.3)
        assert view.offset_mm == pytest.approx((0.0, 0.0), abs=0.5)


def test_a_motion_of_the_patient_is_one_of_all_views():
    """x-rays of the moved patient = x-rays of views that moved together; and that motion is taken out to rounding."""
    views = standard_views((0.0, 45.0, 90.0, 120.0), 32, 320.0)
    motion = torch.tensor([7.0, -4.0, 5.0], dtype=torch.float64)  # x, y, z in mm

    def together(view, turn):
        turned = moved_view(view, turn, 0.0, 0.0)
        return moved_view(turned, 0.0, float(turned.e_u.double() @ motion), float(turned.e_v.double() @ motion))

    for view, back in zip(views, moved_together([together(v, 3.0) for v in views], views), strict=True):
        assert back.angle_deg == pytest.approx(view.angle_deg, abs=1e-9)
        assert back.offset_mm == pytest.approx(view.offset_mm, abs=1e-5)
    volume = torch.zeros(1, 1, 32, 32, 32)
    volume[..., 12:18, 10:19, 13:22] = 0.02
    shifted = volume.roll((1, -2, 3), (2, 3, 4))  # by z 10, y -20, x 30 mm
    by = torch.tensor([30.0, -20.0, 10.0], dtype=torch.float64)
    moved = [moved_view(v, 0.0, -float(v.e_u.double() @ by), -float(v.e_v.double() @ by)) for v in views]
    expected, found = project(shifted, views, SPACING), project(volume, moved, SPACING)
    assert float((expected - found).norm() / expected.norm()) < 0.02


def test_what_views_do_not_share_stays():
    views = standard_views(ANGLES, 32, 320.0)
    off = [
        moved_view(view, *by)
        for view, by in zip(views, ((2.0, 5.0, 3.0), (-3.0, 0.0, -6.0), (1.0, -4.0, 3.0)), strict=True)
    ]
    rest = moved_together(off, views)
    assert [a.angle_deg - b.angle_deg for a, b in zip(rest, views, strict=True)] == pytest.approx([2.0, -3.0, 1.0])
    assert [a.offset_mm[0] - b.offset_mm[0] for a, b in zip(rest, views, strict=True)] == pytest.approx(
        [3.0, -6.0, 3.0], abs=1e-6
    )
    again = moved_together(rest, views)
    for one, other in zip(again, rest, strict=True):
        assert one.offset_mm == pytest.approx(other.offset_mm, abs=1e-6)
    with pytest.raises(InputError, match="views: found 2, expected 3 as in the reference"):
        moved_together(off[:2], views)


def test_bad_input(mu):
    views = standard_views(ANGLES, 32, 320.0)
    xrays = torch.ones(3, 32, 32)
    with pytest.raises(InputError, match="views: found cone beam, expected parallel"):
        recover_views(mu, xrays, standard_views(ANGLES, 32, 320.0, mode="cone"), SPACING)
    with pytest.raises(InputError, match=r"xrays: found shape \(2, 32, 32\), expected \(3, 32, 32\)"):
        recover_views(mu, xrays[:2], views, SPACING)
    with pytest.raises(InputError, match="coarse: found 3, expected a divisor of"):
        recover_views(mu, xrays, views, SPACING, coarse=3)
    with pytest.raises(InputError, match="rate: found 0"):
        recover_views(mu, xrays, views, SPACING, rate=0.0)
