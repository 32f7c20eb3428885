"""Findings put into phantoms: where they lie, what they weigh, and that nothing else changes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from difr3ct_core.files import InputError
from difr3ct_core.phantoms import LABELS, Phantom, make_phantom
from difr3ct_core.phantoms.anomalies import ANOMALIES, METAL, mass, metal, missing_lung, pneumothorax

SPACING = 5.0
SEEDS = range(4)
INNER = [LABELS[name] for name in ("lung_vessels", "airways", "nodule")]
LUNGS = ("lung_left", "lung_right")


@cache
def phantom() -> Phantom:
    return make_phantom(3, 64)


def touched_lung(mask: torch.Tensor) -> str:
    """The one lung that the mask lies in; all of it in parenchyma or in what lungs hold."""
    labels = phantom().labels
    counts = {name: int((labels[mask] == LABELS[name]).sum()) for name in LUNGS}
    name = max(counts, key=counts.get)
    other = LUNGS[name == "lung_left"]
    assert counts[name] > 0 and counts[other] == 0
    assert torch.isin(labels[mask], torch.tensor([LABELS[name], *INNER])).all()
    return name


@pytest.mark.parametrize("name", ANOMALIES)
def test_seeded_and_unchanged_outside_the_mask(name):
    p = phantom()
    before = p.hu.clone()
    hu, mask = ANOMALIES[name](p.hu, p.labels, 5, SPACING)
    again, where = ANOMALIES[name](p.hu, p.labels, 5, SPACING)
    assert torch.equal(hu, again) and torch.equal(mask, where)
    assert torch.equal(p.hu, before)  # the argument is not written to
    assert torch.equal(hu[~mask], p.hu[~mask]) and (hu[mask] != p.hu[mask]).all() and mask.any()
    assert hu.dtype == p.hu.dtype and mask.dtype == torch.bool
    assert hu.min() >= -1024 and hu.max() <= max(METAL, float(p.hu.max()))
    others = [ANOMALIES[name](p.hu, p.labels, seed, SPACING)[1] for seed in range(6)]
    assert any(not torch.equal(mask, other) for other in others)
    # Cohorts store whole HU.
    whole, mask16 = ANOMALIES[name](p.hu.round().to(torch.int16), p.labels, 5, SPACING)
    assert whole.dtype == torch.int16 and (whole.float() - hu).abs().max() <= 2
    assert (mask16 & ~mask).sum() < 0.01 * mask.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_pneumothorax_is_air_at_the_wall_and_keeps_the_tissue(seed):
    p = phantom()
    hu, mask = pneumothorax(p.hu, p.labels, seed, SPACING)
    name = touched_lung(mask)
    own = (p.labels == LABELS[name]) & mask
    x = own.nonzero()[:, 2].float()
    air = own & (hu < -980)
    outer = air.nonzero()[:, 2].float().mean() - x.mean()
    assert outer > 0 if name == "lung_left" else outer < 0  # +x is Left; the lung shrinks to the middle
    assert 0.2 < float(air.sum() / own.sum()) < 0.85  # 1 - 0.8³ to 1 - 0.6³, less the rim of partial volume
    left = own & (hu > -900)
    assert hu[left].mean() > p.hu[left].mean() + 100


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lung_that_collapses_loses_air_and_no_tissue(seed):
    """A block of even parenchyma, 16 % tissue: its mass, in voxels of water, is the same in less room."""
    hu, labels = torch.full((40, 40, 40), 40.0), torch.zeros(40, 40, 40, dtype=torch.uint8)
    for name, part in (("lung_right", slice(3, 17)), ("lung_left", slice(23, 37))):
        labels[5:35, 8:32, part] = LABELS[name]
    hu[labels > 0] = -840
    after, mask = pneumothorax(hu, labels, seed, SPACING)
    lung = labels == labels[mask][0]
    tissue, kept = ((values[lung] + 1000).sum() for values in (hu, after))
    rim = 0.005 * int((after[lung] < -990).sum()) * 1000  # what AIR weighs
    assert float((kept - rim) / tissue) == pytest.approx(1.0, abs=0.06)
    assert 160 / 0.8**3 <= float(after[lung].max()) + 1000 <= 160 / 0.6**3


@pytest.mark.parametrize("seed", SEEDS)
def test_mass_is_a_sphere_of_soft_tissue_in_one_lung(seed):
    p = phantom()
    hu, mask = mass(p.hu, p.labels, seed, SPACING)
    touched_lung(mask)
    assert (hu >= p.hu).all() and -100 < hu[mask].median() < 60
    points = mask.nonzero().float() * SPACING
    widths = points.amax(0) - points.amin(0) + SPACING
    assert (widths >= 40).all() and (widths <= 80 + 2 * SPACING).all()
    # The volume is that of a sphere about its own middle, less what the chest wall and large vessels cut off.
    core = (hu > -300) & mask
    volume = int(core.sum()) * SPACING**3
    sphere = 4 / 3 * torch.pi * (float(widths.max()) / 2) ** 3
    assert 0.35 * sphere < volume < 1.1 * sphere


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_lung_leaves_no_air_on_its_side(seed):
    p = phantom()
    hu, mask = missing_lung(p.hu, p.labels, seed, SPACING)
    name = touched_lung(mask)
    own = p.labels == LABELS[name]
    assert (hu[own] > -100).all() and abs(float(hu[own].mean()) - 12) < 2
    other = p.labels == LABELS[LUNGS[name == "lung_left"]]
    assert torch.equal(hu[other], p.hu[other])
    assert float(hu.mean() - p.hu.mean()) > 20  # some litres of water were added


@pytest.mark.parametrize("seed", SEEDS)
def test_metal_is_a_rod_beside_the_canal(seed):
    p = phantom()
    hu, mask = metal(p.hu, p.labels, seed, SPACING)
    assert (hu[mask] == METAL).all() and (hu >= p.hu).all()
    assert not torch.isin(p.labels[mask], torch.tensor([LABELS["air"], LABELS["spinal_canal"]])).any()
    points = mask.nonzero().float() * SPACING
    length, depth, width = (points.amax(0) - points.amin(0) + SPACING).tolist()
    assert 95 <= length <= 190 and width <= 40 and depth <= 80  # spines lean
    area = int(mask.sum()) * SPACING**3 / length
    assert 0.6 * 78.5 < area < 1.6 * 78.5  # π (5 mm)²
    canal = (p.labels == LABELS["spinal_canal"]).nonzero().float() * SPACING
    gap = points[:, 2].mean() - canal[:, 2].mean()
    assert 10 < abs(float(gap)) < 26


def test_both_sides_occur():
    p = phantom()
    names = {touched_lung(missing_lung(p.hu, p.labels, seed, SPACING)[1]) for seed in range(8)}
    assert names == set(LUNGS)


@pytest.mark.parametrize("name", ANOMALIES)
def test_bad_input_is_named(name):
    p = phantom()
    make = ANOMALIES[name]
    with pytest.raises(InputError, match=r"labels: found shape \(64, 64, 63\) for HU of \(64, 64, 64\)"):
        make(p.hu, p.labels[..., 1:], 0, SPACING)
    for seed in (-1, 1.5, True):
        with pytest.raises(InputError, match="seed: found"):
            make(p.hu, p.labels, seed, SPACING)
    for spacing in (0.0, -5.0, float("nan")):
        with pytest.raises(InputError, match="spacing_mm: found"):
            make(p.hu, p.labels, 0, spacing)
    broken = p.hu.clone()
    broken[1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="hu: holds NaN"):
        make(broken, p.labels, 0, SPACING)
    with pytest.raises(InputError, match=r"labels: found (no voxel of lung|the spinal canal in 0 slices)"):
        make(p.hu, torch.zeros_like(p.labels), 0, SPACING)
