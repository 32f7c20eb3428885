"""What a chapter must be before it runs and after it ran.

Papermill returns success for a misspelled parameter, and Jupyter Book renders an unexecuted notebook or one that
holds a traceback without a word. Here both are errors, with the notebook, the cell and the remedy in the message.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from difr3ct_core.files import InputError, require_file

#: Every chapter has these, with these names, in its cell tagged `parameters`.
STANDARD_PARAMETERS = ("preset", "data", "run", "views", "seed", "device")
#: A cell with one of these tags must show something.
OUTPUT_TAGS = ("needs-output", "figure")


def read_notebook(path: Path) -> NotebookNode:
    """The notebook in ``path``, as nbformat 4.

    Raises:
        InputError: missing, truncated, or not a notebook.
    """
    require_file(path, "a Jupyter notebook")
    try:
        notebook = nbformat.read(str(path), as_version=4)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises errors of json, jsonschema and its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: is no readable notebook ({first}), expected nbformat 4; copy it again.") from error
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def parse(source: str) -> ast.Module | None:
    """The code of a cell without its IPython lines, or None when it still is no Python."""
    lines = ["pass" if line.lstrip()[:1] in ("%", "!") else line for line in source.splitlines()]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return None


def parameters_of(notebook: NotebookNode, path: Path) -> dict[str, Any]:
    """Names and default values in the cell tagged ``parameters``; a default that is no literal reads as None.

    Raises:
        InputError: there is no such cell, or more than one.
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) != 1:
        raise InputError(f"{path}: {len(cells)} code cells are tagged 'parameters', expected one; tag the first.")
    values: dict[str, Any] = {}
    tree = parse(cells[0].source)
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                try:
                    values[target.id] = ast.literal_eval(value)
                except ValueError:
                    values[target.id] = None
    return values


def injected_parameters(notebook: NotebookNode) -> dict[str, Any]:
    """The parameters that an executed copy was run with; empty for a source."""
    values = {}
    for cell in notebook.cells:
        if "injected-parameters" in tags(cell):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def check_parameters(notebook: NotebookNode, path: Path, given: Mapping[str, Any]) -> None:
    """Refuse a parameter that the notebook does not have, or a value of another type than its default.

    Raises:
        InputError: names the parameter, the notebook and the names that it knows.
    """
    known = parameters_of(notebook, path)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "check the spelling."
            raise InputError(f"{path}: parameter {name!r} is unknown, expected some of {', '.join(known)}; {hint}")
        default = known[name]
        numbers = isinstance(value, (int, float)) and isinstance(default, float)
        if default is not None and value is not None and type(value) is not type(default) and not numbers:
            raise InputError(
                f"{path}: parameter {name!r} is {value!r} of type {type(value).__name__}, "
                f"expected {type(default).__name__} like its default {default!r}."
            )


def check_clean(notebook: NotebookNode, path: Path) -> None:
    """Refuse a source notebook that holds outputs or execution counts.

    Raises:
        InputError: names the first such cell.
    """
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            raise InputError(
                f"{path}: cell {number} holds outputs of an earlier run, expected a source without outputs; "
                "clear them (in JupyterLab: Edit, Clear Outputs of All Cells) and save."
            )


def check_executed(notebook: NotebookNode, path: Path) -> None:
    """Refuse an executed copy with an unexecuted cell, a traceback, a missing output or a gap in the counts.

    Raises:
        InputError: names the notebook, the cell and what is wrong with it.
    """
    cells = code_cells(notebook)
    figure_names = _imported_from(cells, "difr3ct_core.figures")
    for number, cell in enumerate(cells, 1):
        where = f"{path}: cell In[{number}] {_first_line(cell.source)}"
        for output in cell.outputs:
            if output.output_type == "error":
                what = f"{output.ename}: {_one_line(output.evalue)}"
                raise InputError(f"{where} ended with {what}, expected no error; mend it and run the chapter again.")
            if output.output_type == "stream" and "Traceback (most recent call last)" in output.text:
                last = _one_line(output.text.strip().splitlines()[-1])
                raise InputError(f"{where} wrote a traceback ({last}), expected none; mend it and run again.")
        if cell.execution_count is None:
            raise InputError(f"{where} was not executed, expected every cell to run; run the chapter again.")
        if not cell.outputs and (reason := _must_show(cell, figure_names)):
            raise InputError(f"{where} shows nothing, expected an output because {reason}; run the chapter again.")
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(counts) + 1)):
        raise InputError(f"{path}: execution counts are {counts}, expected 1 to {len(counts)}; run the chapter again.")
    if cells and not any(cell.outputs for cell in cells):
        raise InputError(f"{path}: no cell shows anything, expected outputs; the kernel may have lost them, run again.")


def _must_show(cell: NotebookNode, figure_names: set[str]) -> str:
    """Why the cell must have an output, or an empty string."""
    for tag in OUTPUT_TAGS:
        if tag in tags(cell):
            return f"it is tagged {tag!r}"
    tree = parse(cell.source)
    if tree is None or not tree.body:
        return ""
    expressions = [node.value for node in tree.body if isinstance(node, ast.Expr)]
    if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "print" for node in expressions):
        return "it prints"
    last = tree.body[-1]
    if isinstance(last, ast.Expr) and not cell.source.rstrip().endswith(";"):
        called = ast.unparse(last.value.func) if isinstance(last.value, ast.Call) else ast.unparse(last.value)
        if called in figure_names or called.startswith("figures.") or called in ("fig", "figure", "plt.show"):
            return "it ends in a figure"
    return ""


def _imported_from(cells: list[NotebookNode], module: str) -> set[str]:
    names = set()
    for cell in cells:
        for node in ast.walk(parse(cell.source) or ast.Module([], [])):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{module}."):
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def _first_line(source: str) -> str:
    line = source.strip().splitlines()[0]
    return f"`{line[:57]}...`" if len(line) > 60 else f"`{line}`"


def _one_line(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", " ".join(text.split()))[-200:]
