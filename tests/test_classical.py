"""Classical reconstruction: against dense linear algebra, other algorithms, other programs, and known phantoms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from difr3ct_core.baselines.classical import METHODS, body_support, cgls, fbp, sirt, tv, tv_body, tv_objective
from difr3ct_core.drr import backproject, project
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View, standard_views, voxel_centres

SHAPE, SPACING = (4, 7, 6), (11.0, 8.0, 9.0)
VIEWS = tuple(View(angle, (5, 9), (9.0, 8.0)) for angle in (10.0, 55.0, 100.0, 160.0))


def forward(mu: torch.Tensor, views=VIEWS, spacing=SPACING) -> torch.Tensor:
    return project(mu[:, None], views, spacing)[:, 0]


def dense(views, shape, spacing) -> np.ndarray:
    """The projector as a matrix, one column per voxel."""
    unit = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return forward(unit, views, spacing).flatten(1).T.numpy()


def random_xrays(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mu = torch.rand(batch, *SHAPE, generator=generator, dtype=torch.float64) * 0.04
    xrays = forward(mu)
    return mu, xrays + 0.05 * torch.randn(xrays.shape, generator=generator, dtype=torch.float64)


def smooth_blob(size: int, fov_mm: float = 320.0) -> torch.Tensor:
    """A Gaussian off the centre, smooth at the voxel's scale, that fades inside the cube."""
    points = voxel_centres((size, size, size), fov_mm / size)
    centre, width = torch.tensor([20.0, -30.0, 10.0]), torch.tensor([42.0, 30.0, 36.0])
    return (0.04 * torch.exp(-0.5 * ((points - centre) / width).square().sum(-1)))[None]


def psnr(estimate: torch.Tensor, truth: torch.Tensor) -> float:
    return 10 * math.log10(float(truth.max()) ** 2 / float((estimate - truth).square().mean()))


@pytest.mark.parametrize("angles", [(20.0,), tuple(np.arange(0, 180, 12.0) + 3)])
def test_cgls_is_the_least_squares_solution_of_minimum_norm(angles: tuple[float, ...]):
    """One view: fewer rays than voxels, so the norm decides. Fifteen: noise has no solution, so the residual does."""
    shape = (3, 5, 4)
    views = tuple(View(angle, (3, 7), (11.0, 8.0)) for angle in angles)
    xrays = torch.rand(2, len(views), 3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = dense(views, shape, SPACING)
    assert (matrix.shape[0] < matrix.shape[1]) == (len(views) == 1)
    found = cgls(xrays, views, shape, SPACING, bounds=None, iterations=200)
    expected = np.linalg.lstsq(matrix, xrays.flatten(1).T.numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(found.flatten(1).T.numpy(), expected, atol=1e-6 * np.abs(expected).max())


def test_cgls_residual_falls_in_every_step_and_patients_do_not_touch_each_other():
    _, xrays = random_xrays()
    misfits = []
    for steps in (1, 2, 4, 8, 16):
        mu = cgls(xrays, VIEWS, SHAPE, SPACING, bounds=None, iterations=steps)
        misfits.append((forward(mu) - xrays).square().sum(dim=(1, 2, 3)))
    assert (torch.stack(misfits).diff(dim=0) < 0).all()
    # The first patient is scaled by a thousand beside the second: each must keep its own step lengths.
    mixed = torch.cat([1000 * xrays[:1], xrays[1:]])
    together = cgls(mixed, VIEWS, SHAPE, SPACING, bounds=None, iterations=8)
    alone = cgls(xrays[1:], VIEWS, SHAPE, SPACING, bounds=None, iterations=8)
    torch.testing.assert_close(together[1:], alone)


def test_cgls_keeps_an_empty_patient_empty():
    _, xrays = random_xrays()
    xrays[0] = 0
    mu = cgls(xrays, VIEWS, SHAPE, SPACING)
    assert (mu[0] == 0).all() and (mu[1] > 0).any()


def test_sirt_lowers_the_weighted_residual_in_every_step_and_ends_where_its_gradient_vanishes():
    _, xrays = random_xrays()
    weights = 1 / forward(torch.ones(1, *SHAPE, dtype=torch.float64)).clamp_min(1e-9)

    def misfit(mu: torch.Tensor) -> torch.Tensor:
        return (weights * (forward(mu) - xrays).square()).sum(dim=(1, 2, 3))

    values = torch.stack([misfit(sirt(xrays, VIEWS, SHAPE, SPACING, None, n)) for n in (1, 2, 3, 5, 10, 40)])
    assert (values.diff(dim=0) < 0).all()

    def slope(mu: torch.Tensor) -> float:
        residual = weights * (forward(mu) - xrays)
        return float(backproject(residual[:, None], VIEWS, SHAPE, SPACING).abs().max())

    start = slope(torch.zeros(2, *SHAPE, dtype=torch.float64))
    assert slope(sirt(xrays, VIEWS, SHAPE, SPACING, None, 20_000)) < 1e-3 * start


def test_sirt_leaves_a_volume_that_explains_its_xrays_alone():
    mu, _ = random_xrays(batch=1)
    once = sirt(forward(mu), VIEWS, SHAPE, SPACING, None, 1)
    residual = forward(mu) - forward(once)
    # Started from zero, the first step and a step on what is left must add up to two steps.
    twice = sirt(forward(mu), VIEWS, SHAPE, SPACING, None, 2)
    torch.testing.assert_close(once + sirt(residual, VIEWS, SHAPE, SPACING, None, 1), twice)


@pytest.mark.parametrize("support", [False, True])
def test_tv_reaches_the_minimum_that_another_algorithm_finds(support: bool):
    """L-BFGS-B on the total variation smoothed by 1e-9/mm² gives the same objective from a different method."""
    _, xrays = random_xrays(batch=1)
    weight, high = 1.0, 0.03
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) > 0.3 if support else None
    found = tv(xrays, VIEWS, SHAPE, SPACING, (0.0, high), weight, iterations=4000, support=mask)
    assert float(found.min()) >= 0 and float(found.max()) <= high
    if support:
        assert float(found[:, ~mask].abs().max()) == 0.0
    reached = float(tv_objective(found, xrays, VIEWS, SPACING, weight))

    # Written out anew: the integrals of the docstring, times views over the pixel area (8 x 9 mm).
    def smoothed(mu: torch.Tensor) -> torch.Tensor:
        square = torch.full(SHAPE, 1e-18, dtype=torch.float64)
        square[:-1] += (mu.diff(dim=0) / SPACING[0]) ** 2
        square[:, :-1] += (mu.diff(dim=1) / SPACING[1]) ** 2
        square[:, :, :-1] += (mu.diff(dim=2) / SPACING[2]) ** 2
        variation = square.sqrt().sum() * math.prod(SPACING) * len(VIEWS) / 72.0
        return 0.5 * (forward(mu[None]) - xrays).square().sum() + weight * variation

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        mu = torch.tensor(values.reshape(SHAPE), requires_grad=True)
        value = smoothed(mu)
        value.backward()
        return float(value.detach()), mu.grad.numpy().ravel()

    top = np.full(math.prod(SHAPE), high) if mask is None else high * mask.numpy().ravel()
    start = np.minimum(0.01, top)
    result = minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=list(zip(np.zeros_like(top), top, strict=True)),
        options={"maxiter": 2500, "maxfun": 5000, "ftol": 1e-14, "gtol": 1e-12},
    )  # fmt: skip
    assert reached == pytest.approx(float(smoothed(found[0])), rel=1e-6)
    assert reached <= result.fun * (1 + 1e-3)
    assert reached == pytest.approx(result.fun, rel=5e-3)


def test_tv_objective_falls_with_more_iterations():
    size = 32
    views = standard_views("4view", size, 320.0)
    truth = smooth_blob(size) + 0.01 * (smooth_blob(size) > 0.01)
    xrays = forward(truth, views, 10.0)
    values = []
    for n in (5, 20, 80, 320):
        mu = tv(xrays, views, (size,) * 3, 10.0, weight_mm=0.1, iterations=n)
        values.append(float(tv_objective(mu, xrays, views, 10.0, 0.1)))
    assert values == sorted(values, reverse=True)
    # The starting point, an empty volume, is far worse.
    assert values[0] < 0.05 * float(tv_objective(torch.zeros_like(truth), xrays, views, 10.0, 0.1))


def test_patients_solved_together_with_a_weight_each_are_those_solved_alone():
    views = standard_views("2view", 16, 320.0)
    truth = torch.cat([smooth_blob(16), smooth_blob(16).flip(-1) * 1.2])
    xrays = forward(truth, views, 20.0)
    weights = torch.tensor([0.0, 0.5])
    prior = torch.full_like(truth, 0.01)
    held = {"iterations": 15, "prior": prior, "prior_weight_mm": torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)}
    together = tv(xrays, views, (16,) * 3, 20.0, weight_mm=weights, **held)
    for i, weight in enumerate(weights.tolist()):
        rows = slice(i, i + 1)
        own = held | {"prior": prior[rows], "prior_weight_mm": float(held["prior_weight_mm"][i])}
        alone = tv(xrays[rows], views, (16,) * 3, 20.0, weight_mm=weight, **own)
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-7)
    unweighted = tv(xrays, views, (16,) * 3, 20.0, weight_mm=0.0, **held)
    assert float((together - unweighted)[1].abs().max()) > 1e-3


def test_tv_weight_means_the_same_on_every_grid():
    """The objective of a smooth volume, in mm², hardly changes when voxels and pixels are halved."""
    values = []
    for size in (32, 64):
        views = standard_views("2view", size, 320.0)
        mu, spacing = smooth_blob(size), 320 / size
        values.append(float(tv_objective(mu, 0.9 * forward(mu, views, spacing), views, spacing, 3.0)) * spacing**2)
    assert values[1] == pytest.approx(values[0], rel=0.02)


def test_tv_is_better_than_unregularised_solvers_on_a_piecewise_constant_body():
    size = 32
    points = voxel_centres((size,) * 3, 10.0) / torch.tensor([130.0, 95.0, 150.0])
    body = 0.02 * ((points.square().sum(-1) < 1).float())[None]
    body[:, 8:20, 12:20, 8:14] = 0.005
    views = standard_views("8view", size, 320.0)
    xrays = forward(body, views, 10.0)
    scores = {
        name: psnr(method(xrays, views, (size,) * 3, 10.0, (0.0, 0.05)), body) for name, method in METHODS.items()
    }
    assert scores["tv"] > 40
    assert scores["tv"] > max(scores["sirt"], scores["cgls"], scores["fbp"]) + 5
    assert scores["tv_body"] == scores["tv"], "from three views on the outline comes from the x-rays"


@pytest.mark.parametrize("views_name", ["1view_frontal", "1view_lateral", "2view"])
def test_body_support_finds_an_elliptic_body_and_helps_tv(views_name: str):
    size = 32
    points = voxel_centres((size,) * 3, 10.0) / torch.tensor([140.0, 100.0, 1e6])
    inside = (points.square().sum(-1) < 1)[None]
    body = 0.02 * inside.float()
    views = standard_views(views_name, size, 320.0)
    xrays = forward(body, views, 10.0)
    support = body_support(xrays, views, (size,) * 3, 10.0)
    assert float((inside & ~support).float().sum() / inside.sum()) < 0.01
    assert float(support.float().mean()) < 0.75
    plain, helped = (m(xrays, views, (size,) * 3, 10.0, (0.0, 0.05)) for m in (tv, tv_body))
    assert psnr(helped, body) > psnr(plain, body) + 0.5


def test_body_support_follows_an_offset_body_in_either_direction_of_view():
    """A body on the patient's left stays there for views from front and back, left and right."""
    size, shape = 40, (12, 20, 16)
    points = voxel_centres(shape, 10.0)
    body = 0.02 * (((points - torch.tensor([20.0, -30.0, 0.0])) / torch.tensor([40.0, 50.0, 1e6])).norm(dim=-1) < 1)
    for angles in ((0.0, 90.0), (180.0, 270.0)):
        for mode in ("parallel", "cone"):
            views = standard_views(angles, size, 280.0, mode, dso_mm=4000.0, dsd_mm=6000.0)
            support = body_support(forward(body[None].float(), views, 10.0), views, shape, 10.0, threshold=0.1)
            centre = points[support[0]].mean(0)
            assert float(centre[0]) == pytest.approx(20, abs=4) and float(centre[1]) == pytest.approx(-30, abs=4)
            assert support[0][body > 0].all()


def test_fbp_with_many_views_recovers_a_smooth_phantom_and_its_scale():
    size = 48
    truth = smooth_blob(size)
    views = standard_views(tuple(np.arange(180) * 1.0), size, 320.0)
    found = fbp(forward(truth, views, 320 / size), views, (size,) * 3, 320 / size, bounds=None)
    assert psnr(found, truth) > 40
    # Outside the inscribed cylinder some views miss the voxel, and the mean there is not defined by the x-rays.
    seen = voxel_centres((size,) * 3, 320 / size)[..., :2].norm(dim=-1) < 155
    assert float(found[0][seen].mean()) == pytest.approx(float(truth[0][seen].mean()), rel=0.01)
    assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(1.0, abs=0.01)


def test_fbp_shares_the_angle_between_views_that_stand_close():
    """Views bunched in one half of the circle, or seen from behind, must not raise or lower the mean."""
    size = 32
    truth = smooth_blob(size)
    sparse, fine = np.arange(0, 90, 5.0), np.arange(90, 180, 1.25)
    for angles in (np.concatenate([sparse, fine]), np.concatenate([sparse + 180, fine]), np.arange(0, 360, 3.0)):
        views = standard_views(tuple(angles), size, 320.0)
        found = fbp(forward(truth, views, 10.0), views, (size,) * 3, 10.0, bounds=None)
        assert psnr(found, truth) > 30
        assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(1.0, abs=0.02)


def test_fbp_equals_scikit_image_on_a_central_slice():
    """iradon turns about pixel n//2, which is the centre for an odd size, and smears t = x cos θ - y sin θ.

    That is -u for θ = 90° - angle.
    """
    transform = pytest.importorskip("skimage.transform")
    size, angles = 33, np.arange(0, 180, 2.0)
    truth = smooth_blob(size)
    spacing = 320 / size
    views = standard_views(tuple(angles), size, 320.0)
    xrays = forward(truth, views, spacing)
    ours = fbp(xrays, views, (size,) * 3, spacing, bounds=None)[0, size // 2].numpy()
    sinogram = xrays[0, :, size // 2].numpy().T[::-1] / spacing
    theirs = transform.iradon(sinogram, theta=90 - angles, circle=True, filter_name="ramp")
    row, column = np.mgrid[:size, :size] - size // 2
    inside = np.hypot(row, column) < size // 2 - 1
    assert np.abs(ours - theirs)[inside].max() < 0.01 * ours.max()


def test_fdk_recovers_a_phantom_from_a_full_turn():
    size = 32
    truth = smooth_blob(size)
    views = standard_views(tuple(np.arange(0, 360, 3.0)), 48, 320.0, "cone")
    found = fbp(forward(truth, views, 10.0), views, (size,) * 3, 10.0, bounds=None)
    assert psnr(found, truth) > 32
    assert float((found * truth).sum() / truth.square().sum()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_every_method_keeps_the_bounds_and_the_sides_of_the_patient(name: str, mode: str):
    """An asymmetric pair of blocks comes out on the right side, in a box, from parallel and cone x-rays alike."""
    shape, spacing = (16, 24, 20), (12.0, 10.0, 11.0)
    truth = torch.zeros(2, *shape)
    truth[0, 3:7, 4:9, 12:17] = 0.03
    truth[1, 9:14, 14:20, 3:8] = 0.03
    views = standard_views((0.0, 30.0, 60.0, 90.0, 120.0, 150.0), (20, 30), 300.0, mode)
    found = METHODS[name](forward(truth, views, spacing), views, shape, spacing, bounds=(0.0, 0.04))
    assert found.shape == truth.shape
    assert float(found.min()) >= 0 and float(found.max()) <= 0.04
    assert int(truth[0].flatten()[found[0].argmax()] > 0) and int(truth[1].flatten()[found[1].argmax()] > 0)
    own = [float((found[i] * truth[i]).sum()) for i in range(2)]
    other = [float((found[i] * truth[1 - i]).sum()) for i in range(2)]
    assert min(own) > 3 * max(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xrays": torch.zeros(1, 3, 5, 9)}, "found 3 images for 4 views"),
        ({"xrays": torch.zeros(4, 5, 9)}, r"expected \(patient, view, v, u\)"),
        ({"xrays": torch.zeros(1, 4, 9, 5)}, r"found images of \(9, 5\) pixels .* detector of \(5, 9\)"),
        ({"xrays": torch.full((1, 4, 5, 9), float("nan"))}, "180 pixels that are NaN"),
        ({"xrays": torch.zeros(1, 4, 5, 9, dtype=torch.int32)}, "expected line integrals in floating point"),
        ({"bounds": (0.05, 0.0)}, "bounds: found"),
        ({"volume_shape": (4, 0, 6)}, "volume_shape: found"),
        ({"spacing_mm": -1.0}, "spacing_mm"),
        ({"views": ()}, "views: found none"),
    ],
)
def test_bad_input_is_named(change: dict, message: str):
    arguments = {
        "xrays": torch.zeros(1, 4, 5, 9), "views": VIEWS, "volume_shape": SHAPE, "spacing_mm": SPACING,
        "bounds": (0.0, 0.05),
    } | change  # fmt: skip
    for method in METHODS.values():
        with pytest.raises(InputError, match=message):
            method(**arguments)


def test_bad_settings_are_named():
    xrays = torch.zeros(1, 4, 5, 9)
    with pytest.raises(InputError, match="weight_mm: found -1"):
        tv(xrays, VIEWS, SHAPE, SPACING, weight_mm=-1)
    with pytest.raises(InputError, match="0 or more, for all patients or for each"):
        tv(xrays, VIEWS, SHAPE, SPACING, weight_mm=torch.ones(3))
    with pytest.raises(InputError, match=r"support: found torch\.float32"):
        tv(xrays, VIEWS, SHAPE, SPACING, support=torch.ones(SHAPE))
    for method in (sirt, cgls, tv):
        with pytest.raises(InputError, match="iterations: found 0"):
            method(xrays, VIEWS, SHAPE, SPACING, iterations=0)
