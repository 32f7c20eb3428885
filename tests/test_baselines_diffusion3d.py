"""3D Diffusion: the latent model on voxels; a condition in the right place, samples, learning one patient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_baselines import DIFFUSION_SMALL, LANDMARK_VOXEL, landmark_xrays, stir, without_gradient
from small_models import SMALL, patients
from torch import nn

from difr3ct_core.baselines.diffusion3d import VoxelDiffusion
from difr3ct_core.baselines.network import load_network, train_network
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views
from difr3ct_core.presets import TrainPreset

VIEWS = preset_views(SMALL, "2view")


def model(views=VIEWS, preset=SMALL) -> VoxelDiffusion:
    torch.manual_seed(0)
    return VoxelDiffusion(preset, DIFFUSION_SMALL, views)


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_the_condition_lies_on_the_grid_of_the_volume(mode):
    """With features that are the x-rays themselves, an asymmetric landmark is the brightest voxel of the condition."""

    class Copy(nn.Module):
        down = (None,)

        def forward(self, images):
            return images[:, :1]

    views = standard_views([0.0, 45.0, 90.0, 135.0], 16, SMALL.volume.fov_mm, mode)
    network = model(views)
    network.fusion.net = Copy()
    condition = network.condition(landmark_xrays(views))
    assert condition.shape == (1, 1, *SMALL.volume.shape)
    place = torch.nonzero(condition[0, 0] == condition.max())[0]
    assert (place - torch.tensor(LANDMARK_VOXEL)).abs().max() <= (0 if mode == "parallel" else 1)


def test_gradient_reaches_every_parameter():
    network, two = model(), patients(2).with_views("2view")
    stir(network)
    generator = torch.Generator().manual_seed(1)
    loss, _ = network.loss(two.unit(), two.xrays, generator, slice(0, 2), 2)
    loss.backward()
    assert without_gradient(network) == []


def test_samples_do_not_depend_on_their_batch():
    two = patients(2).with_views("2view")
    network = model()
    stir(network)
    together = network.samples(two.xrays, 3, seed=5)
    assert together.shape == (2, 3, *SMALL.volume.shape) and float(together.abs().max()) <= 1
    network.settings = dataclasses.replace(network.settings, sample_batch=2)
    torch.testing.assert_close(network.samples(two.xrays, 3, seed=5), together, atol=1e-4, rtol=1e-3)
    assert not torch.equal(together[0, 0], together[0, 1])
    network.preset = SMALL.replace(sampling={"n_samples": 3})
    torch.testing.assert_close(network.reconstruct(two.xrays, 5)[:, 0], together.mean(1), atol=1e-4, rtol=1e-3)


def test_it_learns_one_patient_and_is_loaded_again(tmp_path):
    one = patients(1).with_views("2view")
    training = TrainPreset(steps=150, batch_size=4, lr=4e-3, warmup_steps=10, precision="fp32", ema_decay=0.95)
    settings = dataclasses.replace(DIFFUSION_SMALL, training=training)
    network = train_network(VoxelDiffusion, one, SMALL, settings, tmp_path / "voxels")
    truth, volume = one.unit(), network.reconstruct(one.xrays)
    # A hundred and fifty steps explain half of the patient; the slow test below goes on.
    assert float((volume - truth).square().mean()) < 0.6 * float((truth - truth.mean()).square().mean())
    loaded, metadata = load_network(VoxelDiffusion, tmp_path / "voxels")
    assert torch.equal(loaded.reconstruct(one.xrays), volume)
    assert metadata["fingerprint"]["diffusion"]["schedule"] == SMALL.diffusion.schedule


@pytest.mark.slow
def test_it_overfits_one_patient(tmp_path):
    one = patients(1).with_views("2view")
    training = TrainPreset(steps=500, batch_size=4, lr=4e-3, warmup_steps=10, precision="fp32", ema_decay=0.98)
    settings = dataclasses.replace(DIFFUSION_SMALL, training=training)
    truth = one.unit()
    volume = train_network(VoxelDiffusion, one, SMALL, settings, tmp_path / "voxels").reconstruct(one.xrays)
    assert float((volume - truth).square().mean()) < 0.05 * float((truth - truth.mean()).square().mean())


def test_bad_input():
    with pytest.raises(InputError, match=r"expected \(patient, 2, 16, 16\)"):
        model().reconstruct(patients(1).xrays)
