"""Chapters 00, 02, 04 to 06, 08, 09: they run from nothing, say where figures are from, and refuse wrong answers.

The notebooks' cells run in this process at a preset far below `tiny`, which decides nothing about image quality.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from small_baselines import DIFFUSION_SMALL, INRR3CT_SMALL, NAF_SMALL, X2CTGAN_SMALL

import difr3ct_core.presets as presets
from difr3ct_core.baselines.presets import BASELINES, BaselinePresets
from difr3ct_core.figures import models
from difr3ct_core.files import read_json, write_json
from difr3ct_core.presets import get_preset
from difr3ct_core.results import load_result

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
#: In the order of the book, so that each finds the models of those before it.
CHAPTERS = (
    "02_vqgan",
    "04_ldm_training",
    "00_quickstart",
    "05_sampling",
    "06_uncertainty",
    "08_comparison",
    "09_beyond",
)
PARAMETERS = {"preset": "small", "data": "data", "views": "8view", "seed": 0, "run": "", "device": "auto"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)


def tagged(name: str, tag: str) -> list[str]:
    return [cell.source for cell in read(name).cells if tag in cell.metadata.get("tags", [])]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a kernel does: the value of a last expression is what it shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every chapter run from nothing: its names, and under "shown_figures" what its figure cells showed."""
    micro = get_preset("tiny").replace(
        volume={"size": 16},
        xray={"detector_size": 16},
        cohort={"n_train": 6, "n_val": 3, "n_test": 5, "draw_size": 16},
        book={"few": 2},  # the fewest that methods can be compared on, patient by patient
        vqgan={"base_channels": 4, "codebook_size": 32, "groups": 4},
        fusion={"widths": (8, 8), "out_channels": 8},
        unet={"widths": (8, 16), "heads": 1, "head_channels": 8},
        diffusion={"timesteps": 25},
        sampling={"steps": 6, "n_samples": 4},
        train_vqgan={"steps": 12, "batch_size": 3, "log_every": 1},
        train_ldm={"steps": 8, "batch_size": 3, "log_every": 1},
    )
    root = tmp_path_factory.mktemp("book")
    chapters = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(presets.PRESETS, "small", micro)  # what the notebooks take by default; no weights ship for it
        few = [
            dataclasses.replace(settings, training=dataclasses.replace(settings.training, steps=3))
            for settings in (NAF_SMALL, INRR3CT_SMALL, X2CTGAN_SMALL, DIFFUSION_SMALL)
        ]
        patch.setitem(BASELINES, "tiny", BaselinePresets(*few))
        for name in CHAPTERS:
            names: dict[str, Any] = {"__name__": "chapter"}
            figures = []
            for cell in read(name).cells:
                if cell.cell_type != "code":
                    continue
                shown = run_cell(cell.source, names)
                tags = cell.metadata.get("tags", [])
                if "parameters" in tags:
                    names.update(data=str(root / "data"), run=str(root / "run"), device="cpu")
                if "figure" in tags:
                    figures.append((cell.source, shown))
            chapters[name] = names | {"shown_figures": figures}
    return chapters


@pytest.mark.parametrize("name", CHAPTERS)
def test_source_has_what_every_chapter_has(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    values: dict[str, Any] = {}
    exec(code[0].source, values)
    assert code[0].metadata.tags == ["parameters"]
    own = {"baseline": ""} if name == "08_comparison" else {}
    del values["__builtins__"]
    assert values == PARAMETERS | own
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for word in ("**You will**", "**Time and hardware.**", "## Exercises", "## Summary", "**Notice"):
        assert word in text
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_has_alternative_text_and_comes_from_saved_results(name: str) -> None:
    cells = [cell for cell in read(name).cells if "figure" in cell.metadata.get("tags", [])]
    assert len(cells) >= 3
    for cell in cells:
        assert len(cell.metadata.mystnb.image.alt) > 80
        assert re.match(r"figures\.\w+\(chapter\.load\(\"\w+\"\)\)", cell.source), cell.source


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_number_in_the_prose_is_glued(name: str) -> None:
    cells = read(name).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    used = {key.split(":")[0] for key in re.findall(r"\{glue:text\}`([^`]+)`", prose)}
    assert used
    # What "Notice" paragraphs say of this run must not be typed: a number before dB or HU is a measured one.
    notices = [cell.source for cell in cells if cell.cell_type == "markdown" and "**Notice" in cell.source]
    for text in notices:
        text = text.split("## Exercises")[0]
        assert not re.search(r"(?<![`\w.])\d+(\.\d+)? (dB|HU)\b", re.sub(r"`[^`]*`", "", text)), text


def test_prose_and_glue_agree(executed: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the glue cells again and compare with what the text asks for; formats must fit the values."""
    for name in CHAPTERS:
        glued: dict[str, Any] = {}

        def glue(key: str, value: Any, display: bool, glued: dict[str, Any] = glued) -> None:
            assert key not in glued, f"{key} is glued twice, of which the book warns"
            glued[key] = value

        monkeypatch.setattr("myst_nb.glue", glue)
        names = executed[name] | {"glue": glue}
        for source in tagged(name, "remove-cell"):
            run_cell(source, names)
        prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        assert "`{glue" not in prose  # a role inside a code span stays as it is typed
        for role in re.findall(r"\{glue:text\}`([^`]+)`", prose):
            key, _, form = role.partition(":")
            assert key in glued, f"{name}: the text asks for {key}, which no cell glues"
            value = glued[key]
            assert format(int(value) if form.endswith("d") else value, form)


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_carry_message_and_provenance(executed: dict[str, dict[str, Any]], name: str) -> None:
    for source, figure in executed[name]["shown_figures"]:
        if "real" in source:  # the scan is not fetched here; the chapter says so instead
            assert "not fetched" in figure.data
            continue
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert len(figure.get_suptitle()) > 15
        assert "preset tiny, seed 0 · commit " in figure.get_supxlabel()
        for axes in figure.axes:
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                assert text.get_fontsize() >= 8


def test_figures_can_be_redrawn_from_the_files(executed: dict[str, dict[str, Any]]) -> None:
    names = executed["04_ldm_training"]
    folder = names["chapter"].results
    assert load_result(folder, "end_to_end").values == names["end_to_end"].values
    first, second = (models.end_to_end(load_result(folder, "end_to_end"))._repr_png_() for _ in range(2))
    assert first == second
    means = [text.get_text() for text in models.end_to_end(load_result(folder, "end_to_end")).axes[0].texts]
    for key in ("8view", "2view", "1view", "classical_2view", "wrong_xrays_8view"):
        assert f"{names['end_to_end'].values[f'psnr_{key}']:.1f}" in means


def test_end_to_end_holds_the_asked_for_figures(executed: dict[str, dict[str, Any]]) -> None:
    names = executed["04_ldm_training"]
    values, arrays = names["end_to_end"].values, names["end_to_end"].arrays
    for key in ("8view", "2view", "1view", "mean_volume", "wrong_xrays_8view", "classical_8view"):
        assert 0 < values[f"psnr_{key}"] < 60 and values[f"psnr_12bit_{key}"] - values[f"psnr_{key}"] == pytest.approx(
            4.286, abs=2e-3
        )
    assert values["psnr_2view"] == pytest.approx(arrays["model_2view"].mean())
    assert values["n_patients"] == 5 and values["n_samples"] == 4
    best = values["table"]["2view"]
    assert values["psnr_classical_2view"] == pytest.approx(max(best.values()))


def test_figures_file_copies_the_run_and_names_what_is_missing(
    executed: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(NOTEBOOKS.parent / "benchmarks"))
    import end_to_end

    names = executed["05_sampling"]
    build, out = tmp_path / "build", tmp_path / "out" / "end_to_end.json"
    where = ["--build", str(build), "--out", str(out)]
    write_json(build / "state.json", {"tiny": {"whole_run": {"minutes": 12.5, "peak_gb": 2.5}}})
    assert end_to_end.main(["--run", str(names["chapter"].run), *where]) == 0
    found = read_json(out)
    assert set(found) == {*end_to_end.SOURCES, "book_minutes", "peak_gb", "provenance"}
    assert found["psnr_ddpm1000"]["value"] == pytest.approx(names["quality"].values["psnr_ddpm1000"], abs=1e-3)
    assert found["psnr_dpm20"]["unit"] == "dB" and found["book_minutes"] == {"value": 12.5, "unit": "min"}
    assert found["psnr_8view"]["measured"]["chapter"] == "04_ldm_training"
    assert "test_minutes" in capsys.readouterr().out
    assert end_to_end.main(["--run", str(tmp_path), *where]) == 2
    assert str(tmp_path / "results") in capsys.readouterr().err


def test_bias_and_variance_add_up_to_the_error(executed: dict[str, dict[str, Any]]) -> None:
    result = executed["06_uncertainty"]["decomposition"]
    for views in ("2view", "8view"):
        assert result.values[f"identity_gap_{views}"] < 1e-12
        a = result.arrays
        assert (a[f"bias_{views}"] + a[f"variance_{views}"]) == pytest.approx(a[f"error_{views}"], rel=1e-5, abs=1e-3)


def test_sliders_show_what_the_figures_show(executed: dict[str, dict[str, Any]]) -> None:
    names = executed["06_uncertainty"]
    arrays, whole = names["chapter"].load("sample_slices").arrays, names["decomposition"].arrays
    middle = names["volume"].size // 2
    assert len(names["growing"]) == len(arrays["shown"]) and arrays["shown"][-1] == len(arrays["slices"]) == names["N"]
    assert np.abs(arrays["slices"].mean(0) - whole["mean_2view"][:, middle]).max() <= 1  # both are rounded to whole HU
    assert (arrays["truth"] == whole["truth"][:, middle]).all()
    guided = executed["05_sampling"]["guidance"].arrays
    assert len(executed["05_sampling"]["turned"]) == len(guided["guidance"])
    assert (guided["guided_slice_std"][-1] >= 0).all() and guided["guided_slice_mean"].shape[1:] == (16, 16)
    through = executed["00_quickstart"]["through"]
    assert len(through) == 16 and through.labels[0].startswith("z = -")


def test_the_any_view_model_draws_every_number_of_views(executed: dict[str, dict[str, Any]]) -> None:
    names = dict(executed["06_uncertainty"])
    assert names["adding"].values["counts"] == [2, 8]  # no such model at hand
    names["chapter"].ldm("any")
    (source,) = (cell.source for cell in read("06_uncertainty").cells if "take_angles" in cell.source)
    run_cell(source, names)
    adding = names["adding"]
    assert adding.values["counts"] == list(range(1, 9)) and len(names["each_view"]) == 8
    xrays = dict(zip(adding.values["added_deg"], adding.arrays["xrays"], strict=True))
    for view, xray in zip(names["patient"].views, names["patient"].xrays[0], strict=True):
        assert np.abs(xrays[view.angle_deg] - xray.numpy()).max() < 0.02  # each x-ray once, under its own angle


def test_chests_that_match_really_have_the_same_xrays(executed: dict[str, dict[str, Any]]) -> None:
    values = executed["00_quickstart"]["ambiguity"].values
    assert max(values["misfit_percent"]) < 2 and min(values["distance_hu"][1:]) > 50


#: chapter, number of the exercise, a wrong answer, a word that the message must hold
WRONG = [
    ("00_quickstart", 1, "unknowns_per_equation = volume.size**3 / detector**2; views_needed = 16", "equation"),
    ("00_quickstart", 1, "unknowns_per_equation = 8.0; views_needed = 17", "views_needed"),
    ("00_quickstart", 2, "extra = drawn.var(axis=0, ddof=1).mean()", "n - 1"),
    ("00_quickstart", 3, "closer = float((matched - truth).square().mean().sqrt())", "HU"),
    ("02_vqgan", 1, "bits = math.prod(grid) * channels * math.log2(vqgan.codebook.size)", "channels"),
    ("02_vqgan", 1, "factor = 8.0", "factor"),
    ("02_vqgan", 2, "nearest = lambda v, c: (-(v @ c.T)).argmin(1)", "norm"),
    ("02_vqgan", 2, "nearest = lambda v, c: torch.cdist(v, c).argmax(1)", "largest"),
    ("02_vqgan", 3, "gradient = 2 * z.detach()", "2q"),
    ("04_ldm_training", 1, "balance = 0", "first time"),
    ("04_ldm_training", 1, "balance += 1", "first time"),
    ("04_ldm_training", 2, "epsilon_of = lambda z, v, g: g**0.5 * z - (1 - g) ** 0.5 * v", "rotation"),
    ("04_ldm_training", 3, "beta = 1 - chen.gamma", "product"),
    ("05_sampling", 1, "step = lambda z, x0, gt, gs: math.sqrt(gs) * x0 + math.sqrt(1 - gs) * z", "noise"),
    ("05_sampling", 2, "predicted_dpm = toy['error_dpm++2m'][2] / 4", "order"),
    ("05_sampling", 3, "guide = lambda null, conditional, s: conditional + s * (conditional - null)", "Scale 0"),
    ("06_uncertainty", 1, "enough = 10", "enough"),
    ("06_uncertainty", 1, "factor = 5 / 4", "factor"),
    ("06_uncertainty", 2, "coverage = lambda n, k: 1 - 2 * k / n", "gaps"),
    ("06_uncertainty", 2, "n_needed = 40", "smallest"),
    ("06_uncertainty", 3, "surer = samples['2view'] / 2", "mean"),
    ("08_comparison", 1, "loss_db = 20 * math.log10(2)", "amplitude"),
    ("08_comparison", 1, "loss_db = 1.5", "doubles"),
    ("08_comparison", 2, "to_4095 = lambda db, width: db + 10 * math.log10(4095 / width)", "20 log10"),
    ("08_comparison", 3, "paired_error = lambda a, b: (statistics.variance(a + b) / len(a)) ** 0.5", "differences"),
    (
        "08_comparison",
        3,
        "paired_error = lambda a, b: ((statistics.variance(a) + statistics.variance(b)) / len(a)) ** 0.5",
        "cancels",
    ),
    ("09_beyond", 1, "delta = one / n", "add up"),
    ("09_beyond", 2, "twice = corrected['2view', 'none'][0] * 0", "once"),
    ("06_uncertainty", 3, "surer = mean['2view'][:, None] + (samples['2view'] - mean['2view'][:, None]) / 4", "half"),
]


@pytest.mark.parametrize(("name", "number", "wrong", "word"), WRONG)
def test_wrong_answers_are_refused_with_a_hint(
    executed: dict[str, dict[str, Any]], name: str, number: int, wrong: str, word: str
) -> None:
    names = dict(executed[name])
    solution, check = tagged(name, "solution")[number - 1], tagged(name, "check")[number - 1]
    run_cell(solution, names)
    run_cell(wrong, names)
    with pytest.raises(AssertionError, match=re.escape(word)) as refused:
        run_cell(check, names)
    assert len(str(refused.value)) > 40
    run_cell(solution, names)
    run_cell(check, names)


def test_every_exercise_has_a_wrong_answer_here() -> None:
    for name in CHAPTERS:
        assert len(tagged(name, "solution")) == len(tagged(name, "check")) >= 2
        assert {n for chapter, n, _, _ in WRONG if chapter == name} == set(range(1, len(tagged(name, "check")) + 1))
