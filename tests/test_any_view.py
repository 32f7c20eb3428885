"""The any-view model: which views a training step sees, what its weights accept, and that it uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import SMALL, patients

from difr3ct_core import reconstruct
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views
from difr3ct_core.presets import VIEW_SETS
from difr3ct_core.stages import draw_views, fan_angles, train_ldm, train_vqgan
from difr3ct_core.weights import load_ldm, state_digest


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("any")
    vqgan = train_vqgan(patients(), SMALL, folder / "vqgan")
    train_ldm(patients(), vqgan, SMALL, folder / "ldm-any", any_view=True)
    return folder / "ldm-any"


def odd_views(*angles: float):
    return standard_views(angles, SMALL.xray.detector_size, SMALL.volume.fov_mm)


def draws(count: int = 2000) -> list[list[int]]:
    return [draw_views(SMALL, torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_the_fan_holds_every_view_of_the_paper():
    angles = fan_angles(SMALL)
    assert len(set(angles)) == SMALL.any_view.fan and angles[0] == 0 and max(angles) < 180
    assert {angle for views in VIEW_SETS.values() for angle in views} <= set(angles)


def test_draws_are_a_function_of_the_generator_and_follow_their_shares():
    angles = fan_angles(SMALL)
    some = draws()
    assert some == draws()
    sets = {tuple(angles.index(a) for a in views): name for name, views in VIEW_SETS.items()}
    of_paper = [sets[tuple(pick)] for pick in some if tuple(pick) in sets]
    # Each set is a tenth; a random part of the fan hits one by chance about once in 400 draws (a single view).
    for name in VIEW_SETS:
        assert of_paper.count(name) / len(some) == pytest.approx(0.1, abs=0.025)
    others = [pick for pick in some if tuple(pick) not in sets]
    for count in range(1, 9):
        assert sum(len(pick) == count for pick in others) / len(some) == pytest.approx(1 / 16, abs=0.02)
    assert all(pick == sorted(set(pick)) and pick[0] >= 0 and pick[-1] < 32 for pick in some)
    assert {i for pick in others for i in pick} == set(range(32))


def test_rendered_x_rays_are_those_on_disk():
    """The paper's angles, rendered anew, give the images that preparation stored."""
    some = patients(2)
    angles = fan_angles(SMALL)
    fan = some.at_angles(angles, SMALL.xray, batch=1)
    assert fan.xrays.shape == (2, 32, 16, 16)
    pick = [angles.index(a) for a in VIEW_SETS["8view"]]
    torch.testing.assert_close(fan.xrays[:, pick], some.xrays)
    assert tuple(fan.views[i] for i in pick) == preset_views(SMALL)


def test_a_run_in_parts_is_the_same_run(weights, tmp_path):
    vqgan = load_ldm(weights)[1]
    for _ in range(2):
        train_ldm(patients(), vqgan, SMALL, tmp_path / "run", stop_after=1, any_view=True)
    again = train_ldm(patients(), vqgan, SMALL, tmp_path / "run", any_view=True)
    assert state_digest(again) == state_digest(load_ldm(weights)[0])


def test_it_is_not_taken_for_a_model_of_fixed_views(weights, capsys):
    vqgan = load_ldm(weights)[1]
    fixed = train_ldm(patients(), vqgan, SMALL, weights.with_name("ldm-8view"))
    assert state_digest(fixed) != state_digest(load_ldm(weights)[0])
    assert "any_view_most" not in load_ldm(weights.with_name("ldm-8view"))[3]


@pytest.mark.parametrize("angles", [(90.0,), (3.0, 77.7, 120.0), (0.0, 20.0, 40.0, 60.0, 80.0, 100.0, 120.0, 179.0)])
def test_any_views_reconstruct(weights, angles):
    views = odd_views(*angles)
    xrays = patients(1).at_angles(angles, SMALL.xray).xrays[0]
    result = reconstruct(xrays, views, weights, n_samples=2)
    assert result.samples.shape == (2, 16, 16, 16) and result.samples.isfinite().all()
    # The order of the views is no information: the mean of Eq. 10 forgets it.
    turned = reconstruct(xrays.flip(0), views[::-1], weights, n_samples=2)
    torch.testing.assert_close(turned.samples, result.samples, atol=2.0, rtol=0)  # HU, of 2500


def test_nine_views_and_views_from_behind_are_refused(weights):
    nine = odd_views(*range(0, 90, 10))
    with pytest.raises(InputError, match=r"views: found 9, expected 1 to 8, for which .*ldm-any.* choose some"):
        reconstruct(torch.rand(9, 16, 16), nine, weights)
    with pytest.raises(InputError, match=r"views: found angles \[200.0\]°, expected 0° to below 180°.* mirror"):
        reconstruct(torch.rand(2, 16, 16), odd_views(10, 200), weights)
    cone = standard_views((0.0,), 16, SMALL.volume.fov_mm, mode="cone")
    with pytest.raises(InputError, match="found cone beam, expected parallel"):
        reconstruct(torch.rand(1, 16, 16), cone, weights)
