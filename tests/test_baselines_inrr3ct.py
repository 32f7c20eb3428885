"""INRR3CT: features from the right rays, SIREN's statistics, memory, and a fit of one patient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_baselines import INRR3CT_SMALL, landmark, landmark_xrays, stir, without_gradient
from small_models import SMALL, patients

from difr3ct_core.baselines.inrr3ct import INRR3CT
from difr3ct_core.baselines.network import load_network, train_network
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError
from difr3ct_core.geometry import standard_views, voxel_centres
from difr3ct_core.implicit import SineLayers, fourier_features, sample_features
from difr3ct_core.presets import TrainPreset
from difr3ct_core.weights import training_history

VIEWS = preset_views(SMALL, "4view")


def model(views=VIEWS, **changes) -> INRR3CT:
    torch.manual_seed(0)
    return INRR3CT(SMALL, dataclasses.replace(INRR3CT_SMALL, **changes), views)


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_features_come_from_the_ray_of_the_point(mode):
    """The projector's image of a landmark, sampled at the landmark: its peak there, nothing at mirrored places."""
    views = standard_views([0.0, 30.0, 90.0, 200.0], 16, SMALL.volume.fov_mm, mode)
    images, (_, place) = landmark_xrays(views), landmark()
    mirrors = torch.tensor([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1], [-1, -1, 1]])
    for i, view in enumerate(views):
        found = sample_features(images[:, i, None], view, (place * mirrors)[None])[0, :, 0]
        assert float(found[0]) > 0.5, (view.angle_deg, found)
        # A mirror image along the ray itself falls on the same pixel; of the others none does.
        assert float(found[3]) < 0.05 and float(found[4]) < 0.05
        assert float(found[1:3].min()) < 0.05


def test_points_outside_the_detector_have_no_feature():
    view = VIEWS[0]
    found = sample_features(torch.ones(1, 2, 16, 16), view, torch.tensor([[[0.0, 500.0, 0.0], [0.0, 0.0, 0.0]]]))
    assert found[0].tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_fourier_features_are_the_formula():
    points = torch.tensor([[0.25, -0.5, 1.0]])
    found = fourier_features(points, 2)[0].tolist()
    angles = [frequency * math.pi * value for value in (0.25, -0.5, 1.0) for frequency in (1, 2)]
    expected = [0.25, -0.5, 1.0] + [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert found == pytest.approx(expected, abs=1e-5)


def test_sine_layers_keep_the_scale_of_their_signal():
    """Sitzmann et al.: after every layer the values are distributed as arcsine, standard deviation 1/sqrt(2)."""
    torch.manual_seed(0)
    layers = SineLayers(64, 256, 6, 50.0, first=True)
    x = 2 * torch.rand(500, 64) - 1
    with torch.no_grad():
        for layer in layers.layers:
            x = torch.sin(layers.omega * layer(x))
            assert float(x.std()) == pytest.approx(1 / math.sqrt(2), abs=0.05)


def test_order_of_the_views_does_not_matter_but_their_angles_do():
    one = patients(1).with_views("4view")
    network = model()
    stir(network)
    volume = network.reconstruct(one.xrays)
    turned = INRR3CT(SMALL, INRR3CT_SMALL, VIEWS[::-1])
    turned.load_state_dict(network.state_dict())
    torch.testing.assert_close(turned.reconstruct(one.xrays.flip(1)), volume, atol=1e-4, rtol=1e-3)
    assert float((network.reconstruct(one.xrays.flip(1)) - volume).abs().max()) > 1e-2


@pytest.mark.parametrize("mode", ["parallel", "cone"])
def test_a_volume_is_the_field_at_every_voxel(mode):
    """Two patients, a grid of three different edges, some of it beyond the detectors."""
    network, xrays = model(), patients(2).with_views("4view").xrays.double()
    stir(network)  # to weights that magnify rounding a thousandfold
    field, shape, spacing = network.field.double(), (5, 9, 24), 30.0
    views = standard_views([0.0, 30.0, 90.0, 200.0], 16, SMALL.volume.fov_mm, mode)
    points = voxel_centres(shape, (spacing,) * 3).view(1, -1, 3).expand(2, -1, -1).double()
    assert not sample_features(torch.ones(2, 1, 16, 16), views[2], points).all()
    with torch.no_grad():
        expected = field.at(field.features(xrays, views), views, points).view(2, 1, *shape)
    assert expected.std() > 0.05 and (expected.abs() < 1).float().mean() > 0.5
    found = field.volume(xrays, views, shape, spacing)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-9, rtol=0)


def test_chunks_make_no_difference(monkeypatch):
    network, one = model(), patients(1).with_views("4view")
    stir(network)
    whole = network.reconstruct(one.xrays)
    monkeypatch.setattr("difr3ct_core.implicit.CHUNK", 1000)
    torch.testing.assert_close(network.reconstruct(one.xrays), whole, atol=1e-5, rtol=1e-4)


def test_gradient_reaches_every_parameter():
    network, two = model(), patients(2).with_views("4view")
    loss, _ = network.loss(two.unit(), two.xrays, torch.Generator().manual_seed(0), slice(0, 2), 2)
    loss.backward()
    assert without_gradient(network) == []


def test_loss_of_parts_is_the_loss_of_the_batch():
    network, four = model(), patients(4).with_views("4view")

    def loss(part: slice) -> float:
        generator = torch.Generator().manual_seed(3)
        return float(network.loss(four.unit()[part], four.xrays[part], generator, part, 4)[0])

    assert (loss(slice(0, 2)) + loss(slice(2, 4))) / 2 == pytest.approx(loss(slice(0, 4)), rel=1e-5)


def kept_bytes(views: int, points: int) -> int:
    """Bytes that a training step keeps for its backward pass."""
    network = model(VIEWS[:views], points=points)
    one = patients(1).with_views("4view")
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.loss(one.unit(), one.xrays[:, :views], torch.Generator().manual_seed(0), slice(0, 1), 1)
    return total


def test_memory_grows_with_every_view_and_is_bounded_by_the_points():
    one, two, three, four = (kept_bytes(views, 2048) for views in (1, 2, 3, 4))
    per_view = two - one
    assert per_view > 0.4 * one  # most of it is the views' own
    assert three - two == pytest.approx(per_view, rel=0.02) and four - three == pytest.approx(per_view, rel=0.02)
    images = kept_bytes(4, 1)
    assert kept_bytes(4, 4096) - images == pytest.approx(2 * (four - images), rel=0.02)


def test_it_overfits_one_patient_and_is_loaded_again(tmp_path):
    one = patients(1).with_views("2view")
    training = TrainPreset(steps=250, batch_size=1, lr=2e-3, warmup_steps=10, precision="fp32", ema_decay=0.9)
    settings = dataclasses.replace(INRR3CT_SMALL, training=training, omega=20.0)
    network = train_network(INRR3CT, one, SMALL, settings, tmp_path / "inr")
    truth, volume = one.unit(), network.reconstruct(one.xrays)
    assert float((volume - truth).square().mean()) < 0.05 * float((truth - truth.mean()).square().mean())
    loaded, metadata = load_network(INRR3CT, tmp_path / "inr")
    assert torch.equal(loaded.reconstruct(one.xrays), volume)
    assert loaded.settings == settings and loaded.preset == SMALL and loaded.views == one.views
    assert metadata["provenance"]["wall_s"] > 0
    before = (tmp_path / "inr" / "weights.safetensors").stat().st_mtime_ns
    assert torch.equal(train_network(INRR3CT, one, SMALL, settings, tmp_path / "inr").reconstruct(one.xrays), volume)
    assert (tmp_path / "inr" / "weights.safetensors").stat().st_mtime_ns == before


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    four = patients(4).with_views("2view")
    whole = train_network(INRR3CT, four, SMALL, INRR3CT_SMALL, tmp_path / "whole")
    train_network(INRR3CT, four, SMALL, INRR3CT_SMALL, tmp_path / "parts", stop_after=2)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    parts = train_network(INRR3CT, four, SMALL, INRR3CT_SMALL, tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_training_begins_with_given_weights(tmp_path):
    four = patients(4).with_views("2view")
    first = train_network(INRR3CT, four, SMALL, INRR3CT_SMALL, tmp_path / "first")
    still = dataclasses.replace(INRR3CT_SMALL, training=dataclasses.replace(INRR3CT_SMALL.training, lr=0.0))
    other = patients(4, seed=5).with_views("2view")
    kept = train_network(INRR3CT, other, SMALL, still, tmp_path / "kept", start=tmp_path / "first")
    for a, b in zip(first.parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b)
    # What it began with counts towards what it cost; to use it later nobody need say what that was.
    history = training_history(load_network(INRR3CT, tmp_path / "kept")[1])
    assert [h["steps"] for h in history] == [INRR3CT_SMALL.training.steps] * 2
    again = train_network(INRR3CT, other, SMALL, still, tmp_path / "kept")
    assert torch.equal(again.reconstruct(other.xrays[:1]), kept.reconstruct(other.xrays[:1]))
    with pytest.raises(InputError, match="no such file"):
        train_network(INRR3CT, other, SMALL, still, tmp_path / "none", start=tmp_path / "nothing")
    with pytest.raises(InputError, match="do not fit INRR3CT"):
        wider = dataclasses.replace(INRR3CT_SMALL, width=48)
        train_network(INRR3CT, other, SMALL, wider, tmp_path / "wide", start=tmp_path / "first")


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="views: found 8, expected 1 to 4"):
        model(preset_views(SMALL, "8view"))
    with pytest.raises(InputError, match=r"detector of \(15, 15\) pixels, expected multiples of 2"):
        model(standard_views("2view", 15, SMALL.volume.fov_mm))
    network, one = model(), patients(1)
    with pytest.raises(InputError, match=r"xrays: found shape \(1, 8, 16, 16\), expected \(patient, 4, 16, 16\)"):
        network.reconstruct(one.xrays)
    broken = one.with_views("4view").xrays.clone()
    broken[0, 0, 0, 0] = math.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        network.reconstruct(broken)
    with pytest.raises(InputError, match="no such file"):
        load_network(INRR3CT, tmp_path / "nothing")
