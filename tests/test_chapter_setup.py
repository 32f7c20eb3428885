"""What every notebook begins with: the same folders from anywhere, data and models made or loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core.chapters import Chapter, open_chapter, pick_device, project_root
from difr3ct_core.files import InputError
from difr3ct_core.phantoms.variety import varied
from difr3ct_core.presets import VIEW_SETS, Preset, get_preset
from difr3ct_core.weights import load_initial

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def preset() -> Preset:
    """The tiny preset with few, coarse patients and hardly any training."""
    return get_preset("tiny").replace(
        volume={"size": 16},
        xray={"detector_size": 16},
        cohort={"n_train": 3, "n_val": 1, "n_test": 2, "draw_size": 16},
        train_vqgan={"steps": 2, "batch_size": 2},
        train_ldm={"steps": 2, "batch_size": 2},
    )


@pytest.fixture(scope="module")
def chapter(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Chapter:
    folder = tmp_path_factory.mktemp("chapter")
    return Chapter("test", preset, folder / "data", folder / "runs", 0, torch.device("cpu"))


def test_the_project_is_found_from_a_notebook_and_from_its_root(monkeypatch, tmp_path):
    for folder in (ROOT, ROOT / "notebooks", ROOT / "difr3ct_core"):
        monkeypatch.chdir(folder)
        assert project_root() == ROOT
    monkeypatch.chdir(tmp_path)
    assert project_root() == tmp_path


def test_relative_folders_hang_on_the_project_and_absolute_ones_do_not(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "notebooks")
    chapter = open_chapter("test", "tiny", "data", None, device="cpu")
    assert (chapter.data, chapter.run) == (ROOT / "data", ROOT / "runs" / "tiny")
    assert open_chapter("test", "tiny", tmp_path, tmp_path / "r", device="cpu").run == tmp_path / "r"


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta9"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(InputError, match=rf"device: found '{device}'.*expected auto, cpu or cuda"):
        pick_device(device)


def test_an_unknown_preset_is_named():
    with pytest.raises(InputError, match="preset: found 'huge', expected one of tiny, small, paper"):
        open_chapter("test", "huge")


def test_data_and_models_are_made_once_and_loaded_afterwards(chapter: Chapter):
    assert chapter.patients("train").hu.shape == (3, 16, 16, 16)
    two = chapter.patients("test", "2view")
    assert [view.angle_deg for view in two.views] == list(VIEW_SETS["2view"])
    first = chapter.ldm("2view")
    weights = chapter.weights("ldm-2view") / "weights.safetensors"
    made = weights.stat().st_mtime_ns
    # Another chapter of the same run sees files, not variables.
    again = Chapter("other", chapter.preset, chapter.data, chapter.run, 0, chapter.device).ldm("2view")
    assert weights.stat().st_mtime_ns == made
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_variations_are_those_of_the_training_patients_in_turn(chapter: Chapter, monkeypatch):
    train = chapter.patients("train")
    assert len(train) == 3
    five = chapter.variations(5)
    rows = [0, 1, 2, 0, 1]
    for i in (0, 3, 4):  # each is drawn by its own number, however many are asked for
        alone = varied(train.hu[[rows[i]]], train.labels[[rows[i]]], train.volume, seed=chapter.seed + i)
        assert torch.equal(five[i], alone[0])
    assert not torch.equal(five[0], five[3])  # the same patient, varied anew
    # On many cores they are the same.
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from _one_gpu import OwnModels

    many = OwnModels("test", chapter.preset, chapter.data, chapter.run, chapter.seed, chapter.device)
    assert torch.equal(many.variations(5), five)
    lidc = Chapter("test", get_preset("small-lidc"), chapter.data, chapter.run, 0, chapter.device)
    with pytest.raises(InputError, match=r"initial.varied: varies phantoms by their labels, and the patients of"):
        lidc.variations(1)


def test_a_network_learns_from_variations_where_the_preset_says_so(chapter: Chapter):
    preset = chapter.preset.replace(
        initial={"network": True, "solver": "none", "in_voxels": True, "varied": 0.67, "points": 64,
                 "widths": (8, 8), "features": 8, "width": 8},
        train_initial={"steps": 2, "batch_size": 2, "warmup_steps": 0},
    )  # fmt: skip
    one = Chapter("test", preset, chapter.data, chapter.run / "varied", 0, chapter.device)
    one.initial("2view")
    number, share, _ = load_initial(one.run / "initial-2view")[2]["fingerprint"]["others"]
    assert (number, share) == (2, 0.4)


def test_without_the_real_scan_there_is_none(chapter: Chapter):
    assert chapter.real is None


def test_a_result_of_one_chapter_is_read_by_another(chapter: Chapter):
    array = np.arange(24).reshape(2, 3, 4)
    chapter.save("numbers", {"array": array}, {"answer": 4.5}, note="more")
    other = Chapter("other", chapter.preset, chapter.data, chapter.run, 0, chapter.device)
    result = other.load("numbers")
    assert np.array_equal(result.arrays["array"], array) and result.values == {"answer": 4.5}
    assert result.provenance["chapter"] == "test" and result.provenance["note"] == "more"
    assert result.provenance["preset"] == "tiny" and result.provenance["seed"] == 0
    with pytest.raises(InputError, match="nothing_here"):
        other.load("nothing_here")
