"""Shipping: what leaves the run folder is small, says where it is from, and is what a chapter then loads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_models import patients, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data_scripts"))
import ship_weights

from difr3ct_core import chapters, reconstruct
from difr3ct_core.chapters import Chapter
from difr3ct_core.checkpoints import read_log
from difr3ct_core.datasets import preset_views
from difr3ct_core.files import InputError, read_safetensors
from difr3ct_core.weights import load_ldm, load_vqgan

from small_models import SMALL  # isort: skip

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A project folder with pretrained/ made from a tiny run, whose any-view model stands in for 2 views."""
    folder = tmp_path_factory.mktemp("project")
    trained(folder / "run")
    (folder / "run" / "2view").rename(folder / "run" / "ldm-2view")
    (folder / "pyproject.toml").write_text("")
    (folder / "notebooks").mkdir()
    results = {"psnr_2view": {"value": 12.345, "unit": "dB", "std": 0.5, "patients": 4, "psnr_4095": 16.635}}
    (folder / "quality_tiny.json").write_text(json.dumps(results))
    ship_weights.ship(folder / "run", folder / "pretrained", folder)
    return folder


def test_files_and_card(shipped):
    names = sorted(path.name for path in (shipped / "pretrained").iterdir())
    assert names == [f"tiny-{m}.{e}" for m in ("ldm-2view", "vqgan") for e in ("csv", "md", "safetensors")]
    card = (shipped / "pretrained" / "tiny-ldm-2view.md").read_text()
    for words in ("4 synthetic phantom", "3 steps", "seed 0", "not for clinical use",
                  "12.345 dB ± 0.500 over 4 patients",
                  "--stage ldm --views 2view --preset tiny --set", "steps=3", "16.6"):  # fmt: skip
        assert words in card, words
    assert "betas" not in card  # unchanged settings are no part of the command
    assert "12.345" not in (shipped / "pretrained" / "tiny-vqgan.md").read_text()


def test_a_chapter_loads_them_and_prefers_its_own(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(shipped)
    monkeypatch.setattr(chapters, "train_ldm", lambda *a, **k: pytest.fail("was trained"))
    monkeypatch.setattr(chapters, "train_vqgan", lambda *a, **k: pytest.fail("was trained"))
    chapter = Chapter("x", SMALL, tmp_path / "data", tmp_path / "run", 0, torch.device("cpu"))
    path = chapter.weights("ldm-2view")
    assert path == shipped / "pretrained" / "tiny-ldm-2view.safetensors"
    assert chapter.vqgan().codebook.initialised and not chapter.ldm("2view").training
    assert read_log(chapter.log("ldm-2view"), "loss")[0] == read_log(shipped / "run" / "ldm-2view", "loss")[0]
    views = preset_views(SMALL, "2view")
    few = patients(1).with_views("2view").xrays[0]
    ours, exact = (reconstruct(few, views, w, n_samples=1).samples for w in (path, shipped / "run" / "ldm-2view"))
    assert ours.isfinite().all() and ours.shape == exact.shape
    assert chapter.weights("ldm-8view") == tmp_path / "run" / "ldm-8view"  # nothing was shipped for 8 views
    (tmp_path / "run" / "ldm-2view").mkdir(parents=True)
    assert chapter.weights("ldm-2view") == tmp_path / "run" / "ldm-2view"


def test_the_any_view_model_serves_where_no_other_was_shipped(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(shipped)
    any_view = shipped / "pretrained" / "tiny-ldm-any.safetensors"
    any_view.write_bytes(b"")
    chapter = Chapter("x", SMALL, tmp_path / "data", tmp_path / "run", 0, torch.device("cpu"))
    assert chapter.weights("ldm-8view") == any_view
    assert chapter.weights("ldm-2view").name == "tiny-ldm-2view.safetensors"
    any_view.unlink()


def test_where_weights_ship_a_short_training_is_made_beside_them(shipped, tmp_path, monkeypatch):
    """It is the beginning of the whole training, is made once, and stands aside where the run trained its own."""
    monkeypatch.chdir(shipped)
    preset = SMALL.replace(book={"scratch_steps": 2})
    chapter = Chapter("x", preset, tmp_path / "data", tmp_path / "run", 0, torch.device("cpu"))
    chapter._patients["train"] = patients()
    for model in ("vqgan", "ldm-2view"):
        own = chapter.short_run(model)
        steps, losses = read_log(own, "loss")
        assert steps == [0, 1] and own != chapter.log(model)
        before = (own / "checkpoint.safetensors").stat().st_mtime_ns
        assert chapter.short_run(model) == own and (own / "checkpoint.safetensors").stat().st_mtime_ns == before
        assert losses[0] == pytest.approx(read_log(shipped / "run" / model, "loss")[1][0], rel=1e-3)
    (tmp_path / "run" / "vqgan").mkdir(parents=True)
    assert chapter.short_run("vqgan") == chapter.log("vqgan") == tmp_path / "run" / "vqgan"


def test_the_card_tells_what_is_special(shipped):
    _, metadata = read_safetensors(shipped / "run" / "ldm-2view" / "weights.safetensors")
    metadata["fingerprint"]["start"] = "0123"
    metadata["preset"]["initial"] = {"solver": "tv_body", "iterations": 60}
    card = ship_weights.card("ldm-2view", metadata, 1.0, shipped / "nothing.json", "It was interrupted once.")
    for words in ("- **How it went**: It was interrupted once.", "`tv_body`, 60 iterations", "initial.iterations=60",
                  "--weights START`", "Not measured yet"):  # fmt: skip
        assert words in card, words
    metadata["preset"]["initial"] = {"solver": "none", "network": True, "in_voxels": True}
    card = ship_weights.card("ldm-2view", metadata, 1.0, shipped / "nothing.json")
    assert "encoded volume of an INRR3CT" in card and "--weights START --network NETWORK`" in card


def test_too_large_and_nothing_there(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ship_weights, "LIMIT_MB", 0.001)
    with pytest.raises(InputError, match=r"would be 0\.\d MB, expected at most 0\.001"):
        ship_weights.ship(shipped / "run", tmp_path, shipped)
    assert list(tmp_path.iterdir()) == []
    assert ship_weights.main(["--run", str(tmp_path)]) == 2
    assert "holds no finished model" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_what_the_project_ships(path):
    assert path.stat().st_size <= 16e6
    if path.stem.endswith("vqgan"):
        model, preset = load_vqgan(path)
    else:
        model, _, preset, _ = load_ldm(path)
    assert path.stem.startswith(preset.name)
    assert all(p.isfinite().all() for p in model.parameters())
    card = path.with_suffix(".md").read_text()
    for words in ("**Data**", "**Training**", "**Command**", "## Quality", "## Limits", "dB"):
        assert words in card
    assert read_log(path.with_suffix(".csv"), "loss")[0]
