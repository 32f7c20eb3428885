"""The line under every figure: run, commit, preset, data, seed, device, time and a link that leads to the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from build_html import linked_results
from nbformat.v4 import new_code_cell, new_notebook, new_output
from run_chapters import Book

from difr3ct_core.chapters import Chapter
from difr3ct_core.figures.models import schedules
from difr3ct_core.figures.style import Frames, origin_html
from difr3ct_core.files import InputError
from difr3ct_core.interactive import frame_slider
from difr3ct_core.presets import COHORTS, get_preset
from difr3ct_core.results import Result, run_id

ROOT = Path(__file__).resolve().parents[1]
GAMMA = np.linspace(0.98, 0.02, 30)


@pytest.fixture
def chapter(tmp_path: Path) -> Chapter:
    (tmp_path / "notebooks").mkdir()
    chapter = Chapter("04_x", get_preset("tiny"), tmp_path / "data", tmp_path / "runs" / "tiny", 7, "cpu")
    chapter._opened.add("tiny-lung")
    chapter.save("schedules", {"gamma_chen": GAMMA, "gamma_ddpm": GAMMA**2}, {"half_chen": 15, "half_ddpm": 9})
    return chapter


def test_everything_that_a_reviewer_asks_for_is_there(chapter: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BOOK_STATIC", raising=False)
    result = chapter.load("schedules")
    line = origin_html(result)
    run = json.loads((chapter.run / "run.json").read_text())["id"]
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", run)
    device = str(result.provenance["device"])
    commit = result.provenance["commit"]
    for word in (run, commit, "preset tiny", "data: tiny-lung", "seed 7", device, " s", "schedules.json</a>"):
        assert word in line
    (link,) = re.findall(r'href="([^"]+)"', line)
    notebooks = chapter.run.parents[1] / "notebooks"
    assert (notebooks / link).resolve() == (chapter.results / "schedules.json").resolve()
    monkeypatch.setenv("BOOK_STATIC", "1")
    assert 'href="../results/schedules.json"' in origin_html(result)


def test_a_figure_shows_its_picture_and_then_its_origin(chapter: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    figure = schedules(chapter.load("schedules"))
    figure._ipython_display_()
    picture, line = shown
    assert picture.data.startswith(b"\x89PNG") and line.data == origin_html(chapter.load("schedules"))


def test_a_slider_has_its_origin_too(chapter: Chapter) -> None:
    frames = Frames([np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint8)], chapter.load("schedules"))
    text = frame_slider(frames, ["a", "b"], "Frame {label}.").html
    assert text.count('class="origin"') == 1 and "tiny-lung" in text
    assert 'class="origin"' not in frame_slider(list(frames), ["a", "b"], "Frame {label}.").html


def test_words_of_a_result_cannot_become_markup() -> None:
    result = Result("r", {}, {}, {"data": ["<script>"], "run": "<b>", "device": "&", "wall_s": 1.0})
    line = origin_html(result)
    assert "<script>" not in line and "<b>" not in line and "&lt;script&gt;" in line


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first != run_id(tmp_path / "b")
    (tmp_path / "a" / "run.json").write_text("[]")
    with pytest.raises(InputError, match=r"run\.json: holds no id"):
        run_id(tmp_path / "a")


def test_the_pages_bring_the_results_that_they_link_to(chapter: Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOK_STATIC", "1")
    root, html = chapter.run.parents[1], origin_html(chapter.load("schedules"))
    cells = [
        new_code_cell('run = "runs/tiny"', metadata={"tags": ["injected-parameters"]}),
        new_code_cell("figure", outputs=[new_output("display_data", {"text/html": html})]),
    ]
    copy = root / "04_x.ipynb"
    nbformat.write(new_notebook(cells=cells), str(copy))
    expected = {"schedules.json": root / "runs" / "tiny" / "results" / "schedules.json"}
    assert linked_results(root, {"04_x.ipynb": copy}) == expected
    expected["schedules.json"].unlink()
    with pytest.raises(InputError, match=r"schedules\.json: is gone, expected the origin of a figure; run 04_x again"):
        linked_results(root, {"04_x.ipynb": copy})


def test_older_results_have_a_line_with_what_they_know(tmp_path: Path) -> None:
    line = origin_html(Result("old", {}, {"patient": "phantom"}, {"preset": "tiny"}))
    assert "run <code>?</code>" in line and "data: phantom" in line and "time ?" in line
    for names, shown in (
        (["phantom", "LIDC-IDRI-0001"], "phantom, LIDC-IDRI-0001"),
        (["FBP"], "computed in the chapter"),
    ):
        assert f"data: {shown}" in origin_html(Result("old", {}, {"names": names}, {}))


def test_a_preset_may_name_its_cohort(tmp_path: Path) -> None:
    for cohort in COHORTS:
        preset = get_preset(f"tiny-{cohort}")
        assert preset.cohort.cohort == cohort and preset.volume == get_preset("tiny").volume
        assert preset.cohort_folder == f"tiny-{cohort}"
    assert get_preset("tiny").cohort_folder == "tiny-lung"
    for preset, folder in (("tiny", "tiny-lung"), ("tiny-thoracic", "tiny-thoracic")):
        book = Book(ROOT, preset)
        assert [book.fill(made) for made in book.steps["phantoms"]["makes"]] == [f"data/{folder}/manifest.json"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(get_preset("tiny").replace(name="mine", sampling={"steps": 3}).to_dict()))
    assert get_preset(str(path)).sampling.steps == 3 and get_preset(str(path)).cohort_folder == "mine-lung"
    for bad in ("tiny-", "tiny-brain", "huge-lung", str(tmp_path / "none.json")):
        with pytest.raises(InputError, match="expected"):
            get_preset(bad)
