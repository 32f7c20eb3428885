"""Chapters 01 and 03: they run without the real scan, say where every figure is from, and refuse wrong answers.

The notebooks' cells run in this process on coarser grids than the book's.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest

import difr3ct_core.presets as presets
from difr3ct_core.interactive import Interactive
from difr3ct_core.presets import get_preset

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS = ("01_drr_generation", "03_fusion_geometry")


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)


def tagged(name: str, tag: str) -> list[str]:
    return [cell.source for cell in read(name).cells if tag in cell.metadata.get("tags", [])]


def solutions(name: str) -> list[str]:
    return tagged(name, "solution")


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a kernel does: the value of a last expression is what it shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Both chapters run from nothing: their names, what figure cells showed, what was glued."""
    root = tmp_path_factory.mktemp("book")
    chapters = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for preset, size in (("paper", 64), ("small", 32)):
            change = {"volume": {"size": size}, "xray": {"detector_size": size}}
            patch.setitem(presets.PRESETS, preset, get_preset(preset).replace(**change))
        for name in CHAPTERS:
            names: dict[str, Any] = {"__name__": "chapter"}
            figures, sliders, glued = [], [], {}
            patch.setattr("myst_nb.glue", lambda key, value, display, glued=glued: glued.__setitem__(key, value))
            for cell in read(name).cells:
                if cell.cell_type != "code":
                    continue
                shown = run_cell(cell.source, names)
                tags = cell.metadata.get("tags", [])
                if "parameters" in tags:
                    names.update(data=str(root / "data"), run=str(root / "run"), device="cpu")
                if "figure" in tags:
                    figures.append(shown)
                if isinstance(shown, Interactive):
                    sliders.append(shown)
            chapters[name] = names | {"all_figures": figures, "all_sliders": sliders, "all_glued": glued}
    return chapters


@pytest.mark.parametrize("name", CHAPTERS)
def test_source_has_what_every_chapter_has(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert code[0].metadata.tags == ["parameters"]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for words in (
        "**You will**",
        "**Time and hardware.**",
        "What can go wrong",
        "## Exercises",
        "## Summary",
        "**Notice",
    ):
        assert words in text
    for cell in notebook.cells:
        if "figure" in cell.metadata.get("tags", []):
            assert len(cell.metadata.mystnb.image.alt) > 80
            assert re.match(r"figures\.\w+\(chapter\.load\(\"\w+\"\)\)", cell.source)


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_carry_message_and_provenance(executed: dict[str, dict[str, Any]], name: str) -> None:
    assert len(executed[name]["all_figures"]) >= 6
    for figure in executed[name]["all_figures"]:
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert len(figure.get_suptitle()) > 15
        assert "preset small, seed 0 · commit " in figure.get_supxlabel()


@pytest.mark.parametrize("name", CHAPTERS)
def test_sliders_are_light(executed: dict[str, dict[str, Any]], name: str) -> None:
    (slider,) = executed[name]["all_sliders"]
    assert 20_000 < len(slider.html) < 1_000_000


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_number_that_the_text_asks_for_is_glued(executed: dict[str, dict[str, Any]], name: str) -> None:
    glued = executed[name]["all_glued"]
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    roles = re.findall(r"\{glue:text\}`([^`]+)`", prose)
    assert len(roles) >= 10
    for role in roles:
        key, _, form = role.partition(":")
        assert key in glued, f"the text asks for {key}, which no cell glues"
        assert format(glued[key], form)
    assert "{glue" not in "".join(re.findall(r"\$\$(.+?)\$\$", prose, re.S)), "glue does not work inside formulas"


def test_numbers_of_chapter_01_are_physics(executed: dict[str, dict[str, Any]]) -> None:
    glued = executed["01_drr_generation"]["all_glued"]
    assert glued["line_integral"] == pytest.approx(glued["projector"], rel=1e-5)
    assert glued["centre"] == pytest.approx(1.5)
    assert glued["worst_percent"] < 1
    assert glued["best_8view"] > glued["best_4view"] > glued["best_2view"] > glued["best_1view_frontal"]
    orders = executed["01_drr_generation"]["orders"]
    assert all(1.7 < order < 2.3 for order in orders.values())


def test_numbers_of_chapter_03_are_geometry(executed: dict[str, dict[str, Any]]) -> None:
    names = executed["03_fusion_geometry"]
    glued, spacing = names["all_glued"], names["spacing"]
    assert glued["error_parallel"] < spacing and glued["error_cone"] < spacing
    assert glued["percent_parallel"] < 1 and glued["percent_cone"] < 2 and glued["percent_at_zero"] < 1e-3
    assert glued["rms_filtered_64"] < 0.7 * glued["rms_plain_64"]
    assert glued["rms_filtered_8"] > 0.85 * glued["rms_plain_8"]
    values = names["mistakes"].values
    # Angles that turn the other way mirror x; mirrored columns turn by 180° about z. Both stars stay perfect.
    x, y = (float(c) for c in names["point"][:2])
    assert values["error_mm"][0] < spacing
    assert values["error_mm"][2] == pytest.approx(2 * abs(x), abs=1.5 * spacing)
    assert values["error_mm"][3] == pytest.approx(2 * (x * x + y * y) ** 0.5, abs=1.5 * spacing)
    assert min(values["peak_percent"][2:4]) > 90 > values["peak_percent"][1]


#: chapter, number of the exercise, a wrong answer, a word that the message must hold
WRONG = [
    ("01_drr_generation", 1, "share_through = lambda hu, step: torch.exp(-(0.02 * (1 + hu / 1000)).sum())", "step"),
    ("01_drr_generation", 1, "share_through = lambda hu, step: torch.tensor(-step * len(hu) / 50).exp()", "differs"),
    ("01_drr_generation", 2, "from_behind = lambda xray: xray", "e_u"),
    ("01_drr_generation", 2, "from_behind = lambda xray: xray.flip(-1).flip(-2)", "rows"),
    ("01_drr_generation", 3, "wide_pa, wide_ap = wide_ap, wide_pa", "source"),
    ("01_drr_generation", 3, "wide_ap = 120 * 1.5", "wide_ap"),
    ("03_fusion_geometry", 1, "coarse_index = lambda k, factor: k / factor", "centre"),
    ("03_fusion_geometry", 2, "ok = triangulate; triangulate = lambda *a: ok(*a) * torch.tensor([-1, 1, 1])", "sign"),
    ("03_fusion_geometry", 3, "fuse_two = lambda a, b: (a[:, :, None] + b[:, None, :]) / 2", "axis"),
    ("03_fusion_geometry", 3, "fuse_two = lambda a, b: (a + b.flip(-1)) / 2", "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "wrong", "word"), WRONG)
def test_wrong_answers_are_refused_with_a_hint(
    executed: dict[str, dict[str, Any]], name: str, number: int, wrong: str, word: str
) -> None:
    names = dict(executed[name])
    solution, check = solutions(name)[number - 1], tagged(name, "check")[number - 1]
    run_cell(solution, names)
    run_cell(wrong, names)
    with pytest.raises(AssertionError, match=re.escape(word)):
        run_cell(check, names)
    run_cell(solution, names)
    run_cell(check, names)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_exercise_has_a_wrong_answer_here(name: str) -> None:
    assert len(solutions(name)) == len(tagged(name, "check")) >= 2
    assert {n for chapter, n, _, _ in WRONG if chapter == name} == set(range(1, len(solutions(name)) + 1))
