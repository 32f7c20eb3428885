"""`make verify`: an honest run agrees with itself; one number changed by hand, anywhere, is found and named."""

from __future__ import annotations

import ast
import base64
import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import verify
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_checks import read_notebook
from run_folders import borrow_models
from verify import MEASURED, Report, compare, differing_pixels, figure_calls, leaves, main

from difr3ct_core.figures import models
from difr3ct_core.results import Result, load_result, provenance, save_result

T = 50
GAMMA = 1 - (np.arange(T) + 1) / (T + 1)
SETUP = "from difr3ct_core.figures import models as figures\nfrom difr3ct_core.chapters import open_chapter"
SHOW = 'figures.schedules(chapter.load("schedules"))'
WORK = """
import numpy as np
chapter = open_chapter("01_small", preset, data, run or None, seed, device)
gamma = 1 - (np.arange(50) + 1) / 51
chapter.save("schedules", {"gamma_chen": gamma, "gamma_ddpm": gamma**2, "seconds_x": [seed]},
    {"half_chen": int((gamma > 0.5).sum()), "half_ddpm": int((gamma**2 > 0.5).sum()), "seconds": 3.0, "name": "µ"});
"""


def results(run: Path, **values: Any) -> None:
    """The results of one small chapter."""
    saved = {"half_chen": int((GAMMA > 0.5).sum()), "half_ddpm": int((GAMMA**2 > 0.5).sum()), "seconds": 2.0}
    origin = provenance("tiny", 0, chapter="01_small")
    arrays = {"gamma_chen": GAMMA, "gamma_ddpm": GAMMA**2, "seconds_x": [1.0]}
    save_result(run / "results", "schedules", arrays, {**saved, "name": "µ", **values}, origin)


def cell(source: str, *tags: str, count: int | None = None, outputs: tuple = ()) -> nbformat.NotebookNode:
    return new_code_cell(source, execution_count=count, outputs=list(outputs), metadata={"tags": list(tags)})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one chapter, its run and its executed copy, as `make book` leaves them."""
    parameters = 'preset = "tiny"\ndata = "data"\nrun = ""\nviews = "8view"\nseed = 0\ndevice = "auto"'
    parts = [(parameters, "parameters"), (SETUP,), (WORK,), (SHOW, "figure"), ("glue()", "remove-cell")]
    source = new_notebook(cells=[new_markdown_cell("# Small"), *(cell(*part) for part in parts)])
    source.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    results(tmp_path / "runs" / "tiny")
    picture = models.schedules(load_result(tmp_path / "runs" / "tiny" / "results", "schedules"))._repr_png_()
    shown = new_output("display_data", {"image/png": base64.b64encode(picture).decode()})
    numbers = [
        new_output("display_data", {"text/plain": repr(value)}, metadata={"scrapbook": {"name": name}})
        for name, value in {"half_chen": 25, "schedules_half_ddpm": "14", "gap": 11}.items()
    ]
    copies = [cell(*part) for part in parts]
    copies[3].outputs, copies[4].outputs = [shown], numbers
    copies.insert(1, cell('run = "runs/tiny"\nseed = 0\npreset = "tiny"', "injected-parameters"))
    for path, notebook in (
        (tmp_path / "notebooks" / "01_small.ipynb", source),
        (tmp_path / "build" / "executed" / "tiny" / "01_small.ipynb", new_notebook(cells=copies)),
    ):
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, str(path))
    return tmp_path


def in_this_process(source: Path, executed: Path, parameters: dict, root: Path, step_file: Path) -> None:
    """Run a chapter without a kernel."""
    names: dict[str, Any] = {}
    for number, one in enumerate(
        c for c in read_notebook(source).cells if c.cell_type == "code" and c.source != "glue()"
    ):
        exec(compile(ast.parse(one.source), "<cell>", "exec"), names)
        if number == 0:
            names.update(parameters)


def change(run: Path, key: str, value: Any) -> None:
    """What a hand with an editor does."""
    path = run / "results" / "schedules.json"
    record = json.loads(path.read_text())
    record["values"][key] = value
    path.write_text(json.dumps(record))


def test_an_honest_run_agrees(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--run", "runs/tiny"], project) == 0
    said = capsys.readouterr().out
    assert "Everything agrees." in said and "1 results read, 1 figures drawn, 1 figures compared" in said
    assert "2 numbers in the text traced" in said and "1 numbers in the text not traced" in said
    assert "2 numbers recomputed, 1 numbers without a formula" in said
    drawn = project / "build" / "verify" / "tiny" / "01_small.schedules.schedules.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert json.loads((project / "build" / "verify" / "report.json").read_text())["differences"] == []


def test_a_number_changed_by_hand_is_named(project: Path, capsys: pytest.CaptureFixture) -> None:
    change(project / "runs" / "tiny", "half_chen", 31)
    assert main(["--run", "runs/tiny"], project) == 1
    said = capsys.readouterr()
    assert "DIFFERS schedules.half_chen: saved 31, found 25, tolerance 0" in said.err
    assert "DIFFERS 01_small, `half_chen` in the text: saved 31, found 25" in said.err
    assert "2 differences." in said.out


def test_a_number_of_the_text_given_as_words_is_looked_up_too(project: Path, capsys: pytest.CaptureFixture) -> None:
    change(project / "runs" / "tiny", "half_ddpm", 16)
    assert main(["--run", "runs/tiny"], project) == 1
    assert "`schedules_half_ddpm` in the text: saved 16, found 14, tolerance 0.5" in capsys.readouterr().err


def test_changed_arrays_are_noticed(project: Path, capsys: pytest.CaptureFixture) -> None:
    run = project / "runs" / "tiny" / "results"
    with np.load(run / "schedules.npz") as held:
        arrays = dict(held)
    np.savez(run / "schedules.npz", **{**arrays, "gamma_chen": arrays["gamma_chen"] ** 0.5})
    assert main(["--run", "runs/tiny"], project) == 1
    assert "is not the file that schedules.json describes" in capsys.readouterr().err


def test_another_picture_is_noticed(project: Path, capsys: pytest.CaptureFixture) -> None:
    """Arrays and values were made again together, and agree; but the book shows the old picture."""
    arrays = {"gamma_chen": np.sqrt(GAMMA), "gamma_ddpm": GAMMA**2}
    values = {"half_chen": int((np.sqrt(GAMMA) > 0.5).sum()), "half_ddpm": int((GAMMA**2 > 0.5).sum())}
    save_result(project / "runs" / "tiny" / "results", "schedules", arrays, values, provenance("tiny", 0))
    assert main(["--run", "runs/tiny"], project) == 1
    assert "figure models.schedules of schedules: share of pixels that differ" in capsys.readouterr().err


def test_a_chapter_runs_again(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(verify, "run_notebook", in_this_process)
    assert main(["--run", "runs/tiny", "--chapter", "01"], project) == 0, capsys.readouterr().err
    assert "2 numbers of the chapter compared, 2 arrays of the chapter compared" in capsys.readouterr().out
    assert [path.name for path in (project / "runs").iterdir()] == ["tiny"], "nothing is left behind"
    change(project / "runs" / "tiny", "name", "m")
    change(project / "runs" / "tiny", "seconds", 99.0)
    assert main(["--run", "runs/tiny", "--chapter", "01"], project) == 1
    assert "DIFFERS schedules.name: saved m, found µ, exactly" in (said := capsys.readouterr().err)
    assert "seconds" not in said, "times are not compared"


@pytest.mark.slow
def test_a_chapter_runs_again_in_a_kernel(project: Path) -> None:
    assert main(["--run", "runs/tiny", "--chapter", "01"], project) == 2, "the cell that glues nothing fails"
    path = project / "notebooks" / "01_small.ipynb"
    notebook = nbformat.read(str(path), 4)
    notebook.cells.pop()
    nbformat.write(notebook, str(path))
    assert main(["--run", "runs/tiny", "--chapter", "01"], project) == 0
    change(project / "runs" / "tiny", "half_chen", 31)
    assert main(["--run", "runs/tiny", "--chapter", "01"], project) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "runs/none"], "holds no saved result"),
        (["--run", "runs/tiny", "--chapter", "07"], "0 notebooks begin with it"),
        (["--run", "runs/tiny", "--tolerance", "-1"], "found -1.0, expected a share"),
    ],
)
def test_what_cannot_be_checked_is_said(
    project: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments, project) == 2
    assert words in capsys.readouterr().err


def two(saved: dict, found: dict, arrays: tuple = ({}, {})) -> Report:
    report = Report()
    pair = [
        Result("r", {k: np.asarray(v) for k, v in a.items()}, v, {})
        for a, v in zip(arrays, (saved, found), strict=True)
    ]
    compare(*pair, 0.01, report)
    return report


@pytest.mark.parametrize(
    ("saved", "found", "differs"),
    [
        ({"psnr": 30.0}, {"psnr": 30.29}, False),
        ({"psnr": 30.0}, {"psnr": 30.31}, True),
        ({"psnr": {"8view": [30.0, 20.0]}}, {"psnr": {"8view": [30.0, 21.0]}}, True),
        ({"psnr": 30.0}, {}, True),
        ({}, {"psnr": 30.0}, True),
        ({"identity": 1e-16}, {"identity": 3e-16}, False),
        ({"good": True}, {"good": False}, True),
        ({"speed_up": 50.0}, {"speed_up": 20.0}, False),
        ({"n": 8}, {"n": None}, True),
    ],
)
def test_values_are_compared_within_the_tolerance(saved: dict, found: dict, differs: bool) -> None:
    assert bool(two(saved, found).differences) is differs


def test_arrays_are_compared_by_shape_type_and_size() -> None:
    x = np.linspace(-100, 100, 24).reshape(2, 3, 4)
    assert not two({}, {}, ({"x": x}, {"x": x + 0.9})).differences
    moved = x.copy()
    moved[1, 2, 0] += 30
    (line,) = two({}, {}, ({"x": x}, {"x": moved})).differences
    assert line.startswith("r, array x at [1, 2, 0]: saved 73.9") and line.endswith("tolerance 1")
    assert two({}, {}, ({"x": x}, {"x": x[0]})).differences and two({}, {}, ({"x": x}, {})).differences
    assert two({}, {}, ({"x": x}, {"x": np.full_like(x, np.nan)})).differences


def test_paths_of_values() -> None:
    assert list(leaves({"a": [1, {"b": None}], "c": "µ"})) == [("a.0", 1), ("a.1.b", None), ("c", "µ")]
    assert MEASURED.search("seconds_ddpm") and MEASURED.search("cost.seconds") and not MEASURED.search("secondsight")


def test_pictures_of_other_size_differ_wholly() -> None:
    from io import BytesIO

    from PIL import Image

    def png(shape: tuple[int, int], level: int) -> bytes:
        stream = BytesIO()
        Image.fromarray(np.full(shape, level, np.uint8)).save(stream, "PNG")
        return stream.getvalue()

    assert differing_pixels(png((4, 5), 9), png((4, 5), 20)) == 0
    assert differing_pixels(png((4, 5), 9), png((4, 5), 90)) == 1
    assert differing_pixels(png((4, 5), 9), png((5, 4), 9)) == 1


def test_the_chapters_figures_are_found() -> None:
    """Of all chapters, nearly every figure cell is drawn from one saved result by a function that exists."""
    import importlib

    found = 0
    for path in sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb")):
        for _, function, name in figure_calls(read_notebook(path)):
            module, _, attribute = function.rpartition(".")
            assert callable(getattr(importlib.import_module(module), attribute)), (path, name)
            found += 1
    assert found >= 40


def test_models_are_borrowed_only_when_finished(tmp_path: Path) -> None:
    owner, borrower = tmp_path / "a" / "models", tmp_path / "a" / "case"
    for name, finished in (("vqgan", True), ("ldm-2view", True), ("ldm-8view", False)):
        (owner / name).mkdir(parents=True)
        (owner / name / ("weights.safetensors" if finished else "checkpoint.safetensors")).write_text("x")
    assert borrow_models(owner, borrower) == ["ldm-2view", "vqgan"] == borrow_models(owner, borrower)
    assert not (borrower / "ldm-8view").exists() and (borrower / "vqgan" / "weights.safetensors").read_text() == "x"
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "case" / "vqgan" / "weights.safetensors").exists(), "links are relative"
