"""Metrics against closed forms and scikit-image; volumes are never cubic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from difr3ct_core.files import InputError
from difr3ct_core.metrics import PEAK_12_BIT, dice, mae, mse, psnr, ssim, to_12_bit


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
