"""The autoencoder and its codebook; volumes are never cubic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difr3ct_core.files import InputError
from difr3ct_core.presets import VQGANPreset
from difr3ct_core.vqgan import VQGAN, Codebook, _fold, _unfold

SMALL = VQGANPreset(base_channels=8, codebook_size=64, latent_channels=4)
SHAPE = (8, 12, 16)


def volumes(count: int = 2, seed: int = 0, shape=SHAPE) -> torch.Tensor:
    """Smooth blobs in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, *(n // 4 for n in shape), generator=generator)
    return torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear").tanh()


def model(preset: VQGANPreset = SMALL, seed: int = 0, trained_codes: bool = True) -> VQGAN:
    torch.manual_seed(seed)
    net = VQGAN(preset)
    if trained_codes:
        net.train()
        net(volumes(4, 9), torch.Generator().manual_seed(1))
    return net.eval()


# --- folding ---------------------------------------------------------------------------------------------------


def test_fold_keeps_every_voxel_in_its_block():
    x = torch.arange(2 * 3 * 4 * 6 * 8.0).view(2, 3, 4, 6, 8)
    folded = _fold(x)
    assert folded.shape == (2, 24, 2, 3, 4)
    assert torch.equal(_unfold(folded), x)
    for i, j, k in ((0, 0, 0), (1, 2, 3), (0, 2, 1)):
        block = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2]
        assert torch.equal(folded[:, :, i, j, k], block.reshape(2, 24))


# --- codebook --------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 200), size=st.integers(1, 50), channels=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_nearest_is_brute_force(n, size, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    book = Codebook(size, channels, 0.99, 0.05)
    book.codes.copy_(torch.randn(size, channels, generator=generator))
    latent = torch.randn(n, channels, generator=generator)
    distance = (latent[:, None] - book.codes[None]).double().square().sum(-1)
    found = distance.gather(1, book.nearest(latent)[:, None])[:, 0]
    torch.testing.assert_close(found, distance.amin(1), atol=1e-5, rtol=1e-5)


def test_nearest_across_chunks():
    generator = torch.Generator().manual_seed(2)
    book = Codebook(7, 2, 0.99, 0.05)
    book.codes.copy_(torch.randn(7, 2, generator=generator))
    latent = torch.randn(40_000, 2, generator=generator)
    expected = torch.cdist(latent.double(), book.codes.double()).argmin(1)
    assert float((book.nearest(latent) == expected).float().mean()) > 0.9999


def test_nearest_keeps_its_precision_under_mixed_precision():
    """Half-precision products would pick wrong codes: 8 bits do not tell neighbours apart."""
    generator = torch.Generator().manual_seed(3)
    book = Codebook(1024, 8, 0.99, 0.05)
    book.codes.copy_(torch.randn(1024, 8, generator=generator))
    latent = torch.randn(2000, 8, generator=generator)
    plain = book.nearest(latent)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = book.nearest(latent)
    assert torch.equal(plain, mixed)


def test_quantised_latents_are_codes_of_their_index_and_gradients_pass_through():
    book = Codebook(16, 3, 0.99, 0.05).eval()
    book.codes.copy_(torch.randn(16, 3, generator=torch.Generator().manual_seed(4)))
    latent = torch.randn(2, 3, 2, 3, 4, generator=torch.Generator().manual_seed(5), requires_grad=True)
    quantised, index = book(latent)
    assert index.shape == (2, 2, 3, 4)
    torch.testing.assert_close(quantised, book.codes[index].movedim(-1, 1))
    weight = torch.randn(quantised.shape, generator=torch.Generator().manual_seed(6))
    (quantised * weight).sum().backward()
    torch.testing.assert_close(latent.grad, weight)


def test_codes_move_to_the_centres_of_a_fixed_mixture():
    """A codebook of K codes fed with K far clusters of unequal size: their means, which no single batch has."""
    generator = torch.Generator().manual_seed(7)
    centres = 10 * torch.randn(6, 3, generator=generator)
    shares = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    book = Codebook(6, 3, 0.9, 0.01).train()
    book.codes.copy_(centres + torch.randn(6, 3, generator=generator))
    book.sums.copy_(book.codes)
    book.initialised.fill_(True)
    for _ in range(200):
        pick = torch.multinomial(shares, 480, replacement=True, generator=generator)
        latent = centres[pick] + 0.5 * torch.randn(480, 3, generator=generator)
        book(latent.view(2, 6, 8, 5, 3).movedim(-1, 1), generator)
    # Moving average over about 19 batches of 48 or more vectors: sd 0.5/sqrt(900) = 0.017 a channel.
    torch.testing.assert_close(book.codes, centres, atol=0.08, rtol=0)
    torch.testing.assert_close(book.usage, 6 * shares, atol=0.15, rtol=0)
    torch.testing.assert_close(book.codes, book.sums / book.usage[:, None], atol=1e-5, rtol=0)


def test_dead_codes_revive_and_live_ones_stay():
    generator = torch.Generator().manual_seed(8)
    book = Codebook(8, 2, 0.9, 0.05).train()
    book.codes[:4] = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    book.codes[4:] = 1000.0  # far from all data
    book.sums.copy_(book.codes)
    book.initialised.fill_(True)
    live = book.codes[:4].clone()
    latent = live[torch.randint(4, (240,), generator=generator)].view(1, 4, 6, 10, 2).movedim(-1, 1)
    steps = 0
    while (book.codes[4:] > 100).all() and steps < 60:
        book(latent, generator)
        steps += 1
        torch.testing.assert_close(book.codes[:4], live, atol=1e-4, rtol=0)
    # Usage 1 falls by 0.9 a step: below 0.05 after ln(0.05)/ln(0.9) = 28.4 steps, not before.
    assert steps == 29
    for code in book.codes[4:]:
        assert float((live - code).abs().sum(1).min()) < 1e-4  # moved onto a latent of the batch
    assert (book.usage[4:] == 1).all()  # and given time to prove itself


def test_few_tokens_per_code_do_not_restart_the_codebook_at_every_step():
    """4096 codes and 512 latents a step: an absolute threshold would replace 63 % of all codes in every step."""
    generator = torch.Generator().manual_seed(9)
    book = Codebook(4096, 8, 0.99, 0.05).train()
    replaced = []
    for _ in range(420):
        book(torch.randn(1, 8, 8, 8, 8, generator=generator), generator)
        replaced.append(float((book.usage == 1.0).float().mean()))  # exactly 1 only after a restart
    assert max(replaced) < 0.15
    assert sum(replaced[100:]) / 320 < 0.01
    assert float((book.usage > 0.1).float().mean()) > 0.5


def test_initialisation_takes_codes_from_the_data_once():
    book = Codebook(32, 3, 0.99, 0.05)
    generator = torch.Generator().manual_seed(10)
    latent = torch.randn(1, 3, 2, 3, 4, generator=generator)
    book.eval()
    book(latent)
    assert not book.initialised and (book.codes == 0).all()  # looking does not initialise
    book.train()
    flat = latent.movedim(1, -1).reshape(-1, 3)
    book._initialise(flat, generator)
    assert (book.codes[:, None] == flat[None]).all(-1).any(1).all()  # each code is one of the vectors
    first = book.codes.clone()
    book(100 + latent, generator)
    assert (book.codes - first).abs().max() < 50  # moved a little towards the batch, not replaced by it


def test_a_resumed_codebook_is_not_initialised_again():
    """The flag is in the state: otherwise the first step after a resume would overwrite all codes."""
    book = Codebook(16, 3, 0.99, 0.05).train()
    generator = torch.Generator().manual_seed(11)
    book(torch.randn(1, 3, 4, 5, 6, generator=generator), generator)
    assert {"codes", "usage", "sums", "initialised"} <= set(book.state_dict())
    resumed = Codebook(16, 3, 0.99, 0.05).train()
    resumed.load_state_dict(book.state_dict())
    batch = torch.randn(1, 3, 4, 5, 6, generator=generator)
    book(batch, torch.Generator().manual_seed(12))
    resumed(batch, torch.Generator().manual_seed(12))
    for name, value in book.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# --- the whole autoencoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_shapes(levels):
    net = model(dataclasses.replace(SMALL, levels=levels), trained_codes=False)
    x = volumes(2, shape=(8, 24, 16))
    latent = net.encode(x)
    assert latent.shape == (2, 4, *(n // 2**levels for n in (8, 24, 16)))
    assert net.decode(latent).shape == x.shape


def test_decode_of_encode_is_the_reconstruction():
    net = model()
    x = volumes(5, 2)
    with torch.no_grad():
        reconstruction = net(x)[0].clamp(-1, 1)
    torch.testing.assert_close(net.decode(net.encode(x)), reconstruction, atol=1e-5, rtol=1e-5)
    net.fit_latent_scale([volumes(4, 3), volumes(3, 4)])
    torch.testing.assert_close(net.decode(net.encode(x), batch=2), reconstruction, atol=1e-5, rtol=1e-5)


def test_latent_scale():
    """Mean 0 and deviation 0.5 per channel over the volumes that it was fitted to; the state carries it."""
    net = model()
    groups = [volumes(4, 5), volumes(3, 6)]
    net.fit_latent_scale(groups)
    latents = torch.cat([net.encode(x) for x in groups]).movedim(1, 0).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.full((4,), 0.5), atol=1e-4, rtol=0)
    other = VQGAN(SMALL).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.encode(groups[0]), net.encode(groups[0]))


def test_evaluation_changes_nothing():
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(volumes(3, 7))
    net.decode(net.encode(volumes(3, 8)))
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_loss_is_l1_and_commitment():
    net = model(dataclasses.replace(SMALL, l1_weight=3.0, commitment_weight=0.5))
    x = volumes(2, 10)
    with torch.no_grad():
        total, values = net.loss(x)
        latent = net.encoder(x)
        codes = net.codebook.codes
        distance = torch.cdist(latent.movedim(1, -1).reshape(-1, 4), codes).amin(1).square()
        reconstruction, _ = net(x)
    assert float(values["l1"]) == pytest.approx(float((reconstruction - x).abs().mean()), rel=1e-5)
    assert float(values["commitment"]) == pytest.approx(float(distance.mean()) / 4, rel=1e-3)
    assert float(total) == pytest.approx(3.0 * float(values["l1"]) + 0.5 * float(values["commitment"]), rel=1e-5)


def test_commitment_pulls_towards_the_code_that_was_used():
    """In training mode the codes move in the same call; the pull must be to those that the decoder saw."""
    net = model(dataclasses.replace(SMALL, codebook_decay=0.0))  # codes jump to the batch at once
    net.train()
    x = volumes(2, 11)
    before, latent = net.codebook.codes.clone(), net.encoder(x).detach()
    distance = torch.cdist(latent.movedim(1, -1).reshape(-1, 4), before).amin(1).square()
    _, terms = net(x, torch.Generator().manual_seed(13))
    assert float(terms["commitment"].detach()) == pytest.approx(float(distance.mean()) / 4, rel=1e-3)


def test_perplexity_counts_the_codes_in_use():
    net = model()
    with torch.no_grad():
        latent = net.encoder(volumes(2, 12))
        for count in (1, 2):
            flat = latent.movedim(1, -1).reshape(-1, 4)
            net.codebook.codes.fill_(1e3)
            net.codebook.codes[:count] = flat[:count] + torch.tensor([[0.0], [1e-3]])[:count]
            value = float(net(volumes(2, 12))[1]["perplexity"])
            assert 1.0 <= value <= count + 1e-4
        net.codebook.codes.fill_(1e3)
        net.codebook.codes[0] = 0.0
        assert float(net(volumes(2, 12))[1]["perplexity"]) == pytest.approx(1.0)


def test_every_weight_learns():
    net = model().train()
    for parameter in net.parameters():  # the zeros at the end of residual blocks hold gradients back for one step
        torch.nn.init.normal_(parameter, std=0.1) if parameter.abs().max() == 0 else None
    net.loss(volumes(2, 13), torch.Generator().manual_seed(14))[0].backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not idle


def test_overfits_one_volume():
    torch.manual_seed(15)
    net = VQGAN(dataclasses.replace(SMALL, base_channels=16, codebook_size=128)).train()
    optimiser = torch.optim.Adam(net.parameters(), lr=4e-3, betas=(0.5, 0.9))
    x = volumes(1, 16)
    errors = []
    for step in range(220):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * (1 - step / 240)
        loss, values = net.loss(x, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(values["l1"]))
    assert errors[-1] < errors[0] / 10, (errors[0], errors[-1])


@pytest.mark.parametrize("shape", [(8, 12, 15), (8, 10, 16)])
def test_sizes_that_do_not_divide_are_refused(shape):
    with pytest.raises(InputError, match=r"volume: found .*expected multiples of 4"):
        model().encode(torch.zeros(1, 1, *shape))


def test_live_codes():
    net = model()
    net.codebook.usage.copy_(torch.tensor([0.05] * 16 + [1.3] * 48))
    assert net.live_codes() == pytest.approx(0.75)
