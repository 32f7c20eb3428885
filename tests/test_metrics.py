"""Metrics against closed forms and scikit-image; volumes are never cubic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from difr3ct_core.files import InputError
from difr3ct_core.metrics import (
    PEAK_12_BIT,
    SCORES,
    bone,
    dice,
    lungs,
    mae,
    mse,
    paired_test,
    perceptual_distance,
    psnr,
    score,
    ssim,
    to_12_bit,
)
from difr3ct_core.presets import VolumePreset


def volumes(seed: int, shape=(2, 1, 13, 15, 18)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(shape, generator=generator)
    return (truth + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1), truth


def test_psnr_closed_form():
    truth = torch.rand(3, 1, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([0.1, 0.01, 2.0]).view(3, 1, 1, 1, 1)
    for data_range in (1.0, 2.0, 2500.0):
        expected = [20 * math.log10(data_range / float(o)) for o in offset.flatten()]
        got = psnr(truth + offset, truth, data_range)
        assert got.shape == (3,)
        assert got.tolist() == pytest.approx(expected, abs=1e-3)
    assert mae(truth + offset, truth).tolist() == pytest.approx(offset.flatten().tolist(), rel=1e-5)
    assert mse(truth - offset, truth).tolist() == pytest.approx((offset**2).flatten().tolist(), rel=1e-4)
    assert psnr(truth, truth, 1.0).isinf().all()


def test_psnr_is_of_the_whole_volume_as_in_scikit_image():
    estimate, truth = volumes(1)
    estimate[0, :, 3] = 0.0  # the mean over slices would be another number
    for i in range(2):
        expected = peak_signal_noise_ratio(truth[i].numpy(), estimate[i].numpy(), data_range=1.0)
        assert float(psnr(estimate, truth, 1.0)[i]) == pytest.approx(expected, abs=1e-4)
    slices = torch.stack([psnr(estimate[:1, :, z : z + 1], truth[:1, :, z : z + 1], 1.0) for z in range(13)]).mean()
    assert abs(float(slices) - float(psnr(estimate, truth, 1.0)[0])) > 0.1


def test_psnr_is_the_same_in_every_unit():
    """Window [-1000, 1500] HU: in [-1, 1] with peak 2 or in HU with peak 2500; +4.29 dB with the 12-bit peak."""
    estimate, truth = volumes(2)
    unit = psnr(2 * estimate - 1, 2 * truth - 1, 2.0)
    hu = psnr(2500 * estimate - 1000, 2500 * truth - 1000, 2500.0)
    torch.testing.assert_close(unit, hu, atol=1e-4, rtol=0)
    twelve = psnr(2500 * estimate - 1000, 2500 * truth - 1000, PEAK_12_BIT)
    assert to_12_bit(float(hu[0]), 2500) == pytest.approx(float(twelve[0]), abs=1e-9)
    assert to_12_bit(0.0, 2500) == pytest.approx(4.29, abs=0.005)
    assert to_12_bit(30.0, 4095) == 30.0


def test_leading_axes_are_a_batch():
    estimate, truth = volumes(3, (2, 3, 1, 4, 5, 6))
    for metric in (mse, mae, lambda a, b: psnr(a, b, 1.0)):
        got = metric(estimate, truth)
        assert got.shape == (2, 3)
        for i in range(2):
            for j in range(3):
                assert float(got[i, j]) == pytest.approx(float(metric(estimate[i, j], truth[i, j])), rel=1e-12)


def test_double_precision_inside():
    """A float32 mean over many HU values would lose the small error."""
    truth = torch.full((1, 1, 40, 50, 60), 3000.0)
    estimate = truth.clone()
    estimate[..., 0, 0, 0] += 1.0
    assert float(mse(estimate, truth)) == pytest.approx(1 / truth.numel(), rel=1e-12)


def test_missing_axes_are_not_broadcast():
    """(b, 1, z, y, x) against (b, z, y, x) would silently compare every patient with every other."""
    estimate, truth = volumes(4)
    for metric in (mse, mae, lambda a, b: psnr(a, b, 1.0), lambda a, b: ssim(a, b, 1.0)):
        with pytest.raises(InputError, match=r"truth: found shape \(2, 13, 15, 18\), expected"):
            metric(estimate, truth[:, 0])
        with pytest.raises(InputError, match=r"expected \(2, 1, 13, 15, 18\)"):
            metric(estimate, truth[..., :-1])


def test_one_truth_for_many_samples():
    estimate, truth = volumes(4, (3, 1, 11, 12, 13))
    for metric in (mse, mae, lambda a, b: psnr(a, b, 1.0), lambda a, b: ssim(a, b, 1.0)):
        together = metric(estimate, truth[:1])
        assert together.shape == (3,)
        for i in range(3):
            assert float(together[i]) == pytest.approx(float(metric(estimate[i : i + 1], truth[:1])), rel=1e-12)


@pytest.mark.parametrize("shape", [(13, 15, 18), (11, 14, 12), (20, 11, 16)])
@pytest.mark.parametrize("data_range", [1.0, 2.0, 4095.0])
def test_ssim_is_scikit_images(shape, data_range):
    generator = np.random.default_rng(5)
    truth = generator.random((3, 1, *shape)) * data_range
    estimate = 0.7 * truth + 0.2 * data_range * generator.random((3, 1, *shape)) + 0.05 * data_range
    got = ssim(torch.from_numpy(estimate), torch.from_numpy(truth), data_range)
    for i in range(3):
        expected = structural_similarity(
            truth[i, 0], estimate[i, 0], gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=data_range,
        )  # fmt: skip
        assert float(got[i]) == pytest.approx(expected, abs=1e-6)


def test_ssim_of_itself_and_of_float32_hu():
    estimate, truth = volumes(6)
    torch.testing.assert_close(ssim(truth, truth, 1.0), torch.ones(2, dtype=torch.float64))
    low, high = ssim(estimate, truth, 1.0), ssim(estimate, truth, 2.0)
    assert (high - low > 1e-4).all()  # the data range is part of the number
    torch.testing.assert_close(ssim(2500 * estimate, 2500 * truth, 2500.0), low, atol=1e-5, rtol=0)


def test_ssim_of_a_volume_smaller_than_its_window():
    estimate, truth = volumes(7, (1, 1, 13, 10, 18))
    with pytest.raises(InputError, match=r"10, 18\) voxels, expected at least 11"):
        ssim(estimate, truth, 1.0)


def test_dice():
    a = torch.zeros(4, 3, 4, 5, dtype=torch.bool)
    b = a.clone()
    a[0, 0, 0, :4] = True  # 4 voxels
    b[0, 0, 0, 2:5] = True  # 3 voxels, 2 shared
    a[1], b[1] = True, True
    a[2, 1, 1, 1] = True  # nothing shared
    assert dice(a, b).tolist() == pytest.approx([2 * 2 / 7, 1.0, 0.0, 1.0])  # the last: both empty
    assert dice(b, a).tolist() == dice(a, b).tolist()


def chest(wall: int = 2) -> torch.Tensor:
    """(z, y, x) in HU: a body of soft tissue with two lungs that reach the first slice, a spine, air around."""
    hu = torch.full((12, 20, 24), -1000.0)
    hu[:, 3:17, 2:22] = 40.0
    hu[:9, 3 + wall : 13, 5:10] = -850.0
    hu[:9, 3 + wall : 13, 14:19] = -850.0
    hu[:, 13:16, 11:13] = 600.0
    return hu


def test_lungs_are_the_dark_regions_inside_each_slice():
    hu = chest()
    found = lungs(torch.stack([hu, hu.flip(2)]))
    expected = hu == -850
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected.flip(2))
    leaking = hu.clone()
    leaking[4, :8, 7] = -1000.0  # a gap in the chest wall of one slice, on one side
    lost = lungs(leaking[None])[0]
    assert not lost[4, :, 5:10].any() and lost[4, :, 14:19].any()
    assert torch.equal(lost[[0, 1, 2, 3, 5, 6, 7, 8]], expected[[0, 1, 2, 3, 5, 6, 7, 8]])
    assert not lungs(torch.full((1, 4, 5, 6), -1000.0)).any() and not lungs(torch.zeros(1, 4, 5, 6)).any()


def test_bone_is_above_its_threshold():
    hu = chest()
    assert torch.equal(bone(hu[None])[0], hu == 600)
    assert not bone(torch.full((1, 2, 3, 4), 200.0)).any()


def test_score_is_a_row_of_every_metric():
    volume = VolumePreset(size=12)
    truth_hu = torch.stack([chest(), chest(3)])[:, None]
    shift = torch.tensor([50.0, -20.0]).view(2, 1, 1, 1, 1)
    to_unit = lambda hu: (hu + 1000) / 1250 - 1  # noqa: E731
    row = score(to_unit(truth_hu + shift), to_unit(truth_hu), volume)
    assert set(row) == set(SCORES) - {"perceptual"}
    assert row["mae_hu"].tolist() == pytest.approx([50.0, 20.0], rel=1e-4)
    assert row["psnr"].tolist() == pytest.approx([20 * math.log10(2500 / 50), 20 * math.log10(2500 / 20)], abs=1e-3)
    assert (row["psnr_4095"] - row["psnr"]).tolist() == pytest.approx([to_12_bit(0.0, 2500)] * 2, abs=1e-9)
    # A constant shift moves no edge and no threshold crossing of this chest.
    for name in ("sharpness", "dice_lungs", "dice_bone"):
        assert row[name].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    half = (truth_hu + 1000) / 2 - 1000  # half the contrast: a quarter of the gradient's energy, no bone left
    blurred = score(to_unit(half), to_unit(truth_hu), volume)
    assert blurred["sharpness"].tolist() == pytest.approx([0.25, 0.25], abs=1e-3)
    assert blurred["dice_bone"].tolist() == [0.0, 0.0]


def test_score_refuses_what_is_no_volume():
    truth = torch.zeros(1, 1, 12, 12, 12)
    broken = truth.clone()
    broken[0, 0, 3, 4, 5] = math.nan
    with pytest.raises(InputError, match="estimate: holds NaN"):
        score(broken, truth, VolumePreset(size=12))
    with pytest.raises(InputError, match="truth: found shape"):
        score(truth[:, 0], truth, VolumePreset(size=12))


def test_perceptual_distance_is_the_mean_over_all_slices():
    """With a judge that gives the mean difference of a batch of pictures, every voxel counts the same on each axis."""

    def judge(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[1] == 1 and len(a) <= 16
        return (a - b).mean()

    truth = torch.zeros(2, 1, 18, 20, 33)
    estimate = truth + torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    assert perceptual_distance(estimate, truth, judge).tolist() == pytest.approx([1.0, 3.0])


def test_paired_test_sees_a_small_difference_that_all_patients_share():
    generator = np.random.default_rng(0)
    base = generator.normal(25, 4, 20)  # patients differ by far more than the methods do
    better = base + 0.2 + 0.05 * generator.normal(size=20)
    found = paired_test(better, base)
    assert found["difference"] == pytest.approx(float((better - base).mean())) and found["p"] < 1e-4
    assert paired_test(base, better)["p"] == pytest.approx(found["p"])
    assert paired_test(base, base) == {"difference": 0.0, "p": 1.0}
    # All six differences of one sign: of the 2^6 equally likely patterns of signs two are as extreme.
    assert paired_test([1.1, 2.2, 3.3, 4.4, 5.5, 6.6], [0.0] * 6)["p"] == pytest.approx(2 / 64)


@pytest.mark.parametrize("b", [[1.0], [1.0, 2.0], [1.0, math.nan, 2.0]])
def test_paired_test_refuses(b):
    with pytest.raises(InputError):
        paired_test([1.0, 2.0, 4.0][: 1 if len(b) == 1 else 3], b)
