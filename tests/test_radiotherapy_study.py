"""The two protocols, and what a posterior adds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("pyRadPlan", reason="extra rt is not installed")

from radiotherapy_toys import toy_chest

from difr3ct_core.ct_io import CTVolume
from difr3ct_core.files import InputError
from difr3ct_core.phantoms import make_phantom
from difr3ct_core.radiotherapy import Prescription, Structures, contour_ct, resample_ct
from difr3ct_core.radiotherapy import study as rt
from difr3ct_core.radiotherapy.dose import plan_on

START_B = Prescription(40.05, 15)


@pytest.fixture
def contours_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are tested elsewhere: here a CT is contoured as the toy, wherever its body was moved to."""
    ct, exact = toy_chest()
    first = np.flatnonzero(ct.hu.numpy().max((0, 2)) > -500)[0]

    def draw(moved: CTVolume) -> Structures:
        shift = np.flatnonzero(moved.hu.numpy().max((0, 2)) > -500)[0] - first
        masks = {name: np.roll(mask, shift, axis=1) for name, mask in exact.masks.items()}
        return Structures(masks, moved.affine, moved.name)

    monkeypatch.setattr(rt, "contour_ct", draw)


def test_a_shift_is_invisible_to_the_papers_protocol_only(contours_by_hand: None) -> None:
    ct, exact = toy_chest()
    shifted = dataclasses.replace(ct, hu=torch.roll(ct.hu, 1, 1), name="shifted by 8 mm to the back")
    case = rt.study_case("toy", ct, exact, shifted, "left", START_B)
    assert not case.reason
    v90 = case.errors("v90")
    assert abs(v90["own"]) < 0.5 and abs(case.errors("v20_lung")["own"]) < 0.5
    # The fields now reach 8 mm deeper into the lung than anyone planned.
    assert case.errors("v20_lung")["true"] > 1.0
    same = rt.study_case("toy", ct, exact, ct, "left", START_B)
    assert all(abs(same.errors(m)[k]) < 1e-3 for m in ("v90", "v20_lung") for k in ("own", "true"))
    errors = rt.median_errors([case, same], "v20_lung")
    assert errors["true"] == pytest.approx(case.errors("v20_lung")["true"] / 2, abs=1e-3)


def test_what_cannot_be_planned_is_reported_not_planned(
    contours_by_hand: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ct, exact = toy_chest()
    without = Structures({k: v for k, v in exact.masks.items() if k != "heart"}, exact.affine, "toy")
    case = rt.study_case("toy", ct, without, ct, "left", START_B)
    assert case.truth is None and case.reason.startswith("true CT: toy: no contour of heart")
    assert case.errors("v90") is None and rt.median_errors([case], "v90") == {}
    monkeypatch.setattr(rt, "contour_ct", contour_ct)
    air = dataclasses.replace(ct, hu=torch.full_like(ct.hu, -1000.0), name="air")
    case = rt.study_case("toy", ct, exact, air, "left", START_B)
    assert case.truth is not None and case.reconstruction is None and "the CT is air" in case.reason
    with pytest.raises(InputError, match="grid"):
        rt.study_case("toy", ct, exact, CTVolume(ct.hu[1:], ct.affine), "left", START_B)


def test_posterior_gives_bands_and_shares_and_refuses_bad_samples(contours_by_hand: None) -> None:
    ct, exact = toy_chest()
    plan, _ = plan_on(ct, exact, "left", START_B)
    samples = [dataclasses.replace(ct, hu=torch.roll(ct.hu, k, 1)) for k in (-1, 0, 1)]
    scored = rt.score_posterior(plan, samples)
    low, middle, high = scored.band("target")
    assert (low <= middle + 1e-9).all() and (middle <= high + 1e-9).all() and (high - low).max() > 1
    assert low[0] == 100.0 and not scored.skipped
    shares = scored.goals((rt.Goal("v90", ">=", 0.0), rt.Goal("v20_lung", "<=", -1.0)))
    assert list(shares.values()) == [1.0, 0.0]
    # The unmoved sample is the CT that was planned.
    assert scored.metrics[1]["mean_target"] == pytest.approx(40.05, rel=1e-4)
    with pytest.raises(InputError, match="at least 2"):
        rt.score_posterior(plan, samples[:1])
    with pytest.raises(InputError, match="at least 2"):
        rt.score_posterior(plan, [])
    bad = dataclasses.replace(ct, hu=torch.where(ct.hu > -500, torch.nan, ct.hu))
    with pytest.raises(InputError, match=r"\[41\] of 100"):
        rt.score_posterior(plan, [*[ct] * 41, bad, *[ct] * 58])


@pytest.mark.slow
def test_a_phantom_is_planned_from_its_own_contours() -> None:
    drawn = make_phantom(2, 64, "intact")
    ct = resample_ct(CTVolume(drawn.hu, drawn.affine, "intact 2"), 5.0)
    planned = rt.plan_ct(ct, "left", START_B)
    assert planned.metrics["v90"] > 85 and planned.metrics["v20_lung"] < 25 and planned.metrics["mean_heart"] < 8
