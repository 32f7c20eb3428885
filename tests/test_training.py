"""The training loop: a resumed run is the same run, and nothing bad is ever kept."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from difr3ct_core.checkpoints import differences, read_log, read_log_rows, seconds_trained
from difr3ct_core.files import InputError, read_safetensors
from difr3ct_core.presets import TrainPreset, VQGANPreset
from difr3ct_core.training import Opponent, TrainingError, fit, learning_rate
from difr3ct_core.vqgan import VQGAN

SETTINGS = TrainPreset(steps=24, batch_size=2, lr=3e-3, warmup_steps=4, ema_decay=0.9, log_every=3, validate_every=5)
FINGERPRINT = {"kind": "toy", "training": {"lr": 3e-3, "betas": (0.9, 0.999)}}


def toy(seed: int = 0) -> VQGAN:
    """A real model of the project with everything that can go wrong: buffers, a codebook, random restarts."""
    torch.manual_seed(seed)
    return VQGAN(VQGANPreset(base_channels=4, codebook_size=32, latent_channels=3, restart_below=0.5, groups=2))


def toy_loss(model: nn.Module):
    def loss_of_step(step, generator, part):
        coarse = torch.randn(2, 1, 2, 3, 4, generator=generator)
        volume = nn.functional.interpolate(coarse[part], scale_factor=4.0, mode="trilinear").tanh()
        return model.loss(volume, generator)

    return loss_of_step


@torch.no_grad()
def validate(average: nn.Module) -> dict[str, float]:
    return {"val": float(next(average.parameters()).sum())}


def train(folder: Path, stop_after: int | None = None, settings: TrainPreset = SETTINGS, **more) -> nn.Module:
    model = toy()
    arguments = {"fingerprint": FINGERPRINT, "label": "toy", "seed": 5, "validate": validate, **more}
    return fit(model, toy_loss(model), settings, folder, stop_after=stop_after, **arguments)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_run(folder: Path, other: Path) -> None:
    assert sorted(files(folder)) == sorted(files(other)) == ["checkpoint.safetensors", "log.csv"]
    tensors, metadata = read_safetensors(folder / "checkpoint.safetensors")
    others, other_metadata = read_safetensors(other / "checkpoint.safetensors")
    assert metadata.pop("seconds") > 0 and other_metadata.pop("seconds") > 0  # the one thing that may differ
    assert metadata == other_metadata and sorted(tensors) == sorted(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert (folder / "log.csv").read_text() == (other / "log.csv").read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder)
    return folder


# --- resume ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_everything(straight):
    tensors, metadata = read_safetensors(straight / "checkpoint.safetensors")
    assert metadata["step"] == 24
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"model", "average", "optimiser"}
    assert any(name.endswith("exp_avg_sq") for name in tensors)
    assert "model.codebook.initialised" in tensors


def test_time_is_counted_over_all_starts(tmp_path):
    """Not since the last one: a training that was stopped has cost what both its parts took."""
    folder, found = tmp_path / "run", []
    for wait in (0.2, 0.02):
        loss = toy_loss(model := toy())

        def slow(step, generator, part, loss=loss, wait=wait):
            time.sleep(wait)
            return loss(step, generator, part)

        fit(model, slow, SETTINGS, folder, FINGERPRINT, "toy", 5, stop_after=6)
        found.append(seconds_trained(folder))
    assert found[0] >= 6 * 0.2 and found[1] >= found[0] + 6 * 0.02
    with pytest.raises(InputError, match=r"checkpoint\.safetensors"):
        seconds_trained(tmp_path / "nowhere")


@pytest.mark.parametrize("parts", [(1,), (7,), (7, 1, 9), (23,)])
def test_resume_is_bit_for_bit(straight, tmp_path, parts):
    """Weights, moving average, optimiser, codebook and log are those of the run that was never stopped."""
    for part in parts:
        train(tmp_path / "run", stop_after=part)
    best = train(tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")
    again = train(straight)  # finished: nothing to do
    for (name, a), b in zip(best.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_global_random_state_does_not_matter(straight, tmp_path):
    train(tmp_path / "run", stop_after=9)
    model = toy()
    torch.manual_seed(12345)
    torch.rand(7)
    fit(model, toy_loss(model), SETTINGS, tmp_path / "run", FINGERPRINT, "toy", 5, validate)
    assert_same_run(straight, tmp_path / "run")


def test_the_seed_matters(straight, tmp_path):
    train(tmp_path / "run", seed=6)
    ours, _ = read_safetensors(straight / "checkpoint.safetensors")
    other, _ = read_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    assert not torch.equal(ours["model.decoder.layers.0.weight"], other["model.decoder.layers.0.weight"])


KILLED = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import dataclasses, test_training as t
settings = dataclasses.replace(t.SETTINGS, checkpoint_every_s=0.0)
child = os.fork()  # the run that nothing disturbs, with as many threads: their number decides how sums are rounded
if child == 0:
    t.train(Path(sys.argv[3]), settings=settings)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
kills = 0
for delay in (0.05, 0.15, 0.31, 0.23, None):
    child = os.fork()  # no threads run yet here
    if child == 0:
        t.train(Path(sys.argv[1]), settings=settings)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    kills += os.WIFSIGNALED(status)
    checkpoint = Path(sys.argv[1]) / "checkpoint.safetensors"
    if checkpoint.exists():
        print("step", t.read_safetensors(checkpoint)[1]["step"])
print("kills", kills, "status", status)
"""


def test_kill_9_at_random_moments(tmp_path):
    """Checkpoints after every step, killed again and again: the run ends in the same files."""
    folder, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(Path(__file__).parent), str(undisturbed)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    *steps, last = child.stdout.split("\n")[:-1]
    assert last in ("kills 3 status 0", "kills 4 status 0"), child.stdout
    assert steps == sorted(steps, key=lambda line: int(line.split()[1]))  # never backwards
    assert_same_run(undisturbed, folder)


def test_a_log_ahead_of_its_checkpoint_is_cut(straight, tmp_path):
    """Killed between the two writes: the log knows rows which the checkpoint does not."""
    folder = tmp_path / "run"
    train(folder, stop_after=6)
    checkpoint = (folder / "checkpoint.safetensors").read_bytes()
    train(folder, stop_after=9)
    (folder / "checkpoint.safetensors").write_bytes(checkpoint)
    train(folder)
    assert_same_run(straight, folder)


# --- refusal ---------------------------------------------------------------------------------------------------


def broken_from(step_of_nan: int, where: str):
    """A toy whose loss, or only its gradient, is not finite from one step on."""

    def loss_of_step_for(model):
        plain = toy_loss(model)

        def loss_of_step(step, generator, part):
            loss, values = plain(step, generator, part)
            if step >= step_of_nan:
                weight = next(model.parameters()).flatten()[0]
                loss = loss * math.nan if where == "loss" else loss + (weight - weight.detach()).abs().sqrt()
            return loss, values

        return loss_of_step

    return loss_of_step_for


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("checkpoint_every_s", [0.0, 1000.0])
def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path, where, checkpoint_every_s):
    """An infinite gradient with a finite loss must not reach the weights, or the checkpoint after it is ruined."""
    folder = tmp_path / "run"
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=checkpoint_every_s)
    train(folder, stop_after=4, settings=settings)
    before = files(folder)
    model = toy()
    for _ in range(2):  # and again after the resume
        with pytest.raises(TrainingError, match=rf"run: the {where}.* of step 7 is .*finite.*learning rate") as caught:
            fit(model, broken_from(7, where)(model), settings, folder, FINGERPRINT, "toy", 5)
        assert str(folder) in str(caught.value)
    tensors, metadata = read_safetensors(folder / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    if checkpoint_every_s:
        assert files(folder) == before
    else:
        assert metadata["step"] == 7


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "run"
    train(folder, stop_after=2)
    before = files(folder)
    other = {"kind": "toy", "training": {"lr": 1e-4, "betas": (0.9, 0.999)}}
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: was made with other.*training\.lr: found 0\.003"):
        train(folder, fingerprint=other)
    assert files(folder) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_checkpoint_is_named(tmp_path, share):
    folder = tmp_path / "run"
    train(folder, stop_after=2)
    path = folder / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"checkpoint\.safetensors"):
        train(folder)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    train(tmp_path / "run", stop_after=2)
    model = nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: the weights do not fit Linear"):
        fit(
            model,
            lambda step, generator, part: (model.weight.sum(), {}),
            SETTINGS,
            tmp_path / "run",
            FINGERPRINT,
            "toy",
            5,
        )


def test_differences():
    found, expected = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}, {"a": {"b": 2, "c": (1, 2)}, "d": "x", "e": None}
    assert differences(found, expected) == "a.b: found 1, now 2"
    assert differences(found, found) == ""
    many = differences({str(i): i for i in range(9)}, {})
    assert many.count("found") == 3  # a few are enough
    assert "found None" in differences(None, found)


# --- numbers ---------------------------------------------------------------------------------------------------


def test_learning_rate():
    constant = TrainPreset(steps=100, batch_size=1, lr=0.5, lr_decay="constant")
    assert [learning_rate(constant, step) for step in (0, 50, 99)] == [0.5, 0.5, 0.5]
    cosine = dataclasses.replace(constant, lr_decay="cosine")
    for step, expected in ((0, 0.5), (25, 0.25 * (1 + math.sqrt(0.5))), (50, 0.25), (75, 0.25 * (1 - math.sqrt(0.5)))):
        assert learning_rate(cosine, step) == pytest.approx(expected, rel=1e-12)
    assert 0 < learning_rate(cosine, 99) < 1e-3
    warm = dataclasses.replace(constant, warmup_steps=10)
    assert [learning_rate(warm, step) for step in (0, 4, 9, 10)] == pytest.approx([0.05, 0.25, 0.5, 0.5])
    late = dataclasses.replace(constant, lr_decay="late_linear")
    assert [learning_rate(late, step) for step in (0, 50, 75, 99)] == pytest.approx([0.5, 0.5, 0.25, 0.01])
    tenth = dataclasses.replace(constant, lr_decay="late_tenth")
    assert [learning_rate(tenth, step) for step in (0, 49, 50, 99)] == pytest.approx([0.5, 0.5, 0.05, 0.05])


class Ramp(nn.Module):
    """One weight w with loss w: plain Adam moves it by exactly the learning rate a step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))


def ramp(folder: Path, settings: TrainPreset) -> tuple[Ramp, Ramp]:
    model = Ramp()

    def loss_of_step(step, generator, part):
        model.count.fill_(step)
        return -model.w.sum(), {}

    return model, fit(model, loss_of_step, settings, folder, {}, "ramp", 0)


def test_moving_average_closed_form(tmp_path):
    """w_k = k·lr, averaged with decay min(0.9, (1 + k)/(10 + k)); buffers are copied, not averaged."""
    settings = TrainPreset(steps=300, batch_size=1, lr=0.01, lr_decay="constant", ema_decay=0.9, grad_clip=10.0)
    model, average = ramp(tmp_path / "run", settings)
    assert float(model.w.detach()) == pytest.approx(3.0, rel=1e-4)
    expected = 0.0
    for k in range(300):
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * 0.01 * (k + 1)
    assert float(average.w.detach()) == pytest.approx(expected, rel=1e-6)
    # In the steady state the average lags by decay/(1 - decay) = 9 steps.
    assert float((model.w - average.w).detach()) == pytest.approx(9 * 0.01, rel=1e-3)
    assert float(average.count) == 299


def test_without_averaging_the_model_itself_is_returned(tmp_path):
    settings = TrainPreset(steps=10, batch_size=1, lr=0.01, ema_decay=0.0)
    model, result = ramp(tmp_path / "run", settings)
    assert result is model and not result.training
    assert not any(name.startswith("average") for name in read_safetensors(tmp_path / "run/checkpoint.safetensors")[0])
    _, resumed = ramp(tmp_path / "run", settings)
    assert torch.equal(resumed.w, model.w)


def test_gradients_are_clipped(tmp_path):
    """The log has the norm before clipping; Adam's first moment has the clipped gradient."""
    model = nn.Linear(3, 1, bias=False)
    settings = TrainPreset(steps=1, batch_size=1, lr=0.1, grad_clip=0.5, log_every=1)
    fit(model, lambda step, generator, part: (1e3 * model.weight.sum(), {}), settings, tmp_path / "run", {}, "clip", 0)
    assert read_log(tmp_path / "run", "grad_norm")[1] == [pytest.approx(1e3 * math.sqrt(3), rel=1e-5)]
    tensors, _ = read_safetensors(tmp_path / "run" / "checkpoint.safetensors")
    assert float(tensors["optimiser.0.exp_avg"].norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)


# --- log -------------------------------------------------------------------------------------------------------


def test_log(straight):
    steps, losses = read_log(straight, "loss")
    assert steps == [*range(0, 24, 3), 23]
    assert all(math.isfinite(value) for value in losses)
    assert read_log(straight, "val")[0] == [4, 9, 14, 19, 23]  # every 5 steps, and at the end
    names = set(read_log_rows(straight / "log.csv")[0])
    assert names == {"step", "loss", "grad_norm", "l1", "commitment", "perplexity", "val"}
    with pytest.raises(InputError, match=r"log\.csv: has no values in column 'psnr'"):
        read_log(straight, "psnr")
    with pytest.raises(InputError, match=r"nowhere.*log\.csv: no such file"):
        read_log(straight.parent / "nowhere", "loss")


def test_validation_sees_the_average_in_evaluation_mode(tmp_path):
    modes = []
    model = toy()
    fit(
        model, toy_loss(model), SETTINGS, tmp_path / "run", FINGERPRINT, "toy", 5,
        lambda average: modes.append((average is model, average.training, model.training)) or {},
    )  # fmt: skip
    assert set(modes) == {(False, False, True)}


# --- parts of a batch, opponents -----------------------------------------------------------------------------------


class Guess(nn.Module):
    """A number, and a critic that learns how far it is from 3."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))


def duel(folder: Path, stop_after: int | None = None) -> tuple[nn.Module, Guess]:
    """The model minimises (weight - critic)², the critic (critic - 3)² + weight: its optimum ignores the model."""
    torch.manual_seed(0)
    model, critic = Guess(0.0), Guess(1.0)
    left: dict[str, torch.Tensor] = {}

    def loss_of_step(step, generator, part):
        assert not critic.weight.requires_grad
        left["fake"] = model.weight.detach()
        return (model.weight - critic.weight).square(), {}

    def against():
        assert critic.weight.requires_grad
        return (critic.weight - 3).square() + left["fake"], {"critic": critic.weight.detach()}

    settings = TrainPreset(steps=400, batch_size=1, lr=0.05, lr_decay="constant", ema_decay=0.0, log_every=100)
    done = fit(model, loss_of_step, settings, folder, {}, "duel", 0, None, stop_after, Opponent(critic, against))
    return done, critic


def test_an_opponent_has_an_optimiser_of_its_own(tmp_path):
    model, critic = duel(tmp_path / "run")
    assert critic.weight.item() == pytest.approx(3.0, abs=0.02)  # the model's loss did not pull at it
    assert model.weight.item() == pytest.approx(3.0, abs=0.05)
    assert float(read_log(tmp_path / "run", "critic")[1][0]) == 1.0


def test_resume_with_an_opponent_is_bit_for_bit(tmp_path):
    duel(tmp_path / "straight")
    for _ in range(3):
        duel(tmp_path / "parts", stop_after=90)
    duel(tmp_path / "parts")
    assert_same_run(tmp_path / "straight", tmp_path / "parts")
    tensors, _ = read_safetensors(tmp_path / "parts" / "checkpoint.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"model", "opponent", "optimiser", "opponent_optimiser"}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_curve_of_the_batch(tmp_path, accumulate):
    """Noise belongs to the row, not to the call: the mean over micro-batches is the loss of the batch."""
    curves = []
    for parts in (1, accumulate):
        settings = dataclasses.replace(SETTINGS, batch_size=4, accumulate=parts, log_every=1, steps=12)
        torch.manual_seed(3)
        model = nn.Conv3d(1, 1, 3)

        def loss_of_step(step, generator, part, model=model):
            return model(torch.randn(4, 1, 5, 6, 7, generator=generator)[part]).square().mean(), {}

        fit(model, loss_of_step, settings, tmp_path / str(parts), {}, "parts", 0)
        curves.append(read_log(tmp_path / str(parts), "loss")[1])
    assert len(curves[0]) == 12
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_batch_that_cannot_be_shared_out(tmp_path):
    settings = dataclasses.replace(SETTINGS, batch_size=4, accumulate=3)
    with pytest.raises(InputError, match=r"batch_size: found 4, expected a multiple of 3 = 1 processes x 3 micro"):
        train(tmp_path / "run", settings=settings)


def test_unknown_precision(tmp_path):
    with pytest.raises(InputError, match="precision: found 'fp16', expected 'auto', 'bf16' or 'fp32'"):
        train(tmp_path / "run", settings=dataclasses.replace(SETTINGS, precision="fp16"))


def test_bf16_trains_to_nearly_the_same(tmp_path):
    curves = []
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(SETTINGS, precision=precision, log_every=1)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv3d(1, 16, 3), nn.SiLU(), nn.Conv3d(16, 1, 3))

        def loss_of_step(step, generator, part, model=model):
            x = torch.randn(4, 1, 8, 9, 10, generator=generator)[part]
            return (model(x).float() - x[:, :, 2:-2, 2:-2, 2:-2]).square().mean(), {}

        fit(model, loss_of_step, settings, tmp_path / precision, {}, "bf16", 0)
        curves.append(read_log(tmp_path / precision, "loss")[1])
    assert curves[1] != curves[0]
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    assert curves[0][-1] < 0.7 * curves[0][0]
