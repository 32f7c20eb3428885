"""The jobs of a study, its DAG in Snakemake, and a small real study that is killed in the middle and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from study import Job, Study, StudyError, parameters

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "book" / "study.yml").read_text(encoding="utf-8"))
PARAMETERS = 'preset = "tiny"\ndata = "data"\nrun = ""\nviews = "8view"\nseed = 0\ndevice = "auto"'


def notebook(path: Path, *sources: str, more: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(PARAMETERS + more, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), str(path))


def project(folder: Path, chapters: dict[str, str]) -> Path:
    """The real Snakefile, engine and profiles with trivial chapters: number → further parameters."""
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    shutil.copy(ROOT / "Snakefile", folder / "Snakefile")
    for number, more in chapters.items():
        notebook(folder / "notebooks" / f"{number}_x.ipynb", "print(seed, views)", more=more)
    return folder


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """A project that has every chapter of the plan."""
    return project(tmp_path / "p", {n: '\nbaseline = "naf"' if n == "08" else "" for n in CONFIG["chapters"]})


# The plan -----------------------------------------------------------------------------------------------------------


def test_the_papers_full_study(everything: Path) -> None:
    study = Study(CONFIG, everything)
    assert study.remarks == []
    jobs = list(study.jobs.values())
    assert len(jobs) == len({job.key for job in jobs})
    # 2 cohorts x 3 seeds: an autoencoder and five diffusion models each.
    assert sum(job.trains for job in jobs) == 2 * 3 * 6
    of = {number: [job for job in jobs if job.name == f"{number}_x"] for number in CONFIG["chapters"]}
    assert {number: len(found) for number, found in of.items()} == {
        "01": 3, "02": 6, "03": 3, "04": 6, "00": 6, "05": 30, "06": 6, "07": 6, "08": 6 * (5 + 4 + 3 + 5), "09": 6,
    }  # fmt: skip
    assert not [j for j in of["08"] if j.parameters["baseline"] == "x2ctgan" and j.parameters["views"] == "8view"]
    # Run folders: two jobs of one chapter never write into the same one.
    for found in of.values():
        assert len({study.folder(job) for job in found}) == len(found)


def test_what_depends_on_what(everything: Path) -> None:
    study = Study(CONFIG, everything)
    job = study.jobs["thoracic/seed-2/2view/05_x"]
    marks = [f"runs/study/done/paper/thoracic/seed-2/models/{model}.json" for model in ("vqgan", "ldm-2view")]
    assert study.inputs(job) == ["runs/study/done/paper/data/thoracic.json", *marks]
    assert study.inputs(study.jobs["lung/seed-0/models/ldm-2view"])[1:] == [
        "runs/study/done/paper/lung/seed-0/models/vqgan.json"
    ]
    words = study.command(job).split()
    assert {"preset=paper-thoracic", "views=2view", "seed=2", "run=runs/study/paper/thoracic/seed-2/2view"} <= set(
        words
    )
    assert words[words.index("--models") + 1] == "runs/study/paper/thoracic/seed-2/models"
    words = study.command(study.jobs["lung/seed-1/models/ldm-4view"]).split()
    assert words[:2] == ["train", "ldm"] and words[words.index("--gpus") + 1] == "4"
    assert words[words.index("--preset") + 1] == "paper" and words[words.index("--views") + 1] == "4view"


def test_chapters_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    study = Study(CONFIG, project(tmp_path / "p", {"05": "", "08": ""}))
    assert "chapter 09: there is no notebook, it is left out" in study.remarks
    assert "chapter 08: has no parameter 'baseline', it does not run over it" in study.remarks
    assert {job.name for job in study.jobs.values() if not job.trains} == {"05_x", "08_x"}


def test_every_chapter_of_the_book_is_in_the_study() -> None:
    assert {path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb")} <= set(CONFIG["chapters"])
    assert parameters(ROOT / "notebooks" / "05_sampling.ipynb") >= {"preset", "views", "seed", "run"}


def test_gpus_are_asked_for_only_when_there_are_some(everything: Path) -> None:
    assert Study(CONFIG, everything).gpu("train") == {"gpu": 4}
    assert Study({**CONFIG, "gpus": {"train": 0, "chapter": 0}}, everything).gpu("train") == {}
    assert Study({**CONFIG, "gpus_here": 0}, everything).gpu("chapter") == {}
    small = Study({**CONFIG, "gpus_here": 2}, everything)
    assert small.gpu("train") == {"gpu": 2} and "--gpus 2" in small.command(Job("lung", 0, "vqgan"))


def test_numbers_of_the_command_line_come_as_text(everything: Path) -> None:
    given = {"seeds": ["0", "7"], "gpus": {"train": "2", "chapter": "0"}, "gpus_here": "4"}
    study = Study({**CONFIG, **given}, everything)
    assert {job.seed for job in study.jobs.values()} == {0, 7} and study.gpu("train") == {"gpu": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": ["3view"]}, "views has '3view'"),
        ({"seeds": [0, 0]}, "expected a list of different entries"),
        ({"seeds": ["a"]}, "expected whole numbers"),
        ({"cohorts": "lung"}, "expected a list"),
        ({"out": "a b; rm -r c"}, "without blanks"),
        ({"colour": 1}, "'colour' is unknown"),
        ({"gpus": {"train": 4}}, "gpus is"),
        ({"chapters": {"05": {"needs": ["gan"]}}}, "chapter 05 needs 'gan'"),
        ({"chapters": {"05": {"needs": [], "over": ["colour"]}}}, "runs over 'colour'"),
        ({"settings": {"vqgan": ["steps=3; ls"], "ldm": []}}, "letters, digits"),
    ],
)
def test_a_study_that_cannot_be_is_refused(everything: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=re.escape(words)):
        study = Study({**CONFIG, **change}, everything)
        study.command(Job("lung", 0, "vqgan"))


# Snakemake ----------------------------------------------------------------------------------------------------------


def snakemake(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--nocolor", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def said(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=280)[0]
    assert process.returncode == 0, text[-4000:]
    return text


def counted(text: str) -> dict[str, int]:
    """Rule → number of jobs, from Snakemake's table."""
    return {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", text, re.M)}


def test_a_dry_run_shows_the_dag_of_the_full_study(everything: Path) -> None:
    pytest.importorskip("snakemake")
    study = Study(CONFIG, everything)
    trains = sum(job.trains for job in study.jobs.values())
    arguments = ["--cores", "1", "--dry-run", "--quiet", "rules", "--config", "seeds=[0,1,2]"]
    found = counted(said(snakemake(everything, *arguments)))
    assert found["train"] == trains == 36 and found["chapter"] == len(study.jobs) - trains and found["data"] == 2
    assert not (everything / "runs").exists(), "a dry run leaves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_the_profiles_are_understood(everything: Path, name: str) -> None:
    """Snakemake knows every setting of the profile, and a training asks for its GPUs."""
    pytest.importorskip(f"snakemake_executor_plugin_{name}")
    arguments = ["--profile", f"profiles/{name}", "--dry-run", "--config", "seeds=[0]", "cohorts=[lung]"]
    text = said(snakemake(everything, *arguments))
    assert counted(text)["train"] == 6 and re.search(r"resources: .*\bgpu=4\b", text)
    if name == "kubernetes":
        assert "--run /study/runs/paper/lung/seed-0/models" in text and "gpu_manufacturer=nvidia" in text


def tiny_study(folder: Path, steps: int) -> list[str]:
    """Arguments of a real study of 16³ voxels: one cohort, one seed, two views, chapters 02 and 05."""
    sys.path.insert(0, str(ROOT / "tests"))
    from small_models import SMALL

    # Checkpoints so often that a kill finds one.
    mini = SMALL.replace(name="mini", train_vqgan={"steps": steps, "checkpoint_every_s": 0.2})
    (folder / "small.json").write_text(json.dumps(mini.to_dict()))
    (folder / "data_scripts").mkdir()
    shutil.copy(ROOT / "data_scripts" / "make_phantoms.py", folder / "data_scripts")
    notebook(
        folder / "notebooks" / "05_x.ipynb",
        "from difr3ct_core.chapters import open_chapter\n"
        'chapter = open_chapter("05_x", preset, data, run or None, seed, device)\n'
        "chapter.shipped = False\n"
        "total = float(sum(p.double().sum() for p in chapter.ldm(views).parameters()))\n"
        'chapter.save("weights", {}, {"total": total, "views": views})\nprint(total)',
    )
    return [
        "--cores", "1", "--rerun-incomplete", "--config", "preset=small.json", "seeds=[0]", "cohorts=[lung]",
        "views=[2view]", "gpus={train: 0, chapter: 0}", "device=cpu",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_killed_in_the_middle_resumes(tmp_path: Path) -> None:
    """SIGKILL of everything while the autoencoder trains: the second call goes on, and ends as an undisturbed one."""
    pytest.importorskip("snakemake")
    ends = []
    for name, kill in (("a", True), ("b", False)):
        folder = project(tmp_path / name, {"05": ""})
        arguments = tiny_study(folder, steps=400)
        models = folder / "runs" / "study" / "mini" / "lung" / "seed-0" / "models"
        if kill:
            process = snakemake(folder, *arguments, start_new_session=True)
            until = time.monotonic() + 250
            while not (models / "vqgan" / "checkpoint.safetensors").exists():
                assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
                time.sleep(0.02)
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (models / "vqgan" / "weights.safetensors").exists()
            said(snakemake(folder, "--unlock", *arguments))
        said(snakemake(folder, *arguments))
        base = models.parents[2]
        ends.append(json.loads((base / "lung/seed-0/2view/results/weights.json").read_text())["values"])
        record = json.loads((base / "lung/seed-0/records/models.vqgan.json").read_text())
        assert [attempt["outcome"] for attempt in record["attempts"]] == (["killed", "done"] if kill else ["done"])
        report = json.loads((base / "report.json").read_text())
        assert report["total"]["done"] == report["total"]["jobs"] == 4 and report["total"]["gpu_hours"] == 0
        assert "Nothing to be done" in said(snakemake(folder, *arguments))
    assert ends[0] == ends[1] and ends[0]["views"] == "2view"
