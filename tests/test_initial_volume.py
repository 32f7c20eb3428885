"""The refined first guess: what the refinement sees, learns and leaves alone, and its way into a diffusion model."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL, patients, same

from difr3ct_core import latents, stage_initial
from difr3ct_core.consistency import QUIET, misfit, residual
from difr3ct_core.datasets import render_xrays, rendered
from difr3ct_core.files import InputError
from difr3ct_core.initial import first_guess, initial_latent
from difr3ct_core.initial_volume import (
    PRIOR_WEIGHT_MM,
    TV_WEIGHT_MM,
    USUAL,
    InitialVolume,
    Refinement,
    evenly,
    trust,
)
from difr3ct_core.latents import doubted, guessed, unrefined
from difr3ct_core.presets import TrainPreset
from difr3ct_core.reconstruct import posterior_samples
from difr3ct_core.stage_initial import train_initial
from difr3ct_core.stages import train_ldm, train_vqgan
from difr3ct_core.weights import join_second, load_initial, load_ldm, training_history

SIZES = {
    "network": True,
    "in_voxels": True,
    "points": 512,
    "widths": (8, 16),
    "features": 16,
    "width": 32,
    "octaves": 3,
}
GUESS = SMALL.replace(initial=SIZES, train_initial=TrainPreset(steps=40, batch_size=2, lr=3e-3))
REFINED = GUESS.replace(
    initial={"refine_widths": (8, 16)}, train_initial=TrainPreset(steps=40, batch_size=4, lr=3e-3, channels_last=True)
)


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    return train_vqgan(patients(), SMALL, tmp_path_factory.mktemp("refined") / "vqgan")


def error(network: InitialVolume, some) -> float:
    return float((network(some.xrays, some.views) - some.unit()).detach().square().mean())


def test_a_refinement_begins_as_the_identity_and_reaches_every_voxel():
    generator = torch.Generator().manual_seed(0)
    volumes = torch.rand(2, 2, 8, 16, 8, generator=generator) * 2 - 1
    network = Refinement(2, (8, 16))
    assert torch.equal(network(volumes), volumes[:, 1:])
    torch.nn.init.normal_(network.head[-1].weight, std=0.1, generator=generator)
    changed = network(volumes).detach() - volumes[:, 1:]
    assert float((changed.abs() > 1e-6).float().mean()) > 0.99
    # The volume that is not the last one matters too, and so does where a voxel is.
    other = volumes.clone()
    other[:, 0] += 0.5
    assert not torch.allclose(network(other) - other[:, 1:], changed, atol=1e-3)
    flat = network(torch.zeros(1, 2, 8, 16, 8)).detach()
    assert float((flat[..., :4, :, :] - flat[..., 4:, :, :]).abs().max()) > 1e-4
    with pytest.raises(InputError, match=r"volume: found \(8, 6, 8\) voxels, expected multiples of 4 on each axis"):
        network(torch.zeros(1, 2, 8, 6, 8))


def test_every_weight_of_a_refinement_has_a_gradient():
    network = Refinement(1, (8, 16))
    for name, weight in network.named_parameters():
        if name.endswith("weight") and float(weight.detach().abs().max()) == 0:  # begins as the identity
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    network(torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))).square().mean().backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in network.parameters())


def test_a_guess_is_moved_to_its_xrays_and_refined_and_its_network_is_left_alone(tmp_path, vqgan):
    some, later = (patients(8, seed=seed).with_views("2view") for seed in (0, 9))
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    metadata = load_initial(tmp_path / "guess" / "initial")[2]
    history = training_history(metadata)
    network = train_initial(later, vqgan, REFINED, tmp_path / "initial", start=guess, history=history)
    assert same(network.field, guess.field) and network.refinement is not None
    assert [h["steps"] for h in training_history(load_initial(tmp_path / "initial")[2])] == [40, 40]
    seen = network.unrefined(later.xrays, later.views).detach()
    torch.testing.assert_close(seen[:, :1], guess(later.xrays, later.views).detach())
    for x, images in zip(seen, later.xrays, strict=True):
        before, after = residual(x, images, later.views, SMALL)
        assert after < 0.7 * before
    assert error(network, later) < 0.9 * error(guess, later)
    # It goes on from there, and the guesses are read from disk.
    kept = list((tmp_path / "latents").glob("*.safetensors"))
    assert any(path.stat().st_size > later.unit().numel() * 2 * 2 for path in kept)
    again = train_initial(later, vqgan, REFINED, tmp_path / "again" / "initial", start=network, stop_after=0)
    assert error(again, later) == pytest.approx(error(network, later), rel=0.05)


def test_of_eight_xrays_the_network_sees_four_and_the_move_all(tmp_path, vqgan):
    four, eight = (patients(8).with_views(name) for name in ("4view", "8view"))
    guess = train_initial(four, vqgan, GUESS, tmp_path / "guess" / "initial")
    assert tuple(eight.views[i] for i in evenly(8, 4)) == tuple(four.views) and evenly(3, 4) == [0, 1, 2]
    assert evenly(6, 4) == [0, 1, 3, 4]
    losses = [
        guess.loss(some.xrays, some.views, some.unit(), torch.Generator().manual_seed(0), slice(0, 8), 8)
        for some in (four, eight)
    ]
    assert float(losses[0].detach()) == float(losses[1].detach())  # and is trained with
    network = train_initial(eight, vqgan, REFINED, tmp_path / "initial", start=guess)
    seen = network.unrefined(eight.xrays, eight.views).detach()
    torch.testing.assert_close(seen[:, :1], guess(four.xrays, four.views).detach())
    for part in (slice(None, None, 2), slice(1, None, 2)):  # the x-rays that it saw, and the others
        before, after = (residual(seen[:, i], eight.xrays[:, part], eight.views[part], SMALL).mean() for i in (0, 1))
        assert after < 0.5 * before
    assert error(network, eight) < 0.8 * error(guess, four)
    assert same(load_initial(tmp_path / "initial")[0], network)
    # The denoiser learns behind the same guess that samples are drawn behind.
    model = train_ldm(eight, vqgan, REFINED, tmp_path / "ldm", network=tmp_path / "initial")
    known = guessed(eight, vqgan, model, tmp_path / "latents", "cpu")
    torch.testing.assert_close(known, initial_latent(model, vqgan, eight.xrays, eight.views), atol=0.02, rtol=0.02)
    found = first_guess(model, vqgan, eight.xrays, eight.views)
    volume = network(eight.xrays, eight.views).detach()
    torch.testing.assert_close(found.lost, volume - vqgan.decode(found.latent), atol=1e-5, rtol=1e-5)
    half = unrefined(eight, vqgan, network, tmp_path / "latents", "cpu")
    assert half.dtype == torch.float16


def test_the_farther_a_volume_misses_its_xrays_the_less_it_is_believed():
    weights, pulls = trust(torch.tensor([0.0, USUAL, 2 * USUAL]))
    torch.testing.assert_close(weights, TV_WEIGHT_MM * torch.tensor([1.0, 1.0, 8.0]))
    torch.testing.assert_close(pulls, PRIOR_WEIGHT_MM / torch.tensor([1.0, 1.0, 8.0]))
    # Two volumes that are far off end up nearly alike: the x-rays and the total variation decide.
    some = patients(2).with_views("8view")
    network, truth = InitialVolume(REFINED), some.unit()
    air, half = -torch.ones_like(truth), truth - 0.5 * (truth + 1)
    from_air, from_half, from_truth = (network.moved(v, some.xrays, some.views) for v in (air, half, truth))
    spread = float((from_air - from_half).square().mean()) / float((air - half).square().mean())
    assert spread < 0.05
    assert float((from_truth - truth).square().mean()) < 0.2 * float((from_half - truth).square().mean())


def test_a_refinement_also_sees_guesses_that_are_wrong(tmp_path, vqgan, monkeypatch):
    some = patients(6).with_views("4view")
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    never = train_initial(some, vqgan, REFINED, tmp_path / "never" / "initial", start=guess)
    wrong, right = doubted(some, vqgan, never, tmp_path / "latents", 3, "cpu").float().split(1, dim=1)
    torch.testing.assert_close(right, never.moved(wrong, some.xrays, some.views), atol=0.02, rtol=0.02)
    # A perfect guess, so spoilt, misses its x-rays as a real chest's does, and the move mends it.
    truth = some.unit()
    with monkeypatch.context() as patch:
        patch.setattr(latents, "unrefined", lambda *_: torch.cat([truth, truth], dim=1))
        wrong, right = doubted(some, vqgan, never, tmp_path / "other", 3, "cpu").float().split(1, dim=1)
    far, near = (residual(v[:, 0], some.xrays, some.views, SMALL) for v in (wrong, right))
    assert far.min() > 0.01 and far.max() < 0.3 and (near < 0.7 * far).all()
    # Wrong in a way of their own: the one that saw such knows what to do, the other does not.
    strange = torch.cat([torch.ones_like(truth), truth + 0.4], dim=1)
    monkeypatch.setattr(stage_initial, "doubted", lambda few, *_: strange[: len(few)])
    preset = REFINED.replace(initial={"doubted": 1.0})
    network = train_initial(some, vqgan, preset, tmp_path / "initial", start=guess)
    found = [net.refinement(strange).detach() for net in (network, never)]
    errors = [float((volumes - truth).square().mean()) for volumes in found]
    assert errors[0] < 0.5 * errors[1]


def test_a_refinement_has_its_say_where_the_guess_misses_the_xrays(monkeypatch):
    some = patients(3).with_views("2view")
    network = InitialVolume(REFINED)
    torch.nn.init.normal_(network.refinement.head[-1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    truth = some.unit()
    found = torch.lerp(truth, -torch.ones_like(truth), torch.tensor([0.01, 0.15, 0.5]).view(3, 1, 1, 1, 1))
    missed, _ = misfit(found[:, 0], some.xrays, some.views, SMALL)
    seen = torch.cat([found, network.moved(found, some.xrays, some.views)], dim=1)
    monkeypatch.setattr(network, "moved", lambda volumes, *_: volumes)  # what comes after
    whole = network.refined(seen, some.xrays, some.views).detach()
    network.preset = REFINED.replace(initial={"refine_from": float(missed[1]) / 1.5})
    partly = network.refined(seen, some.xrays, some.views).detach()
    moved = seen[:, 1:].clamp(-1, 1)
    assert float((whole - moved).abs().amax((1, 2, 3, 4)).min()) > 0.01
    torch.testing.assert_close(partly[0], moved[0])
    torch.testing.assert_close(partly[2], whole[2])
    inside = (whole[1].abs() < 1) & (moved[1].abs() < 1)
    torch.testing.assert_close(partly[1][inside], ((moved[1] + whole[1]) / 2)[inside])


def test_what_is_refined_is_moved_to_the_xrays_again():
    some = patients(4).with_views("4view")
    network, truth = InitialVolume(REFINED), some.unit()
    wrong = (truth + 0.1 * torch.rand(truth.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    seen = torch.cat([-torch.ones_like(wrong), wrong], dim=1)  # of which a new refinement gives back the last
    found = network.refined(seen, some.xrays, some.views).detach()
    before, after = (residual(v[:, 0], some.xrays, some.views, SMALL) for v in (wrong, found))
    assert (after < 0.3 * before).all()
    assert float((found - truth).square().mean()) < 0.5 * float((wrong - truth).square().mean())
    network.preset = REFINED.replace(initial={"move_again": False})
    torch.testing.assert_close(network.refined(seen, some.xrays, some.views).detach(), wrong)


def test_noise_is_not_taken_for_a_patient_that_the_network_does_not_know():
    """A right volume stays where it is, however noisy its x-rays; without telling noise it would be moved to them."""
    some = patients(3).with_views("8view")
    network, truth = InitialVolume(REFINED), some.unit()
    generator = torch.Generator().manual_seed(2)
    size = some.xrays.square().mean((1, 2, 3), keepdim=True).sqrt()
    noisy = some.xrays + 0.15 * size * torch.randn(some.xrays.shape, generator=generator)
    assert float(residual(truth[:, 0], noisy, some.views, SMALL).min()) > 4 * USUAL
    errors = [
        float((network.moved(truth, noisy, some.views, noise) - truth).square().mean())
        for noise in (None, torch.zeros(3))
    ]
    assert errors[0] < 0.1 * errors[1]
    weights, pulls = trust(torch.tensor([0.0, 2 * USUAL]), torch.tensor([2 * QUIET, 2 * QUIET]))
    torch.testing.assert_close(weights, TV_WEIGHT_MM * torch.tensor([8.0, 64.0]))
    torch.testing.assert_close(pulls, PRIOR_WEIGHT_MM * torch.tensor([8.0, 1.0]))


def test_what_cannot_be_refined_is_said(tmp_path, vqgan):
    some = patients(2).with_views("2view")
    with pytest.raises(InputError, match="there is no guess to refine; pass an initial network in voxels, or an INRR3"):
        train_initial(some, vqgan, REFINED, tmp_path / "initial")
    with pytest.raises(InputError, match=r"initial\.solver: found 'tv_body' beside in_voxels, expected 'none'"):
        InitialVolume(REFINED.replace(initial={"solver": "tv_body"}))
    with pytest.raises(InputError, match="xrays: found 2 images, expected 1, one per view"):
        InitialVolume(REFINED)(some.xrays, some.views[:1])


def test_deformed_copies_of_a_scan_join_what_a_refinement_learns_from(tmp_path, vqgan):
    some, scan = patients(6).with_views("4view"), patients(4, seed=3)
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    copies = rendered(scan.hu[:, None].float() + 40, some.views, REFINED)
    both = some.joined(copies)
    torch.testing.assert_close(both.xrays[6:], render_xrays(both.hu[6:].float(), both.views, SMALL.volume, SMALL.xray))
    alone = train_initial(some, vqgan, REFINED, tmp_path / "alone" / "initial", start=guess)
    network = train_initial(some, vqgan, REFINED, tmp_path / "both" / "initial", start=guess, others=copies)
    assert error(network, copies) < 0.95 * error(alone, copies)
    with pytest.raises(InputError, match="patients: found two sets of other views or grids"):
        some.joined(copies.with_views("2view"))
    with pytest.raises(InputError, match="others: found further patients, but what learns from them is an initial"):
        train_initial(some, vqgan, GUESS, tmp_path / "any" / "initial", others=copies, any_view=True)


def test_variations_count_alike_and_join_what_the_guess_itself_learns_from(tmp_path, vqgan):
    some, strange = patients(6).with_views("2view"), patients(4, seed=3)
    others = rendered(strange.hu[:, None].float() + 150, some.views, GUESS)
    start = train_initial(some, vqgan, GUESS, tmp_path / "start" / "initial")
    preset = GUESS.replace(initial={"varied": 0.5}, train_initial={"steps": 150})
    alone = train_initial(some, vqgan, preset, tmp_path / "alone" / "initial", start=start)
    both = train_initial(some, vqgan, preset, tmp_path / "both" / "initial", start=start, others=others)
    assert error(both, others) < 0.95 * error(alone, others)
    # The loss is the mean logarithm of each patient's: one patient's error times e is one more, over their number.
    network = InitialVolume(preset)
    squares = torch.tensor([0.5, 2.0, 8.0])
    larger = squares * torch.tensor([1.0, 1.0, torch.e])
    assert float(network._over_patients(larger) - network._over_patients(squares)) == pytest.approx(1 / 3, rel=1e-5)


def test_a_second_pass_refines_what_the_first_one_found(tmp_path, vqgan):
    some = patients(6).with_views("2view")
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    network = train_initial(some, vqgan, REFINED, tmp_path / "initial", start=guess)
    seen = network.unrefined(some.xrays, some.views)
    noise = misfit(seen[:, 0], some.xrays, some.views, REFINED)[1]
    once = network.refinement(seen).clamp(-1, 1)
    again = torch.cat([once, network.moved(once, some.xrays, some.views, noise)], dim=1)
    twice = network.moved(network.refinement(again).clamp(-1, 1), some.xrays, some.views, noise)
    network.passes = 2
    torch.testing.assert_close(network.refined(seen, some.xrays, some.views), twice, atol=1e-4, rtol=0)
    assert float((twice - again[:, 1:]).detach().abs().max()) > 0.01


def test_a_patient_whose_guess_misses_its_xrays_is_left_to_the_second_network(tmp_path, vqgan):
    some = patients(6).with_views("2view")
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    second = train_initial(some, vqgan, REFINED, tmp_path / "second" / "initial", seed=5, start=guess)
    train_initial(some, vqgan, REFINED, tmp_path / "initial", start=guess)
    train_ldm(some, vqgan, REFINED, tmp_path / "ldm", network=tmp_path / "initial")
    join_second(tmp_path / "ldm", tmp_path / "second" / "initial", tmp_path / "joined.safetensors", passes=2)
    model, _, preset, metadata = load_ldm(tmp_path / "joined.safetensors")
    both, alone = model.initial_network, load_ldm(tmp_path / "ldm")[0].initial_network
    assert preset.initial.second_from == USUAL and metadata["second"]["history"]
    missed = misfit(both.unrefined(some.xrays, some.views)[:, 0], some.xrays, some.views, preset)[0]
    both.preset = preset.replace(initial={"second_from": float(missed.sort().values[2:4].mean())})
    assert both.second.passes == 2 and second.passes == 1
    second.passes = 2
    strange = missed > both.preset.initial.second_from
    assert strange.sum() == 3
    found = both(some.xrays, some.views).detach()
    for network, rows in ((alone, ~strange), (second, strange)):
        torch.testing.assert_close(found[rows], network(some.xrays[rows], some.views).detach(), atol=1e-5, rtol=0)
    assert float((alone(some.xrays, some.views) - second(some.xrays, some.views)).detach().abs().max()) > 0.01
    with pytest.raises(InputError, match=r"initial.second_from: found 0\.03 in preset 'tiny', expected 0"):
        train_initial(some, vqgan, preset, tmp_path / "again" / "initial", start=guess)
    with pytest.raises(InputError, match="expected a refined initial network in voxels, without a second one"):
        join_second(tmp_path / "joined.safetensors", tmp_path / "second" / "initial", tmp_path / "twice.safetensors")


def test_a_patient_whose_guess_misses_its_xrays_gets_samples_that_spread_farther(tmp_path, vqgan):
    some = patients(8).with_views("2view")
    guess = train_initial(some, vqgan, GUESS, tmp_path / "guess" / "initial")
    preset = REFINED.replace(sampling={"anchor": 1.0})
    train_initial(some, vqgan, preset, tmp_path / "initial", start=guess)
    train_ldm(some, vqgan, preset, tmp_path / "ldm", network=tmp_path / "initial", validation=patients(3, seed=2))
    model, _, preset, _ = load_ldm(tmp_path / "ldm")
    one = patients(1, seed=2).with_views("2view")
    volume = guess(one.xrays, one.views).detach()[0]
    missed = float(misfit(volume, one.xrays, one.views, SMALL)[0])
    found = first_guess(model, vqgan, one.xrays, one.views).misfit
    assert float(found) == pytest.approx(missed, rel=1e-4)
    assert 0.3 * missed < preset.sampling.usual_misfit < 3 * missed
    # Samples in the middle of the window, so that none is clipped however far they spread.
    spreads = []
    for usual in (missed / 1.3, missed / 3.9):
        model.preset = preset.replace(sampling={"usual_misfit": usual})
        spreads.append(posterior_samples(model, vqgan, one.xrays, one.views, 3)[0].std(0))
    inside = (spreads[1] > 0) & (spreads[0] < 0.05)
    assert float(inside.float().mean()) > 0.05
    ratio = (spreads[1][inside] / spreads[0][inside]).median()
    assert float(ratio) == pytest.approx(3, rel=0.05)
