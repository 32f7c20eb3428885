"""Chapter 07: its cells run from nothing, with disturbed truths in place of a model's samples."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

pytest.importorskip("pyRadPlan", reason="extra rt is not installed")

import difr3ct_core.datasets as datasets
from difr3ct_core import ct
from difr3ct_core.chapters import Chapter
from difr3ct_core.presets import get_preset
from difr3ct_core.results import load_result

#: The module: the package exports its function under the same name.
reconstruct = importlib.import_module("difr3ct_core.reconstruct")
PATH = Path(__file__).resolve().parents[1] / "notebooks" / "07_radiotherapy.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a kernel does: the value of a last expression is what it shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Any], Path]:
    """The names of the chapter after its cells ran, what its figure cells showed, and the folder of its run."""
    run, volume, seen, shown = tmp_path_factory.mktemp("run"), get_preset("small").volume, {}, []
    names: dict[str, Any] = {}
    render = datasets.render_xrays

    def remember(hu: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen["hu"] = hu[0]
        return render(hu, *rest)

    def samples(ldm: Any, vqgan: Any, xrays: Any, views: Any, count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, 1, 8, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(noise, size=tuple(seen["hu"].shape), mode="trilinear")[:, 0]
        return ct.hu_to_unit(seen["hu"] + 40 * smooth, volume)[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "render_xrays", remember)
        patch.setattr(reconstruct, "posterior_samples", samples)
        patch.setattr(Chapter, "vqgan", lambda self: None)
        patch.setattr(Chapter, "ldm", lambda self, views: None)
        for cell in nbformat.read(PATH, 4).cells:
            if cell.cell_type != "code":
                continue
            value = run_cell(cell.source, names)
            tags = cell.metadata.get("tags", [])
            if "parameters" in tags:
                names |= {"preset": "small", "run": str(run), "data": str(run), "n_patients": 1, "n_samples": 2}
            if "figure" in tags:
                shown.append(value)
    return names, shown, run


@pytest.mark.slow
def test_chapter_07_runs_and_every_figure_is_drawn(executed: tuple[dict[str, Any], list[Any], Path]) -> None:
    names, shown, run = executed
    assert [type(figure).__name__ for figure in shown] == ["TalkFigure"] * 5
    result = load_result(run / "results", "rt_protocols")
    assert result.values["plannable"] == 1 and result.values["cohort"] == names["cohort"]
    assert result.provenance["chapter"] == "07_radiotherapy"
    # Disturbed only a little, so the plan made on the mean nearly covers the true target.
    assert abs(result.values["v90_error_median_true"]) < 15
    shares = load_result(run / "results", "rt_dvh").values["goals"]
    assert set(shares) and all(0 <= share <= 1 for share in shares.values())


@pytest.mark.slow
def test_checks_refuse_wrong_answers(executed: tuple[dict[str, Any], list[Any], Path]) -> None:
    names, *_ = executed
    checks = [cell.source for cell in nbformat.read(PATH, 4).cells if "check" in cell.metadata.get("tags", [])]
    for check, wrong in zip(checks, ({"v": 27.6}, {"covered": False}), strict=True):
        with pytest.raises(AssertionError, match=next(iter(wrong))):
            run_cell(check, {**names, **wrong})
