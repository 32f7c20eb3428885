"""One job of a batch and its record, GPUs shared between jobs, and the report with its costs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import batch_job
import batch_report
import psutil
import pytest
from batch_job import claimed_gpus, training_command

from difr3ct_core.files import InputError


def job(folder: Path, script: str, *more: str) -> tuple[int, dict]:
    """Run a script as a job; its exit code and record."""
    (folder / "work.py").write_text(script)
    code = batch_job.main(["script", "work.py", "--record", "records/work.json", "--done", "done.json", *more], folder)
    return code, json.loads((folder / "records" / "work.json").read_text())


def test_a_job_leaves_its_record(tmp_path: Path) -> None:
    code, record = job(tmp_path, "import sys; print('said', sys.argv[1:])", "--", "--preset", "tiny")
    (attempt,) = record["attempts"]
    assert code == 0 and attempt["outcome"] == "done" and record["kind"] == "script"
    assert attempt["seconds"] > 0 and attempt["peak_gb"] > 0.01 and attempt["gpus"] == 0 and len(attempt["commit"]) > 6
    assert (tmp_path / "records" / "work.log").read_text().strip() == "said ['--preset', 'tiny']"
    assert json.loads((tmp_path / "done.json").read_text()) == record


def test_a_failed_job_says_why_and_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code, record = job(tmp_path, "raise SystemExit('no such organ')")
    assert code == 1 and not (tmp_path / "done.json").exists()
    assert record["attempts"][0]["outcome"] == "failed" and "no such organ" in record["attempts"][0]["error"]
    assert "no such organ" in capsys.readouterr().err
    code, record = job(tmp_path, "pass")
    assert code == 0 and [one["outcome"] for one in record["attempts"]] == ["failed", "done"]


def test_a_killed_job_is_seen_as_killed(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("import time; time.sleep(600)")
    arguments = ["script", "work.py", "--record", "records/work.json"]
    process = multiprocessing.get_context("fork").Process(target=batch_job.main, args=(arguments, tmp_path))
    process.start()
    note = tmp_path / "records" / "work.pids"
    until = time.monotonic() + 200
    while not (note.exists() and json.loads(note.read_text())):
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.05)
    (orphan,) = (int(pid) for pid in json.loads(note.read_text()))
    process.kill()
    process.join()
    record = json.loads((tmp_path / "records" / "work.json").read_text())
    assert record["attempts"][0]["outcome"] == "running"
    code, record = job(tmp_path, "pass")
    assert code == 0 and [one["outcome"] for one in record["attempts"]] == ["killed", "done"]
    assert not psutil.pid_exists(orphan), "what the killed job left running was ended"


def test_a_damaged_record_stops_no_job(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "work.json").write_text('{"attempts": [')
    code, record = job(tmp_path, "pass")
    assert code == 0 and len(record["attempts"]) == 1


# GPUs ---------------------------------------------------------------------------------------------------------------


def hold(folder: Path, count: int, seconds: float, queue: multiprocessing.Queue) -> None:
    with claimed_gpus(count, 3, folder) as mine:
        queue.put(("has", mine))
        time.sleep(seconds)
        queue.put(("gives", mine))


def test_jobs_side_by_side_never_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [context.Process(target=hold, args=(tmp_path, count, 0.3, queue)) for count in (2, 1, 2, 3, 1)]
    for one in jobs:
        one.start()
    busy: set[int] = set()
    for _ in range(2 * len(jobs)):
        what, gpus = queue.get(timeout=60)
        if what == "has":
            assert not busy & set(gpus), "two jobs have the same GPU"
            busy |= set(gpus)
        else:
            busy -= set(gpus)
    for one in jobs:
        one.join(10)
        assert one.exitcode == 0


def test_gpus_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match="asks for 4, this machine has 2"), claimed_gpus(4, 2, tmp_path):
        pass
    with claimed_gpus(4, 0, tmp_path) as none:
        assert none == [] and not list(tmp_path.iterdir())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    with claimed_gpus(2, 2, tmp_path) as given:
        assert given == [], "the scheduler has chosen already"


def test_several_gpus_train_under_accelerate() -> None:
    options = argparse.Namespace(
        what="ldm", run="r", preset="paper", data="data", seed=1, device="auto", views="2view", set=["accumulate=2"]
    )
    command = training_command(options, 4)
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--multi_gpu"]
    assert command[command.index("--num_processes") + 1] == "4"
    rest = command[command.index("difr3ct_core.training") :]
    assert rest[1:5] == ["--stage", "ldm", "--run", "r"] and rest[-2:] == ["--set", "accumulate=2"]
    assert "accelerate.commands.launch" not in training_command(options, 1)


def test_accelerate_and_the_training_understand_the_command(capsys: pytest.CaptureFixture) -> None:
    """accelerate's own parser, and the training's, take every option of the command."""
    launch = pytest.importorskip("accelerate.commands.launch")
    options = argparse.Namespace(
        what="vqgan", run="r", preset="no-such", data="data", seed=1, device="cpu", views="", set=[]
    )
    command = training_command(options, 2)
    parsed = launch.launch_command_parser().parse_args(command[3:])
    assert parsed.num_processes == 2 and parsed.module and parsed.training_script == "difr3ct_core.training"
    from difr3ct_core.training import main

    assert main(parsed.training_script_args) == 2
    assert "preset: found 'no-such'" in capsys.readouterr().err


# The report ---------------------------------------------------------------------------------------------------------


def record(folder: Path, name: str, *attempts: dict) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"attempts": list(attempts)}))


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three hours on four GPUs, the first of them lost; a chapter that failed; one that never began."""
    base = tmp_path / "study"
    done = {"outcome": "done", "gpus": 4, "peak_gb": 20.0}
    killed = {"outcome": "killed", "gpus": 4, "seconds": 3600, "error": "it was killed, or its machine went down"}
    record(base, "lung/seed-0/records/models.vqgan.json", killed, {**done, "seconds": 7200})
    failed = {"outcome": "failed", "gpus": 1, "seconds": 1800, "peak_gb": 3.5, "error": "x.ipynb: cell In[3] | ended"}
    record(base, "lung/seed-0/records/all.05_x.json", failed)
    record(base, "lung/records/data.json", {"outcome": "done", "gpus": 0, "seconds": 600, "peak_gb": 1.0})
    planned = ["lung/seed-0/records/models.vqgan.json", "lung/seed-0/records/all.06_x.json"]
    (base / "plan.json").write_text(json.dumps({"jobs": planned, "remarks": []}))
    return base


def test_the_report_counts_time_and_cost(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert batch_report.main([str(study), "--price", "2.5"]) == 0
    total = json.loads((study / "report.json").read_text())["total"]
    assert (total["jobs"], total["done"], total["failed"], total["not started"]) == (4, 2, 1, 1)
    # 3 h x 4 GPUs, the killed hour included, and half an hour on one.
    assert total["gpu_hours"] == pytest.approx(12.5) and total["cost"] == pytest.approx(31.25)
    assert total["hours"] == pytest.approx(3 + 0.5 + 1 / 6) and total["peak_gb"] == 20.0
    text = (study / "report.md").read_text()
    assert "- **lung/seed-0/all.05_x** (failed): x.ipynb: cell In[3]" in text
    assert "| lung/seed-0/models.vqgan | done | 2 | 3:00:00 | 20.00 | 4 | 12.000 | 30.00 |" in text
    assert "| lung/seed-0/all.06_x | not started | 0 | 0:00 |" in text
    assert "2 done, 1 failed, 1 not started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"), [(["none"], "holds no record of a job"), (["study", "--price", "-1"], "found -1.0")]
)
def test_what_cannot_be_reported(study: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    assert batch_report.main([str(study.parent / arguments[0]), *arguments[1:]]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_no_record_is_named(study: Path, capsys: pytest.CaptureFixture) -> None:
    (study / "lung" / "records" / "data.json").write_text('{"attempts": []}')
    assert batch_report.main([str(study)]) == 2
    assert "data.json: is no record of a job" in capsys.readouterr().err
