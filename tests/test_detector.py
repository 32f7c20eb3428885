"""The detector model: Poisson statistics, closed forms of blur and scatter, limits, seeds; and jittered views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from difr3ct_core.detector import Detector, count_photons, detect, draw_pose, expected_transmission, jitter_views
from difr3ct_core.drr import project, project_rays
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View

VIEWS = (View(0.0, (40, 60), (2.0, 3.0)), View(90.0, (40, 60), (2.0, 3.0)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(value: float, batch: int = 1) -> torch.Tensor:
    return torch.full((batch, 1, 2, 40, 60), value)


def picture() -> torch.Tensor:
    return 3 * torch.rand(2, 1, 2, 40, 60, generator=seeded(5))


def test_ideal_detector_returns_the_very_same_line_integrals():
    p = picture()
    assert detect(p, VIEWS, Detector()) is p
    assert detect(p, VIEWS, Detector(gain=7.0, scatter_mm=30.0)) is p


@pytest.mark.parametrize("thickness", [0.0, 1.0, 4.0])
def test_noise_of_line_integrals_has_the_variance_of_poisson_counts(thickness: float):
    """Var[-log N/I0] = exp(p)/I0 (delta method), and the mean is biased by exp(p)/(2 I0)."""
    i0 = 1e4
    noisy = detect(flat(thickness, batch=20), VIEWS, Detector(i0=i0), seeded()).double()
    n, expected = noisy.numel(), math.exp(thickness) / i0
    # The relative standard error of a variance is sqrt(2/n), and the next order of the delta method is 1.5/N.
    assert float(noisy.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n) + 3 * expected)
    standard_error = math.sqrt(expected / n)
    assert float(noisy.mean()) == pytest.approx(thickness + expected / 2, abs=5 * standard_error + expected**2)


def test_raw_counts_are_poisson_times_gain():
    counts = count_photons(expected_transmission(flat(1.0, 20), VIEWS, Detector()), Detector(i0=50, gain=4), seeded())
    mean = 50 * math.exp(-1)
    assert torch.equal(counts / 4, (counts / 4).round())
    assert float((counts / 4).mean()) == pytest.approx(mean, rel=0.01)
    assert float((counts / 4).var()) == pytest.approx(mean, rel=0.02)


def test_read_out_noise_adds_its_variance():
    detector = Detector(i0=1e4, electronic_noise=80.0)
    counts = count_photons(expected_transmission(flat(1.0, 20), VIEWS, detector), detector, seeded())
    assert float(counts.var()) == pytest.approx(1e4 * math.exp(-1) + 80.0**2, rel=0.02)


def test_noise_vanishes_with_dose_as_its_square_root():
    p = picture()
    error = [float((detect(p, VIEWS, Detector(i0=i0), seeded()) - p).square().mean().sqrt()) for i0 in (1e4, 1e6, 1e8)]
    assert error[0] / error[1] == pytest.approx(10, rel=0.05)
    assert error[1] / error[2] == pytest.approx(10, rel=0.05)
    torch.testing.assert_close(detect(p, VIEWS, Detector(i0=1e12), seeded()), p, atol=1e-4, rtol=0)


def test_gain_cancels_unless_it_is_misjudged():
    p = picture()
    plain = detect(p, VIEWS, Detector(i0=1e4), seeded())
    torch.testing.assert_close(detect(p, VIEWS, Detector(i0=1e4, gain=3.7), seeded()), plain)
    off = detect(p, VIEWS, Detector(gain_error=0.02))
    torch.testing.assert_close(off, p - math.log(1.02))


def test_starved_pixels_stay_finite_and_read_half_a_photon():
    noisy = detect(flat(30.0), VIEWS, Detector(i0=100.0), seeded())
    torch.testing.assert_close(noisy, torch.full_like(noisy, math.log(200.0)))
    both = detect(flat(6.0), VIEWS, Detector(i0=100.0, electronic_noise=5.0), seeded())
    assert torch.isfinite(both).all() and float(both.max()) <= math.log(200.0) + 1e-6
    # Without noise there is no floor, but a line integral beyond the range of numbers must not become infinite.
    assert torch.isfinite(detect(flat(800.0), VIEWS, Detector(blur_mm=2.0))).all()


def test_blur_keeps_the_sum_and_is_a_gaussian_in_mm():
    view_pair = VIEWS
    p = torch.zeros(1, 1, 2, 40, 60)
    p[0, 0, 0, 20, 30], p[0, 0, 1, 2, 58] = 8.0, 8.0  # dark points: inside, and near a corner
    plain = expected_transmission(p, view_pair, Detector())
    blurred = expected_transmission(p, view_pair, Detector(blur_mm=6.0))
    torch.testing.assert_close(blurred.sum((-2, -1)), plain.sum((-2, -1)))
    spread = (1 - blurred)[0, 0, 0]
    v, u = torch.meshgrid(2.0 * (torch.arange(40.0) - 20), 3.0 * (torch.arange(60.0) - 30), indexing="ij")
    # Pixels integrate the Gaussian, which widens its variance by pixel²/12.
    for axis, pixel in ((v, 2.0), (u, 3.0)):
        variance = float((spread * axis.double().square()).sum() / spread.sum())
        assert variance == pytest.approx(6.0**2 + pixel**2 / 12, rel=0.01)


def test_blur_equals_scipy():
    p = picture()
    ours = expected_transmission(p, VIEWS, Detector(blur_mm=12.0))[0, 0, 0].numpy()
    sigma = (12.0 / 2.0, 12.0 / 3.0)
    theirs = ndimage.gaussian_filter(np.exp(-p[0, 0, 0].double().numpy()), sigma, mode="reflect", truncate=5.0)
    # scipy samples the Gaussian at pixel centres, we integrate it: the difference is a widening of 1/12 pixel².
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_scatter_adds_its_share_of_the_primary_and_lowers_contrast():
    p = picture()
    primary = torch.exp(-p.double())
    for detector in (Detector(scatter_to_primary=0.6), Detector(scatter_to_primary=0.6, scatter_mm=15.0)):
        with_haze = expected_transmission(p, VIEWS, detector)
        torch.testing.assert_close(with_haze.sum((-2, -1)), 1.6 * primary.sum((-2, -1)))
        read = detect(p, VIEWS, detector)
        assert (read < p).all()
    offset = expected_transmission(p, VIEWS, Detector(scatter_to_primary=0.6)) - primary
    assert float(offset.flatten(-2).std(dim=-1).max()) < 1e-12


def test_the_same_seed_gives_the_same_image_and_another_another():
    p, detector = picture(), Detector(i0=1e3, electronic_noise=3.0)
    first, second = (detect(p, VIEWS, detector, seeded(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, detect(p, VIEWS, detector, seeded(2)))
    # Both views draw their own noise.
    same = detect(flat(1.0), VIEWS, detector, seeded(1))
    assert not torch.equal(same[0, 0, 0], same[0, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"i0": -1.0}, r"detector.i0: found -1"),
        ({"i0": float("nan")}, r"detector.i0"),
        ({"i0": 1e15}, "at most 1e12"),
        ({"blur_mm": -0.1}, r"detector.blur_mm: found -0.1"),
        ({"scatter_to_primary": "much"}, r"detector.scatter_to_primary: found 'much'"),
        ({"gain": 0.0}, r"detector.gain"),
        ({"gain_error": -1.0}, r"detector.gain_error"),
        ({"electronic_noise": 3.0}, "needs i0"),
    ],
)
def test_impossible_detectors_are_named(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        Detector(**arguments)


def test_bad_images_are_named():
    noisy = Detector(i0=100.0)
    with pytest.raises(InputError, match="generator: found None"):
        detect(picture(), VIEWS, noisy)
    with pytest.raises(InputError, match="one image per view"):
        detect(picture()[..., :1, :, :], VIEWS, noisy, seeded())
    with pytest.raises(InputError, match=r"images of \(60, 40\) pixels"):
        detect(picture().transpose(-1, -2), VIEWS, noisy, seeded())
    with pytest.raises(InputError, match="NaN or infinity"):
        detect(flat(float("nan")), VIEWS, noisy, seeded())


def test_jittered_views_stay_within_their_limits_and_differ():
    jittered = jitter_views(VIEWS * 200, 2.0, 5.0, seeded())
    turns = torch.tensor([j.angle_deg - v.angle_deg for j, v in zip(jittered, VIEWS * 200, strict=True)])
    shifts = torch.tensor([j.offset_mm for j in jittered])
    assert float(turns.abs().max()) <= 2 and float(shifts.abs().max()) <= 5
    # Uniform on ±a has the standard deviation a/√3.
    assert float(turns.std()) == pytest.approx(2 / math.sqrt(3), rel=0.1)
    assert float(shifts.std()) == pytest.approx(5 / math.sqrt(3), rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([turns, shifts[:, 0]]))[0, 1])) < 0.15
    assert jitter_views(VIEWS, 2.0, 5.0, seeded(3)) == jitter_views(VIEWS, 2.0, 5.0, seeded(3))
    assert jitter_views(VIEWS, 0.0, 0.0, seeded()) == VIEWS
    with pytest.raises(InputError, match="shift_mm: found -1"):
        jitter_views(VIEWS, 1.0, -1.0, seeded())


def test_a_jittered_detector_moves_the_image_the_other_way():
    """A detector shifted by two pixels towards +u sees everything two pixels nearer to u = 0."""
    mu = torch.zeros(1, 1, 6, 30, 30)
    mu[0, 0, 2, 11, 17] = 0.02
    view = View(0.0, (6, 30), (10.0, 10.0))
    shifted = View(0.0, (6, 30), (10.0, 10.0), offset_mm=(0.0, 20.0))
    image, moved = (project(mu, (v,), 10.0)[0, 0, 0] for v in (view, shifted))
    torch.testing.assert_close(moved[:, :-2], image[:, 2:])


def test_drawn_poses_have_their_spread_and_move_the_image():
    pose = draw_pose(2000, 1.5, 4.0, seeded())
    assert float(pose.angle_deg.std()) == pytest.approx(1.5, rel=0.1)
    assert float(pose.shift_mm.std()) == pytest.approx(4.0, rel=0.05)
    mu = torch.zeros(1, 1, 12, 12, 12)
    mu[0, 0, 3:7, 4:8, 5:10] = 0.02
    views = tuple(View(a, (12, 12), (10.0, 10.0)) for a in (0.0, 90.0))
    still = project_rays(mu, views, 10.0, draw_pose(2, 0.0, 0.0, seeded()))
    torch.testing.assert_close(still, project_rays(mu, views, 10.0), atol=1e-4, rtol=0)
    assert float((project_rays(mu, views, 10.0, draw_pose(2, 3.0, 8.0, seeded())) - still).abs().max()) > 0.1
    with pytest.raises(InputError, match="angle_deg: found -1"):
        draw_pose(2, -1.0, 0.0, seeded())
