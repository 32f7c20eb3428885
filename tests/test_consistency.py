"""Measurement consistency against linear algebra: what may change, by how little, and towards what."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import SMALL, patients, trained

from difr3ct_core import consistency, ct, reconstruct
from difr3ct_core.baselines.classical import tv, tv_objective
from difr3ct_core.consistency import (
    QUIET,
    correct,
    graininess,
    misfit,
    most_variation,
    noise_deviation,
    overconfidence,
    proximal_model,
    residual,
    smallest_change,
    to_mu,
    to_unit,
    unexplained_noise,
)
from difr3ct_core.datasets import preset_views
from difr3ct_core.detector import Detector, detect
from difr3ct_core.drr import backproject, project
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views

VIEWS = preset_views(SMALL, "2view")
SPACING = SMALL.volume.spacing_mm


def case(seed: int = 0, views=VIEWS):
    """A patient's x-rays, and three wrong volumes near it."""
    truth = patients(1, seed).unit()[0]
    generator = torch.Generator().manual_seed(seed)
    samples = (truth + 0.2 * torch.randn(3, 16, 16, 16, generator=generator)).clamp(-0.99, 0.99)
    xrays = project(to_mu(truth, SMALL)[:, None], views, SPACING)[0, 0]
    return truth, samples, xrays


def forward(mu, views=VIEWS):
    return project(mu[:, None], views, SPACING)[:, 0]


def test_units_go_both_ways():
    unit = torch.linspace(-1, 1, 101)
    torch.testing.assert_close(to_unit(to_mu(unit, SMALL), SMALL), unit, atol=1e-5, rtol=0)


def test_residual_is_the_relative_misfit():
    truth, samples, xrays = case()
    assert float(residual(truth, xrays, VIEWS, SMALL)) < 1e-5
    found = residual(samples, xrays, VIEWS, SMALL)
    by_hand = [(forward(to_mu(s[None], SMALL)) - xrays).norm() / xrays.norm() for s in samples]
    torch.testing.assert_close(found, torch.stack(by_hand))


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_the_smallest_change_explains_the_x_rays_and_leaves_alone_what_they_do_not_see(mode):
    views = standard_views((0.0, 60.0, 90.0), 16, 320.0, mode=mode)
    _, samples, xrays = case(1, views)
    mu = to_mu(samples, SMALL).double()
    images = xrays.double().expand(3, -1, -1, -1)
    change = smallest_change(mu, images, views, SMALL, 400)
    assert float((forward(mu + change, views) - images).norm() / (forward(mu, views) - images).norm()) < 1e-3
    # A change of least norm has no part that the x-rays do not see: it is orthogonal to every such volume.
    unseen = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    unseen = unseen + smallest_change(unseen, torch.zeros_like(images), views, SMALL, 400)
    assert float(forward(unseen, views).norm() / forward(torch.ones_like(unseen), views).norm()) < 1e-3
    cosine = (change * unseen).sum() / change.norm() / unseen.norm()
    assert abs(float(cosine)) < 1e-2
    # Any other solution is further away.
    assert float((change + 0.1 * unseen).norm()) > float(change.norm())


def test_where_nothing_may_change_nothing_does():
    _, samples, xrays = case(3)
    mu = to_mu(samples, SMALL)
    scale = torch.zeros(16, 16, 16)
    scale[:, :, :8] = torch.rand(16, 16, 8, generator=torch.Generator().manual_seed(4)) + 0.5
    images = xrays.expand(3, -1, -1, -1)
    change = smallest_change(mu, images, VIEWS, SMALL, 20, scale)
    assert float(change[..., 8:].abs().max()) == 0 and float(change[..., :8].abs().max()) > 0
    # δ = D² Aᵀ y for some y: divided by D² it is a back-projection, hence constant along the rays of a lone view.
    lone = standard_views((0.0,), 16, 320.0)
    flat = forward(mu, lone) * 0.9
    again = torch.rand(16, 16, 16, generator=torch.Generator().manual_seed(5)) + 0.5
    along_x = smallest_change(mu, flat, lone, SMALL, 30, again) / again.square()
    torch.testing.assert_close(along_x, along_x.mean(-1, keepdim=True).expand_as(along_x), rtol=2e-3, atol=1e-6)


def test_samples_that_explain_their_x_rays_stay():
    truth, _, xrays = case(6)
    for method in ("lsq", "tv"):
        kept = correct(truth, xrays, VIEWS, SMALL, method, tv_weight_mm=0.0)
        torch.testing.assert_close(kept, truth, atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", ["lsq", "spread", "tv"])
def test_corrected_samples_are_nearer_to_their_x_rays_and_to_the_truth(method):
    truth, samples, xrays = case(7)
    found = correct(samples, xrays, VIEWS, SMALL, method, batch=2)
    assert found.shape == samples.shape and float(found.abs().max()) <= 1
    before, after = (residual(v, xrays, VIEWS, SMALL).mean() for v in (samples, found))
    assert float(after) < 0.2 * float(before)
    assert float((found - truth).norm()) < float((samples - truth).norm())
    torch.testing.assert_close(correct(samples, xrays, VIEWS, SMALL, method, batch=3), found, atol=2e-4, rtol=1e-3)


def test_overconfidence_is_one_for_draws_of_one_posterior_and_grows_with_what_none_of_them_has():
    """Samples and truth from N(m, s²) in each voxel: E‖A(µ_s - µ)‖² = 2 tr(A S Aᵀ); a shift by δ adds ‖Aδ‖²."""
    generator = torch.Generator().manual_seed(3)
    shape = SMALL.volume.shape
    draws = 0.1 * torch.randn(33, *shape, generator=generator)
    xrays = forward(to_mu(draws[:1], SMALL))[0]
    samples = draws[1:]
    assert overconfidence(samples, xrays, VIEWS, SMALL) == pytest.approx(1, abs=0.15)
    shift = torch.full((1, *shape), 0.05)
    shifted = forward(to_mu(draws[:1] + shift, SMALL))[0]
    variance = forward(to_mu(draws, SMALL)).var(0).mean()
    expected = 1 + float((shifted - xrays).square().mean() / (2 * variance))
    assert expected > 2
    assert overconfidence(samples, shifted, VIEWS, SMALL) == pytest.approx(expected, rel=0.2)
    with pytest.raises(InputError, match="found 1 sample, expected at least 2"):
        overconfidence(samples[:1], xrays, VIEWS, SMALL)


def test_samples_of_another_patient_are_trusted_less(monkeypatch):
    """Samples that agree with each other and not with the x-rays: the correction goes nearer to the x-rays."""
    truth, samples, xrays = case()
    coarse = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    wrong = truth + 0.2 * torch.nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear")[0]
    sure = wrong + 0.02 * (samples - samples.mean(0))
    assert overconfidence(sure, xrays, VIEWS, SMALL) > 10
    less = correct(sure, xrays, VIEWS, SMALL, prior_weight_mm=500.0)
    monkeypatch.setattr(consistency, "USUAL_OVERCONFIDENCE", float("inf"))
    more = correct(sure, xrays, VIEWS, SMALL, prior_weight_mm=500.0)
    residuals = [float(residual(found, xrays, VIEWS, SMALL).mean()) for found in (less, more)]
    assert residuals[0] < 0.1 * residuals[1]


def test_total_variation_grows_with_the_spread_of_the_samples(monkeypatch):
    """In a sum of squares and of absolute differences the weight of the latter scales as the errors do."""
    _, samples, xrays = case()
    seen = []
    monkeypatch.setattr(consistency, "tv", lambda *a, **k: seen.append(k) or k["prior"])
    monkeypatch.setattr(consistency, "USUAL_OVERCONFIDENCE", float("inf"))
    monkeypatch.setattr(consistency, "QUIET", float("inf"))  # what the samples share here is white, like noise
    monkeypatch.setattr(consistency, "TV_WEIGHT_MM", 1.0)
    monkeypatch.setattr(consistency, "most_variation", lambda noise: torch.tensor(math.inf))
    centre = samples.mean(0)
    for width in (0.1, 0.2):
        correct(centre + width * (samples - centre), xrays, VIEWS, SMALL)
    assert seen[1]["weight_mm"] == pytest.approx(2 * seen[0]["weight_mm"], rel=1e-3)
    hu = 1250 * 0.1 * float((samples - centre).square().mean(0).sqrt().mean())  # half of the window is 1250 HU
    assert seen[0]["weight_mm"] == pytest.approx(consistency.TV_PER_HU * hu, rel=1e-3)
    correct(samples[:1], xrays, VIEWS, SMALL)  # a single sample has no spread
    assert seen[2]["weight_mm"] == 0.5


def test_noise_is_told_from_what_is_smooth_and_agrees_with_wavelets():
    """White noise comes out with its own deviation; what is linear in one of the two directions does not come out."""
    generator = torch.Generator().manual_seed(2)
    v, u = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(0, 3, 64), indexing="ij")
    smooth = (2 + v.square() - u.sin() + v * u.cos())[None, None]
    noise = 0.05 * torch.randn(2, 3, 64, 64, generator=generator)
    assert float(noise_deviation(smooth)) < 1e-4
    torch.testing.assert_close(noise_deviation(smooth + noise), torch.full((2,), 0.05), rtol=0.05, atol=0)
    # Few sharp edges are no noise, and where there are few photons there is more of it.
    edges = smooth + (u > v.square()).float() + noise
    torch.testing.assert_close(noise_deviation(edges), torch.full((2,), 0.05), rtol=0.2, atol=0)
    exact = torch.where(u > 1.5, 5.0, 0.5)[None].repeat(2, 1, 1)
    few = detect(exact, standard_views((0.0, 90.0), 64, 320.0), Detector(i0=2e3), generator)
    assert float(noise_deviation(few)) == pytest.approx(float((few - exact).square().mean().sqrt()), rel=0.1)
    images = (smooth + noise)[0]  # against the median of the finest Haar coefficients (Donoho & Johnstone 1994)
    haar = (images[:, ::2, ::2] - images[:, 1::2, ::2] - images[:, ::2, 1::2] + images[:, 1::2, 1::2]) / 2
    oracle = float(haar.abs().median()) / 0.6745
    assert float(noise_deviation(images[None])) == pytest.approx(oracle, rel=0.1)
    assert torch.equal(noise_deviation(noise[..., :2, :]), torch.zeros(2))  # nothing to tell it by


def test_a_misfit_is_parted_into_noise_and_the_rest():
    """The rest of a wrong volume is that from exact x-rays, however noisy they are; that of a right one is little."""
    views = standard_views((0.0, 22.5, 45.0, 67.5, 90.0), 16, 320.0)
    truth, _, xrays = case(3, views)
    wrong, generator = truth - 0.1 * (truth + 1), torch.Generator().manual_seed(4)
    expected = float(residual(wrong, xrays, views, SMALL))
    for i0 in (math.inf, 2e4, 2e3):
        noisy = detect(xrays, views, Detector(i0=i0), generator)
        share = float((noisy - xrays).norm() / noisy.norm())
        rest, noise = misfit(truth, noisy[None], views, SMALL)
        assert float(rest) <= 0.6 * share + 1e-5 and float(noise) == pytest.approx(share, rel=0.25, abs=1e-5)
        rest, noise = misfit(wrong, noisy[None], views, SMALL)
        assert float(rest) == pytest.approx(expected, rel=0.2)


def test_noise_is_what_the_spread_of_the_samples_does_not_explain():
    """Draws of one posterior miss quiet x-rays by their own spread, which is no noise; noise adds to it by squares."""
    generator = torch.Generator().manual_seed(5)
    again = 0.05 * torch.randn(9, 8, 64, 64, generator=generator)
    samples, xrays = again[1:], again[0]
    assert float(unexplained_noise(samples, xrays)) < 0.015
    noisy = xrays + 0.1 * torch.randn(xrays.shape, generator=generator)
    assert float(unexplained_noise(samples, noisy)) == pytest.approx(0.1, rel=0.05)
    assert float(unexplained_noise(samples[:1], noisy)) == 0  # a single sample tells nothing


def test_noisy_x_rays_count_for_less_and_quiet_ones_do_not(monkeypatch):
    """A correction that knows no noise follows it; where there is none it is as strong as ever."""
    torch.testing.assert_close(graininess(QUIET * torch.tensor([0.5, 1.0, 2.0])), torch.tensor([1.0, 1.0, 8.0]))
    assert float(graininess(torch.tensor(1e9))) == 1e6  # finite, whatever the x-rays are
    torch.testing.assert_close(most_variation(QUIET * torch.tensor([0.5, 3.0])), torch.tensor([0.004, 0.012]))
    views = preset_views(SMALL, "8view")
    truth, samples, xrays = case(6, views)
    coarse = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    wrong = 0.2 * torch.nn.functional.interpolate(coarse, scale_factor=4, mode="trilinear")[0]
    near, far = truth + 0.1 * (samples - truth), truth + wrong + 0.1 * (samples - truth)
    noisy = detect(xrays, views, Detector(i0=1e3), torch.Generator().manual_seed(7))
    errors = {}
    for quiet in (QUIET, math.inf):
        monkeypatch.setattr(consistency, "QUIET", quiet)
        for name, some, images in (("noisy", near, noisy), ("quiet", far, xrays)):
            found = correct(some, images, views, SMALL).mean(0)
            errors[name, quiet] = float((found - truth).square().mean())
    assert errors["noisy", QUIET] < 0.2 * errors["noisy", math.inf]
    assert errors["quiet", QUIET] == errors["quiet", math.inf]
    assert errors["quiet", QUIET] < 0.05 * float((far.mean(0) - truth).square().mean())


def test_blank_x_rays_are_corrected_for_without_a_word_of_nan():
    _, samples, _ = case()
    assert torch.isfinite(correct(samples, torch.zeros(2, 16, 16), VIEWS, SMALL)).all()


def test_a_shifted_volume_is_no_noise():
    """What it misses its quiet x-rays by makes it less believed, not more."""
    truth = patients(1, 3).unit()[0]
    views = preset_views(SMALL, "8view")
    xrays = project(to_mu(truth, SMALL)[:, None], views, SPACING)[0]
    rest, noise = misfit(truth.roll((1, 1), (2, 3)), xrays, views, SMALL)
    assert float(noise) < 0.25 * float(rest)


def test_doubt_moves_weight_from_the_prior_to_the_total_variation(monkeypatch):
    """A prior of d times the variance holds 1/d as much, and errors of √d times the deviation want √d times the TV."""
    _, samples, xrays = case()
    sure = samples[:1] + 0.02 * (samples - samples.mean(0))
    doubt = overconfidence(sure, xrays, VIEWS, SMALL) / consistency.USUAL_OVERCONFIDENCE
    monkeypatch.setattr(consistency, "most_variation", lambda noise: torch.tensor(math.inf))
    seen = []
    monkeypatch.setattr(consistency, "tv", lambda *a, **k: seen.append(k) or k["prior"])
    correct(sure, xrays, VIEWS, SMALL)
    monkeypatch.setattr(consistency, "USUAL_OVERCONFIDENCE", float("inf"))
    correct(sure, xrays, VIEWS, SMALL)
    doubted, trusted = seen
    torch.testing.assert_close(doubted["prior_weight_mm"] * doubt, trusted["prior_weight_mm"])
    assert doubted["weight_mm"] == pytest.approx(trusted["weight_mm"] * math.sqrt(doubt))


def test_no_correction_is_no_change():
    _, samples, xrays = case()
    assert correct(samples, xrays, VIEWS, SMALL, "none") is samples


def test_bad_input():
    _, samples, xrays = case()
    with pytest.raises(InputError, match=r"consistency: found 'magic', expected one of none, lsq, spread, tv"):
        correct(samples, xrays, VIEWS, SMALL, "magic")
    with pytest.raises(InputError, match=r"consistency: 'spread' needs at least 2 samples, found 1; draw more"):
        correct(samples[:1], xrays, VIEWS, SMALL, "spread")


# --- total variation that is held near a prior -------------------------------------------------------------------


def matrix(views, shape) -> torch.Tensor:
    """The projector as a dense matrix."""
    n = math.prod(shape)
    columns = project(torch.eye(n, dtype=torch.float64).view(n, 1, *shape), views, 40.0)
    return columns.flatten(1).t()


def test_without_variation_it_is_tikhonov_in_closed_form():
    shape, views = (4, 5, 6), standard_views((0.0, 50.0, 90.0), 8, 320.0)
    generator = torch.Generator().manual_seed(8)
    prior = 0.02 * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
    xrays = project(0.02 * torch.rand(2, 1, *shape, generator=generator, dtype=torch.float64), views, 40.0)[:, 0]
    weight = 5 + 20 * torch.rand(shape, generator=generator, dtype=torch.float64)
    found = tv(xrays, views, shape, 40.0, None, 0.0, 4000, prior=prior, prior_weight_mm=weight)
    a = matrix(views, shape)
    # views · voxel volume / pixel area turns the integral of the prior term into the sum of the others.
    w = torch.diag(weight.flatten()) * len(views) * 40.0**3 / math.prod(views[0].pixel_mm)
    for i in range(2):
        right = a.t() @ xrays[i].flatten() + w @ prior[i].flatten()
        exact = torch.linalg.solve(a.t() @ a + w, right).view(shape)
        torch.testing.assert_close(found[i], exact, rtol=1e-4, atol=1e-7)


def test_between_the_prior_and_plain_total_variation():
    _, samples, xrays = case(9)
    mu, images = to_mu(samples[:1], SMALL), xrays[None]
    kept = tv(images, VIEWS, (16, 16, 16), SPACING, prior=mu, prior_weight_mm=1e6, iterations=30)
    torch.testing.assert_close(kept, mu, atol=1e-6, rtol=1e-3)
    free = tv(images, VIEWS, (16, 16, 16), SPACING, prior=mu, prior_weight_mm=0.0, iterations=800)
    plain = tv(images, VIEWS, (16, 16, 16), SPACING, iterations=800)
    lowest, reached = (float(tv_objective(v, images, VIEWS, SPACING, 0.004)) for v in (plain, free))
    assert reached == pytest.approx(lowest, rel=0.02)  # it starts elsewhere and ends at the same minimum


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": torch.zeros(2, 16, 16, 16)}, r"prior: found shape \(2, 16, 16, 16\), expected finite µ of \(1, 16"),
        ({"prior": torch.full((1, 16, 16, 16), math.nan)}, "prior: found shape"),
        ({"prior": torch.zeros(1, 16, 16, 16), "prior_weight_mm": -1.0}, "prior_weight_mm: found negative, infinite"),
    ],
)
def test_bad_priors(arguments, message):
    _, _, xrays = case()
    with pytest.raises(InputError, match=message):
        tv(xrays[None], VIEWS, (16, 16, 16), SPACING, **arguments)


# --- inside the sampling, and from the entry point ------------------------------------------------------------------


def test_a_proximal_model_corrects_late_steps_only():
    calls = []

    def model(z, t):
        return z + 1

    def move(volume):
        calls.append(volume)
        return volume * 3

    moved = proximal_model(model, move, decode=lambda z: z * 2, encode=lambda v: v / 2, below=500)
    z = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(moved(z, 500), z + 1) and not calls
    torch.testing.assert_close(moved(z, 499), (z + 1) * 3)
    torch.testing.assert_close(calls[0], (z + 1) * 2)


def test_reconstruct_with_consistency(tmp_path):
    weights = trained(tmp_path)
    xrays = patients(1, 11).with_views("2view").xrays[0]
    plain = reconstruct(xrays, VIEWS, weights, n_samples=2)
    moved = reconstruct(xrays, VIEWS, weights, n_samples=2, consistency="lsq")
    errors = [r.provenance["reprojection_error"] for r in (plain, moved)]
    assert errors[1] < 0.2 * errors[0] and moved.provenance["consistency"] == "lsq"
    unit = ct.hu_to_unit(moved.samples, SMALL.volume)
    assert errors[1] == pytest.approx(float(residual(unit, xrays, VIEWS, SMALL).mean()), rel=1e-2)
    with pytest.raises(InputError, match="consistency: found 'much', expected one of none"):
        reconstruct(xrays, VIEWS, weights, consistency="much")


def test_the_correction_is_a_back_projection():
    """The gradient that the solver follows is Aᵀ of the misfit (an independent check of signs and units)."""
    _, samples, xrays = case(12)
    mu = to_mu(samples[:1], SMALL)
    first = smallest_change(mu, xrays[None], VIEWS, SMALL, 1)
    expected = backproject((xrays[None] - forward(mu))[:, None], VIEWS, (16, 16, 16), SPACING)[:, 0]
    ratio = first / expected
    inside = expected.abs() > 1e-3 * expected.abs().max()
    torch.testing.assert_close(ratio[inside], ratio[inside].mean().expand_as(ratio[inside]), rtol=1e-3, atol=0)
