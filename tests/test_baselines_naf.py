"""NAF: the hash encoding against a loop, the rays against closed forms and the projector, and a fit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_baselines import NAF_SMALL, stir, without_gradient
from small_models import SMALL, patients

from difr3ct_core.baselines.naf import NAF, HashGrid, fit_naf, line_integrals, rays_in_cube, reconstruct_naf
from difr3ct_core.baselines.presets import NAFPreset
from difr3ct_core.drr import project
from difr3ct_core.drr.exact import Blob
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View, standard_views, voxel_centres
from difr3ct_core.presets import TrainPreset, VolumePreset, XrayPreset

FOV = 320.0
#: Off the centre in every direction, and small enough to fade inside the cube.
BLOB = Blob((50.0, -20.0, 35.0), 25.0, 0.02)


def psnr(estimate: torch.Tensor, truth: torch.Tensor) -> float:
    return 10 * math.log10(float(truth.max()) ** 2 / float((estimate - truth).square().mean()))


def naive_encoding(grid: HashGrid, point: list[float]) -> list[float]:
    """One point, one corner, one number at a time, with the 32-bit arithmetic of the hash's authors."""
    found = []
    for cells, table in zip(grid.resolutions, grid.tables, strict=True):
        entries, features = table.shape
        total = [0.0] * features
        cell = [min(int(p * cells), cells - 1) for p in point]
        for corner in range(8):
            bits = [(corner >> axis) & 1 for axis in range(3)]
            place = [c + bit for c, bit in zip(cell, bits, strict=True)]
            weight = math.prod(
                (p * cells - c) if bit else 1 - (p * cells - c) for p, c, bit in zip(point, cell, bits, strict=True)
            )
            if entries == (cells + 1) ** 3:
                row = place[0] + (cells + 1) * (place[1] + (cells + 1) * place[2])
            else:
                row = 0
                for p, prime in zip(place, (1, 2654435761, 805459861), strict=True):
                    row ^= (p * prime) & 0xFFFFFFFF
                row %= entries
            for k in range(features):
                total[k] += weight * float(table[row, k])
        found += total
    return found


def test_hash_encoding_is_the_naive_loop():
    grid = HashGrid(levels=4, features=3, base=3, growth=4, log2_table=9)
    assert [len(table) for table in grid.tables] == [64, 512, 512, 512]  # (3 + 1)³, then the table's limit
    stir(grid)
    points = torch.rand(40, 3, generator=torch.Generator().manual_seed(1))
    points = torch.cat([points, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 2 / 3]])])
    expected = torch.tensor([naive_encoding(grid, point.tolist()) for point in points])
    torch.testing.assert_close(grid(points), expected, atol=1e-5, rtol=1e-4)


def test_hash_encoding_is_continuous_and_reproduces_linear_functions():
    """A dense level whose entries are the corners' own coordinates interpolates to the coordinates."""
    grid = HashGrid(levels=1, features=3, base=5, growth=2, log2_table=19)
    corners = torch.cartesian_prod(*[torch.arange(6)] * 3)
    with torch.no_grad():
        grid.tables[0][grid.index(corners, 0)] = corners / 5
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(grid(points), points, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_line_integrals_are_the_closed_form(mode):
    """An asymmetric landmark, whose x-rays are known exactly: no sign or axis can be wrong."""
    views = standard_views([0.0, 40.0, 90.0, 250.0], (24, 28), FOV, mode)
    rays = rays_in_cube(views, FOV)
    rows = torch.arange(len(rays.length))
    found = line_integrals(BLOB.sample, rays, rows, torch.full((len(rows), 96), 0.5))
    expected = BLOB.integral(rays.origin.double(), rays.direction.double()).float()
    expected = torch.where(rays.length > 0, expected, torch.zeros_like(expected))
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.max()), rtol=0)
    assert float(expected.max()) > 0.5


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_rays_agree_with_the_projector(mode):
    volume = VolumePreset(size=32)
    views = standard_views([0.0, 40.0, 90.0], 32, FOV, mode)
    mu = BLOB.sample(voxel_centres(volume.shape, volume.spacing_mm))
    images = project(mu[None, None], views, volume.spacing_mm)[0, 0]
    rays = rays_in_cube(views, FOV)
    found = line_integrals(BLOB.sample, rays, torch.arange(images.numel()), torch.full((images.numel(), 64), 0.5))
    torch.testing.assert_close(found.view_as(images), images, atol=0.05 * float(images.max()), rtol=0)


def test_rays_are_cut_to_the_cube():
    # One row of three pixels: through the middle, off the middle, and past the cube; a slanted chord is longer.
    rays = rays_in_cube([View(0.0, (1, 3), (10.0, 200.0)), View(45.0, (1, 3), (10.0, 50.0))], FOV)
    assert rays.length[:3].tolist() == pytest.approx([0.0, FOV, 0.0], abs=1e-3)
    chord = FOV * math.sqrt(2)
    assert rays.length[3:].tolist() == pytest.approx([chord - 100, chord, chord - 100], rel=1e-5)


def test_gradient_reaches_every_parameter():
    model = NAF(NAF_SMALL, FOV, 0.05)
    stir(model)
    model(voxel_centres((6, 7, 8), 30.0).view(-1, 3)).square().sum().backward()
    assert without_gradient(model) == []


def test_field_stays_between_air_and_the_window():
    model = NAF(NAF_SMALL, FOV, 0.05)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000)
    mu = model.volume(VolumePreset(size=8))
    assert mu.shape == (8, 8, 8) and float(mu.min()) >= 0 and float(mu.max()) <= 0.05 + 1e-8


def test_it_fits_one_patient_where_the_patient_is():
    one = patients(1)
    many = one.at_angles([180 * i / 20 for i in range(20)], SMALL.xray)
    volume = reconstruct_naf(many.xrays, many.views, NAF_SMALL, SMALL)
    truth = one.unit()
    assert volume.shape == truth.shape
    floor = float((truth - truth.mean()).square().mean())
    assert float((volume - truth).square().mean()) < 0.1 * floor
    for mirrored in (2, 3, 4):  # a wrong sign or order of axes would fit the mirror image
        assert float((volume.flip(mirrored) - truth).square().mean()) > 0.5 * floor


def test_a_fit_is_decided_by_its_seed():
    one, short = patients(1), dataclasses.replace(NAF_SMALL, training=dataclasses.replace(NAF_SMALL.training, steps=3))
    first, same, other = (reconstruct_naf(one.xrays, one.views, short, SMALL, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_bad_input():
    one = patients(1)
    with pytest.raises(InputError, match="xrays: found 8 images for 7 views"):
        reconstruct_naf(one.xrays, one.views[:7], NAF_SMALL, SMALL)
    with pytest.raises(InputError, match=r"expected \(patient, view, v, u\)"):
        reconstruct_naf(one.xrays[0], one.views, NAF_SMALL, SMALL)
    broken = one.xrays.clone()
    broken[0, 2, 3, 4] = math.nan
    with pytest.raises(InputError, match="1 pixels that are NaN"):
        reconstruct_naf(broken, one.views, NAF_SMALL, SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_many_views_suffice_and_fewer_are_worse(mode):
    """A smooth 64³ phantom: 30 dB from 50 views, and less with every view that is taken away."""
    generator = torch.Generator().manual_seed(0)
    place = (torch.rand(12, 3, generator=generator) - 0.5) * 140
    size = 15 + 20 * torch.rand(12, generator=generator)
    blobs = [Blob(tuple(p.tolist()), float(s), 0.01) for p, s in zip(place, size, strict=True)]
    volume, xray = VolumePreset(size=64), XrayPreset(detector_size=64)
    truth = sum(blob.sample(voxel_centres(volume.shape, volume.spacing_mm)) for blob in blobs)
    training = TrainPreset(300, 512, 1e-2, lr_decay="late_tenth", ema_decay=0.0, precision="fp32")
    settings = NAFPreset(training, levels=2, samples=64)
    found = {}
    for count in (50, 8, 4, 2):
        views = standard_views([180 * i / count for i in range(count)], 64, volume.fov_mm, mode)
        xrays = project(truth[None, None], views, volume.spacing_mm)[0, 0]
        field = fit_naf(xrays, views, settings, volume, xray)
        found[count] = psnr(field.volume(volume), truth)
    assert found[50] >= 30, found
    assert found[50] > found[8] > found[4] > found[2], found
