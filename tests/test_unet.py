"""The denoiser; shapes are never cubic."""

from __future__ import annotations

import pytest
import torch

from difr3ct_core.convolution import Conv3d
from difr3ct_core.files import InputError
from difr3ct_core.presets import UNetPreset
from difr3ct_core.unet import SelfAttention, UNet3d, time_embedding

SMALL = UNetPreset(widths=(8, 16), blocks_per_level=1, attention_from_level=1, heads=2, head_channels=4)
SHAPE = (2, 4, 6)
CHANNELS, CONDITION = 3, 5


def awake(preset: UNetPreset = SMALL, condition: int = CONDITION) -> UNet3d:
    """A network whose zero initialisation is replaced, as training would."""
    torch.manual_seed(0)
    net = UNet3d(CHANNELS, condition, preset)
    for parameter in net.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(b: int = 3, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(b, CHANNELS, *shape, generator=generator),
        torch.tensor([0, 500, 999])[:b],
        torch.randn(b, CONDITION, *shape, generator=generator),
    )


@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 4, 8), (8, 2, 4)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_shape(shape, blocks):
    net = awake(UNetPreset(widths=(8, 16), blocks_per_level=blocks, heads=2, head_channels=4))
    z, t, condition = inputs(2, shape)
    assert net(z, t, condition).shape == z.shape


def test_three_levels():
    net = awake(UNetPreset(widths=(8, 16, 24), blocks_per_level=1, attention_from_level=2, heads=2, head_channels=4))
    z, t, condition = inputs(1, (4, 8, 12))
    assert net(z, t, condition).shape == z.shape
    with pytest.raises(InputError, match=r"latent: found \(2, 4, 6\).*expected multiples of 4"):
        net(*inputs(1, (2, 4, 6)))


def test_starts_at_zero_and_every_weight_learns_after_a_few_steps():
    """Zeros at the ends of blocks hold gradients back for one step each; none may stay without."""
    torch.manual_seed(2)
    net = UNet3d(CHANNELS, CONDITION, SMALL)
    z, t, condition = inputs()
    assert (net(z, t, condition) == 0).all()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    target = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    seen = {name: 0.0 for name, _ in net.named_parameters()}
    for _ in range(4):
        optimiser.zero_grad()
        (net(z, t, condition) - target).square().mean().backward()
        for name, parameter in net.named_parameters():
            seen[name] = max(seen[name], float(parameter.grad.abs().max()))
        optimiser.step()
    assert not [name for name, value in seen.items() if value == 0]


def test_no_condition_is_a_condition_of_zeros():
    net = awake()
    z, t, condition = inputs()
    torch.testing.assert_close(net(z, t, None), net(z, t, torch.zeros_like(condition)), rtol=0, atol=0)
    assert (net(z, t, None) - net(z, t, condition)).abs().max() > 1e-3


def test_an_unconditional_network():
    net = awake(condition=0)
    z, t, _ = inputs()
    assert net(z, t).shape == z.shape


def test_time_matters_in_every_sample():
    net = awake()
    z, t, condition = inputs()
    out, other = net(z, t, condition), net(z, t + torch.tensor([1, 0, -30]), condition)
    changed = (out - other).flatten(1).abs().amax(1)
    assert changed[0] > 1e-5 and changed[1] == 0 and changed[2] > 1e-4


def test_samples_of_a_batch_do_not_mix():
    net = awake()
    z, t, condition = inputs()
    out = net(z, t, condition)
    order = [2, 0, 1]
    torch.testing.assert_close(net(z[order], t[order], condition[order]), out[order], atol=1e-5, rtol=1e-5)
    alone = net(z[1:2], t[1:2], condition[1:2])
    torch.testing.assert_close(alone, out[1:2], atol=1e-5, rtol=1e-5)


def test_all_three_axes_are_seen():
    """A change in one voxel reaches far along z, y and x alike: nothing is flat, unlike in the video network."""
    net = awake()
    z, t, condition = inputs(1, (4, 8, 8))
    for axis in (2, 3, 4):
        other = z.clone()
        other.select(axis, 0).add_(1.0)
        difference = (net(other, t, condition) - net(z, t, condition)).abs().select(axis, -1)
        assert difference.max() > 1e-5, axis


def test_attention_is_a_softmax_over_all_voxels():
    """Against its formula, voxel by voxel, and equivariant to permuting them."""
    torch.manual_seed(4)
    layer = SelfAttention(8, heads=2, head_channels=3, groups=4)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 2, 3, 4, generator=torch.Generator().manual_seed(5))
    qkv = layer.qkv(layer.norm(x)).flatten(2).view(2, 3, 2, 3, 24)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    weight = torch.einsum("bhdi,bhdj->bhij", q, k).div(3**0.5).softmax(-1)
    heads = torch.einsum("bhij,bhdj->bhdi", weight, v).reshape(2, 6, 2, 3, 4)
    torch.testing.assert_close(layer(x), x + layer.out(heads), atol=1e-5, rtol=1e-5)
    turned = layer(x.flip(2, 4)).flip(2, 4)
    torch.testing.assert_close(turned, layer(x), atol=1e-5, rtol=1e-5)


def test_time_embedding_tells_all_steps_apart():
    embedding = time_embedding(torch.arange(1000), 48)
    assert embedding.shape == (1000, 48)
    distance = torch.cdist(embedding.double(), embedding.double()) + 10 * torch.eye(1000)
    assert float(distance.min()) > 0.1
    torch.testing.assert_close(embedding.square().sum(1), torch.full((1000,), 24.0))


@pytest.mark.parametrize("shape", [(4, 6, 5), (8, 8, 8), (2, 3, 4), (5, 4, 4)])
def test_the_short_cut_for_one_volume_is_the_convolution(shape):
    """Values and all gradients, in double precision, for grids that are cut and one (odd) that is not."""
    torch.manual_seed(0)
    ours = Conv3d(3, 5).double()
    plain = torch.nn.Conv3d(3, 5, 3, padding=1).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, *shape, dtype=torch.double)
    results = []
    for net in (ours, plain):
        y = x.clone().requires_grad_(True)
        out = net(y)
        results.append((out, *torch.autograd.grad(out.square().sum(), (y, net.weight, net.bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
