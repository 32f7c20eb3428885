"""X2CT-GAN: axes against the projector, losses against closed forms, adversarial training, and a fit of one patient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_baselines import LANDMARK_VOXEL, X2CTGAN_SMALL, landmark_xrays, stir, without_gradient
from small_models import SMALL, patients
from torch import nn

from difr3ct_core.baselines.network import load_network, train_network
from difr3ct_core.baselines.x2ctgan import X2CTGAN, expand, projection_loss, to_patient
from difr3ct_core.checkpoints import read_log
from difr3ct_core.datasets import preset_views
from difr3ct_core.drr import project
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views, view_frame
from difr3ct_core.presets import TrainPreset

VIEWS = preset_views(SMALL, "2view")


def model(views=VIEWS, **changes) -> X2CTGAN:
    torch.manual_seed(0)
    return X2CTGAN(SMALL, dataclasses.replace(X2CTGAN_SMALL, **changes), views)


@pytest.mark.parametrize("angle", [0.0, 90.0, 180.0, 270.0])
def test_expanded_xrays_lie_on_their_rays(angle):
    """At quarter turns the projector is a sum along an axis: the x-ray, expanded, must be that sum at every voxel."""
    view = standard_views([angle], 6, 60.0)[0]
    mu = torch.rand(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.02
    image = project(mu, [view], 10.0)[:, 0]
    along = 4 if angle in (0.0, 180.0) else 3  # the ray runs along x or along y
    expected = 10 * mu.sum(along, keepdim=True).expand_as(mu)
    torch.testing.assert_close(expand(image, view), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("angle", [0.0, 90.0, 180.0, 270.0])
def test_depth_runs_away_from_the_source(angle):
    """The first layer of a view's volume is the one nearest to the source."""
    view = standard_views([angle], 5, 50.0)[0]
    faced = torch.zeros(1, 1, 5, 5, 5)
    faced[0, 0, :, 0] = 1.0
    z, y, x = torch.nonzero(to_patient(faced, view)[0, 0]).float().mean(0) - 2
    assert float(z) == 0
    assert torch.dot(torch.stack([x, y, z]), view_frame(view).to_source.float()) == pytest.approx(2.0)


def test_an_asymmetric_landmark_is_where_the_expanded_views_meet():
    images = landmark_xrays(VIEWS)
    meet = expand(images[:, :1], VIEWS[0]) * expand(images[:, 1:], VIEWS[1])
    peak = torch.nonzero(meet[0, 0] == meet.max())
    assert peak.tolist() == [list(LANDMARK_VOXEL)]


def test_a_network_that_copies_the_xrays_puts_them_in_place():
    """With branches that pass their x-ray on, connection C is the mean of the expanded x-rays."""

    class Copy(nn.Module):
        def forward(self, xray):
            return [xray[:, :, :, None].expand(-1, -1, -1, xray.shape[-1], -1)]

    class First(nn.Module):
        def forward(self, coarsest, skips):
            return [coarsest]

    network = model()
    network.branches = nn.ModuleList([Copy(), Copy()])
    network.fused, network.head = First(), nn.Identity()
    images = landmark_xrays(VIEWS) * SMALL.xray.scale
    volume = network(images)[0, 0]
    assert torch.nonzero(volume == volume.max()).tolist() == [list(LANDMARK_VOXEL)]


def test_projection_loss_is_the_mean_of_three_projections():
    a, b = torch.zeros(1, 1, 2, 3, 4), torch.zeros(1, 1, 2, 3, 4)
    a[0, 0, 1, 2, 3] = 24.0
    # Along an axis of n voxels the projection has one pixel of 24/n among 24/n pixels: mean 1 on each axis.
    assert float(projection_loss(a, b)) == pytest.approx(1.0)
    b[0, 0, 1, 2, 2] = 24.0  # shifted along x: the projection along x does not see it
    assert float(projection_loss(a, b)) == pytest.approx((2 + 2 + 0) / 3)


def test_losses_of_the_two_sides():
    """Least squares: a critic of constant score c gives the generator (c - 1)² and itself ½(c - 1)² + ½c²."""
    network = model()
    critic = network.critic()
    with torch.no_grad():
        last = critic.net.layers[-1][0]
        last.weight.zero_()
        last.bias.fill_(0.3)
    real, fake = torch.rand(2, 1, 16, 16, 16), torch.rand(2, 1, 16, 16, 16)
    assert float(critic.judge(real, fake, torch.rand(2, 2, 16, 16))) == pytest.approx(0.49, rel=1e-5)
    assert float(critic.loss()[0]) == pytest.approx(0.5 * 0.49 + 0.5 * 0.09, rel=1e-5)


@pytest.mark.parametrize("view_set", ["2view", "1view_frontal", "1view_lateral"])
def test_gradient_reaches_every_parameter_of_both_sides(view_set):
    two = patients(2).with_views(view_set)
    network = model(two.views)
    stir(network)
    critic = network.critic()
    loss, values = network.loss(two.unit(), two.xrays, torch.Generator(), slice(0, 2), 2, critic)
    critic.zero_grad()
    loss.backward()
    assert without_gradient(network) == []
    assert set(values) == {"voxel", "projection", "gan"}
    critic.zero_grad()
    network.zero_grad()
    critic.loss()[0].backward()
    assert without_gradient(critic) == []
    assert without_gradient(network) != []  # the critic's side does not train the generator


def test_the_critic_sees_the_xrays():
    network, critic = model(), model().critic()
    volume = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    one = patients(2).with_views("2view")
    scores = [critic.judge(volume, volume, one.xrays[i : i + 1] / 4) for i in range(2)]
    assert float(scores[0]) != pytest.approx(float(scores[1]), abs=1e-6)
    assert network.settings.gan_weight == 0.1


def test_it_overfits_one_patient_against_its_critic(tmp_path):
    one = patients(1).with_views("2view")
    training = TrainPreset(
        steps=120, batch_size=1, lr=2e-3, betas=(0.5, 0.99), lr_decay="late_linear", ema_decay=0.9, grad_clip=100.0,
        precision="fp32", log_every=5,
    )  # fmt: skip
    settings = dataclasses.replace(X2CTGAN_SMALL, training=training)
    network = train_network(X2CTGAN, one, SMALL, settings, tmp_path / "gan")
    truth, volume = one.unit(), network.reconstruct(one.xrays)
    assert float((volume - truth).square().mean()) < 0.2 * float((truth - truth.mean()).square().mean())
    for name in ("voxel", "projection", "gan", "critic"):
        steps, values = read_log(tmp_path / "gan", name)
        assert steps[-1] == 119 and all(value > 0 for value in values)
    loaded, _ = load_network(X2CTGAN, tmp_path / "gan")
    assert torch.equal(loaded.reconstruct(one.xrays), volume)


def test_a_killed_adversarial_training_goes_on_to_the_same_weights(tmp_path):
    four = patients(4).with_views("2view")
    whole = train_network(X2CTGAN, four, SMALL, X2CTGAN_SMALL, tmp_path / "whole")
    train_network(X2CTGAN, four, SMALL, X2CTGAN_SMALL, tmp_path / "parts", stop_after=2)
    parts = train_network(X2CTGAN, four, SMALL, X2CTGAN_SMALL, tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    with pytest.raises(InputError, match=r"at \[0.0, 45.0, 90.0, 135.0\]°, expected centred parallel views at 0°, 90°"):
        model(preset_views(SMALL, "4view"))
    with pytest.raises(InputError, match="found cone views"):
        model(standard_views("2view", 16, 320.0, "cone"))
    with pytest.raises(InputError, match="found 4 for 2D and 3 for 3D features, expected 3 of both, from 16 voxels"):
        model(widths=(8, 8, 16, 16))
    with pytest.raises(InputError, match=r"detector of \(8, 8\) pixels"):
        model(standard_views("2view", 8, 320.0))
    with pytest.raises(InputError, match=r"expected \(patient, 2, 16, 16\)"):
        model().reconstruct(patients(1).xrays)
