"""Bad input to the projector: one clear sentence each, before any work is done."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from difr3ct_core.drr import backproject, checks, clear_cache, project, project_rays, truncated_share
from difr3ct_core.files import InputError
from difr3ct_core.geometry import Pose, View, standard_views

SHAPE, SPACING = (6, 8, 10), (5.0, 4.0, 3.0)
VIEWS = (View(0.0, (10, 14), (5.0, 5.0)), View(90.0, (10, 14), (5.0, 5.0)))
CONE = tuple(View(view.angle_deg, (10, 14), (5.0, 5.0), "cone") for view in VIEWS)


@pytest.fixture(autouse=True)
def fresh_cache():
    """Warnings come when a geometry is first seen."""
    clear_cache()


@pytest.mark.parametrize("projector", [project, project_rays])
@pytest.mark.parametrize(
    ("mu", "words"),
    [
        (torch.zeros(SHAPE), r"3 axes \(6, 8, 10\), expected 5"),
        (torch.zeros(1, *SHAPE), "expected 5"),
        (torch.zeros(1, 1, *SHAPE, dtype=torch.int16), "hu_to_mu"),
        (torch.zeros(1, 0, *SHAPE), "empty axis"),
        ([[1.0]], "expected a tensor"),
        (torch.zeros(1, 1, *SHAPE).numpy(), "torch.as_tensor"),
    ],
)
def test_volumes_of_the_wrong_kind(projector, mu, words):
    with pytest.raises(InputError, match=words):
        projector(mu, VIEWS, SPACING)


@pytest.mark.parametrize("projector", [project, project_rays])
@pytest.mark.parametrize("views", [VIEWS, CONE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_single_nan_is_found_and_counted(projector, views, bad):
    mu = torch.rand(1, 1, *SHAPE)
    mu[0, 0, 3, 4, 5] = bad
    with pytest.raises(InputError, match="mu: 1 of 480 values"):
        projector(mu, views, SPACING)


def test_nan_in_projections():
    images = torch.zeros(1, 1, 2, 10, 14)
    images[0, 0, 1, 2, 3] = math.nan
    with pytest.raises(InputError, match="projections: 1 of 280 values"):
        backproject(images, VIEWS, SHAPE, SPACING)


def test_finite_values_that_overflow_are_not_called_nan():
    with pytest.raises(InputError, match="overflow"):
        project(torch.full((1, 1, *SHAPE), 1e38), VIEWS, SPACING)


@pytest.mark.parametrize("projector", [project, project_rays])
@pytest.mark.parametrize("spacing", [0.0, -2.5, math.nan, (1.0, 1.0), (1.0, -1.0, 1.0)])
def test_spacing(projector, spacing):
    with pytest.raises(InputError, match="spacing_mm"):
        projector(torch.zeros(1, 1, *SHAPE), VIEWS, spacing)


@pytest.mark.parametrize("projector", [project, project_rays])
def test_zero_views(projector):
    with pytest.raises(InputError, match="found none"):
        projector(torch.zeros(1, 1, *SHAPE), (), SPACING)


@pytest.mark.parametrize("projector", [project, project_rays])
def test_a_source_inside_the_volume(projector):
    near = View(0.0, (10, 14), (5.0, 5.0), "cone", dso_mm=20.0, dsd_mm=60.0)
    with pytest.raises(InputError, match=r"dso_mm: found 20 mm.*stand outside"):
        projector(torch.zeros(1, 1, *SHAPE), (near,), SPACING)
    with pytest.raises(InputError, match="exchanged"):
        View(0.0, (10, 14), (5.0, 5.0), "cone", dso_mm=1500.0, dsd_mm=1000.0)


def test_images_and_views_that_do_not_match():
    with pytest.raises(InputError, match=r"found \(view, v, u\) = \(2, 14, 10\), expected \(2, 10, 14\)"):
        backproject(torch.zeros(1, 1, 2, 14, 10), VIEWS, SHAPE, SPACING)
    with pytest.raises(InputError, match="volume_shape"):
        backproject(torch.zeros(1, 1, 2, 10, 14), VIEWS, (8, 10), SPACING)
    with pytest.raises(InputError, match="volume_shape"):
        backproject(torch.zeros(1, 1, 2, 10, 14), VIEWS, (8, 10.5, 3), SPACING)


def test_pose_and_step():
    mu = torch.zeros(1, 1, *SHAPE)
    with pytest.raises(InputError, match="pose: found"):
        project_rays(mu, VIEWS, SPACING, Pose(torch.zeros(1), torch.zeros(2, 3)))
    with pytest.raises(InputError, match="step_mm"):
        project_rays(mu, VIEWS, SPACING, step_mm=0.0)


def test_angles_in_radians():
    views = tuple(View(angle, (10, 14), (5.0, 5.0)) for angle in (0.0, math.pi / 4, math.pi / 2))
    with pytest.warns(UserWarning, match="radians"):
        project(torch.zeros(1, 1, *SHAPE), views, SPACING)


def test_truncation_is_reported_with_its_share():
    half = View(0.0, (10, 14), (5.0, 5.0), offset_mm=(0.0, 35.0))  # sees y > 0 only
    assert abs(truncated_share(half, SHAPE, SPACING) - 0.5) < 0.01
    with pytest.warns(UserWarning, match="50% of the rays .* view at 0 degrees"):
        project(torch.ones(1, 1, *SHAPE), (half,), SPACING)
    gone = View(0.0, (10, 14), (5.0, 5.0), offset_mm=(0.0, 500.0))
    with pytest.warns(UserWarning, match="100% of the rays"):
        assert project(torch.ones(1, 1, *SHAPE), (gone,), SPACING).abs().max() == 0
    with pytest.warns(UserWarning, match="100% of the rays"):
        project_rays(torch.ones(1, 1, *SHAPE), (gone,), SPACING)


def test_reversed_axes_are_guessed():
    views = standard_views("2view", (20, 10), 100.0)  # 200 mm high, 100 mm wide
    tall, flat = (40, 20, 20), (20, 20, 40)
    with pytest.warns(UserWarning, match=r"really \(z, y, x\)"):
        project(torch.zeros(1, 1, *flat), views, 5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project(torch.zeros(1, 1, *tall), views, 5.0)


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_standard_views_of_the_prepared_cube_warn_of_nothing(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project(torch.zeros(1, 1, 12, 12, 12), standard_views("8view", 12, 320.0, mode), 320.0 / 12)


def test_a_volume_larger_than_memory_is_refused_with_the_need():
    # 20 000³ voxels of 4 bytes are 32 000 GB.
    views = standard_views("1view_frontal", 8, 20000.0)
    with pytest.raises(InputError, match=r"need about 3\d{4} GB of memory, found .* on cpu"):
        backproject(torch.zeros(1, 1, 1, 8, 8), views, (20000, 20000, 20000), 1.0)


@pytest.mark.parametrize("views", [VIEWS, CONE])
def test_the_work_space_counts_as_well(monkeypatch, views):
    monkeypatch.setattr(checks, "available_bytes", lambda device: 30e3)
    with pytest.raises(InputError, match="memory, found 30 kB on cpu"):
        project(torch.zeros(1, 1, *SHAPE), views, SPACING)
    monkeypatch.setattr(checks, "available_bytes", lambda device: 3e6)
    project(torch.zeros(1, 1, *SHAPE), views, SPACING)


def test_free_memory_is_a_number():
    assert 1e6 < checks.available_bytes(torch.device("cpu")) < 1e15


def test_unknown_backend():
    with pytest.raises(InputError, match=r"'astra', expected one of torch, tigre"):
        project(torch.zeros(1, 1, *SHAPE), VIEWS, SPACING, drr_backend="astra")
