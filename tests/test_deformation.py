"""Deformed copies against what is known of the map: identity, mirror, size, density."""

from __future__ import annotations

import pytest
import torch

from difr3ct_core.deformation import AIR_HU, Deformation, deformed_copies, warped
from difr3ct_core.files import InputError
from difr3ct_core.presets import VolumePreset

VOLUME = VolumePreset(size=32)
STILL = Deformation((1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def ball(radius_mm: float = 70.0, edge: int = 64, at: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    centre = (torch.arange(edge) + 0.5) * (320 / edge) - 160
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    distance = ((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2).sqrt()
    return (radius_mm - distance).div(5).sigmoid() * 1000 + AIR_HU


def mass(hu: torch.Tensor) -> float:
    return float((hu - AIR_HU).double().sum()) * (320 / hu.shape[-1]) ** 3


def test_no_deformation_is_the_scan_averaged_to_the_grid():
    hu = ball(at=(30, -20, 10)) + 20 * torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    hu = hu.clamp(-1000, 1500)
    expected = hu.view(32, 2, 32, 2, 32, 2).mean((1, 3, 5))
    torch.testing.assert_close(deformed_copies(hu, VOLUME, 1, limits=STILL)[0, 0], expected, atol=0.02, rtol=0)


def test_mirror_exchanges_left_and_right_alone():
    mirrored = Deformation(*(getattr(STILL, name) for name in list(vars(STILL))[:-1]), mirror=1.0)
    copy = deformed_copies(ball(at=(40, 25, -10)), VOLUME, 1, limits=mirrored)[0, 0]
    still = deformed_copies(ball(at=(-40, 25, -10)), VOLUME, 1, limits=STILL)[0, 0]
    torch.testing.assert_close(copy, still, atol=0.05, rtol=0)


@pytest.mark.parametrize("factor", [0.85, 1.2])
def test_a_larger_body_has_the_cube_of_the_factor_in_volume(factor):
    limits = Deformation((factor, factor), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert mass(deformed_copies(ball(), VOLUME, 1, limits=limits)[0, 0]) / mass(ball()) == pytest.approx(
        factor**3, rel=0.005
    )


def centre_of(density: torch.Tensor) -> torch.Tensor:
    """Centre of mass (x, y, z) in mm of a cube of 320 mm."""
    n = density.shape[-1]
    at, total = (torch.arange(n) + 0.5) * (320 / n) - 160, density.sum()
    return torch.stack([(density.sum(other) * at).sum() / total for other in ((0, 1), (0, 2), (1, 2))])


def test_turns_keep_distance_and_mass_and_shifts_are_even_in_their_limits():
    start = torch.tensor([60.0, 30.0, -40.0])
    turned = Deformation((1.0, 1.0), 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    places = []
    for copy in deformed_copies(ball(40.0, at=tuple(start.tolist())), VOLUME, 12, limits=turned)[:, 0]:
        assert mass(copy) == pytest.approx(mass(ball(40.0)), rel=0.005)
        places.append(centre_of(copy - AIR_HU))
        assert float(places[-1].norm()) == pytest.approx(float(start.norm()), abs=0.3)
    moved = (torch.stack(places) - start).norm(dim=1)
    # Up to three turns of 8 degrees; half a turn of that is met by some copy.
    assert moved.max() < 3**0.5 * 0.14 * 78 * 1.1 and moved.max() > 0.5 * 0.14 * 78
    shifted = Deformation((1.0, 1.0), 0.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    copies = deformed_copies(ball(40.0, at=tuple(start.tolist())), VOLUME, 40, limits=shifted)[:, 0]
    shifts = torch.stack([centre_of(copy - AIR_HU) for copy in copies]) - start
    assert shifts.abs().max() < 12.2
    assert (shifts.std(0) - 12 / 3**0.5).abs().max() < 1.6 and (shifts.mean(0).abs() < 3.5).all()


@pytest.mark.parametrize(("coarse", "fine"), [(6.0, 0.0), (0.0, 4.0)])
def test_elastic_displacements_have_the_deviation_asked_for(coarse, fine):
    # A ramp along x shows the displacement along x, voxel by voxel, away from the faces.
    ramp = ((torch.arange(64) + 0.5) * 5 - 160).expand(64, 64, 64).clone()  # HU = mm
    limits = Deformation((1.0, 1.0), 0.0, 0.0, coarse, fine, 0.0, 0.0, 0.0)
    copies = deformed_copies(ramp, VOLUME, 24, limits=limits)[:, 0, 4:-4, 4:-4, 4:-4]
    still = deformed_copies(ramp, VOLUME, 1, limits=STILL)[0, 0, 4:-4, 4:-4, 4:-4]
    # Linear interpolation between independent nodes leaves (2/3)^3 of their variance, on the average over a cell.
    assert float((copies - still).square().mean().sqrt()) == pytest.approx((coarse + fine) * (2 / 3) ** 1.5, rel=0.1)


def test_the_offset_is_of_the_body_and_not_of_the_air():
    limits = Deformation((1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 15.0, 0.0)
    copies = deformed_copies(ball(), VOLUME, 20, limits=limits)[:, 0]
    assert torch.equal(copies[:, 0, 0, 0], torch.full((20,), AIR_HU))
    offsets = copies[:, 16, 16, 16]
    assert offsets.abs().max() <= 15.01 and 6 < float(offsets.std()) < 11


def test_beyond_the_scan_the_trunk_goes_on():
    trunk = ball(70.0)[32].expand(64, 64, 64).clone()  # the same disc in every slice
    limits = Deformation((0.9, 0.9), 0.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    for copy in deformed_copies(trunk, VOLUME, 4, limits=limits)[:, 0]:
        areas = (copy > -500).double().sum((1, 2))
        assert areas.min() == areas.max() > 0


def test_attenuation_rises_by_the_share_drawn():
    limits = Deformation((1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.04, 0.0, 0.0)
    shares = [mass(c[0]) / mass(ball()) for c in deformed_copies(ball(), VOLUME, 12, limits=limits)]
    assert all(0.96 - 1e-4 <= share <= 1.04 + 1e-4 for share in shares) and max(shares) - min(shares) > 0.03


def test_copies_differ_repeat_and_keep_the_window():
    copies = deformed_copies(ball() * 3 + 1500, VOLUME, 3, seed=4)
    assert copies.shape == (3, 1, 32, 32, 32)
    assert copies.min() >= VOLUME.hu_min and copies.max() <= VOLUME.hu_max
    assert torch.equal(copies, deformed_copies(ball() * 3 + 1500, VOLUME, 3, seed=4))
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies, deformed_copies(ball() * 3 + 1500, VOLUME, 3, seed=5))


def test_refusals():
    with pytest.raises(InputError, match=r"hu: found shape \(48, 48, 48\), expected a cube with an edge of k x 32"):
        deformed_copies(torch.zeros(48, 48, 48), VOLUME, 1)
    with pytest.raises(InputError, match="hu: holds NaN or infinity"):
        deformed_copies(torch.full((32, 32, 32), float("nan")), VOLUME, 1)
    with pytest.raises(InputError, match="count: found 0"):
        deformed_copies(torch.zeros(32, 32, 32), VOLUME, 0)


def test_every_volume_is_warped_by_a_map_of_its_own_and_none_mirrored():
    one = ball(edge=32, at=(40, 0, 0))[None, None]
    both = torch.cat([one, one])
    torch.testing.assert_close(warped(both, 320.0, limits=STILL), both, atol=0.02, rtol=0)
    moved = warped(both, 320.0, seed=1, limits=Deformation(mirror=1.0))
    assert float((moved[0] - moved[1]).abs().mean()) > 5  # HU
    x = torch.arange(32) * 10.0 - 155
    for volume in moved:
        weight = (volume[0] - AIR_HU).double()
        assert 20 < float((weight.sum((0, 1)) * x).sum() / weight.sum()) < 60
    torch.testing.assert_close(warped(both, 320.0, seed=1, limits=Deformation(mirror=1.0)), moved)
    assert not torch.equal(warped(both, 320.0, seed=2), moved)
