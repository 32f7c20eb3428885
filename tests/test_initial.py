"""A classical reconstruction as a further condition, fine-tuning from another model, and training on crops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import SMALL, patients, same

from difr3ct_core import ct, reconstruct
from difr3ct_core.baselines.classical import tv_body
from difr3ct_core.checkpoints import read_log
from difr3ct_core.diffusion import LatentDiffusion
from difr3ct_core.drr import project
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views
from difr3ct_core.initial import initial_latent, solved_latent
from difr3ct_core.initial_volume import initial_volume
from difr3ct_core.stages import crops, train_ldm, train_vqgan
from difr3ct_core.weights import load_ldm

SOLVED = SMALL.replace(initial={"solver": "tv_body", "iterations": 8})


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    return train_vqgan(patients(), SMALL, tmp_path_factory.mktemp("initial") / "vqgan")


def test_the_initial_volume_is_the_solvers_in_the_window():
    some = patients().with_views("2view")
    found = initial_volume(some.xrays, some.views, SOLVED, batch=3)
    mu = tv_body(some.xrays, some.views, SMALL.volume.shape, SMALL.volume.spacing_mm, iterations=8)
    expected = ct.hu_to_unit(ct.mu_to_hu(mu, SMALL.xray.mu_water_per_mm), SMALL.volume)[:, None]
    torch.testing.assert_close(found, expected)
    assert float(found.min()) >= -1 and float(found.max()) <= 1


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_it_explains_the_x_rays_better_with_more_iterations(mode):
    """Its projections come closer to the x-rays: in both beams, at angles of no standard set."""
    mu = ct.hu_to_mu(patients().hu.float(), SMALL.xray.mu_water_per_mm)
    views = standard_views((10.0, 70.0, 115.0), 16, 320.0, mode=mode)
    xrays = project(mu[:, None], views, SMALL.volume.spacing_mm)[:, 0]
    misfit = []
    for iterations in (2, 10, 40):
        unit = initial_volume(xrays, views, SOLVED.replace(initial={"iterations": iterations}))
        again = ct.hu_to_mu(ct.unit_to_hu(unit, SMALL.volume), SMALL.xray.mu_water_per_mm)
        misfit.append(float((project(again, views, SMALL.volume.spacing_mm)[:, 0] - xrays).norm() / xrays.norm()))
    assert misfit[0] > misfit[1] > misfit[2] and misfit[2] < 0.15


@pytest.mark.parametrize("solver", ["fbp", "magic"])
def test_unknown_solver(solver):
    some = patients(1)
    with pytest.raises(InputError, match=rf"initial\.solver: found '{solver}', expected 'none' or one of sirt, cgls"):
        initial_volume(some.xrays, some.views, SMALL.replace(initial={"solver": solver}))


def test_it_joins_the_condition(vqgan):
    some = patients().with_views("2view")
    model = LatentDiffusion(SOLVED)
    known = initial_latent(model, vqgan, some.xrays, some.views, batch=3)
    torch.testing.assert_close(known, solved_latent(vqgan, some.xrays, some.views, SOLVED))
    torch.testing.assert_close(known, vqgan.encode(initial_volume(some.xrays, some.views, SOLVED)))
    condition = model.condition(some.xrays, some.views, known)
    assert condition.shape[1] == SOLVED.condition_channels == SMALL.condition_channels + 8
    paper = model.fusion(some.xrays / SMALL.xray.scale, some.views)
    assert torch.equal(condition, torch.cat([paper, known], dim=1))
    assert initial_latent(LatentDiffusion(SMALL), vqgan, some.xrays, some.views) is None
    with pytest.raises(InputError, match="initial: missing, but the model was made with one; pass what initial_latent"):
        model.condition(some.xrays, some.views)
    with pytest.raises(InputError, match="initial: given, but the model was made without one; pass what"):
        LatentDiffusion(SMALL).condition(some.xrays, some.views, known)


@pytest.mark.parametrize("any_view", [False, True])
def test_trained_resumed_and_used(tmp_path, vqgan, any_view):
    some = patients() if any_view else patients().with_views("2view")
    kwargs = {"any_view": any_view, "validation": patients(2, seed=5)}
    whole = train_ldm(some, vqgan, SOLVED, tmp_path / "whole", **kwargs)
    train_ldm(some, vqgan, SOLVED, tmp_path / "parts", stop_after=1, **kwargs)
    assert same(train_ldm(some, vqgan, SOLVED, tmp_path / "parts", **kwargs), whole)
    steps, losses = read_log(tmp_path / "whole", "val_loss")
    assert steps == [SOLVED.train_ldm.steps - 1] and losses == read_log(tmp_path / "parts", "val_loss")[1]
    views = some.with_views("2view").views
    result = reconstruct(patients(1).with_views("2view").xrays[0], views, tmp_path / "whole", n_samples=2, seed=3)
    assert result.mean.shape == SMALL.volume.shape and torch.isfinite(result.samples).all()
    assert load_ldm(tmp_path / "whole")[2] == SOLVED


def test_fine_tuning_begins_with_the_other_models_weights(tmp_path, vqgan):
    first = train_ldm(patients(), vqgan, SOLVED, tmp_path / "any", any_view=True)
    some = patients().with_views("2view")
    still = SOLVED.replace(train_ldm={"lr": 0.0})
    tuned = train_ldm(some, vqgan, still, tmp_path / "tuned", start=tmp_path / "any")
    for (name, a), b in zip(tuned.state_dict().items(), first.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    alone = train_ldm(some, vqgan, still, tmp_path / "alone")
    assert not same(alone, tuned)
    fingerprints = [load_ldm(tmp_path / name)[3]["fingerprint"] for name in ("tuned", "alone")]
    assert "start" in fingerprints[0] and "start" not in fingerprints[1]


def test_fine_tuning_refuses_another_autoencoder_or_shape(tmp_path, vqgan):
    train_ldm(patients(), vqgan, SOLVED, tmp_path / "any", any_view=True)
    other = train_vqgan(patients(), SMALL, tmp_path / "other", seed=7)
    some = patients().with_views("2view")
    with pytest.raises(InputError, match="any: was trained with another autoencoder; start from weights of this run"):
        train_ldm(some, other, SOLVED, tmp_path / "tuned", start=tmp_path / "any")
    with pytest.raises(InputError, match="any: the weights do not fit LatentDiffusion"):
        train_ldm(some, vqgan, SMALL, tmp_path / "tuned", start=tmp_path / "any")


def test_crops_are_parts_of_their_volumes():
    volumes = patients().unit()
    corners = torch.tensor([[0, 0, 0], [1, 2, 3], [8, 8, 8], [0, 5, 8]])
    found = crops(volumes, corners, 8)
    for part, whole, (z, y, x) in zip(found, volumes, corners.tolist(), strict=True):
        assert torch.equal(part, whole[:, z : z + 8, y : y + 8, x : x + 8])


def test_training_on_crops_resumes_and_shares_its_batch(tmp_path):
    cropped = SMALL.replace(train_vqgan={"crop": 8})
    whole = train_vqgan(patients(), cropped, tmp_path / "whole")
    train_vqgan(patients(), cropped, tmp_path / "parts", stop_after=2)
    assert same(train_vqgan(patients(), cropped, tmp_path / "parts"), whole)
    full = train_vqgan(patients(), SMALL, tmp_path / "full")
    assert not same(full, whole)
    assert read_log(tmp_path / "whole", "loss")[1] != read_log(tmp_path / "full", "loss")[1]


@pytest.mark.parametrize("crop", [-4, 6, 20])
def test_impossible_crops(tmp_path: Path, crop: int):
    with pytest.raises(InputError, match=rf"train_vqgan\.crop: found {crop}, expected 0 or a multiple of 4 up to the"):
        train_vqgan(patients(), SMALL.replace(train_vqgan={"crop": crop}), tmp_path)
