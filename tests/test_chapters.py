"""Running chapters: what is refused, what is kept, what goes on after a kill, and what the display says."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import execution
import nbformat
import psutil
import pytest
import run_chapters
from display import Display, clock_text, read_step
from execution import MemoryWatch, end_orphans, only_one, refresh_text, run_notebook
from fingerprint import core_files
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_checks import STANDARD_PARAMETERS, check_clean, check_executed, check_parameters, read_notebook

from difr3ct_core.files import InputError

PARAMETERS = 'preset = "tiny"\ndata = "data"\nrun = ""\nviews = "8view"\nseed = 0\ndevice = "auto"\nscale = 1.0'


def code(source: str, *tags: str, count: int | None = None, outputs: tuple = ()) -> nbformat.NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=list(outputs), metadata={"tags": list(tags)})


def save(path: Path, *cells: nbformat.NotebookNode) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[code(PARAMETERS, "parameters"), *cells], metadata=kernel), str(path))
    return path


def printed(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


# What is refused before a run -----------------------------------------------------------------------------------


def test_a_misspelled_parameter_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "04_x.ipynb")
    with pytest.raises(InputError) as error:
        check_parameters(read_notebook(path), path, {"veiws": "2view"})
    for word in ("04_x.ipynb", "'veiws'", "did you mean 'views'", *STANDARD_PARAMETERS):
        assert word in str(error.value)


@pytest.mark.parametrize("given", [{"seed": "one"}, {"seed": 1.5}, {"views": 2}, {"seed": True}, {"scale": "big"}])
def test_a_parameter_of_another_type_is_refused(tmp_path: Path, given: dict) -> None:
    path = save(tmp_path / "04_x.ipynb")
    with pytest.raises(InputError, match=f"{next(iter(given))}.*expected"):
        check_parameters(read_notebook(path), path, given)


def test_good_parameters_pass(tmp_path: Path) -> None:
    path = save(tmp_path / "04_x.ipynb")
    check_parameters(read_notebook(path), path, {"seed": 3, "views": "2view", "scale": 2, "preset": "small"})


def test_a_notebook_without_parameters_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.ipynb"
    nbformat.write(new_notebook(cells=[code("seed = 0")]), str(path))
    with pytest.raises(InputError, match=r"bad\.ipynb: 0 code cells are tagged 'parameters', expected one"):
        check_parameters(read_notebook(path), path, {})


def test_outputs_in_a_source_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ipynb", code("print(1)", count=1, outputs=(printed("1"),)))
    with pytest.raises(InputError, match=r"a\.ipynb: cell 1 holds outputs"):
        check_clean(read_notebook(path), path)


@pytest.mark.parametrize("content", ["", "{", '{"cells": 3}', '{"nbformat": 4, "nbformat_minor": 5, "cells"'])
def test_a_damaged_notebook_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cut.ipynb"
    path.write_text(content)
    with pytest.raises(InputError, match=r"cut\.ipynb.*expected"):
        read_notebook(path)


# What is refused after a run ------------------------------------------------------------------------------------

GOOD = [
    code(PARAMETERS, "parameters", count=1),
    code("from difr3ct_core.figures import montage", count=2),
    code("montage(3)", count=3, outputs=(new_output("display_data", {"image/png": "aGk="}),)),
    code("", count=None),
    code("print(1)", count=4, outputs=(printed("1\n"),)),
]


def broken(index: int, cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return new_notebook(cells=[cell if i == index else good for i, good in enumerate(GOOD)])


def test_a_complete_copy_passes(tmp_path: Path) -> None:
    check_executed(new_notebook(cells=GOOD), tmp_path / "a.ipynb")


@pytest.mark.parametrize(
    ("index", "cell", "message"),
    [
        (4, code("print(1)"), r"cell In\[4\] `print\(1\)` was not executed"),
        (4, code("1/0", count=4, outputs=(new_output("error", ename="ZeroDivisionError", evalue="", traceback=[]),)),
         r"cell In\[4\] `1/0` ended with ZeroDivisionError"),
        (4, code("f()", count=4, outputs=(printed("Traceback (most recent call last):\n ...\nKeyError: 3"),)),
         r"`f\(\)` wrote a traceback \(KeyError: 3\)"),
        (4, code("print(1)", count=4), r"`print\(1\)` shows nothing, expected an output because it prints"),
        (4, code("x = 1", "needs-output", count=4), "shows nothing, expected .* because it is tagged 'needs-output'"),
        (2, code("montage(3)", count=3), r"`montage\(3\)` shows nothing, expected .* because it ends in a figure"),
        (4, code("print(1)", count=5, outputs=(printed("1"),)), r"counts are \[1, 2, 3, 5\], expected 1 to 4"),
    ],
)  # fmt: skip
def test_an_incomplete_copy_is_refused(index: int, cell: nbformat.NotebookNode, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_executed(broken(index, cell), Path("06_x.ipynb"))


def test_a_copy_that_shows_nothing_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no cell shows anything"):
        check_executed(new_notebook(cells=[code("x = 1", count=1)]), Path("a.ipynb"))


def test_a_figure_made_silent_on_purpose_passes() -> None:
    check_executed(broken(2, code("montage(3);", count=3)), Path("a.ipynb"))


# Real kernels ---------------------------------------------------------------------------------------------------


def test_a_chapter_runs_with_its_parameters(tmp_path: Path) -> None:
    source = save(tmp_path / "01_x.ipynb", code("print(seed, views)"))
    target, seen = tmp_path / "out" / "01_x.ipynb", []
    run_notebook(source, target, {"seed": 7}, tmp_path, tmp_path / "step.json", lambda n, m: seen.append((n, m)))
    assert nbformat.read(str(target), 4).cells[-1].outputs[0].text == "7 8view\n"
    assert seen[-1] == (3, 3)
    assert not nbformat.read(str(source), 4).cells[-1].outputs, "the source stays clean"
    assert os.environ.get("DIFR3CT_PROGRESS") is None
    assert sorted(path.name for path in target.parent.iterdir()) == ["01_x.ipynb"]


def test_a_failing_chapter_is_refused_and_keeps_the_earlier_copy(tmp_path: Path) -> None:
    source = save(tmp_path / "01_x.ipynb", code("print('before')"), code("{}['organ']"), code("print('after')"))
    target = tmp_path / "out" / "01_x.ipynb"
    target.parent.mkdir()
    target.write_text("earlier")
    with pytest.raises(InputError, match=r"01_x\.ipynb: cell In\[3\] ended with KeyError: 'organ'") as error:
        run_notebook(source, target, {}, tmp_path, tmp_path / "step.json")
    assert target.read_text() == "earlier"
    failed = target.with_suffix(".failed.ipynb")
    assert str(failed) in str(error.value) and "before" in failed.read_text()


# A whole book of trivial chapters -------------------------------------------------------------------------------


def make_project(folder: Path, numbers: tuple[str, ...] = ("01", "02"), seconds: float = 0.0) -> Path:
    """A project of chapters that append their number to ran.txt and print."""
    (folder / "book").mkdir(parents=True)
    (folder / "difr3ct_core").mkdir()
    (folder / "difr3ct_core" / "__init__.py").write_text("from .far import away\n")
    (folder / "difr3ct_core" / "near.py").write_text("from .further import x  # a remark\n")
    (folder / "difr3ct_core" / "further.py").write_text("x = 1\n")
    (folder / "difr3ct_core" / "far.py").write_text("away = 1\n")
    plan = {number: {"after": list(numbers[:i]), "seconds": 5} for i, number in enumerate(numbers)}
    (folder / "book" / "chapters.yml").write_text(json.dumps({"steps": {}, "chapters": plan}))
    for number in numbers:
        work = f"import os, time\nopen('ran.txt', 'a').write('{number}\\n')\ntime.sleep({seconds})\nprint(seed)"
        uses = "if False:\n    from difr3ct_core import near" if number == numbers[-1] else "pass"
        save(folder / "notebooks" / f"{number}_x.ipynb", new_markdown_cell("Text."), code(work), code(uses))
    return folder


def ran(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().split() if (folder / "ran.txt").exists() else []


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_chapters, "build_html", lambda root, copies, note: [])


@pytest.mark.usefixtures("without_pages")
def test_only_what_changed_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_project(tmp_path / "p")

    def again(*arguments: str) -> list[str]:
        before = len(ran(folder))
        assert run_chapters.main(["book", *arguments], root=folder) == 0
        return ran(folder)[before:]

    assert again() == ["01", "02"]
    assert "open build/html/index.html" in capsys.readouterr().out
    state = json.loads((folder / "build" / "state.json").read_text())["tiny"]
    assert state["whole_run"]["minutes"] > 0 and 0.05 < state["parts"]["01"]["peak_gb"] < 6
    assert again() == []
    # Text and comments: nothing runs, but the copy shows the new words.
    notebook = nbformat.read(str(folder / "notebooks" / "02_x.ipynb"), 4)
    notebook.cells[1].source = "Better text."
    nbformat.write(notebook, str(folder / "notebooks" / "02_x.ipynb"))
    (folder / "difr3ct_core" / "further.py").write_text("# why\nx  =  1\n")
    assert again() == []
    copy = nbformat.read(str(folder / "build" / "executed" / "tiny" / "02_x.ipynb"), 4)
    assert [cell.source for cell in copy.cells if cell.cell_type == "markdown"] == ["Better text."]
    check_executed(copy, Path("02_x.ipynb"))
    # The core, where 02 imports it; 01 does not.
    (folder / "difr3ct_core" / "further.py").write_text("x = 2\n")
    (folder / "difr3ct_core" / "far.py").write_text("away = 2\n")
    assert again() == ["02"]
    # A chapter, and so what comes after it.
    save(folder / "notebooks" / "01_x.ipynb", code("open('ran.txt', 'a').write('01\\n')\nprint('new')"))
    assert again() == ["01", "02"]
    # A parameter, and then a misspelled one, which runs nothing.
    assert again("seed=5") == ["01", "02"]
    before = len(ran(folder))
    assert run_chapters.main(["book", "sed=5"], root=folder) == 2
    assert "'sed': unknown to every chapter" in capsys.readouterr().err
    assert run_chapters.main(["run", "01", "sed=5"], root=folder) == 2
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert run_chapters.main(["run", "07"], root=folder) == 2
    assert "chapter '07': 0 notebooks begin with it, expected one of 01, 02" in capsys.readouterr().err
    assert len(ran(folder)) == before
    # One chapter with its own parameters: beside the book's copy, which stays.
    assert run_chapters.main(["run", "02", "seed=9"], root=folder) == 0
    own = nbformat.read(str(folder / "build" / "executed" / "tiny" / "02_x.seed=9.ipynb"), 4)
    assert any(cell.outputs and cell.outputs[0].text == "9\n" for cell in own.cells if cell.cell_type == "code")
    assert again("seed=5") == []


DRIVER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import run_chapters;"
    "run_chapters.build_html = lambda *a: []; sys.exit(run_chapters.main(['book'], root=Path(sys.argv[2])))"
)


def test_a_killed_run_goes_on(root: Path, tmp_path: Path) -> None:
    """kill -9 in the second chapter: the first is kept, no half copy stays, the left-over kernel is gone."""
    folder = make_project(tmp_path / "p", seconds=0)
    slow = save(folder / "notebooks" / "02_x.ipynb", code("import time\nopen('ran.txt', 'a').write('02\\n')\n"
                "time.sleep(0 if __import__('os').path.exists('quick') else 60)\nprint(1)"))  # fmt: skip
    assert slow.exists()
    command = [sys.executable, "-c", DRIVER, str(root / "book"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root)
    deadline = time.monotonic() + 90
    while ran(folder) != ["01", "02"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.5)  # until the kernel's number is noted
    process.send_signal(signal.SIGKILL)
    process.wait()
    copies = folder / "build" / "executed" / "tiny"
    assert (copies / "01_x.ipynb").exists() and not (copies / "02_x.ipynb").exists()
    (folder / "quick").write_text("")
    again = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "unchanged, kept: chapters 01" in again.stderr
    assert ran(folder) == ["01", "02", "02"]
    assert sorted(path.name for path in copies.iterdir()) == ["01_x.ipynb", "02_x.ipynb"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with only_one(lock), pytest.raises(InputError, match=f"held by process {os.getpid()}"), only_one(lock):
        pass


def test_left_over_processes_are_ended_but_never_others(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        watch = MemoryWatch(tmp_path / "running.json")
        watch.sample()
        noted = json.loads(watch.note.read_text())
        assert str(sleeper.pid) in noted and watch.take_peak_gb() > 0.01
        # The number was given to another process since: its start differs, it is left alone.
        watch.note.write_text(json.dumps({str(sleeper.pid): noted[str(sleeper.pid)] - 100}))
        end_orphans(watch.note, patience_s=0.1)
        assert sleeper.poll() is None
        watch.note.write_text(json.dumps({str(sleeper.pid): noted[str(sleeper.pid)]}))
        end_orphans(watch.note, patience_s=0.1)
        assert not psutil.pid_exists(sleeper.pid)
    finally:
        sleeper.kill()


def test_a_missing_network_is_told_and_the_book_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, without_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path / "p", numbers=("01",))
    plan = json.loads((folder / "book" / "chapters.yml").read_text())
    plan["steps"]["real CT"] = {
        "script": "fetch.py", "arguments": ["{data}"], "makes": ["{data}/ct"],
        "seconds": 1, "missing": 3, "without": "the CT",
    }  # fmt: skip
    (folder / "book" / "chapters.yml").write_text(json.dumps(plan))
    (folder / "fetch.py").write_text("import os\nif not os.path.exists('net'): raise SystemExit(3)\nopen('ct', 'w')")

    def pretended(source: Path, executed: Path, *more: object) -> None:
        with open(folder / "ran.txt", "a") as handle:
            handle.write("01\n")
        executed.parent.mkdir(parents=True, exist_ok=True)
        executed.write_bytes(source.read_bytes())

    monkeypatch.setattr(run_chapters, "run_notebook", pretended)
    assert run_chapters.main(["book", "data=."], root=folder) == 0
    assert "missing: the CT." in capsys.readouterr().out
    assert run_chapters.main(["book", "data=."], root=folder) == 0
    assert ran(folder) == ["01"], "still missing: nothing changed"
    (folder / "net").write_text("")
    assert run_chapters.main(["book", "data=."], root=folder) == 0
    assert "missing" not in capsys.readouterr().out.splitlines()[-1]
    assert ran(folder) == ["01", "01"], "the CT came: the chapter shows it"
    (folder / "fetch.py").write_text("raise SystemExit('disk on fire')")
    assert run_chapters.main(["book", "data=."], root=folder) == 2
    assert "fetch.py: ended with exit code 1, expected 0; it said: disk on fire" in capsys.readouterr().err


def test_figures_are_copied_only_from_a_run_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = make_project(tmp_path / "p"), []
    assert run_chapters.main(["figures"], root=folder) == 2
    assert "holds no run from scratch at preset 'tiny'" in capsys.readouterr().err
    fake = types.SimpleNamespace(update_results=lambda *given, **more: calls.append((given, more)))
    monkeypatch.setitem(sys.modules, "_results", fake)
    (folder / "build").mkdir()
    whole = {"tiny": {"whole_run": {"minutes": 12.5, "peak_gb": 3.25, "finished": "now"}}}
    (folder / "build" / "state.json").write_text(json.dumps(whole))
    (folder / "build" / "tests.json").write_text('{"minutes": 8.0}')
    assert run_chapters.main(["figures"], root=folder) == 0
    (((path, figures), more),) = calls
    assert path == folder / "benchmarks" / "results" / "end_to_end.json" and "make book" in more["command"]
    assert {key: (entry["value"], entry["unit"]) for key, entry in figures.items()} == {
        "book_minutes": (12.5, "min"), "peak_gb": (3.25, "GB"), "test_minutes": (8.0, "min"),
    }  # fmt: skip


def test_dependencies_are_followed_through_the_core(root: Path, tmp_path: Path) -> None:
    folder = make_project(tmp_path / "p")
    names = {path.name for path in core_files(folder, "from difr3ct_core.near import x")}
    assert names == {"near.py", "further.py"}
    assert {path.name for path in core_files(folder, "from difr3ct_core import away")} == {"__init__.py", "far.py"}
    assert core_files(folder, "import numpy, os.path") == set()
    real = {path.name for path in core_files(root, "from difr3ct_core.uncertainty import decompose")}
    assert real == {"uncertainty.py", "files.py"}


def test_text_is_refreshed_only_where_it_changed(tmp_path: Path) -> None:
    source = new_notebook(cells=[new_markdown_cell("Old"), code("a = 1", "parameters"), code("print(a)"), code("")])
    copy = new_notebook(cells=[new_markdown_cell("Old"), code("a = 1", "parameters", count=1),
                               code("a = 2", "injected-parameters", count=2),
                               code("print(a)", count=3, outputs=(printed("2\n"),)), code("")])  # fmt: skip
    path = tmp_path / "copy.ipynb"
    nbformat.write(copy, str(path))
    assert not refresh_text(source, path)
    source.cells[0].source = "New"
    source.cells.append(new_markdown_cell("End"))
    assert refresh_text(source, path)
    fresh = nbformat.read(str(path), 4)
    assert [cell.source for cell in fresh.cells] == ["New", "a = 1", "a = 2", "print(a)", "", "End"]
    assert fresh.cells[3].outputs[0].text == "2\n" and fresh.cells[3].execution_count == 3


# The display ----------------------------------------------------------------------------------------------------


def test_steps_are_read_and_nonsense_is_not(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    assert read_step(path) is None
    for bad in ("", "{", "[]", '{"label": "a"}', '{"label": "a", "step": "x", "total": 1}'):
        path.write_text(bad)
        assert read_step(path) is None
    path.write_text(json.dumps({"label": "training", "step": 3, "total": None}))
    assert read_step(path) == ("training", 3, None)


def test_the_display_estimates_the_time_left(tmp_path: Path) -> None:
    now, out, step = [0.0], io.StringIO(), tmp_path / "step.json"
    display = Display([("a", 100.0), ("b", 300.0)], stream=out, step_file=step, clock=lambda: now[0])
    display._thread = execution.threading.Thread(target=lambda: None)  # time stands still here
    display.start("a")
    assert display.remaining_s() == pytest.approx(400)
    now[0] = 50.0
    assert display.remaining_s() == pytest.approx(350)
    now[0] = 260.0  # 2.6 times slower than foreseen: (260 + 60) / (100 + 60) = 2
    display.finish()
    display.start("b")
    assert display.remaining_s() == pytest.approx(600)
    # The loop inside b says that it needs longer still: 10 steps in 100 s, 90 to go.
    step.write_text(json.dumps({"label": "training", "step": 0, "total": 100}))
    display.poll()
    now[0] = 360.0
    step.write_text(json.dumps({"label": "training", "step": 10, "total": 100}))
    display.poll()
    assert display.remaining_s() == pytest.approx(900)
    assert display.line() == "[2/2] b · training 10/100 · 6:00 gone, about 15:00 left"
    display.close()
    assert "[1/2] a done in 4:20" in out.getvalue() and "\r" not in out.getvalue()


def test_a_log_gets_a_line_every_15_seconds_and_a_terminal_one_line(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, lines in ((io.StringIO(), 4), (Terminal(), 0)):
        now = [0.0]
        display = Display([("a", 60.0)], stream=stream, clock=lambda now=now: now[0])
        display._thread = execution.threading.Thread(target=lambda: None)
        display.start("a")
        for second in range(60):
            now[0] = float(second)
            display.show()
        assert stream.getvalue().count("\n") in (lines, lines - 1)
        assert ("\r" in stream.getvalue()) == (lines == 0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text
