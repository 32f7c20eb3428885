"""Variations of phantoms: what they change, where, and what they leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from difr3ct_core.deformation import Deformation
from difr3ct_core.files import InputError
from difr3ct_core.phantoms import LABELS, make_phantom
from difr3ct_core.phantoms.variety import Variety, varied
from difr3ct_core.presets import VolumePreset

VOLUME = VolumePreset(size=32)
STILL = Deformation(scale=(1.0, 1.0), turn_deg=0, shift_mm=0, coarse_mm=0, fine_mm=0, mirror=0)
NOTHING = Variety(
    contrast=0, table=0, lung_hu=(0, 0), soft_hu=(0, 0), bone=(1, 1), grain_hu=(0, 0), shape=STILL
)  # fmt: skip


@pytest.fixture(scope="module")
def phantoms():
    made = [make_phantom(seed, 32) for seed in (3, 4)]
    hu = torch.stack([p.hu for p in made]).clamp(VOLUME.hu_min, VOLUME.hu_max)
    return hu, torch.stack([p.labels for p in made])


def changed(phantoms, **limits):
    hu, labels = phantoms
    return varied(hu, labels, VOLUME, 5, dataclasses.replace(NOTHING, **limits))[:, 0] - hu


def inside(labels: torch.Tensor, *names: str) -> torch.Tensor:
    """Voxels whose neighbours all belong to the organs."""
    mask = torch.isin(labels, torch.tensor([LABELS[name] for name in names])).float()
    return torch.nn.functional.avg_pool3d(mask[:, None], 3, 1, 1)[:, 0] > 0.999


def test_without_limits_nothing_changes(phantoms):
    torch.testing.assert_close(changed(phantoms), torch.zeros_like(phantoms[0]), atol=0.1, rtol=0)


def test_a_contrast_medium_brightens_blood_and_nothing_that_has_none(phantoms):
    _, labels = phantoms
    found = changed(phantoms, contrast=1.0, contrast_hu=(200.0, 200.0), chamber=(0.0, 0.0))
    aorta = found[inside(labels, "aorta", "great_vessels", "heart") & (labels == LABELS["aorta"])]
    assert 100 <= float(aorta.median()) <= 230
    # Chambers have all of it, the wall less.
    heart, chambers = labels == LABELS["heart"], inside(labels, "heart")
    assert float(found[chambers].mean()) > 100 and float(found[heart].max()) <= 201
    assert float(found[chambers].mean()) > 1.5 * float(found[heart & ~chambers].mean())
    far = inside(labels, "air") | inside(labels, "muscle", "fat", "skin") | inside(labels, "vertebrae")
    assert float(found[far].abs().max()) < 1
    # More of it on one side.
    uneven = changed(phantoms, contrast=1.0, contrast_hu=(200.0, 200.0), chamber=(0.5, 0.5))
    columns = torch.arange(32).expand_as(labels)
    left, right = (inside(labels, "heart") & side for side in (columns > 18, columns < 14))
    assert float((uneven - found)[left].mean()) > 20 > -20 > float((uneven - found)[right].mean())


def test_a_table_lies_behind_the_back_and_not_in_the_body(phantoms):
    hu, _ = phantoms
    found = changed(phantoms, table=1.0)
    assert float(found[hu > -850].abs().max()) < 1e-3
    where = found.abs() > 20
    body = (hu > -500).any(-1)  # (b, z, y)
    rows = torch.arange(32).expand_as(body)
    for i in range(2):
        assert where[i].any(), "a table is there"
        backs = torch.where(body[i], rows[i], -1).amax(-1).float()
        # The plate bends up beside the body, so only the middle is sure to be behind it.
        middle = torch.where(where[i][:, :, 12:20].any(-1), rows[i], 99).amin(-1).float()
        seen = middle < 99
        assert float((middle[seen] - backs[seen]).median()) > -2


def test_bones_and_lungs_have_other_densities(phantoms):
    hu, labels = phantoms
    bone = inside(labels, "vertebrae")
    found = changed(phantoms, bone=(1.4, 1.4))
    torch.testing.assert_close(found[bone], 0.4 * (hu[bone] - 60).clamp_min(0), atol=0.5, rtol=0)
    lungs = inside(labels, "lung_left", "lung_right")
    found = changed(phantoms, lung_hu=(-50.0, -50.0))
    torch.testing.assert_close(found[lungs], torch.full_like(found[lungs], -50.0), atol=1.5, rtol=0)


def test_a_seed_is_a_variation_on_any_type_and_in_any_company(phantoms):
    hu, labels = phantoms
    both = varied(hu, labels, VOLUME, 11)
    assert torch.equal(both, varied(hu, labels, VOLUME, 11))
    assert torch.equal(both[1:], varied(hu[1:], labels[1:], VOLUME, 12))
    assert not torch.allclose(both, varied(hu, labels, VOLUME, 12), atol=1)
    whole = hu.round().to(torch.int16)
    torch.testing.assert_close(varied(whole, labels, VOLUME, 11), varied(whole.float(), labels, VOLUME, 11))
    assert float(both.min()) >= VOLUME.hu_min and float(both.max()) <= VOLUME.hu_max
    assert float((both[:, 0] - hu).abs().mean()) > 50  # a variation is another patient


def test_shapes_must_agree(phantoms):
    hu, labels = phantoms
    with pytest.raises(
        InputError, match=r"hu, labels: found shapes \(32, 32, 32\) and \(32, 32, 32\), expected \(b, z"
    ):
        varied(hu[0], labels[0], VOLUME)
    with pytest.raises(InputError, match=r"hu, labels: found shapes .*, expected \(b, z, y, x\) of \(64, 64, 64\)"):
        varied(hu, labels, VolumePreset(size=64))
