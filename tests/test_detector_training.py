"""X-rays of many detectors for a training: within their limits, each patient's own, never mixed up with exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import SMALL, patients

from difr3ct_core import chapters
from difr3ct_core.chapters import Chapter
from difr3ct_core.datasets import through_detectors
from difr3ct_core.detector import DetectorRange, draw_detector
from difr3ct_core.files import InputError
from difr3ct_core.latents import data_digest


def test_detectors_are_drawn_evenly_within_their_limits():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_detector(generator) for _ in range(400)]
    limits = DetectorRange()
    for name in ("i0", "blur_mm", "scatter_to_primary", "gain_error"):
        values = torch.tensor([getattr(d, name) for d in drawn], dtype=torch.float64)
        low, high = getattr(limits, name)
        if name == "i0":
            values, low, high = values.log(), math.log(low), math.log(high)
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.05 and 0.95 < share.max() <= 1
        assert abs(float(share.mean()) - 0.5) < 3 * 12**-0.5 / 20  # three deviations of the mean of 400


def test_noise_is_what_the_dose_says_and_a_gain_error_a_shift():
    some = patients(6).with_views("2view")
    noisy = through_detectors(some, 3, DetectorRange((1e4, 1e4), (0, 0), (0, 0), (0, 0)))
    error = (noisy.xrays - some.xrays).double()
    # To first order the variance is exp(p) / I0 (docstring of detect).
    assert float((error.square() / (some.xrays.double().exp() / 1e4)).mean()) == pytest.approx(1, abs=0.1)
    shifted = through_detectors(some, 3, DetectorRange((1e12, 1e12), (0, 0), (0, 0), (0.05, 0.05)))
    torch.testing.assert_close(shifted.xrays, some.xrays - math.log(1.05), atol=2e-4, rtol=0)


def test_every_patient_has_its_own_detector_and_another_name():
    some = patients(3).with_views("2view")
    once, again, other = (through_detectors(some, seed) for seed in (1, 1, 2))
    assert torch.equal(once.xrays, again.xrays) and not torch.equal(once.xrays, other.xrays)
    assert torch.equal(once.hu, some.hu)
    # What is cached for the exact x-rays is found by names and volumes.
    dimmer = through_detectors(some, 1, DetectorRange(i0=(1e3, 1e4)))
    assert len({data_digest(p) for p in (some, once, other, dimmer)}) == 4
    # A patient's x-rays do not depend on who else is there but on its place.
    assert torch.equal(through_detectors(some.take([0, 1]), 1).xrays, once.xrays[:2])


def test_any_view_training_says_that_it_cannot(tmp_path, monkeypatch):
    chapter = Chapter("x", SMALL, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    monkeypatch.setattr(chapter, "patients", lambda split, views=None: patients())
    chapter.detectors = True
    with pytest.raises(InputError, match="detectors: found views 'any', expected one set of views"):
        chapter._training(None)
    seen = chapter._training("2view")
    assert seen.ids[0].startswith("blob-0-0@") and seen.detectors["seed"] == 0


def test_copies_of_a_scan_go_through_detectors_too(tmp_path, monkeypatch):
    """What a refinement learns from has no exact x-rays among imperfect ones."""
    chapter = Chapter("x", SMALL, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    monkeypatch.setattr(chapter, "patients", lambda split, views=None: patients(4).with_views(views or "2view"))
    monkeypatch.setattr(chapter, "_autoencoder", lambda start: None)
    monkeypatch.setattr(chapter, "copies", lambda scan, count: patients(count, seed=5).hu[:, None].float())
    seen = []
    monkeypatch.setattr(chapters, "train_initial", lambda *given: seen.append(given[-1]))
    for chapter.detectors in (False, True):
        chapter.initial("2view", scan=tmp_path)
    exact, imperfect = seen
    assert exact.detectors is None and imperfect.detectors["seed"] == 1
    assert torch.equal(exact.hu, imperfect.hu)
    assert float((exact.xrays - imperfect.xrays).square().mean()) > 1e-4
