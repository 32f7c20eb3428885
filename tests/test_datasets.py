"""Cohorts on disk: reproducible, split by patient, completed after a kill; x-rays that belong to their volumes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from difr3ct_core import datasets
from difr3ct_core.datasets import (
    SPLITS,
    _majority,
    batch_index,
    load_patients,
    make_cohort,
    preset_views,
    render_xrays,
)
from difr3ct_core.drr import project
from difr3ct_core.files import InputError, read_json, read_npz, sha256, write_npz
from difr3ct_core.phantoms import make_phantom
from difr3ct_core.presets import VIEW_SETS, get_preset

PRESET = get_preset("tiny").replace(
    volume={"size": 16}, xray={"detector_size": 16}, cohort={"n_train": 3, "n_val": 2, "n_test": 2, "draw_size": 32}
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort") / "tiny", PRESET, workers=1)


def checksums(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_splits_share_no_patient(cohort):
    patients = read_json(cohort / "manifest.json")["patients"]
    assert [sum(p["split"] == s for p in patients) for s in SPLITS] == [3, 2, 2]
    assert len({p["seed"] for p in patients}) == len({p["id"] for p in patients}) == 7
    volumes = [load_patients(cohort, split) for split in SPLITS]
    flat = torch.cat([v.hu.flatten(1) for v in volumes]).float()
    assert (torch.cdist(flat, flat) + 1e9 * torch.eye(7)).min() > 1000  # no two are the same anatomy


def test_a_larger_training_set_never_holds_a_test_patient(cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "_make_phantom_patient", lambda job: None)  # the plan is enough
    make_cohort(tmp_path, PRESET.replace(cohort={"n_train": 5000, "n_val": 3}), workers=1)
    small, large = (read_json(folder / "manifest.json")["patients"] for folder in (cohort, tmp_path))
    assert all(patient in large for patient in small)  # same name, seed and split
    assert len({p["seed"] for p in large}) == len(large) == 5005


def test_further_training_patients_stand_beside_the_same_test_patients(cohort, tmp_path):
    """The phantoms from number 2 on: the last of the three, and two that the cohort does not have."""
    further = make_cohort(tmp_path / "further", PRESET, workers=1, first=2)
    for split in ("val", "test"):
        assert torch.equal(load_patients(further, split).hu, load_patients(cohort, split).hu)
    before, after = (load_patients(folder, "train").hu for folder in (cohort, further))
    assert torch.equal(after[0], before[2])
    assert not any(torch.equal(a, b) for a in after[1:] for b in before)
    assert make_cohort(further, PRESET, workers=1) == further  # asked for nothing, it stays what it is
    with pytest.raises(InputError, match="the cohort there was made with other numbers"):
        make_cohort(further, PRESET, workers=1, first=0)


def test_the_same_seeds_make_the_same_patients(cohort, tmp_path):
    again = make_cohort(tmp_path / "again", PRESET, workers=1)
    assert checksums(again) == checksums(cohort)
    other = make_cohort(tmp_path / "other", PRESET.replace(cohort={"seed": 7}), workers=1)
    assert load_patients(other, "val").hu.ne(load_patients(cohort, "val").hu).any()


@pytest.mark.slow  # two fresh processes import torch
def test_a_process_makes_the_same_patients(cohort, tmp_path):
    few = PRESET.replace(cohort={"n_train": 2, "n_val": 1, "n_test": 1})
    made = make_cohort(tmp_path / "few", few, workers=2)
    ours, theirs = checksums(made), checksums(cohort)
    assert len(ours) == 9
    assert all(theirs[name] == value for name, value in ours.items() if name != "manifest.json")


def test_patients_are_the_phantoms_averaged_down(cohort):
    train = load_patients(cohort, "train")
    seed = next(p["seed"] for p in read_json(cohort / "manifest.json")["patients"] if p["id"] == train.ids[1])
    phantom = make_phantom(seed, 32, PRESET.cohort.cohort, 320.0)
    for z, y, x in ((4, 5, 8), (10, 7, 3), (15, 0, 9)):
        block = phantom.hu[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert abs(float(block.mean().clamp(-1000, 1500)) - float(train.hu[1, z, y, x])) <= 0.51
    assert train.hu.dtype == torch.int16 and train.labels.dtype == torch.uint8


def test_x_rays_belong_to_their_volume(cohort):
    """Line integrals of µ = 0.02/mm · (1 + HU/1000) over voxels of 20 mm, straight from the stored volumes."""
    val = load_patients(cohort, "val")
    mu = 0.02 * (1 + val.hu.float() / 1000)
    assert val.xrays.shape == (2, 8, 16, 16) and val.xrays.dtype == torch.float32
    torch.testing.assert_close(val.xrays[:, 0], 20 * mu.sum(3), atol=1e-4, rtol=1e-4)  # 0°, lateral: along x
    torch.testing.assert_close(val.xrays[:, 4], 20 * mu.sum(2).flip(-1), atol=1e-4, rtol=1e-4)  # 90°, frontal
    assert float(val.xrays.min()) >= 0 and 3 < float(val.xrays.max()) < 15


@pytest.mark.parametrize("name", VIEW_SETS)
def test_with_views_picks_the_right_x_rays(cohort, name):
    train = load_patients(cohort, "train")
    some = train.with_views(name)
    assert tuple(view.angle_deg for view in some.views) == VIEW_SETS[name]
    mu = 0.02 * (1 + train.hu.float() / 1000)
    expected = project(mu[:, None], preset_views(PRESET, name), 20.0)[:, 0]
    torch.testing.assert_close(some.xrays, expected, atol=1e-5, rtol=1e-5)
    assert some.ids == train.ids and torch.equal(some.hu, train.hu)


def test_with_views_refuses(cohort):
    train = load_patients(cohort, "train")
    with pytest.raises(InputError, match=r"views: found '3view', expected one of 8view"):
        train.with_views("3view")
    with pytest.raises(InputError, match=r"no x-rays are stored at \[22\.5, .*only at \[0\.0, 90\.0\]"):
        train.with_views("2view").with_views("8view")


def test_render_clips_to_the_window():
    """Metal above the window is not in the training target, so it must not be in the x-rays."""
    hu = torch.full((1, *PRESET.volume.shape), -1000.0)
    hu[0, 8, 8, 8] = 3000.0
    xrays = render_xrays(hu, preset_views(PRESET, "2view"), PRESET.volume, PRESET.xray)
    assert float(xrays.max()) == pytest.approx(20 * 0.02 * 2.5, rel=1e-5)


def test_unit_and_take(cohort):
    train = load_patients(cohort, "train")
    unit = train.unit()
    assert unit.shape == (3, 1, 16, 16, 16) and unit.min() >= -1 and unit.max() <= 1
    torch.testing.assert_close(unit[:, 0], train.hu.float() / 1250 - 0.2)
    torch.testing.assert_close(train.unit([2, 0]), unit[[2, 0]])
    torch.testing.assert_close(train.unit(torch.tensor([1])), unit[1:2])
    some = train.take([2, 0])
    assert some.ids == (train.ids[2], train.ids[0]) and len(some) == 2
    assert torch.equal(some.xrays, train.xrays[[2, 0]]) and torch.equal(some.labels, train.labels[[2, 0]])


def test_limit(cohort):
    assert load_patients(cohort, "train", limit=2).ids == load_patients(cohort, "train").ids[:2]


# --- kill and damage -------------------------------------------------------------------------------------------


def test_a_killed_preparation_is_completed(cohort, tmp_path, monkeypatch):
    folder = tmp_path / "cohort"
    made = []
    draw = datasets.make_phantom

    def counting(seed, *args):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(seed)
        return draw(seed, *args)

    monkeypatch.setattr(datasets, "make_phantom", counting)
    with pytest.raises(KeyboardInterrupt):
        make_cohort(folder, PRESET, workers=1)
    monkeypatch.setattr(datasets, "make_phantom", draw)
    # Killed, and now with other numbers: the finished patients must not be mixed with theirs.
    with pytest.raises(InputError, match=r"manifest\.json: .*made with other numbers"):
        make_cohort(folder, PRESET.replace(cohort={"seed": 1}), workers=1)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")}
    make_cohort(folder, PRESET, workers=1)
    assert checksums(folder) == checksums(cohort)
    assert all(p.stat().st_mtime_ns == moment for p, moment in before.items())  # kept, not made again


@pytest.mark.parametrize("name", ["ct.npz", "xrays.npz"])
def test_only_what_is_missing_is_made(cohort, tmp_path, monkeypatch, name):
    folder = Path(shutil.copytree(cohort, tmp_path / "cohort"))
    (folder / "patients" / "lung-val-0001" / name).unlink()
    with pytest.raises(InputError, match=rf"lung-val-0001/{name}: no such file"):
        load_patients(folder, "val")
    made = []
    draw = datasets.make_phantom
    monkeypatch.setattr(datasets, "make_phantom", lambda seed, *args: made.append(seed) or draw(seed, *args))
    make_cohort(folder, PRESET, workers=1)
    assert made == [PRESET.cohort.seed * 10**7 + 10**6 + 1]
    assert checksums(folder) == checksums(cohort)


def test_other_numbers_are_refused(cohort):
    changes = {"volume": {"hu_max": 1000.0}, "xray": {"mu_water_per_mm": 0.019}, "cohort": {"n_val": 3}}
    for section, change in changes.items():
        with pytest.raises(InputError, match=r"manifest\.json: .*other numbers than preset 'tiny'.*another data"):
            make_cohort(cohort, PRESET.replace(**{section: change}), workers=1)
    # What does not shape the data does not matter.
    assert make_cohort(cohort, PRESET.replace(train_ldm={"lr": 1.0}), workers=1) == cohort


def test_draw_size_that_does_not_divide(tmp_path):
    with pytest.raises(InputError, match=r"cohort\.draw_size: found 24, expected a multiple of 16"):
        make_cohort(tmp_path / "c", PRESET.replace(cohort={"draw_size": 24}), workers=1)
    assert not (tmp_path / "c").exists()


def test_no_cohort_and_unknown_split(cohort, tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json: no such file.*make_phantoms"):
        load_patients(tmp_path, "train")
    with pytest.raises(InputError, match=r"split: found 'training', expected one of train, val, test"):
        load_patients(cohort, "training")
    empty = Path(shutil.copytree(cohort, tmp_path / "empty"))
    record = read_json(empty / "manifest.json")
    record["patients"] = [p for p in record["patients"] if p["split"] != "val"]
    (empty / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"manifest\.json: lists no patient in split 'val'"):
        load_patients(empty, "val")


@pytest.mark.parametrize("content", ["[]", "{", '{"key": {"volume": {}}}', '{"key": 3, "views": []}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        load_patients(tmp_path, "train")
    with pytest.raises(InputError, match=r"manifest\.json"):
        make_cohort(tmp_path, PRESET, workers=1)


def test_damaged_patients_are_named(cohort, tmp_path):
    folder = Path(shutil.copytree(cohort, tmp_path / "c"))
    scan, xrays = (folder / "patients" / "lung-test-0000" / name for name in ("ct.npz", "xrays.npz"))
    good = {path: path.read_bytes() for path in (scan, xrays)}
    for path in good:
        path.write_bytes(good[path][: len(good[path]) // 2])
        with pytest.raises(InputError, match=rf"lung-test-0000/{path.name}"):
            load_patients(folder, "test")
        path.write_bytes(good[path])
    arrays = read_npz(scan)
    write_npz(scan, hu=arrays["hu"][1:], labels=arrays["labels"])
    with pytest.raises(InputError, match=r"ct\.npz: found hu of \(15, 16, 16\), expected \(16, 16, 16\)"):
        load_patients(folder, "test")
    scan.write_bytes(good[scan])
    write_npz(xrays, line_integrals=read_npz(xrays)["line_integrals"][:7])
    with pytest.raises(InputError, match=r"xrays\.npz: found shape \(7, 16, 16\), expected \(8, 16, 16\)"):
        load_patients(folder, "test")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"locked.*cannot be written"):
        make_cohort(tmp_path / "locked" / "c", PRESET, workers=1)


# --- labels and batches ----------------------------------------------------------------------------------------


def test_majority_of_each_block():
    fine = torch.zeros(4, 6, 8, dtype=torch.uint8)
    fine[0, 0, :2], fine[1, 1, :2], fine[0, 1, 0] = 7, 7, 7  # five of the first block's eight voxels
    fine[2:, 4:, 6:] = torch.tensor([3, 3, 3, 3, 3, 9, 9, 9], dtype=torch.uint8).view(2, 2, 2)
    coarse = _majority(fine, 2)
    assert coarse.shape == (2, 3, 4)
    assert coarse[0, 0, 0] == 7 and coarse[1, 2, 3] == 3 and int(coarse.sum()) == 10
    assert torch.equal(_majority(fine, 1), fine)


@pytest.mark.parametrize(("n", "batch"), [(7, 2), (7, 7), (5, 8), (1, 3), (16, 4)])
def test_every_epoch_is_a_permutation(n, batch):
    steps = 3 * n  # a whole number of epochs
    rows = torch.cat([batch_index(n, batch, step, seed=4) for step in range(steps)]).view(-1, n)
    assert (rows.sort(1).values == torch.arange(n)).all()
    if n > 4:
        assert len({tuple(epoch.tolist()) for epoch in rows}) > 1  # shuffled anew


def test_batches_are_a_pure_function_of_seed_and_step():
    forwards = [batch_index(11, 3, step, 0).tolist() for step in range(40)]
    backwards = [batch_index(11, 3, step, 0).tolist() for step in reversed(range(40))][::-1]
    assert forwards == backwards
    assert forwards != [batch_index(11, 3, step, 1).tolist() for step in range(40)]
    state = np.random.default_rng(0)  # unrelated randomness does not matter
    state.random(3)
    torch.rand(3)
    assert batch_index(11, 3, 7, 0).tolist() == forwards[7]
