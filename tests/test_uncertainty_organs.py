"""Intervals that are told the organ, where the answer is known: two tissues that look alike, one of them rare."""

from __future__ import annotations

import torch

from difr3ct_core.uncertainty import fit_by_organ, fit_conformal


def world(patients: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Of voxels that look alike (mean 0, spread 20) 3 % are bone, 150 HU above; errors of patients are shared."""
    generator = torch.Generator().manual_seed(seed)
    n = 3000
    labels = (torch.rand(patients, n, generator=generator) < 0.03).to(torch.uint8) + 1
    own = 4 * torch.randn(patients, 1, generator=generator)
    truth = 20 * torch.randn(patients, n, generator=generator) + own + 150 * (labels == 2)
    number = torch.arange(patients)[:, None].expand(patients, n)
    mean, std = torch.zeros_like(truth), torch.full_like(truth, 20.0)
    return tuple(part.flatten() for part in (mean, std, truth, labels, number))


def share(inside: torch.Tensor) -> float:
    return 100 * float(inside.double().mean())


def test_each_organ_is_held_where_it_is_known_and_the_rare_one_lost_where_it_is_not():
    mean, std, truth, labels, number = world(24, 0)
    all_alike = fit_conformal(mean, std, truth, patient=number)
    known = fit_by_organ(mean, std, truth, labels, number)
    assert sorted(known) == [1, 2]
    mean, std, truth, labels, _ = world(24, 1)
    assert 88 < share(all_alike.coverage(mean, std, truth)) < 92
    bone = labels == 2
    assert share(all_alike.coverage(mean[bone], std[bone], truth[bone])) < 20
    for label, fitted in known.items():
        own = labels == label
        assert 87.5 < share(fitted.coverage(mean[own], std[own], truth[own])) < 92.5
    # And it is not bought by width: told the organ, the interval is no wider than the errors of that organ.
    assert known[1].half_width(mean, std).mean() < 1.1 * 1.645 * (20**2 + 4**2) ** 0.5
    low, high = known[2].bounds(mean[bone], std[bone])
    assert low.mean() > 90 and high.mean() < 210  # around 150, not around the mean of 0


def test_an_organ_of_one_patient_is_left_out():
    mean, std, truth, labels, number = world(4, 2)
    labels = torch.where(number == 0, 7, 1).to(torch.uint8)
    assert list(fit_by_organ(mean, std, truth, labels, number)) == [1]
