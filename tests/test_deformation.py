"""Deformed copies against what is known of the map: identity, mirror, size, density."""

from __future__ import annotations

import pytest
import torch

from difr3ct_core.deformation import AIR_HU, Deformation, deformed_copies
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


def test_turns_and_shifts_keep_the_mass_and_move_the_centre():
    limits = Deformation((1.0, 1.0), 8.0, 12.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    copies = deformed_copies(ball(at=(60, 0, 0), radius_mm=50), VOLUME, 6, limits=limits)
    centre = (torch.arange(32) + 0.5) * 10 - 160
    for copy in copies[:, 0]:
        assert mass(copy) == pytest.approx(mass(ball(50.0)), rel=0.005)
        density = copy - AIR_HU
        place = [float((density.sum(other) * centre).sum() / density.sum()) for other in ((1, 2), (0, 2), (0, 1))]
        away = sum((a - b) ** 2 for a, b in zip(place, (0, 0, 60), strict=True)) ** 0.5
        assert 0.1 < away < 12 * 3**0.5 + 60 * 0.25  # a shift, and turns of up to 8 degrees about each axis


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
