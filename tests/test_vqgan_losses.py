"""The judges of the autoencoder: closed forms of the losses, who learns from what, and what a distance measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import SMALL, patients
from torch import nn

from difr3ct_core import processes
from difr3ct_core.checkpoints import read_log
from difr3ct_core.files import InputError, read_safetensors, write_safetensors
from difr3ct_core.presets import VQGANPreset
from difr3ct_core.stages import train_vqgan
from difr3ct_core.vqgan_losses import (
    VGG16_LAYOUT,
    VGG16_TAPS,
    Critics,
    PatchDiscriminator,
    Perceptual,
    feature_matching,
    hinge_discriminator,
    hinge_generator,
    ramp,
    sharpness,
)
from difr3ct_core.weights import load_vqgan

ON = {"perceptual_weight": 4.0, "image_gan_weight": 1.0, "volume_gan_weight": 1.0, "feature_weight": 4.0}
PRESET = VQGANPreset(base_channels=8, critic_channels=8, critic_strides=2, gan_start=2, gan_ramp=4, **ON)
REAL_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "vgg16" / "vgg16_lpips.safetensors"


@pytest.fixture(scope="module")
def random_vgg(tmp_path_factory) -> Path:
    """A VGG16 of the right shapes whose weights are random: even such features tell pictures apart."""
    generator = torch.Generator().manual_seed(0)
    widths = [w for w in VGG16_LAYOUT if isinstance(w, int)]
    tensors = {}
    for i, width in enumerate(widths):
        before = 3 if i == 0 else widths[i - 1]
        tensors[f"conv.{i}.weight"] = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        tensors[f"conv.{i}.bias"] = torch.zeros(width)
    for i, tap in enumerate(VGG16_TAPS):
        tensors[f"lin.{i}"] = torch.rand(widths[tap], generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    write_safetensors(path, tensors, {})
    return path


def volumes(seed: int = 0, count: int = 2, size: int = 16) -> torch.Tensor:
    coarse = torch.randn(count, 1, 5, 6, 7, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size,) * 3, mode="trilinear").tanh()


# --- hinge, ramp, matching -------------------------------------------------------------------------------------


def test_hinge_closed_forms():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_generator(fake) == pytest.approx(2 / 3)
    sure = torch.full((5,), 1.5)
    assert hinge_discriminator(sure, -sure) == 0  # beyond the margin nothing is left to learn


def test_the_best_constant_score_of_equal_sides_costs_one():
    """Where real and fake cannot be told apart no score beats 0, whose loss is 1: the equilibrium of the game."""
    scores = torch.linspace(-3, 3, 61)
    losses = torch.stack([hinge_discriminator(s, s) for s in scores])
    assert losses.min() == pytest.approx(1.0)
    assert torch.allclose(losses[scores.abs() <= 1], torch.ones(()))


def test_ramp():
    preset = VQGANPreset(base_channels=8, gan_start=100, gan_ramp=10)
    assert [ramp(preset, step) for step in (0, 99, 100, 104, 109, 110, 10**6)] == [0, 0, 0.1, 0.5, 1, 1, 1]


def test_feature_matching():
    features = [torch.ones(2, 3), torch.zeros(2, 4), torch.tensor([9.0])]
    other = [torch.zeros(2, 3), torch.full((2, 4), 0.5), torch.tensor([-9.0])]
    assert feature_matching(features, features) == 0
    assert feature_matching(features, other) == pytest.approx(0.75)  # the scores, last, are left out


# --- discriminators --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_patch_sees_its_receptive_field_and_no_more(dimensions):
    """Without normalisation, which sees everything: 4 + 3·2 (+ 3·4 for each layer of stride 1 after two strides)."""
    critic = PatchDiscriminator(dimensions, 4, 2)
    for layer in critic.layers:
        for i, part in enumerate(layer):
            if isinstance(part, nn.GroupNorm):
                layer[i] = nn.Identity()
    x = torch.randn(1, 1, *[64] * dimensions, requires_grad=True)
    scores = critic(x)[-1]
    middle = (0, 0, *(edge // 2 for edge in scores.shape[2:]))
    (gradient,) = torch.autograd.grad(scores[middle], x)
    for axis in range(2, 2 + dimensions):
        others = [a for a in range(2 + dimensions) if a != axis]
        seen = gradient.abs().sum(others).nonzero()[:, 0]
        # Going back: 1 score, 4 (k4 s1), 4+3 (k4 s1), then strides 2: 2·7+2 = 16, 2·16+2 = 34.
        assert int(seen.max() - seen.min()) + 1 == 34


@pytest.mark.parametrize("size", [16, 17, 32])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_small_pictures_still_give_scores(dimensions, size):
    scores = PatchDiscriminator(dimensions, 4, 3)(torch.randn(2, 1, *[size] * dimensions))[-1]
    assert min(scores.shape[2:]) >= 3 and scores.shape[:2] == (2, 1)


def test_they_learn_to_tell_sharp_from_blurred():
    torch.manual_seed(0)
    critics = Critics(dataclasses.replace(PRESET, gan_start=0, gan_ramp=1, perceptual_weight=0.0))
    optimiser = torch.optim.Adam(critics.parameters(), lr=2e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(30):
        real = volumes(step) + 0.1 * torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(step))
        fake = F.avg_pool3d(real, 3, 1, 1)
        critics.judge(real, fake, step, torch.tensor([4, 9]))
        loss, values = critics.loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert set(values) == {"image_critic", "volume_critic"}
    assert losses[0] == pytest.approx(2.0, abs=0.6)  # two critics that know nothing
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


# --- who learns from what --------------------------------------------------------------------------------------


def test_gradients_reach_their_own_side_only(random_vgg):
    torch.manual_seed(0)
    critics = Critics(dataclasses.replace(PRESET, gan_start=0, gan_ramp=1), Perceptual(random_vgg))
    real = volumes()
    decoder = nn.Conv3d(1, 1, 3, padding=1)
    critics.requires_grad_(False)
    total, values = critics.judge(real, decoder(real), 5, torch.tensor([3, 8]))
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    assert all(p.grad is None for p in critics.parameters())
    assert {"perceptual", "image_gan", "volume_gan", "image_features", "volume_features"} == set(values)
    critics.requires_grad_(True)
    decoder.zero_grad(set_to_none=True)
    critics.loss()[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critics.parameters())
    weights = [p for name, p in critics.named_parameters() if name.endswith("weight")]
    assert all(p.grad.abs().sum() > 0 for p in weights)
    assert all(p.grad is None for p in decoder.parameters())


def test_the_total_is_the_weighted_sum(random_vgg):
    torch.manual_seed(0)
    preset = dataclasses.replace(PRESET, gan_start=10, gan_ramp=4)
    critics = Critics(preset, Perceptual(random_vgg))
    real, fake, slices = volumes(0), volumes(1), torch.tensor([2, 5])
    critics.requires_grad_(False)
    early, values = critics.judge(real, fake, 9, slices)
    assert set(values) == {"perceptual"} and critics.loss()[1] == {}
    assert early == pytest.approx(4 * float(values["perceptual"]))
    late, values = critics.judge(real, fake, 11, slices)
    adversarial = values["image_gan"] + values["volume_gan"]
    matching = values["image_features"] + values["volume_features"]
    assert late == pytest.approx(float(4 * values["perceptual"] + 0.5 * (adversarial + 4 * matching)), rel=1e-5)


# --- perceptual distance ---------------------------------------------------------------------------------------


def blurred(picture: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        picture = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return picture


@pytest.mark.parametrize("size", [16, 33])
def test_the_distance_is_one_of_pictures(random_vgg, size):
    """Zero only for equal pictures, symmetric, the same for a batch as for its members, and it grows with blur."""
    look = Perceptual(random_vgg)
    a = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    distances = [float(look(a, blurred(a, times))) for times in (0, 1, 2, 5)]
    assert distances[0] == 0 and distances == sorted(distances) and distances[1] > 1e-4
    assert float(look(blurred(a, 1), a)) == pytest.approx(distances[1], rel=1e-5)
    one_by_one = [float(look(a[i : i + 1], blurred(a[i : i + 1], 1))) for i in range(2)]
    assert sum(one_by_one) / 2 == pytest.approx(distances[1], rel=1e-4)


def test_nothing_of_vgg_is_trained_or_saved(random_vgg):
    critics = Critics(PRESET, Perceptual(random_vgg))
    assert critics.state_dict().keys() == Critics(PRESET).state_dict().keys()
    assert list(Perceptual(random_vgg).parameters()) == []


def test_weights_of_another_network_are_refused(random_vgg, tmp_path):
    tensors, _ = read_safetensors(random_vgg)
    tensors["conv.5.weight"] = tensors["conv.5.weight"][:, :100]
    write_safetensors(tmp_path / "other.safetensors", tensors, {})
    with pytest.raises(InputError, match=r"other\.safetensors: conv\.5\.weight is \(256, 100, 3, 3\), expected"):
        Perceptual(tmp_path / "other.safetensors")


@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="data/vgg16 is missing: run data_scripts/fetch_vgg16.py")
def test_real_weights_have_edge_detectors_first():
    """What every trained VGG16 has: first filters that answer to edges, some to upright, some to level ones."""
    look = Perceptual(REAL_WEIGHTS)
    kernels = look.conv_0_weight
    down = (kernels[:, :, 2] - kernels[:, :, 0]).sum((1, 2)).abs()
    right = (kernels[:, :, :, 2] - kernels[:, :, :, 0]).sum((1, 2)).abs()
    assert (down > 3 * right).sum() >= 4 and (right > 3 * down).sum() >= 4
    # The mixed-up axes of a wrong layout would make the sum over a kernel's plane as large as over its channels.
    assert all((getattr(look, f"lin_{i}") >= 0).all() for i in range(5))  # LPIPS's weights are non-negative
    step = torch.zeros(1, 1, 32, 32)
    step[..., 16:] = 1
    assert float(look(step, blurred(step, 2))) > 5 * float(look(step, 0.98 * step))


# --- in training -----------------------------------------------------------------------------------------------


def test_a_training_with_everything_on(random_vgg, tmp_path):
    preset = SMALL.replace(
        vqgan={**ON, "gan_start": 10, "gan_ramp": 10, "critic_channels": 8, "critic_strides": 2},
        train_vqgan={"steps": 40, "batch_size": 2, "log_every": 1, "warmup_steps": 4},
    )
    model = train_vqgan(patients(), preset, tmp_path / "run", vgg16=random_vgg)
    _, l1 = read_log(tmp_path / "run", "l1")
    assert sum(l1[-5:]) < 0.8 * sum(l1[:5])
    for column, first in (("perceptual", 0), ("image_gan", 10), ("volume_critic", 10), ("volume_features", 10)):
        steps, values = read_log(tmp_path / "run", column)
        assert steps == list(range(first, 40)) and all(abs(v) < 100 for v in values)
    assert read_safetensors(tmp_path / "run" / "weights.safetensors")[1]["perceptual"] is True
    assert load_vqgan(tmp_path / "run")[0].state_dict().keys() == model.state_dict().keys()  # no critics inside


@pytest.mark.parametrize("off", ["image", "volume"])
def test_a_discriminator_of_weight_zero_is_off(off):
    """Neither its score nor its features reach the autoencoder, and it does not learn."""
    on = "volume" if off == "image" else "image"
    preset = dataclasses.replace(PRESET, gan_start=0, gan_ramp=1, perceptual_weight=0.0, **{f"{off}_gan_weight": 0.0})
    torch.manual_seed(0)
    critics = Critics(preset)
    total, values = critics.judge(volumes(0), volumes(1), 5, torch.tensor([2, 5]))
    assert set(values) == {f"{on}_gan", f"{on}_features"}
    assert float(total.detach()) == pytest.approx(float(values[f"{on}_gan"] + 4 * values[f"{on}_features"]), rel=1e-5)
    loss, values = critics.loss()
    loss.backward()
    assert set(values) == {f"{on}_critic"}
    silent, learns = (critics.slices, critics.volumes) if off == "image" else (critics.volumes, critics.slices)
    assert all(p.grad is None for p in silent.parameters()) and all(p.grad is not None for p in learns.parameters())


def test_resume_with_discriminators_is_bit_for_bit(tmp_path):
    """Stops before, at and after the discriminators' start: their weights and their optimiser's state are kept."""
    preset = SMALL.replace(
        vqgan={
            **ON,
            "perceptual_weight": 0.0,
            "gan_start": 2,
            "gan_ramp": 3,
            "critic_channels": 8,
            "critic_strides": 2,
        },
        train_vqgan={"steps": 7, "batch_size": 2, "log_every": 1},
    )
    train_vqgan(patients(), preset, tmp_path / "straight")
    for stop in (1, 1, 3, None):
        train_vqgan(patients(), preset, tmp_path / "parts", stop_after=stop)
    one, other = (read_safetensors(tmp_path / run / "checkpoint.safetensors")[0] for run in ("straight", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.startswith("opponent_optimiser.") for name in one)
    assert (tmp_path / "straight" / "log.csv").read_text() == (tmp_path / "parts" / "log.csv").read_text()


def test_several_processes_before_the_discriminators_start(monkeypatch):
    """Nothing to average yet, and so no message between the processes."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    critics = Critics(PRESET)
    processes.average_gradients(critics.parameters())
    assert all(p.grad is None for p in critics.parameters())


def test_without_vgg16_the_run_says_so(tmp_path, capsys):
    preset = SMALL.replace(vqgan={**ON, "critic_channels": 8, "critic_strides": 2})
    train_vqgan(patients(), preset, tmp_path / "run")
    assert "the perceptual loss is off, VGG16 is missing; data_scripts/fetch_vgg16.py" in capsys.readouterr().out
    assert read_safetensors(tmp_path / "run" / "weights.safetensors")[1]["perceptual"] is False
    with pytest.raises(InputError, match="has no values in column 'perceptual'"):
        read_log(tmp_path / "run", "perceptual")


def test_sharpness():
    truth = volumes()
    assert torch.allclose(sharpness(truth, truth), torch.ones(2))
    assert torch.allclose(sharpness(truth / 2, truth), torch.full((2,), 0.25))
    assert (sharpness(F.avg_pool3d(truth, 3, 1, 1), truth) < 0.95).all()
