"""Check a run against itself: figures from results, printed numbers from results, and a chapter run again.

    python book/verify.py --run runs/tiny [--chapter 05] [--tolerance 0.01] [--train]

Without a chapter nothing is trained or sampled: every saved result is read (its checksum too), every figure of the
chapters is drawn from it and compared with the picture in the executed chapter, every number with a formula
(recompute.py) is computed again, and the numbers in the executed chapters' text are looked up in the results. With a
chapter, that chapter also runs again into a folder of its own, with the run's models (``--train``: without, so that
it trains them), and what it saves is compared number by number.

A number may differ by ``tolerance`` times its size, and an array by that share of its largest value: another
processor or library adds up in another order. Times are measured, not computed, and are not compared.
"""

from __future__ import annotations

import argparse
import ast
import base64
import importlib
import io
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from execution import run_notebook
from nbformat import NotebookNode
from notebook_checks import code_cells, injected_parameters, parse, read_notebook
from PIL import Image
from recompute import FORMULAS
from run_folders import borrow_models

from difr3ct_core.files import InputError, write_json
from difr3ct_core.results import Result, load_result

TOLERANCE = 0.01
#: Differences below this count for nothing: numbers that are zero but for rounding.
FLOOR = 1e-4
#: What is measured with a clock or a memory meter.
MEASURED = re.compile(r"(^|[._])(seconds|wall_s|speed_up|minutes|hours|peak_gb)($|[._])")


@dataclass
class Report:
    """What was looked at, and what did not agree."""

    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counted: dict[str, int] = field(default_factory=dict)

    def count(self, what: str, number: int = 1) -> None:
        """Add to what was looked at."""
        self.counted[what] = self.counted.get(what, 0) + number

    def differ(self, where: str, saved: Any, found: Any, tolerance: float | None = None) -> None:
        """A disagreement, in one line."""
        allowed = "exactly this expected" if tolerance is None else f"tolerance {tolerance:.3g}"
        self.differences.append(f"{where}: saved {_short(saved)}, found {_short(found)}, {allowed}")


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of nested lists and objects with its path ("psnr.8view")."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Results and figures ------------------------------------------------------------------------------------------------


def read_results(run: Path, report: Report) -> dict[str, Result]:
    """Every saved result of a run; a damaged one is a difference.

    Raises:
        InputError: there is none.
    """
    found = {}
    for path in sorted((run / "results").glob("*.json")):
        try:
            found[path.stem] = load_result(path.parent, path.stem)
            report.count("results read")
        except InputError as error:
            report.differences.append(str(error))
    if not found and not report.differences:
        raise InputError(f"{run / 'results'}: holds no saved result, expected those of a run; run `make book` first.")
    return found


def figure_calls(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, str, str]]:
    """(cell, dotted function, name of the result) of every figure that is drawn from one saved result."""
    modules: dict[str, str] = {}
    for cell in code_cells(notebook):
        for node in ast.walk(parse(cell.source) or ast.Module([], [])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("difr3ct_core.figures"):
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for cell in code_cells(notebook):
        for node in ast.walk(parse(cell.source) or ast.Module([], [])):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Call):
                continue
            root, _, rest = ast.unparse(node.func).partition(".")
            load = node.args[0]
            if root in modules and ast.unparse(load.func) == "chapter.load" and isinstance(load.args[0], ast.Constant):
                yield cell, ".".join(filter(None, [modules[root], rest])), str(load.args[0].value)


def draw(function: str, result: Result) -> Any:
    """What a figure function makes of a result."""
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(module), name)(result)


def check_figures(notebook: NotebookNode, source: Path, results: dict[str, Result], out: Path, report: Report) -> None:
    """Draw the figures of one chapter; ``notebook`` is its executed copy, or its source when there is none."""
    for cell, function, name in figure_calls(notebook):
        if name not in results:
            report.notes.append(f"{source.stem}: {name} is not in this run, {function.rpartition('.')[2]} is not drawn")
            continue
        where = f"{source.stem}, figure {function.removeprefix('difr3ct_core.figures.')} of {name}"
        try:
            drawn = draw(function, results[name])
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            report.differences.append(f"{where}: cannot be drawn from the saved result ({what})")
            continue
        report.count("figures drawn")
        if not hasattr(drawn, "_repr_png_"):
            continue  # a table, or the frames of a slider
        png = drawn._repr_png_()
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{source.stem}.{function.rpartition('.')[2]}.{name}.png").write_bytes(png)
        shown = [
            data["image/png"] for output in cell.get("outputs", []) if "image/png" in (data := output.get("data", {}))
        ]
        if shown:
            share = differing_pixels(base64.b64decode(shown[0]), png)
            report.count("figures compared with the book's")
            if share > TOLERANCE:
                report.differ(f"{where}: share of pixels that differ from the book's picture", 0.0, share, TOLERANCE)


def differing_pixels(first: bytes, second: bytes, levels: int = 32) -> float:
    """Share of pixels in which two pictures differ visibly; 1 when their sizes differ."""
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=np.int16) for png in (first, second))
    return 1.0 if a.shape != b.shape else float((np.abs(a - b).max(axis=-1) > levels).mean())


# Numbers ------------------------------------------------------------------------------------------------------------


def check_formulas(results: dict[str, Result], report: Report) -> None:
    """Compute every number that has a formula and compare it with the saved one."""
    for name, result in results.items():
        saved, checked = dict(leaves(result.values)), set()
        if name in FORMULAS:
            try:
                for path, value, tolerance in FORMULAS[name](result):
                    checked.add(path)
                    report.count("numbers recomputed")
                    if path not in saved or not _is_number(saved[path]):
                        report.differ(f"{name}.{path}", saved.get(path), value)
                    elif not abs(saved[path] - value) <= tolerance:
                        report.differ(f"{name}.{path}", saved[path], value, tolerance)
            except InputError as error:  # a preset of the user's own, whose window is not known here
                report.notes.append(f"{name}: is not recomputed ({error})")
            except (KeyError, IndexError, ValueError) as error:
                report.differences.append(f"{name}: cannot be recomputed, {type(error).__name__} {error}")
        report.count("numbers without a formula", sum(_is_number(saved[path]) for path in saved.keys() - checked))


def glued(notebook: NotebookNode) -> dict[str, Any]:
    """What the executed copy hands to its text, by key."""
    found = {}
    for cell in code_cells(notebook):
        for output in cell.get("outputs", []):
            key = output.get("metadata", {}).get("scrapbook", {}).get("name")
            text = next((v for k, v in output.get("data", {}).items() if k.endswith("text/plain")), None)
            if key and text is not None:
                try:
                    found[key] = ast.literal_eval(text)
                except (ValueError, SyntaxError):
                    continue  # a figure, or something else that is no number
    return found


def check_prose(notebook: NotebookNode, source: Path, results: dict[str, Result], report: Report) -> None:
    """Compare numbers in an executed chapter's text with the saved ones of the same name.

    The text's ``psnr_8view`` is a value of that name in one of the chapter's results; ``count_rmse_8`` is ``rmse_8``
    of the result whose name ends in ``count``. Others (differences of two values, say) are counted as not traced.
    """
    own = {name: result for name, result in results.items() if result.provenance.get("chapter") == source.stem}
    values: dict[str, set[Any]] = {}
    for name, result in own.items():
        for path, value in leaves(result.values):
            if isinstance(value, str | int | float):
                values.setdefault(path, set()).add(value)
                values.setdefault(f"{name.rpartition('_')[2]}_{path}", set()).add(value)
    for key, shown in glued(notebook).items():
        saved = values.get(key, set())
        if len(saved) != 1:
            report.count("numbers in the text not traced")
            continue
        value = next(iter(saved))
        report.count("numbers in the text traced")
        number = float(m[0]) if isinstance(shown, str) and (m := re.match(r"[-+]?\d+(\.\d+)?", shown)) else shown
        if _is_number(number) and _is_number(value):
            places = len(shown.partition(".")[2]) if isinstance(shown, str) else 9
            tolerance = 0.5001 * 10.0**-places if isinstance(shown, str) else 1e-9 * abs(value)
            if abs(number - value) > tolerance:
                report.differ(f"{source.stem}, `{key}` in the text", value, shown, tolerance)
        elif shown != value:
            report.differ(f"{source.stem}, `{key}` in the text", value, shown)


def compare(saved: Result, found: Result, tolerance: float, report: Report) -> None:
    """Compare a saved result with that of another run."""
    old, new = dict(leaves(saved.values)), dict(leaves(found.values))
    for path in sorted(old.keys() | new.keys()):
        a, b = old.get(path), new.get(path)
        where = f"{saved.name}.{path}"
        if MEASURED.search(path):
            continue
        report.count("numbers of the chapter compared", int(_is_number(a)))
        if _is_number(a) and _is_number(b):
            allowed = FLOOR + tolerance * abs(a)
            if not abs(a - b) <= allowed:
                report.differ(where, a, b, allowed)
        elif a != b:
            report.differ(where, a, b)
    for key in sorted(saved.arrays.keys() | found.arrays.keys()):
        where = f"{saved.name}, array {key}"
        if key not in saved.arrays or key not in found.arrays:
            report.differ(where, *("there" if key in r.arrays else "missing" for r in (saved, found)))
            continue
        x, y = saved.arrays[key], found.arrays[key]
        if MEASURED.search(key):
            continue
        report.count("arrays of the chapter compared")
        if x.shape != y.shape or x.dtype != y.dtype:
            report.differ(where, f"{x.dtype} {x.shape}", f"{y.dtype} {y.shape}")
        elif x.size:
            x, y = x.astype(np.float64), y.astype(np.float64)
            allowed = FLOOR + tolerance * float(np.abs(x).max())
            off = float(np.abs(x - y).max())
            if not off <= allowed:
                at = np.unravel_index(int(np.abs(x - y).argmax()), x.shape)
                report.differ(f"{where} at {[int(i) for i in at]}", float(x[at]), float(y[at]), allowed)


# A chapter again ----------------------------------------------------------------------------------------------------


def run_again(
    root: Path, source: Path, run: Path, results: dict[str, Result], given: dict[str, Any], train: bool,
    tolerance: float, report: Report,
) -> None:  # fmt: skip
    """Run a chapter into a temporary folder beside the run and compare what it saves.

    Raises:
        InputError: the run holds no result of this chapter, or the chapter fails.
    """
    own = {name: result for name, result in results.items() if result.provenance.get("chapter") == source.stem}
    if not own:
        raise InputError(f"{run / 'results'}: holds no result of {source.stem}, expected some; run that chapter first.")
    origin = next(iter(own.values())).provenance
    again = Path(tempfile.mkdtemp(prefix=f".verify-{run.name}-", dir=run.parent))
    try:
        if not train:
            borrow_models(run, again)
        parameters = {"preset": origin["preset"], "seed": origin["seed"], **given, "run": str(again)}
        run_notebook(source, again / source.name, parameters, root, again / "step.json")
        for name, saved in own.items():
            try:
                compare(saved, load_result(again / "results", name), tolerance, report)
            except InputError as error:
                report.differences.append(f"{name}: was not made again ({error})")
    finally:
        shutil.rmtree(again, ignore_errors=True)


def verify(
    root: Path, run: Path, chapter: str = "", tolerance: float = TOLERANCE, train: bool = False, data: str = ""
) -> Report:
    """Everything; see the text of this module.

    Raises:
        InputError: no such run, chapter, or a tolerance below 0.
    """
    if not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance: found {tolerance}, expected a share of at least 0, such as {TOLERANCE}.")
    run, report = (root / run).resolve(), Report()
    results = read_results(run, report)
    presets = sorted({str(result.provenance.get("preset", "?")) for result in results.values()})
    if len(presets) > 1:
        report.differences.append(f"{run}: holds results of the presets {', '.join(presets)}, expected one preset")
    sources = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    again = [source for source in sources if chapter and source.name.startswith(f"{chapter}_")]
    if chapter and len(again) != 1:
        raise InputError(f"chapter {chapter!r}: {len(again)} notebooks begin with it, expected one.")
    given: dict[str, Any] = {}
    for source in sources:
        executed = root / "build" / "executed" / (presets or ["?"])[0] / source.name
        parameters = injected_parameters(read_notebook(executed)) if executed.exists() else {}
        same = parameters and (root / str(parameters.get("run", ""))).resolve() == run
        notebook = read_notebook(executed if same else source)
        if not same:
            report.notes.append(f"{source.stem}: no executed copy of this run, its text and pictures are not compared")
        check_figures(notebook, source, results, root / "build" / "verify" / run.name, report)
        if same:
            check_prose(notebook, source, results, report)
            if source in again:
                given = {key: value for key, value in parameters.items() if key != "run"}
    check_formulas(results, report)
    for source in again:
        if data:
            given["data"] = data
        run_again(root, source, run, results, given, train, tolerance, report)
    return report


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """Command line; 0 when all agrees, 1 when something differs, 2 when it could not be checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder, such as runs/tiny")
    parser.add_argument("--chapter", default="", help="number of a chapter to run again")
    parser.add_argument("--data", default="", help="folder of the data, where it is not the one of the executed copy")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a number may differ")
    parser.add_argument("--train", action="store_true", help="train the chapter's models again, too")
    o = parser.parse_args(arguments)
    root = root or Path(__file__).resolve().parents[1]
    try:
        report = verify(root, Path(o.run), o.chapter, o.tolerance, o.train, o.data)
        write_json(root / "build" / "verify" / "report.json", {"run": o.run, "chapter": o.chapter, **vars(report)})
    except InputError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    for note in report.notes:
        print(f"note: {note}")
    for line in report.differences:
        print(f"DIFFERS {line}", file=sys.stderr)
    print(f"{o.run}: {', '.join(f'{number} {what}' for what, number in report.counted.items())}")
    print(f"{len(report.differences)} differences." if report.differences else "Everything agrees.")
    return 1 if report.differences else 0


if __name__ == "__main__":
    sys.exit(main())
