"""Load or train: a finished model is loaded, a half-done one resumed, another one set aside, a wrong one refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from small_models import SMALL, patients, same, trained

from difr3ct_core import stages
from difr3ct_core.files import InputError, read_safetensors, write_safetensors
from difr3ct_core.geometry import views_from_json
from difr3ct_core.latents import encoded
from difr3ct_core.presets import VIEW_SETS, Preset
from difr3ct_core.stages import train_ldm, train_vqgan, with_settings
from difr3ct_core.weights import export_weights, load_ldm, load_vqgan, state_digest


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained(folder)
    return folder


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("was trained again")

    monkeypatch.setattr(stages, "fit", refuse)


def test_a_finished_model_is_loaded(runs, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    no_training(monkeypatch)
    train = patients()
    vqgan = train_vqgan(train, SMALL, runs / "vqgan")
    ldm = train_ldm(train.with_views("2view"), vqgan, SMALL, runs / "2view")
    assert same(vqgan, load_vqgan(runs / "vqgan")[0]) and same(ldm, load_ldm(runs / "2view")[0])
    assert not vqgan.training and not ldm.training
    assert before == {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stops", [(1,), (2, 1)])
def test_a_run_in_parts_is_the_same_run(runs, tmp_path, stops):
    train = patients()
    for stop in stops:
        train_vqgan(train, SMALL, tmp_path / "vqgan", stop_after=stop)
        assert not (tmp_path / "vqgan" / "weights.safetensors").exists()
    vqgan = train_vqgan(train, SMALL, tmp_path / "vqgan")
    assert same(vqgan, load_vqgan(runs / "vqgan")[0])
    some = train.with_views("2view")
    for stop in stops:
        train_ldm(some, vqgan, SMALL, tmp_path / "2view", stop_after=stop)
    assert same(train_ldm(some, vqgan, SMALL, tmp_path / "2view"), load_ldm(runs / "2view")[0])


def test_what_the_weights_hold(runs):
    ldm, vqgan, preset, metadata = load_ldm(runs / "2view" / "weights.safetensors")
    assert preset == SMALL == Preset.from_dict(json.loads(json.dumps(metadata["preset"])))
    assert tuple(v.angle_deg for v in views_from_json(metadata["views"])) == VIEW_SETS["2view"]
    assert metadata["provenance"]["preset"] == "tiny" and metadata["provenance"]["seed"] == 0
    # The autoencoder inside is the one it was trained with, its latent scale included.
    assert same(vqgan, load_vqgan(runs / "vqgan" / "weights.safetensors")[0])
    assert not torch.equal(vqgan.latent_scale, torch.ones(8))
    latents = vqgan.encode(patients().unit()).movedim(1, 0).flatten(1)
    torch.testing.assert_close(latents.std(1), torch.full((8,), 0.5), atol=1e-3, rtol=0)
    assert not ldm.training and not vqgan.training


CHANGES = {
    "training steps": lambda p: p.replace(train_vqgan={"steps": 4}),
    "architecture": lambda p: p.replace(vqgan={"base_channels": 16}),
    "window": lambda p: p.replace(volume={"hu_max": 1000.0}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_numbers_is_set_aside(copy, capsys, change):
    preset = CHANGES[change](SMALL)
    old = {p.name: p.read_bytes() for p in (copy / "vqgan").iterdir()}
    vqgan = train_vqgan(patients(), preset, copy / "vqgan")
    assert vqgan.preset == preset.vqgan
    assert {p.name: p.read_bytes() for p in (copy / "vqgan.old1").iterdir()} == old
    said = capsys.readouterr().out
    assert "vqgan.old1" in said and "found" in said and "now" in said
    train_vqgan(patients(), SMALL, copy / "vqgan")  # and back: the second is set aside as well
    assert (copy / "vqgan.old2").is_dir()
    assert {p.name: p.read_bytes() for p in (copy / "vqgan.old1").iterdir()} == old
    assert same(load_vqgan(copy / "vqgan")[0], load_vqgan(copy / "vqgan.old1")[0])


def test_a_half_done_run_with_other_numbers_is_set_aside(copy, tmp_path):
    (copy / "vqgan" / "weights.safetensors").unlink()
    train_vqgan(patients(), SMALL, copy / "vqgan", seed=1)
    assert (copy / "vqgan.old1" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("what", "expected"),
    [("seed", "seed: found 0, now 1"), ("data", "data: found"), ("views", "views"), ("autoencoder", "autoencoder:")],
)
def test_other_data_views_and_autoencoders_train_another_diffusion_model(copy, capsys, what, expected):
    vqgan = load_vqgan(copy / "vqgan")[0]
    train, seed = patients(seed=9 if what == "data" else 0), int(what == "seed")
    if what == "autoencoder":
        vqgan.latent_scale.mul_(1.5)
    some = train.with_views("2view" if what != "views" else "1view_frontal")
    train_ldm(some, vqgan, SMALL, copy / "2view", seed)
    assert expected in capsys.readouterr().out
    assert (copy / "2view.old1" / "weights.safetensors").exists()


def test_a_fine_tuned_model_is_used_without_naming_what_it_began_with(copy, monkeypatch):
    vqgan, some = load_vqgan(copy / "vqgan")[0], patients().with_views("2view")
    tuned = train_ldm(some, vqgan, SMALL, copy / "tuned", start=copy / "2view")
    no_training(monkeypatch)
    assert same(train_ldm(some, vqgan, SMALL, copy / "tuned"), tuned)
    with pytest.raises(AssertionError, match="trained again"):  # asked for by name, another beginning is another model
        train_ldm(some, vqgan, SMALL, copy / "tuned", start=copy / "tuned")


def test_the_seed_decides(runs, tmp_path):
    assert not same(train_vqgan(patients(), SMALL, tmp_path / "v", seed=1), load_vqgan(runs / "vqgan")[0])


def test_validation_is_logged(tmp_path):
    from difr3ct_core.checkpoints import read_log

    train_vqgan(patients(), SMALL, tmp_path / "v", validation=patients(5, 3))
    steps, values = read_log(tmp_path / "v", "val_psnr")
    assert steps == [2] and 0 < values[0] < 60
    assert 0 <= read_log(tmp_path / "v", "live_codes")[1][0] <= 1


# --- refusal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_named(copy, share):
    for name, load in (("vqgan", load_vqgan), ("2view", load_ldm)):
        path = copy / name / "weights.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(InputError, match=rf"{name}/weights\.safetensors"):
            load(path)
    # Training does not silently start over either: the file may hold days of work.
    with pytest.raises(InputError, match=r"vqgan/weights\.safetensors"):
        train_vqgan(patients(), SMALL, copy / "vqgan")


def test_missing_and_unfinished(copy, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        load_ldm(tmp_path / "nowhere")
    (copy / "2view" / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"2view/weights\.safetensors: no such file, but a checkpoint.*not finished"):
        load_ldm(copy / "2view")


def test_another_kind(runs):
    with pytest.raises(InputError, match=r"vqgan/weights\.safetensors: found weights of kind 'vqgan', expected 'ldm'"):
        load_ldm(runs / "vqgan")
    with pytest.raises(InputError, match=r"found weights of kind 'ldm', expected 'vqgan'"):
        load_vqgan(runs / "2view" / "weights.safetensors")
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: found weights of kind None"):
        load_ldm(runs / "2view" / "checkpoint.safetensors")


def rewrite(path: Path, change) -> None:
    tensors, metadata = read_safetensors(path)
    change(tensors, metadata)
    write_safetensors(path, tensors, metadata)


BROKEN = {
    "lack \\['preset'\\]": lambda t, m: m.pop("preset"),
    "lack \\['views'\\]": lambda t, m: m.pop("views"),
    "preset.unet: unknown fields \\['width'\\]": lambda t, m: m["preset"]["unet"].update(width=3),
    "preset.vqgan.base_channels: is missing": lambda t, m: m["preset"]["vqgan"].pop("base_channels"),
    "do not fit LatentDiffusion": lambda t, m: m["preset"]["unet"].update(widths=[16, 16]),
    "do not fit VQGAN": lambda t, m: m["preset"]["vqgan"].update(codebook_size=32),
    "do not fit LatentDiffusion .*stem": lambda t, m: t.pop("ldm.unet.stem.weight"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_weights_that_do_not_fit_their_preset(copy, message):
    path = copy / "2view" / "weights.safetensors"
    rewrite(path, BROKEN[message])
    with pytest.raises(InputError, match=rf"2view/weights\.safetensors: .*(?:{message})"):
        load_ldm(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"locked.*cannot be written"):
        train_vqgan(patients(), SMALL, tmp_path / "locked" / "vqgan")


# --- latents are encoded once, shipped weights are small ---------------------------------------------------------


def test_latents_are_encoded_once(runs, tmp_path, monkeypatch):
    vqgan, train = load_vqgan(runs / "vqgan")[0], patients()
    first = encoded(train, vqgan, tmp_path)
    torch.testing.assert_close(first, vqgan.encode(train.unit()))
    monkeypatch.setattr(type(vqgan), "encode", lambda *a: pytest.fail("was encoded again"))
    assert torch.equal(encoded(train, vqgan, tmp_path), first)


def test_other_patients_another_autoencoder_or_damage_are_encoded_anew(runs, tmp_path):
    vqgan, train = load_vqgan(runs / "vqgan")[0], patients()
    first = encoded(train, vqgan, tmp_path)
    assert not torch.equal(encoded(patients(seed=5), vqgan, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(encoded(train, vqgan, tmp_path), first)
    with torch.no_grad():
        vqgan.encoder.layers[0].bias += 0.1
    other = encoded(train, vqgan, tmp_path)
    torch.testing.assert_close(other, vqgan.encode(train.unit()))
    assert len(list(tmp_path.iterdir())) == 1  # those of the autoencoder that is gone are gone


def test_what_another_training_is_writing_is_left_alone(runs, tmp_path):
    vqgan = load_vqgan(runs / "vqgan")[0]
    half = tmp_path / ".0123-other.tmp.safetensors"
    half.write_bytes(b"half")
    old = tmp_path / "0123-old.safetensors"
    old.write_bytes(b"of an autoencoder that is gone")
    encoded(patients(), vqgan, tmp_path)
    assert half.exists() and not old.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exported_weights_are_half_as_large_and_nearly_the_same(runs, tmp_path, dtype):
    size = export_weights(runs / "2view", tmp_path / "small.safetensors", dtype)
    assert size < 0.6 * (runs / "2view" / "weights.safetensors").stat().st_size
    (ldm, vqgan, preset, metadata), (exact, vqgan_exact, *_) = (
        load_ldm(path) for path in (tmp_path / "small.safetensors", runs / "2view")
    )
    assert preset == SMALL and metadata["stored_as"] == str(dtype).removeprefix("torch.")
    assert torch.equal(vqgan.codebook.codes, vqgan_exact.codebook.codes)
    assert torch.equal(vqgan.latent_scale, vqgan_exact.latent_scale)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for (name, a), b in zip(ldm.state_dict().items(), exact.state_dict().values(), strict=True):
        assert a.dtype == torch.float32, name
        torch.testing.assert_close(a, b, rtol=rounding, atol=1e-6)


def test_words_change_a_preset():
    changed = with_settings(SMALL, "train_ldm", ["accumulate=2", "precision=bf16", "lr=0.5"])
    assert changed == SMALL.replace(train_ldm={"accumulate": 2, "precision": "bf16", "lr": 0.5})
    assert with_settings(SMALL, "train_ldm", ["initial.iterations=7"]) == SMALL.replace(initial={"iterations": 7})
    for word in ("nothing=1", "accumulate", "initial.nothing=1", "nowhere.lr=1", "name.lr=1"):
        with pytest.raises(InputError, match=rf"train_ldm: found '{word}', expected NAME=VALUE with a name of accumul"):
            with_settings(SMALL, "train_ldm", [word])
    with pytest.raises(InputError, match=r"preset\.train_ldm\.accumulate: found 'two', expected a whole number"):
        with_settings(SMALL, "train_ldm", ["accumulate=two"])


def test_exported_models_share_the_autoencoder_beside_them(runs, tmp_path):
    export_weights(runs / "vqgan", tmp_path / "vqgan.safetensors")
    alone = export_weights(runs / "2view", tmp_path / "alone.safetensors")
    path = tmp_path / "shared.safetensors"
    assert export_weights(runs / "2view", path, autoencoder=tmp_path / "vqgan.safetensors") < alone
    found, whole = load_ldm(path), load_ldm(tmp_path / "alone.safetensors")
    for a, b in zip(found[:2], whole[:2], strict=True):
        assert state_digest(a) == state_digest(b)
    # Another autoencoder in its place, or none: said, not used.
    vqgan = (tmp_path / "vqgan.safetensors").read_bytes()
    other = train_vqgan(patients(), SMALL, tmp_path / "other", seed=3)
    assert state_digest(other) != state_digest(found[1])
    export_weights(tmp_path / "other", tmp_path / "vqgan.safetensors")
    with pytest.raises(InputError, match=r"vqgan\.safetensors: is not the autoencoder that shared\.safetensors was"):
        load_ldm(path)
    (tmp_path / "vqgan.safetensors").unlink()
    with pytest.raises(InputError, match=r"vqgan\.safetensors: no such file, but shared\.safetensors needs it beside"):
        load_ldm(path)
    # A model that was trained with another one keeps its own.
    export_weights(tmp_path / "other", tmp_path / "vqgan.safetensors")
    export_weights(runs / "2view", path, autoencoder=tmp_path / "vqgan.safetensors")
    assert state_digest(load_ldm(path)[1]) == state_digest(whole[1])
    # A name that leads out of the folder is refused.
    (tmp_path / "vqgan.safetensors").write_bytes(vqgan)
    tensors, metadata = read_safetensors(path)
    metadata["autoencoder"] = {"file": "../vqgan.safetensors", "digest": "0"}
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match=r"shared\.safetensors: found .*, expected file and digest of its autoencoder"):
        load_ldm(path)
