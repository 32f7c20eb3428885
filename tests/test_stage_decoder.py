"""The decoder's own training: codes stay, volumes get better, and what lives in the latents stays valid."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL, patients, same

from difr3ct_core.chapters import Chapter
from difr3ct_core.files import InputError, read_safetensors
from difr3ct_core.metrics import psnr
from difr3ct_core.stage_decoder import train_decoder
from difr3ct_core.stages import train_ldm, train_vqgan
from difr3ct_core.training import TrainingError
from difr3ct_core.weights import export_weights, latents_digest, load_ldm, load_vqgan, state_digest

QUICK = SMALL.replace(
    train_decoder={"steps": 60, "batch_size": 2, "lr": 3e-3, "warmup_steps": 5, "log_every": 1, "ema_decay": 0.9}
)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    return train_vqgan(patients(), SMALL, folder / "vqgan"), folder


def quality(vqgan, some) -> float:
    return float(psnr(vqgan.decode(vqgan.encode(some.unit())), some.unit(), 2.0).mean())


def test_volumes_get_better_and_latents_stay(first, tmp_path):
    vqgan, _ = first
    before = {k: v.clone() for k, v in vqgan.state_dict().items()}
    better = train_decoder(vqgan, patients(), QUICK, tmp_path / "decoder", validation=patients(2, 9))
    assert all(torch.equal(v, before[k]) for k, v in vqgan.state_dict().items())  # what it began with is not changed
    assert quality(better, patients()) > quality(vqgan, patients()) + 1.5
    for name in ("encoder", "codebook"):
        assert same(getattr(better, name), getattr(vqgan, name))
    assert not same(better.decoder, vqgan.decoder)
    assert torch.equal(better.encode(patients().unit()), vqgan.encode(patients().unit()))
    assert state_digest(better) != state_digest(vqgan)
    assert latents_digest(better) == latents_digest(vqgan) == state_digest(vqgan)
    again = load_vqgan(tmp_path / "decoder")[0]
    assert same(again, better) and again.latents_of == better.latents_of
    # A second call loads; its own decoder going on once more still names the first.
    assert same(train_decoder(vqgan, patients(), QUICK, tmp_path / "decoder"), better)
    more = train_decoder(better, patients(), QUICK, tmp_path / "more", stop_after=2)
    assert more.latents_of == state_digest(vqgan)


def test_a_training_in_parts_is_the_training_whole(first, tmp_path):
    short = QUICK.replace(train_decoder={"steps": 6})
    copies = patients(3, 5).unit()
    whole = train_decoder(first[0], patients(), short, tmp_path / "whole", others=copies, others_share=0.5)
    train_decoder(first[0], patients(), short, tmp_path / "parts", stop_after=2, others=copies, others_share=0.5)
    parts = train_decoder(first[0], patients(), short, tmp_path / "parts", others=copies, others_share=0.5)
    assert same(whole, parts)
    without = train_decoder(first[0], patients(), short, tmp_path / "without")
    assert not same(whole, without)
    # The finished model serves a call that knows nothing of the other volumes.
    assert same(train_decoder(first[0], patients(), short, tmp_path / "whole"), whole)
    assert read_safetensors(tmp_path / "whole" / "weights.safetensors")[1]["fingerprint"]["others"][:2] == [3, 0.5]


def test_diffusion_models_of_the_old_decoder_work_with_the_new(first, tmp_path):
    vqgan, folder = first
    train = patients().with_views("2view")
    train_ldm(train, vqgan, SMALL, tmp_path / "2view")
    better = train_decoder(vqgan, patients(), QUICK.replace(train_decoder={"steps": 3}), tmp_path / "decoder")
    # Shipped in half precision, before and after the decoder's training: the two still belong together.
    for first_file in (folder / "vqgan", tmp_path / "decoder"):
        shared = tmp_path / first_file.name
        export_weights(first_file, shared.with_suffix(".safetensors"))
        export_weights(tmp_path / "2view", tmp_path / "ldm.safetensors", autoencoder=shared.with_suffix(".safetensors"))
        tensors, metadata = read_safetensors(tmp_path / "ldm.safetensors")
        assert metadata["autoencoder"]["file"] == f"{first_file.name}.safetensors"
        assert not any(name.startswith("vqgan.") for name in tensors)
    rounded = {k: v.to(torch.bfloat16).float() for k, v in better.decoder.state_dict().items()}
    assert all(
        torch.equal(v, rounded[k]) for k, v in load_ldm(tmp_path / "ldm.safetensors")[1].decoder.state_dict().items()
    )
    # A finished run takes the new decoder when it is opened with it, and stays finished.
    assert not same(load_ldm(tmp_path / "2view")[1], better)
    train_ldm(train, better, SMALL, tmp_path / "2view")
    assert same(load_ldm(tmp_path / "2view")[1], better) and not (tmp_path / "2view.old1").exists()
    # And one that is trained with the new one says whose latents it lives in.
    train_ldm(train, better, SMALL, tmp_path / "new")
    assert load_ldm(tmp_path / "new")[1].latents_of == state_digest(vqgan)
    train_ldm(train, vqgan, SMALL.replace(train_ldm={"lr": 1e-4}), tmp_path / "further", start=tmp_path / "new")


def test_refusals(first, tmp_path):
    with pytest.raises(InputError, match="vqgan: has another shape than the preset's autoencoder"):
        train_decoder(first[0], patients(), QUICK.replace(vqgan={"base_channels": 16}), tmp_path / "a")
    with pytest.raises(InputError, match=r"others_share: found 1, expected a share from 0 to below 1"):
        train_decoder(first[0], patients(), QUICK, tmp_path / "b", others=patients().unit(), others_share=1.0)
    with pytest.raises(InputError, match=r"others: found shape \(4, 1, 8, 16, 16\), expected \(n, 1, z, y, x\) on"):
        train_decoder(first[0], patients(), QUICK, tmp_path / "d", others=patients().unit()[:, :, ::2])
    chapter = Chapter("x", SMALL, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    with pytest.raises(InputError, match=r"train_decoder\.steps: found 0 in preset 'tiny', which leaves the decoder's"):
        chapter.decoder()
    chapter = Chapter("x", QUICK, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    with pytest.raises(InputError, match="LIDC-IDRI-0001 is the test patient and trains nothing"):
        chapter.decoder(scan=tmp_path / "sample_ct" / "lidc_idri_0001" / "ct.nii.gz")
    broken = patients().unit()
    broken[:, :, 0, 0, 0] = float("nan")
    with pytest.raises((InputError, TrainingError)):
        train_decoder(first[0], patients(), QUICK, tmp_path / "c", others=broken, others_share=0.9)


def test_a_chapter_has_its_decoder_trained_and_uses_it(tmp_path, monkeypatch):
    preset = QUICK.replace(train_decoder={"steps": 4})
    chapter = Chapter("x", preset, tmp_path, tmp_path / "run", 0, torch.device("cpu"))
    monkeypatch.setattr(chapter, "patients", lambda split, views=None: patients(4 if split == "train" else 2))
    chapter.shipped = False
    found = chapter.vqgan()
    first = load_vqgan(tmp_path / "run" / "vqgan")[0]
    assert found.latents_of == state_digest(first) and not same(found.decoder, first.decoder)
    assert same(chapter.vqgan(), found)  # and finds it finished
    assert chapter.decoder_log() == tmp_path / "run" / "decoder"
    metadata = read_safetensors(tmp_path / "run" / "decoder" / "weights.safetensors")[1]
    assert [training["steps"] for training in metadata["history"]] == [3, 4]
    # A decoder trained from weights, in a run without an autoencoder of its own.
    other = Chapter("y", preset, tmp_path, tmp_path / "other", 0, torch.device("cpu"))
    monkeypatch.setattr(other, "patients", chapter.patients)
    other.shipped = False
    assert same(other.decoder(start=tmp_path / "run" / "vqgan"), found)
    assert same(other.vqgan(), found) and not (tmp_path / "other" / "vqgan").exists()
