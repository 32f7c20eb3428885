"""Solvers against a model whose answer is known, and against diffusers.

For z_0 ~ N(m, s²) the clean latent that a perfect denoiser predicts is E[z_0 | z_t], in closed form, and the
probability-flow equation carries z_t from one step to another by shifting and scaling it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from difr3ct_core.diffusion import Schedule
from difr3ct_core.files import InputError
from difr3ct_core.presets import DiffusionPreset
from difr3ct_core.sampling import (
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    dpm_solver_pp_3m,
    draw,
    gaussian,
    guided,
    time_grid,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside diffusers
MEAN, SD = 0.7, 0.3
SHAPE = (2, 3, 4, 5, 6)
BOTH = pytest.mark.parametrize("name", ["chen_linear", "ddpm_linear"])


def schedule(name: str = "chen_linear", prediction: str = "epsilon", steps: int = 1000) -> Schedule:
    return Schedule(DiffusionPreset(timesteps=steps, schedule=name, prediction=prediction))


def noise(shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_model(s: Schedule):
    """E[z_0 | z_t] for z_0 ~ N(MEAN, SD²)."""

    def model(z, t):
        gamma = float(s.gamma[t])
        alpha = math.sqrt(gamma)
        return MEAN + SD**2 * alpha * (z - alpha * MEAN) / (gamma * SD**2 + 1 - gamma)

    return model


def gaussian_denoiser(s: Schedule):
    """The same as a network would give it, ε or v."""

    def denoiser(z, t, condition=None):
        x0 = gaussian_model(s)(z, int(t[0]))
        gamma = float(s.gamma[t[0]])
        eps = (z - math.sqrt(gamma) * x0) / math.sqrt(1 - gamma)
        return eps if s.prediction == "epsilon" else math.sqrt(gamma) * eps - math.sqrt(1 - gamma) * x0

    return denoiser


def exact_flow(s: Schedule, z: torch.Tensor, t: int, u: int) -> torch.Tensor:
    """The probability-flow solution at step u, from z at step t."""

    def alpha_sd(step):
        gamma = float(s.gamma[step])
        return math.sqrt(gamma), math.sqrt(gamma * SD**2 + 1 - gamma)

    (alpha_t, sd_t), (alpha_u, sd_u) = alpha_sd(t), alpha_sd(u)
    return alpha_u * MEAN + (z - alpha_t * MEAN) * sd_u / sd_t


# --- the grid of steps -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("spacing", ["logsnr", "time"])
@pytest.mark.parametrize("steps", [1, 2, 20, 40, 300, 999, 1000])
def test_time_grid(name, spacing, steps):
    grid = time_grid(schedule(name), steps, spacing)
    assert grid[0] == 999 and (steps == 1 or grid[-1] == 0)
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert len(grid) == steps


def test_even_in_log_snr():
    s = schedule(steps=100_000)
    lam = torch.special.logit(s.gamma[time_grid(s, 20)]) / 2
    steps = lam.diff()
    assert float((steps / steps.mean() - 1).abs().max()) < 0.1


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize("solver", [ddim, dpm_solver_pp_2m, dpm_solver_pp_3m, ddpm])
def test_steps_out_of_range(solver, steps):
    s = schedule()
    with pytest.raises(InputError, match=rf"steps: found {steps}, expected 1 to 1000"):
        solver(gaussian_model(s), noise(), s, steps=steps)


def test_unknown_solver():
    s = schedule()
    expected = r"sampling\.solver: found 'heun', expected 'dpm\+\+2m', 'dpm\+\+3m', 'ddim' or 'ddpm'"
    with pytest.raises(InputError, match=expected):
        draw(gaussian_denoiser(s), s, None, SHAPE, solver="heun")


# --- convergence to the exact solution -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("solver", "low", "high"), [(ddim, 0.8, 1.3), (dpm_solver_pp_2m, 1.7, 2.3)])
def test_order_of_convergence(name, solver, low, high):
    s = schedule(name, steps=100_000)  # so fine that rounding to its steps does not show
    z = noise()
    errors, counts = [], []
    for steps in (20, 40, 80, 160):
        grid = time_grid(s, steps)
        assert grid[0] == 99_999 and grid[-1] == 0
        exact = gaussian_model(s)(exact_flow(s, z, grid[0], 0), 0)
        found = solver(gaussian_model(s), z, s, steps, spacing="logsnr")
        errors.append(float((found - exact).abs().max()))
        counts.append(len(grid))
    slopes = [math.log(errors[i] / errors[i + 1]) / math.log(counts[i + 1] / counts[i]) for i in range(len(errors) - 1)]
    assert all(low < slope < high for slope in slopes), slopes
    assert errors[-1] < (1e-3 if solver is dpm_solver_pp_2m else 5e-2)


@BOTH
def test_third_order_inside(name):
    """The low orders of its ends bound the whole by order 2, but what lies between makes it more exact than 2M."""
    s, z = schedule(name, steps=100_000), noise()
    for steps in (40, 80, 160):
        exact = gaussian_model(s)(exact_flow(s, z, 99_999, 0), 0)
        second, third = (
            float((solver(gaussian_model(s), z, s, steps, spacing="logsnr") - exact).abs().max())
            for solver in (dpm_solver_pp_2m, dpm_solver_pp_3m)
        )
        assert third < 0.5 * second


@BOTH
def test_twenty_steps_of_dpm_solver_are_close_and_better_than_ddim(name):
    """At T = 1000 and 20 evaluations, as the presets have it."""
    s, z = schedule(name), noise()
    exact = gaussian_model(s)(exact_flow(s, z, 999, 0), 0)
    first, second = (
        float((solver(gaussian_model(s), z, s, 20) - exact).square().mean().sqrt())
        for solver in (ddim, dpm_solver_pp_2m)
    )
    assert second < 0.02 * SD
    assert second < 0.2 * first


@BOTH
@pytest.mark.parametrize("steps", [1000, 100])
def test_ancestral_sampling_has_the_mean_and_variance(name, steps):
    s = schedule(name)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(8, 4, 10, 12, 14, generator=generator, dtype=torch.float64)
    found = ddpm(gaussian_model(s), z, s, steps, generator)
    # At t = 0 the mean E[z_0 | z_0'] is returned: a little less spread than z_0 itself has.
    gamma = float(s.gamma[0])
    spread = SD**2 * math.sqrt(gamma) / (gamma * SD**2 + 1 - gamma) * math.sqrt(gamma * SD**2 + 1 - gamma)
    assert float(found.mean()) == pytest.approx(MEAN, abs=4 * SD / found.numel() ** 0.5 + 2e-3)
    assert float(found.std()) == pytest.approx(spread, rel=0.03 if steps == 1000 else 0.1)  # shrinks with T


def test_ancestral_posterior_is_bayes():
    """Two steps of a known model: z_s given z_t and ẑ_0 by conditioning the joint Gaussian directly."""
    s = schedule(steps=1000)
    z = noise((20_000, 1, 1, 1, 1))
    t, u = time_grid(s, 2, "time")
    assert (t, u) == (999, 0)
    seen = {}
    x0 = torch.full_like(z, 0.4)
    ddpm(lambda *_: x0, z, s, 2, torch.Generator().manual_seed(4), lambda step, value, _: seen.update({step: value}))
    gamma_t, gamma_u = float(s.gamma[t]), float(s.gamma[u])
    # z_u = sqrt(γ_u) x0 + n1 and z_t = sqrt(γ_t/γ_u) z_u + n2: linear regression of z_u on z_t.
    slope = math.sqrt(gamma_t / gamma_u) * (1 - gamma_u) / (1 - gamma_t)
    mean = math.sqrt(gamma_u) * x0 + slope * (z - math.sqrt(gamma_t) * x0)
    variance = (1 - gamma_u) - slope**2 * (1 - gamma_t)
    rest = seen[u] - mean
    assert abs(float(rest.mean())) < 4 * math.sqrt(variance / len(z))
    assert float(rest.var()) == pytest.approx(variance, rel=0.05)
    assert abs(float(torch.corrcoef(torch.stack([rest.flatten(), z.flatten()]))[0, 1])) < 0.03


# --- diffusers as oracle ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("solver", "order"), [(dpm_solver_pp_2m, 2), (dpm_solver_pp_3m, 3)])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_dpm_solver_is_diffusers(name, solver, order, prediction):
    diffusers = pytest.importorskip("diffusers")
    s = schedule(name, prediction)
    steps = 12
    grid = time_grid(s, steps)
    beta = 1 - s.gamma / torch.cat([s.gamma.new_ones(1), s.gamma[:-1]])
    # From the last of its steps diffusers goes on to the σ of t = 0, in first order, as we do.
    other = diffusers.DPMSolverMultistepScheduler(
        trained_betas=beta.numpy(), algorithm_type="dpmsolver++", solver_order=order, solver_type="midpoint",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction], thresholding=False,
        lower_order_final=True, final_sigmas_type="sigma_min", timestep_spacing="linspace",
    )  # fmt: skip
    other.set_timesteps(steps - 1)
    other.timesteps = torch.tensor(grid[:-1])
    sigma = ((1 - s.gamma) / s.gamma).sqrt()
    other.sigmas = sigma[grid]
    denoiser = gaussian_denoiser(s)
    z = theirs = noise()
    for t in grid[:-1]:
        theirs = other.step(denoiser(theirs, torch.tensor([t])), t, theirs).prev_sample
    ours = {}
    model = guided(denoiser, s, None)
    result = solver(model, z, s, steps, lambda t, value, x0: ours.update({t: (value, x0)}))
    torch.testing.assert_close(ours[0][0], theirs, atol=1e-5, rtol=0)
    assert torch.equal(result, ours[0][1])
    assert float((theirs - exact_flow(s, z, 999, 0)).abs().max()) < 0.1  # both solve the problem


@BOTH
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_ddim_is_diffusers(name, prediction):
    diffusers = pytest.importorskip("diffusers")
    s = schedule(name, prediction)
    beta = 1 - s.gamma / torch.cat([s.gamma.new_ones(1), s.gamma[:-1]])
    other = diffusers.DDIMScheduler(
        trained_betas=beta.numpy(), prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    denoiser = gaussian_denoiser(s)
    z = theirs = noise()
    grid = list(range(999, -1, -111))  # even in t, which is all that DDIMScheduler can do
    assert grid[-1] == 0
    other.num_inference_steps = 1000 // 111
    for t in grid:
        theirs = other.step(denoiser(theirs, torch.tensor([t])), t, theirs, eta=0.0).prev_sample
    ours = ddim(guided(denoiser, s, None), z, s, 10)
    assert time_grid(s, 10, "time") == grid
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# --- guidance --------------------------------------------------------------------------------------------------


class Counting:
    """A denoiser that answers with its condition, or with -1 for none."""

    def __init__(self) -> None:
        self.conditions: list = []

    def __call__(self, z, t, condition):
        self.conditions.append(condition)
        return 0.1 * z + (condition if condition is not None else -1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_guidance(prediction):
    """Eq. 8: s = 0 is the null model, s = 1 the conditional one, and the prediction is linear in s."""
    s, z = schedule(prediction=prediction), noise()
    condition = torch.full(SHAPE, 2.0, dtype=torch.float64)

    def at(scale):
        denoiser = Counting()
        return guided(denoiser, s, condition, scale)(z, 400), denoiser.conditions

    null, asked = at(0.0)
    assert asked == [None]
    conditional, asked = at(1.0)
    assert len(asked) == 1 and asked[0] is condition
    t = torch.full((2,), 400)
    torch.testing.assert_close(null, s.to_x0(z, t, 0.1 * z - 1))
    torch.testing.assert_close(conditional, s.to_x0(z, t, 0.1 * z + 2))
    for scale in (0.5, 2.0, 7.5, -1.0):
        found, asked = at(scale)
        assert len(asked) == 2
        torch.testing.assert_close(found, null + scale * (conditional - null))
    unconditional = guided(Counting(), s, None, 3.0)(z, 400)
    torch.testing.assert_close(unconditional, null)


# --- randomness and shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "ddim", "ddpm"])
def test_a_sample_does_not_depend_on_its_batch(solver):
    s = schedule()

    def sample(numbers):
        generators = [torch.Generator().manual_seed(100 + i) for i in numbers]
        return draw(gaussian_denoiser(s), s, None, (len(numbers), *SHAPE[1:]), solver, 10, generator=generators)

    together = sample([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(sample([i])[0], together[i])
    torch.testing.assert_close(sample([2, 0]), together[[2, 0]])
    assert float((together[0] - together[1]).abs().max()) > 0.1


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "ddim", "ddpm"])
def test_one_generator_repeats(solver):
    s = schedule()

    def sample(seed):
        return draw(gaussian_denoiser(s), s, None, SHAPE, solver, 10, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1).shape == SHAPE and sample(1).dtype == torch.float32


def test_noise_is_standard_normal():
    for generator in (torch.Generator().manual_seed(5), [torch.Generator().manual_seed(i) for i in range(4)], None):
        z = gaussian((4, 8, 10, 11, 12), generator)
        assert abs(float(z.mean())) < 0.03 and float(z.std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("solver", [ddim, dpm_solver_pp_2m, dpm_solver_pp_3m, ddpm])
def test_any_number_of_axes(solver, shape):
    s = schedule(steps=50)
    assert solver(gaussian_model(s), noise(shape), s, 5).shape == shape


@pytest.mark.parametrize("solver", [ddim, dpm_solver_pp_2m, dpm_solver_pp_3m, ddpm])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(solver, steps):
    """One step is the model's answer at the noisiest t; more come nearer to the truth."""
    s, z = schedule("ddpm_linear"), noise()
    calls = []
    found = solver(gaussian_model(s), z, s, steps=steps, callback=lambda t, value, x0: calls.append((t, value, x0)))
    spacing = "logsnr" if solver in (dpm_solver_pp_2m, dpm_solver_pp_3m) else "time"
    assert [t for t, *_ in calls] == time_grid(s, steps, spacing)
    assert torch.equal(calls[0][1], z)
    assert torch.equal(calls[-1][2], found)
    assert abs(float(found.mean()) - MEAN) < 0.1


def test_nothing_is_clipped():
    """Latents far outside [-1, 1] come out as they are."""
    s = schedule()
    for solver in (ddim, dpm_solver_pp_2m, dpm_solver_pp_3m, ddpm):
        found = solver(lambda z, t: torch.full_like(z, 40.0), noise(), s, 10)
        torch.testing.assert_close(found, torch.full(SHAPE, 40.0, dtype=torch.float64))
