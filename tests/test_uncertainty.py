"""The bias-variance identity, closed forms with Gaussian samples, and bad samples named."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difr3ct_core.files import InputError
from difr3ct_core.uncertainty import auroc, decompose, fit_conformal, moments, organ_weight, rank_correlation, roc_curve

SHAPE = (3, 4, 5)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 12),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 50.0, -800.0]),
)
def test_error_is_bias_plus_variance(n, seed, scale, offset):
    generator = torch.Generator().manual_seed(seed)
    samples = offset + scale * torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64)
    truth = offset + scale * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    d = decompose(samples, truth)
    gap = (d.mean_squared_error - d.squared_bias - d.variance).abs()
    # Rounding of the samples themselves, at size `offset`, enters linearly in the deviations.
    assert float((gap / d.mean_squared_error).max()) < 1e-12 * max(1.0, abs(offset) / scale)
    for part in (d.mean, d.variance, d.squared_bias, d.mean_squared_error):
        assert part.shape == SHAPE and part.dtype == torch.float64
    assert (d.variance >= 0).all() and (d.squared_bias >= 0).all()


def test_closed_form_by_hand():
    samples = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, *SHAPE)
    d = decompose(samples, torch.full(SHAPE, 5.0))
    assert (d.mean == 2).all() and (d.variance == 1).all()  # population variance: divided by N
    assert (d.squared_bias == 9).all() and (d.mean_squared_error == 10).all()


def test_gaussian_samples():
    """x ~ N(b, s²), truth 0: bias² -> b² + s²/N and variance -> s² (1 - 1/N) in the mean over many voxels."""
    n, b, s = 8, 0.7, 1.3
    samples = b + s * torch.randn(n, 30, 40, 50, generator=torch.Generator().manual_seed(1))
    d = decompose(samples, torch.zeros(30, 40, 50))
    assert float(d.squared_bias.mean()) == pytest.approx(b**2 + s**2 / n, rel=0.02)
    assert float(d.variance.mean()) == pytest.approx(s**2 * (1 - 1 / n), rel=0.02)


def test_float32_samples_in_hu_are_averaged_in_double():
    samples = torch.full((64, *SHAPE), 3000.1)
    samples[0] += 0.25
    d = decompose(samples, torch.full(SHAPE, 3000.1))
    step = float(samples[0, 0, 0, 0].double() - samples[1, 0, 0, 0].double())
    assert float(d.variance[0, 0, 0]) == pytest.approx(step**2 * 63 / 64**2, rel=1e-6)
    assert math.isclose(float(d.squared_bias[0, 0, 0]), (step / 64) ** 2, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_is_named(bad):
    samples = torch.zeros(5, *SHAPE)
    samples[3, 1, 2, 3] = bad
    with pytest.raises(InputError, match=r"samples: numbers \[3\] of 5 hold NaN or infinity"):
        moments(samples)
    with pytest.raises(InputError, match=r"\[3\] of 5"):
        decompose(samples, torch.zeros(SHAPE))
    with pytest.raises(InputError, match=r"truth: .*NaN or infinity"):
        decompose(torch.zeros(5, *SHAPE), samples[3])


@pytest.mark.parametrize("n", [0, 1])
def test_one_sample_has_no_spread(n):
    with pytest.raises(InputError, match=rf"samples: found {n}, expected at least 2"):
        moments(torch.zeros(n, *SHAPE))


def test_other_shape():
    with pytest.raises(InputError, match=r"truth: found shape \(3, 5, 4\), expected \(3, 4, 5\)"):
        decompose(torch.zeros(2, *SHAPE), torch.zeros(3, 5, 4))


def test_rank_correlation():
    error = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    assert rank_correlation(error**3, error) == pytest.approx(1.0)  # only the order counts
    assert rank_correlation(-error, error) == pytest.approx(-1.0)
    other = torch.rand(20, 30, 40, generator=torch.Generator().manual_seed(3))
    assert abs(rank_correlation(other, other.flip(0))) < 0.05


# --- intervals whose coverage is measured ------------------------------------------------------------------------


def voxels(n: int, seed: int, skew: bool = False):
    """Means of all tissues, a spread that is too small by an unknown factor that differs among tissues, and truths."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2400 * torch.rand(n, generator=generator) - 1000
    std = 5 + 50 * torch.rand(n, generator=generator)
    wrong = torch.where(mean < -500, 3.0, 0.5)
    noise = torch.randn(n, generator=generator)
    if skew:
        noise = noise.exp() - math.exp(0.5)
    return mean, std, mean + wrong * std * noise


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_intervals_cover_what_they_promise_in_every_tissue(level, skew):
    intervals = fit_conformal(*voxels(40_000, 1, skew), level)
    mean, std, truth = voxels(40_000, 2, skew)
    inside = intervals.coverage(mean, std, truth)
    assert float(inside.double().mean()) == pytest.approx(level, abs=0.01)
    for where in (mean < -500, (mean > -500) & (mean < -150), mean > 150):
        assert float(inside[where].double().mean()) == pytest.approx(level, abs=0.03)
    width = intervals.half_width(mean, std)
    assert float(width[mean < -500].mean()) > 3 * float(width[mean > 150].mean())  # as the errors are


def test_for_normal_errors_the_factor_is_the_normal_quantile():
    generator = torch.Generator().manual_seed(3)
    std = 20 + 30 * torch.rand(200_000, generator=generator)
    mean = torch.zeros(200_000)
    truth = std * torch.randn(200_000, generator=generator)
    intervals = fit_conformal(mean, std, truth, 0.9, floor_hu=0.0)
    for side in (intervals.below, intervals.above):
        assert side[3].numpy() == pytest.approx(1.6449, abs=0.05)  # six groups of -20 to 150 HU
        assert side[0].numpy() == pytest.approx(1.6449, abs=0.015)  # empty: that of all voxels
    assert (intervals.spread_edges[3].diff() > 0).all() and intervals.spread_edges[0].isinf().all()


def test_small_calibration_sets_err_on_the_wide_side():
    """With n scores the rank is ⌈0.95 (n + 1)⌉ on either side: nine of nine for 90 %."""
    mean, std = torch.zeros(9), torch.ones(9)
    intervals = fit_conformal(mean, std, torch.arange(-3.0, 6.0), 0.9, floor_hu=0.0)
    low, high = intervals.bounds(mean, std)
    assert (low == -3).all() and (high == 5).all()
    assert float(intervals.half_width(mean, std)[0]) == 4.0
    assert intervals.spread_edges.isinf().all()  # too few to divide them by spread


def test_each_side_has_its_own_width():
    """Of an exponential error the interval is from the 5 % to the 95 % quantile, not as wide below as above."""
    generator = torch.Generator().manual_seed(4)
    mean, std = torch.zeros(100_000), torch.full((100_000,), 10.0)
    truth = 10 * torch.empty(100_000).exponential_(generator=generator)
    intervals = fit_conformal(mean, std, truth, 0.9, floor_hu=0.0)
    low, high = (float(end[0]) for end in intervals.bounds(mean, std))
    assert low == pytest.approx(-10 * math.log(0.95), rel=0.05)  # above the mean: below it nothing ever lies
    assert high == pytest.approx(-10 * math.log(0.05), rel=0.02)


def test_a_spread_that_errs_differently_where_it_is_small_is_put_right():
    """Where samples agree the error is many times the spread, elsewhere as large: held at 90 % in both."""
    generator = torch.Generator().manual_seed(5)

    def draw(n):
        std = torch.where(torch.rand(n, generator=generator) < 0.5, 2.0, 60.0) * (
            1 + 0.1 * torch.rand(n, generator=generator)
        )
        error = torch.where(std < 10, 40.0, std) * torch.randn(n, generator=generator)
        return torch.zeros(n), std, error

    calibration, (mean, std, truth) = draw(60_000), draw(60_000)
    for bins, right in ((6, True), (1, False)):
        held = fit_conformal(*calibration, 0.9, spread_bins=bins).coverage(mean, std, truth)
        assert float(held.double().mean()) == pytest.approx(0.9, abs=0.01)
        of = [float(held[where].double().mean()) for where in (std < 10, std > 10)]
        assert (max(abs(share - 0.9) for share in of) < 0.01) == right


def hard_and_easy(n: int, seed: int, size: int = 1500):
    """Patients (n, voxels) whose errors share, in each tissue, a factor that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    tissue = torch.arange(size) % 5
    mean = torch.tensor([-800.0, -300.0, -100.0, 50.0, 300.0])[tissue].expand(n, size)
    std = 10 + 20 * torch.rand(n, size, generator=generator)
    harder = (0.6 * torch.randn(n, 5, generator=generator)).exp()[:, tissue]
    return mean, std, mean + harder * std * torch.randn(n, size, generator=generator)


def test_the_promise_is_for_patients_on_the_average_and_not_for_each():
    mean, std, truth = hard_and_easy(400, 6)
    held = fit_conformal(*hard_and_easy(100, 7), 0.9).coverage(mean, std, truth).double().mean(1)
    assert float(held.mean()) == pytest.approx(0.9, abs=0.015)
    assert float(held.min()) < 0.8 and float(held.max()) > 0.95


def test_few_patients_are_fewer_than_their_voxels():
    """Intervals that hold 90 % of five patients hold less of others; leaving patients out in turn finds how much."""
    mean, std, truth = hard_and_easy(200, 8)
    plain, others, asked = [], [], []
    for seed in range(12):
        calibration = hard_and_easy(5, 100 + seed)
        patient = torch.arange(5)[:, None].expand(calibration[0].shape)
        plain.append(float(fit_conformal(*calibration, 0.9).coverage(mean, std, truth).double().mean()))
        fitted = fit_conformal(*calibration, 0.9, patient=patient)
        others.append(float(fitted.coverage(mean, std, truth).double().mean()))
        asked.append(fitted.asked)
    assert sum(plain) / 12 < 0.88 and min(asked) > 0.9
    assert sum(others) / 12 == pytest.approx(0.9, abs=0.02)


def test_with_many_patients_alike_nothing_more_is_asked():
    calibration = [part.view(20, 2000) for part in voxels(40_000, 9)]
    patient = torch.arange(20)[:, None].expand(20, 2000)
    assert fit_conformal(*calibration, 0.9, patient=patient).asked == pytest.approx(0.9, abs=0.006)


def test_weights_hold_a_rare_structure_more_often_at_the_same_share_of_all():
    """One voxel in twenty is bone that the mean shows as muscle, missed by the model: the truth is far above."""
    generator = torch.Generator().manual_seed(10)

    def draw(n):
        bone = (torch.rand(n, 1000, generator=generator) < 0.05).byte()
        error = torch.randn(n, 1000, generator=generator) * torch.where(bone == 1, 30.0, 10.0) + 100 * bone
        return torch.zeros(n, 1000), 8 + 4 * torch.rand(n, 1000, generator=generator), error, bone

    (*calibration, labels), (mean, std, truth, bone) = draw(60), draw(100)
    patient = torch.arange(60)[:, None].expand(60, 1000)
    of_bone = []
    for power in (0.0, 0.5, 1.0):
        fitted = fit_conformal(*calibration, 0.9, patient=patient, weight=organ_weight(labels, power))
        held = fitted.coverage(mean, std, truth)
        assert float(held.double().mean()) == pytest.approx(0.9, abs=0.01)
        of_bone.append(float(held[bone == 1].double().mean()))
    assert of_bone[0] < 0.1 and of_bone[1] > 0.3 and of_bone[2] > 0.6, of_bone


def test_weight_of_an_organ():
    labels = torch.tensor([[0, 0, 0, 0], [2, 2, 2, 7]], dtype=torch.uint8)
    assert organ_weight(labels, 0.0).tolist() == [[1.0] * 4] * 2
    whole = organ_weight(labels, 1.0)
    assert [float(whole[labels == k].sum()) for k in (0, 2, 7)] == pytest.approx([8 / 3] * 3)  # every organ the same
    half = organ_weight(labels, 0.5)
    assert float(half[1, 3] / half[0, 0]) == pytest.approx(2.0) and float(half.mean()) == pytest.approx(1.0)


def test_equal_spreads_make_one_group():
    mean, std = torch.zeros(1000), torch.full((1000,), 7.0)
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(7))
    intervals = fit_conformal(mean, std, truth, 0.9)
    assert float(intervals.coverage(mean, std, truth).double().mean()) == pytest.approx(0.9, abs=0.005)
    # Samples of a new patient that agree even better, or less, have an error bar all the same.
    assert (intervals.half_width(mean, torch.linspace(0, 100, 1000)) > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": torch.zeros(3)}, r"truth: found shape \(3,\), expected that of mean \(4,\)"),
        ({"level": 90.0}, "level: found 90, expected a share between 0 and 1"),
        ({"spread_bins": 0}, "spread_bins: found 0, expected at least 1"),
        (dict.fromkeys(("mean", "std", "truth"), torch.zeros(0)), "mean: holds no voxel"),
        ({"patient": torch.zeros(3)}, r"patient: found shape \(3,\), expected that of mean \(4,\)"),
        ({"patient": torch.ones(4, dtype=torch.long)}, "patient: found 1, expected voxels of at least 2 patients"),
        ({"weight": torch.ones(4)}, "weight: found one without patient"),
        (
            {"patient": torch.arange(4), "weight": torch.zeros(4)},
            "weight: found one without patient or one not above 0",
        ),
        ({"std": torch.full((4,), math.nan)}, "mean, std or truth: hold NaN or infinity"),
    ],
)
def test_bad_calibration(change, message):
    arguments = {"mean": torch.zeros(4), "std": torch.ones(4), "truth": torch.zeros(4), "level": 0.9} | change
    with pytest.raises(InputError, match=message):
        fit_conformal(**arguments)


# --- detectors ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    normal=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    altered=st.lists(st.integers(0, 9), min_size=1, max_size=30),
)
def test_area_is_the_share_of_pairs_in_order(normal, altered):
    """The Mann-Whitney statistic, counted pair by pair, ties by half."""
    pairs = [(a > n) + 0.5 * (a == n) for a in altered for n in normal]
    scores = torch.tensor(normal).float(), torch.tensor(altered).float()
    assert auroc(*scores) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(*reversed(scores)) == pytest.approx(1 - auroc(*scores), abs=1e-12)
    false, true = roc_curve(*scores)
    assert false[0] == true[0] == 0 and false[-1] == true[-1] == 1
    assert (false.diff() >= 0).all() and (true.diff() >= 0).all()


def test_area_of_two_normal_distributions():
    """Scores N(0, 1) and N(d, 1): the area is Φ(d / √2)."""
    generator = torch.Generator().manual_seed(6)
    normal = torch.randn(4000, generator=generator, dtype=torch.float64)
    altered = 1 + torch.randn(4000, generator=generator, dtype=torch.float64)
    assert auroc(normal, altered) == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.015)


@pytest.mark.parametrize("bad", [torch.zeros(0), torch.tensor([1.0, math.nan]), torch.zeros(2, 2)])
def test_scores_that_are_none_are_refused(bad):
    with pytest.raises(InputError, match="normal: found scores of shape"):
        auroc(bad, torch.ones(3))
    with pytest.raises(InputError, match="altered: found scores of shape"):
        roc_curve(torch.ones(3), bad)
