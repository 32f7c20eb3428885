"""Every method of the tables is trained and scored by the script for one GPU, on whatever device there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from difr3ct_core.baselines.registry import METHODS
from difr3ct_core.datasets import make_cohort
from difr3ct_core.presets import get_preset

ROOT = Path(__file__).parents[1]


def test_every_trained_method_and_its_views_have_a_process(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from one_gpu import jobs

    trained = {(name, views) for name, method in METHODS.items() for views in method.view_sets if method.models(views)}
    reused = {job for job in trained if METHODS[job[0]].reuses}  # the correction is of the same samples
    assert set(jobs()) == (trained - reused) | {("difr3ct", "any"), ("detectors", "8view"), ("naf", "")}
    assert len(jobs()) == len(set(jobs()))


@pytest.mark.slow
def test_both_cohorts_are_trained_scored_and_handed_out(tmp_path):
    words = []
    for cohort in ("lung", "thoracic"):
        preset = get_preset("small" if cohort == "lung" else "small-thoracic")
        preset = preset.replace(cohort={"n_train": 4, "n_val": 2, "n_test": 2})
        (tmp_path / f"{cohort}.json").write_text(json.dumps(preset.to_dict()))
        make_cohort(tmp_path / "data" / preset.cohort_folder, preset)
        words.append(str(tmp_path / f"{cohort}.json"))
    command = [sys.executable, "benchmarks/one_gpu.py", "--presets", *words, "--data", tmp_path / "data", "--run"]
    command += [
        tmp_path / "run",
        "--out",
        tmp_path / "out",
        "--smoke",
        "2",
        "--seconds",
        "200",
        "100",
        "--patients",
        "2",
    ]
    command += ["--device", "cpu", "--only", "inrr3ct/1view_frontal", "difr3ct/1view_frontal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads((tmp_path / "out" / "tables.json").read_text())
    rows = {f"{c}/{m}/1view_frontal" for c in ("lung", "thoracic") for m in ("difr3ct", "difr3ct_tv", "inrr3ct")}
    assert set(tables) == rows | {"provenance"}
    assert all("against_difr3ct" in tables[row] for row in rows if "/difr3ct/" not in row)
    assert tables["thoracic/inrr3ct/1view_frontal"]["patients_seen"]["mean"] == 32  # two steps of 8 here, 2 before
