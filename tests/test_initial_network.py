"""The initial network: what it sees, what it learns, and its way into a diffusion model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import SMALL, patients, same

from difr3ct_core import reconstruct
from difr3ct_core.baselines.inrr3ct import INRR3CT
from difr3ct_core.baselines.network import train_network
from difr3ct_core.baselines.presets import get_baselines
from difr3ct_core.checkpoints import read_log
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views
from difr3ct_core.initial import FirstGuess, first_guess, initial_latent, solved_latent
from difr3ct_core.initial_network import InitialNetwork
from difr3ct_core.initial_volume import InitialVolume
from difr3ct_core.presets import TrainPreset
from difr3ct_core.reconstruct import anchored, posterior_samples
from difr3ct_core.stage_initial import train_initial
from difr3ct_core.stages import train_ldm, train_vqgan
from difr3ct_core.weights import load_initial, load_ldm, training_history

SIZES = {"network": True, "widths": (8, 16), "features": 16, "width": 32, "octaves": 3}
ALONE = SMALL.replace(initial=SIZES, train_initial=TrainPreset(steps=4, batch_size=2, lr=1e-3, checkpoint_every_s=0.0))
SOLVED = ALONE.replace(initial={"solver": "tv_body", "iterations": 4})
VOXELS = ALONE.replace(initial={"in_voxels": True, "points": 512})


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    return train_vqgan(patients(), SMALL, tmp_path_factory.mktemp("network") / "vqgan")


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_any_views_in_any_order(mode):
    """One set of weights serves any number of views and angles; a view comes with its x-ray, so order is nothing."""
    torch.manual_seed(0)
    network = InitialNetwork(ALONE)
    for angles in ((90.0,), (0.0, 33.0, 101.0), tuple(20.0 * i for i in range(8))):
        views = standard_views(angles, 16, 320.0, mode=mode)
        xrays = torch.rand(2, len(angles), 16, 16)
        found = network(xrays, views)
        assert found.shape == (2, *SMALL.latent_shape)
        order = torch.randperm(len(angles), generator=torch.Generator().manual_seed(1)).tolist()
        torch.testing.assert_close(network(xrays[:, order], [views[i] for i in order]), found, rtol=1e-4, atol=1e-5)
        if len(angles) > 1:  # an x-ray at another view's angle says something else
            assert float((network(xrays.flip(1), views) - found).detach().abs().max()) > 1e-3


def test_a_point_sees_its_own_rays():
    """A change in one pixel of the frontal x-ray changes the latents of its column and not far from it."""
    torch.manual_seed(0)
    local = ALONE.replace(initial={"widths": (8,)})  # one level: the 2D network sees its neighbourhood only
    network = InitialNetwork(local)
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)):  # its mean couples all pixels
        norm.forward = lambda x: x  # type: ignore[method-assign]
    views = standard_views((90.0,), 16, 320.0)  # along y: detector rows are z, columns are x
    images = torch.rand(1, 1, 16, 16)
    changed = images.clone()
    changed[0, 0, 13, 2] += 1.0
    change = (network(changed, views) - network(images, views)).abs().sum((0, 1)).detach()  # z, y, x of 4³
    hit = change > 1e-7
    assert hit.any() and bool(hit.any(1).equal(hit.all(1)))  # all along the ray, or not at all
    z, x = torch.nonzero(hit.any(1))[change.amax(1)[hit.any(1)].argmax()].tolist()
    assert (z, x) == (3, 3)  # row 13 of 16 is the last quarter; u runs against x, so column 2 is the last quarter too


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    network = InitialNetwork(SOLVED)
    views = preset_views(SMALL, "2view")
    network(torch.rand(2, 2, 16, 16), views, torch.randn(2, *SMALL.latent_shape)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_training_in_half_precision_leaves_its_sines_whole():
    torch.manual_seed(0)
    network, views = InitialNetwork(SOLVED), preset_views(SMALL, "2view")
    xrays, solved = torch.rand(2, 2, 16, 16), torch.randn(2, *SMALL.latent_shape)
    whole = network(xrays, views, solved)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(xrays, views, solved.bfloat16().float()), network(xrays, views, solved.bfloat16()))
        half = network(xrays, views, solved)
    assert half.dtype == torch.float32 and torch.equal(half, whole)


def test_it_fits_patients_from_one_x_ray(tmp_path, vqgan):
    """Depth along the ray is what one x-ray does not show and position must give."""
    some = patients(3).with_views("1view_frontal")
    quick = ALONE.replace(train_initial={"steps": 300, "batch_size": 1, "lr": 1e-3, "checkpoint_every_s": 600.0})
    network = train_initial(some, vqgan, quick, tmp_path / "initial")
    with torch.no_grad():
        latents = vqgan.encode(some.unit())
        left = (network(some.xrays, some.views) - latents).square().mean() / latents.var()
    assert float(left) < 0.1


@pytest.mark.parametrize("any_view", [False, True])
@pytest.mark.parametrize("preset", [ALONE, SOLVED], ids=["alone", "solved"])
def test_trained_resumed_and_used(tmp_path, vqgan, preset, any_view):
    some = patients() if any_view else patients().with_views("2view")
    kwargs = {"any_view": any_view, "validation": patients(2, seed=5)}
    network = train_initial(some, vqgan, preset, tmp_path / "initial", **kwargs)
    train_initial(some, vqgan, preset, tmp_path / "parts", stop_after=2, **kwargs)
    assert same(train_initial(some, vqgan, preset, tmp_path / "parts", **kwargs), network)
    assert read_log(tmp_path / "initial", "val_loss")[0] == [preset.train_initial.steps - 1]
    assert same(load_initial(tmp_path / "initial")[0], network)
    assert same(train_initial(some, vqgan, preset, tmp_path / "initial", **kwargs), network)  # finished: read back
    # The diffusion model reads it and leaves it alone.
    ldm = train_ldm(some, vqgan, preset, tmp_path / "ldm", any_view=any_view, network=tmp_path / "initial")
    assert same(ldm.initial_network, network)
    assert same(train_ldm(some, vqgan, preset, tmp_path / "ldm", any_view=any_view), ldm)
    loaded = load_ldm(tmp_path / "ldm")[0]
    one = patients(1).with_views("2view")
    expected = network(one.xrays, one.views, solved_latent(vqgan, one.xrays, one.views, preset))
    torch.testing.assert_close(initial_latent(loaded, vqgan, one.xrays, one.views), expected.detach())
    result = reconstruct(one.xrays[0], one.views, tmp_path / "ldm", n_samples=2, seed=3)
    assert torch.isfinite(result.samples).all()
    # Another network, another model: it is a part of the condition.
    train_initial(some, vqgan, preset, tmp_path / "second", seed=1, any_view=any_view)
    other = train_ldm(some, vqgan, preset, tmp_path / "other", any_view=any_view, network=tmp_path / "second")
    assert not same(other.unet, ldm.unet)
    # All that led to the model is written down, with its time.
    history = training_history(load_ldm(tmp_path / "ldm")[3])
    assert [(h["kind"], h["steps"], h["batch_size"]) for h in history] == [("initial", 4, 2), ("ldm", 3, 2)]
    assert all(h["wall_s"] > 0 and h["peak_memory_gb"] > 0 for h in history)


def test_fine_tuning_takes_the_network_of_its_beginning_or_a_new_one(tmp_path, vqgan):
    some = patients().with_views("2view")
    still = ALONE.replace(train_ldm={"lr": 0.0}, train_initial={"lr": 0.0})
    network = train_initial(patients(), vqgan, still, tmp_path / "initial-any", any_view=True)
    first = train_ldm(patients(), vqgan, still, tmp_path / "ldm-any", any_view=True, network=tmp_path / "initial-any")
    kept = train_ldm(some, vqgan, still, tmp_path / "kept", start=tmp_path / "ldm-any")
    assert same(kept, first)
    new = train_initial(some, vqgan, ALONE, tmp_path / "initial", start=network)
    assert not same(new, network)
    changed = train_ldm(
        some, vqgan, still, tmp_path / "changed", start=tmp_path / "ldm-any", network=tmp_path / "initial"
    )
    kinds = [h["kind"] for h in training_history(load_ldm(tmp_path / "changed")[3])]
    assert kinds == ["initial", "ldm", "initial", "ldm"]  # of the beginning, then its own
    assert same(changed.initial_network, new) and same(changed.unet, first.unet)
    # A model of before, which had the solver's latent only, can begin one with a network: the channels are the same.
    plain = SMALL.replace(initial={"solver": "tv_body", "iterations": 4}, train_ldm={"lr": 0.0})
    before = train_ldm(some, vqgan, plain, tmp_path / "before")
    fresh = train_initial(some, vqgan, SOLVED, tmp_path / "solved")
    quiet = SOLVED.replace(train_ldm={"lr": 0.0})
    grown = train_ldm(some, vqgan, quiet, tmp_path / "grown", start=tmp_path / "before", network=tmp_path / "solved")
    assert same(grown.unet, before.unet) and same(grown.initial_network, fresh)


def test_what_does_not_fit_is_said(tmp_path, vqgan):
    some = patients().with_views("2view")
    with pytest.raises(InputError, match=r"network: missing, but initial\.network of preset 'small' is true; pass"):
        train_ldm(some, vqgan, ALONE.replace(name="small"), tmp_path / "ldm")
    train_initial(some, vqgan, ALONE, tmp_path / "initial")
    with pytest.raises(InputError, match=r"network: given, but initial\.network of preset 'small' is false"):
        train_ldm(some, vqgan, SMALL.replace(name="small"), tmp_path / "ldm", network=tmp_path / "initial")
    with pytest.raises(InputError, match=r"initial\.network: is false in preset"):
        train_initial(some, vqgan, SMALL, tmp_path / "none")
    train_ldm(some, vqgan, SMALL, tmp_path / "paper")
    with pytest.raises(InputError, match="paper: holds a diffusion model without an initial network"):
        load_initial(tmp_path / "paper")
    with pytest.raises(InputError, match="xrays: found 2 images, expected 1, one per view"):
        InitialNetwork(ALONE)(some.xrays, some.views[:1])
    with pytest.raises(InputError, match="solved: missing, but the solver of the preset is 'tv_body'; pass what"):
        InitialNetwork(SOLVED)(some.xrays, some.views)
    with pytest.raises(InputError, match="solved: given, but the solver of the preset is 'none'"):
        InitialNetwork(ALONE)(some.xrays, some.views, torch.zeros(len(some), *SMALL.latent_shape))
    assert not (tmp_path / "ldm").exists() and not (tmp_path / "none").exists()


def test_a_guess_in_voxels_and_what_the_autoencoder_loses_of_it(tmp_path, vqgan, monkeypatch):
    some = patients().with_views("2view")
    long = VOXELS.replace(train_initial={"steps": 60, "lr": 3e-3})
    network = train_initial(some, vqgan, long, tmp_path / "initial", validation=patients(2, seed=5))
    assert isinstance(network, InitialVolume) and read_log(tmp_path / "initial", "val_loss")[0] == [59]
    assert same(load_initial(tmp_path / "initial")[0], network)
    truth = some.unit()
    before, after = (
        float((net(some.xrays, some.views) - truth).detach().square().mean()) for net in (InitialVolume(long), network)
    )
    assert after < 0.7 * before
    model = train_ldm(some, vqgan, long, tmp_path / "ldm", network=tmp_path / "initial")
    assert same(load_ldm(tmp_path / "ldm")[0].initial_network, network)
    one = patients(3, seed=8).with_views("2view")
    guess = first_guess(model, vqgan, one.xrays, one.views, batch=2)
    volume = network(one.xrays, one.views).detach()
    torch.testing.assert_close(guess.latent, vqgan.encode(volume))
    torch.testing.assert_close(guess.lost, volume - vqgan.decode(guess.latent))
    with_it = posterior_samples(model, vqgan, one.xrays, one.views, 2)
    monkeypatch.setitem(posterior_samples.__globals__, "first_guess", lambda *_: FirstGuess(guess.latent))
    without = posterior_samples(model, vqgan, one.xrays, one.views, 2)
    assert float(guess.lost.abs().max()) > 0.1
    torch.testing.assert_close(with_it, (without + guess.lost).clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_a_trained_inrr3ct_is_a_first_guess(tmp_path, vqgan):
    some = patients().with_views("2view")
    settings = get_baselines("tiny").inrr3ct
    settings = dataclasses.replace(settings, training=TrainPreset(steps=2, batch_size=2, lr=1e-4))
    rival = train_network(INRR3CT, some, SMALL, settings, tmp_path / "inrr3ct")
    network, preset, _ = load_initial(tmp_path / "inrr3ct")
    torch.testing.assert_close(network(some.xrays, some.views).detach(), rival.reconstruct(some.xrays))
    model = train_ldm(
        some, vqgan, preset.replace(train_ldm=ALONE.train_ldm), tmp_path / "ldm", network=tmp_path / "inrr3ct"
    )
    assert same(model.initial_network, network)
    kinds = [h["kind"] for h in training_history(load_ldm(tmp_path / "ldm")[3])]
    assert kinds == ["inrr3ct", "ldm"]
    with pytest.raises(InputError, match=r"initial\.solver: found 'tv_body' beside in_voxels, expected 'none'"):
        InitialVolume(SOLVED.replace(initial={"in_voxels": True}))
    with pytest.raises(InputError, match="xrays: found 2 images, expected 1, one per view"):
        network(some.xrays, some.views[:1])


def test_samples_move_together_to_the_first_guess(tmp_path, vqgan):
    generator = torch.Generator().manual_seed(0)
    samples, mean = torch.rand(5, 4, 4, 4, generator=generator) - 0.5, torch.rand(4, 4, 4, generator=generator) - 0.5
    moved = anchored(samples, mean, 0.5)
    torch.testing.assert_close(moved.std(0), samples.std(0))
    torch.testing.assert_close(moved.mean(0), 0.6 * samples.mean(0) + 0.4 * mean)  # half of four fifths of the way
    torch.testing.assert_close(anchored(samples[:1], mean), samples[:1])  # one sample says nothing of the mean
    # Where the guess is the mean and the samples are off by the same error, it is taken away but for its n-th part.
    away = anchored(mean + 0.2 + 0.1 * (samples - samples.mean(0)), mean)
    torch.testing.assert_close(away.mean(0), mean + 0.2 / 5)
    # A patient of another kind: the spread grows about the mean, wherever that is moved.
    wide = anchored(0.3 * samples, 0.3 * mean, 0.5, 2.5)
    torch.testing.assert_close(wide.std(0), 0.75 * samples.std(0))
    torch.testing.assert_close(wide.mean(0), 0.3 * moved.mean(0))
    # Near the end of the window it grows as far as it can, and the mean stays.
    low = 0.3 * samples - 0.8
    wide = anchored(low, low.mean(0), 1.0, 10.0)
    torch.testing.assert_close(wide.mean(0), low.mean(0), atol=1e-6, rtol=0)
    assert float(wide.min()) >= -1
    assert torch.all(wide.std(0) > 1.2 * low.std(0))
    some = patients().with_views("2view")
    preset = VOXELS.replace(sampling={"anchor": 1.0})
    train_initial(some, vqgan, preset, tmp_path / "initial")
    model = train_ldm(some, vqgan, preset, tmp_path / "ldm", network=tmp_path / "initial")
    guess = model.initial_network(some.xrays, some.views).detach()
    drawn = posterior_samples(model, vqgan, some.xrays, some.views, 8)
    model.preset = VOXELS
    free = posterior_samples(model, vqgan, some.xrays, some.views, 8)
    expected = torch.stack([anchored(x, m) for x, m in zip(free, guess[:, 0], strict=True)])
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert float((drawn - free).abs().max()) > 0.01
