"""The forward process against closed forms, and the training loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from difr3ct_core.diffusion import LatentDiffusion, Schedule, diffusion_loss
from difr3ct_core.files import InputError
from difr3ct_core.geometry import View
from difr3ct_core.presets import DiffusionPreset, get_preset

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside diffusers
BOTH = pytest.mark.parametrize("name", ["chen_linear", "ddpm_linear"])
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v"])
SHAPE = (2, 3, 4, 5)  # channel, z, y, x


def schedule(name: str = "chen_linear", prediction: str = "epsilon", steps: int = 1000) -> Schedule:
    return Schedule(DiffusionPreset(timesteps=steps, schedule=name, prediction=prediction))


@BOTH
@pytest.mark.parametrize("steps", [2, 100, 1000, 4000])
def test_gamma_falls_and_stays_inside(name, steps):
    gamma = schedule(name, steps=steps).gamma
    assert gamma.shape == (steps,) and gamma.dtype == torch.float64
    assert (gamma.diff() < 0).all()
    assert float(gamma[-1]) > 0 and float(gamma[0]) < 1


def test_chen_linear_is_one_minus_t():
    gamma = schedule(steps=999).gamma
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]  # without the ends, where λ is infinite
    torch.testing.assert_close(gamma, 1 - t, atol=1e-15, rtol=0)


def test_ddpm_linear_is_ho_et_als():
    gamma = schedule("ddpm_linear").gamma
    product, expected = 1.0, []
    for t in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(product)
    torch.testing.assert_close(gamma, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(gamma[-1]) == pytest.approx(4.04e-5, rel=0.01)
    # Another T is the same process in other steps: the same noise at the end.
    assert float(schedule("ddpm_linear", steps=4000).gamma[-1]) == pytest.approx(float(gamma[-1]), rel=0.1)


def test_ddpm_linear_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    torch.testing.assert_close(schedule("ddpm_linear").gamma.float(), other.alphas_cumprod, rtol=1e-5, atol=0)


@pytest.mark.parametrize("field", ["schedule", "prediction"])
def test_unknown_names(field):
    with pytest.raises(InputError, match=rf"diffusion\.{field}: found 'cosinus', expected"):
        Schedule(dataclasses.replace(DiffusionPreset(), **{field: "cosinus"}))


@BOTH
def test_moments_of_the_noisy_latent(name):
    """q(z_t | z_0) = N(sqrt(γ) z_0, 1 - γ), and unit variance is kept when z_0 has it."""
    s = schedule(name)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    noise = torch.randn(n, *SHAPE, generator=generator)
    for t in (0, 300, 999):
        steps = torch.full((n,), t)
        z = s.noisy(torch.full((n, *SHAPE), 1.7), steps, noise)
        gamma = float(s.gamma[t])
        assert float(z.mean()) == pytest.approx(1.7 * gamma**0.5, abs=0.01)
        assert float(z.var()) == pytest.approx(1 - gamma, rel=0.01)
        z = s.noisy(torch.randn(n, *SHAPE, generator=generator), steps, noise)
        assert float(z.var()) == pytest.approx(1.0, rel=0.01)


@BOTH
@PREDICTIONS
def test_target_and_to_x0_are_inverse_at_every_step(name, prediction):
    s = schedule(name, prediction)
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(1)
    z0 = torch.randn(1000, *SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(1000, *SHAPE, generator=generator, dtype=torch.float64)
    back = s.to_x0(s.noisy(z0, t, noise), t, s.target(z0, t, noise))
    torch.testing.assert_close(back, z0, rtol=0, atol=1e-11)


def test_v_is_the_velocity_of_salimans_and_ho():
    """With sqrt(γ) = cos φ the noisy latent turns in the plane of z_0 and ε, and v is dz/dφ."""
    s = schedule(prediction="v")
    generator = torch.Generator().manual_seed(2)
    z0, noise = torch.randn(2, 4, *SHAPE, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 250, 600, 990])
    phi = s.gamma[t].sqrt().acos().view(4, 1, 1, 1, 1).requires_grad_()
    z = torch.func.jvp(lambda p: p.cos() * z0 + p.sin() * noise, (phi.detach(),), (torch.ones_like(phi),))[1]
    torch.testing.assert_close(s.target(z0, t, noise), z)


def test_the_step_of_each_sample_is_its_own():
    s = schedule()
    z0, t = torch.ones(3, *SHAPE), torch.tensor([0, 500, 999])
    z = s.noisy(z0, t, torch.zeros_like(z0))
    torch.testing.assert_close(z[:, 0, 0, 0, 0].double(), s.gamma[t].sqrt(), atol=1e-6, rtol=0)
    torch.testing.assert_close(z, z[:, :1, :1, :1, :1].expand_as(z))


def test_gamma_stays_double_when_the_model_is_moved():
    model = torch.nn.ModuleDict({"schedule": schedule(), "layer": torch.nn.Linear(2, 2)})
    before = model["schedule"].gamma.clone()
    model.to(torch.bfloat16)
    assert model["layer"].weight.dtype == torch.bfloat16
    assert torch.equal(model["schedule"].gamma, before)
    assert "schedule.gamma" not in model.state_dict()  # the preset defines it
    z = model["schedule"].noisy(torch.ones(1, *SHAPE, dtype=torch.bfloat16), torch.tensor([5]), torch.zeros(1, *SHAPE))
    assert z.shape == (1, *SHAPE)


@BOTH
@PREDICTIONS
def test_the_perfect_denoiser_has_no_loss(name, prediction):
    s = schedule(name, prediction)
    z0 = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def perfect(z, t, condition):
        alpha, sigma = s.gamma[t].sqrt().view(-1, 1, 1, 1, 1), (1 - s.gamma[t]).sqrt().view(-1, 1, 1, 1, 1)
        noise = (z - alpha * z0) / sigma
        return noise if prediction == "epsilon" else alpha * noise - sigma * z0

    loss = diffusion_loss(perfect, s, z0, None, 0.1, torch.Generator().manual_seed(4))
    assert float(loss) < 1e-20
    off = diffusion_loss(lambda *args: perfect(*args) + 0.5, s, z0, None, 0.1, torch.Generator().manual_seed(4))
    assert float(off) == pytest.approx(0.25)


def test_the_zero_denoiser_has_the_variance_of_the_noise():
    z0 = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(5))
    loss = diffusion_loss(lambda z, t, c: torch.zeros_like(z), schedule(), z0, None, 0.0, torch.Generator())
    assert float(loss) == pytest.approx(1.0, rel=0.02)


def _conditions_seen(dropout: float, n: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    seen = {}

    def record(z, t, condition):
        seen["condition"], seen["t"] = condition, t
        return torch.zeros_like(z)

    condition = torch.arange(1.0, n + 1).view(n, 1, 1, 1, 1).expand(n, 2, 1, 2, 3)
    diffusion_loss(record, schedule(), torch.zeros(n, 1, 1, 2, 3), condition, dropout, torch.Generator().manual_seed(6))
    return seen["condition"], seen["t"]


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
def test_condition_drop_out(dropout):
    """Whole conditions are dropped, with the stated probability, and the others stay as they are."""
    n = 4000
    condition, t = _conditions_seen(dropout)
    dropped = condition[:, 0, 0, 0, 0] == 0
    assert torch.equal(condition[dropped], torch.zeros_like(condition[dropped]))
    kept = torch.arange(1.0, n + 1).view(n, 1, 1, 1, 1).expand_as(condition)[~dropped]
    assert torch.equal(condition[~dropped], kept)
    if dropout in (0.0, 1.0):
        assert bool(dropped.all()) == (dropout == 1.0) and bool(dropped.any()) == (dropout == 1.0)
    else:
        # Four standard deviations of a binomial.
        assert abs(float(dropped.float().mean()) - dropout) < 4 * (dropout * (1 - dropout) / n) ** 0.5
    # Every step is drawn, evenly.
    assert int(t.min()) < 10 and int(t.max()) > 989
    assert abs(float(t.float().mean()) - 499.5) < 4 * 289 / n**0.5


def test_the_generator_decides_everything():
    z0 = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(7))

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return float(diffusion_loss(lambda z, t, c: 0.1 * z + c, schedule(), z0, z0, 0.5, generator))

    before = torch.random.get_rng_state()
    assert loss(1) == loss(1) != loss(2)
    assert torch.equal(before, torch.random.get_rng_state())  # the global stream is not touched


def test_the_models_loss_trains_both_networks_and_ignores_dropped_x_rays():
    preset = get_preset("tiny").replace(
        volume={"size": 16},
        xray={"detector_size": 16},
        fusion={"widths": (8, 8), "out_channels": 8},
        unet={"widths": (8, 16), "heads": 2, "head_channels": 4},
        diffusion={"condition_dropout": 0.0},
    )
    torch.manual_seed(0)
    model = LatentDiffusion(preset)
    torch.nn.init.normal_(model.unet.head[-1].weight, std=0.1)  # as after the first step; zero blocks all gradients
    views = tuple(View(angle, (16, 16), (20.0, 20.0)) for angle in (0.0, 90.0))
    generator = torch.Generator().manual_seed(8)
    latents, xrays = torch.randn(2, *preset.latent_shape, generator=generator), 4 * torch.rand(2, 2, 16, 16)
    loss, _ = model.loss(latents, xrays, views, torch.Generator().manual_seed(9))
    loss.backward()
    assert model.fusion.net.stem.weight.grad.abs().max() > 0
    assert model.unet.stem.weight.grad.abs().max() > 0
    other, _ = model.loss(latents, xrays.flip(0), views, torch.Generator().manual_seed(9))
    assert float(other.detach()) != float(loss.detach())

    always = LatentDiffusion(preset.replace(diffusion={"condition_dropout": 1.0}))
    always.load_state_dict(model.state_dict())
    values = [
        float(always.loss(latents, x, views, torch.Generator().manual_seed(9))[0].detach())
        for x in (xrays, xrays.flip(0))
    ]
    assert values[0] == values[1]
