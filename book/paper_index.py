"""The paper index: from an equation, figure, table or claim of the paper to the code and the result that stand for it.

    python book/paper_index.py            writes book/paper_index.md from book/paper_index.yml
    python book/paper_index.py --figures  writes the counts into benchmarks/results/book.json too

The page is committed; a test fails when it and its data differ, or when the data name something that is not there.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from notebook_checks import code_cells, parse, read_notebook

from difr3ct_core.files import InputError, atomic_path

ROOT = Path(__file__).resolve().parents[1]
#: Status in the data → words on the page.
STATUS = {
    "reproduced": "reproduced",
    "phantom": "reproduced in phantom form",
    "needs data": "not reproducible without data",
    "beyond": "gone beyond",
    "not yet": "not yet",
}
#: Part of the data → (heading, how an entry is called).
PARTS = {
    "equations": ("Equations", "Eq. {}"),
    "figures": ("Figures", "Fig. {}"),
    "tables": ("Tables", "Table {}"),
    "claims": ("Claims", "{}"),
}
_FIELDS = {"what", "section", "chapter", "functions", "results", "status", "note", "data"}
_REQUIRED = {"what", "chapter", "functions", "results", "status"}


def read_index(root: Path = ROOT) -> dict[str, dict[str, dict[str, Any]]]:
    """Part → key → entry.

    Raises:
        InputError: a part, a field or a status is missing or unknown.
    """
    path = root / "book" / "paper_index.yml"
    index = yaml.safe_load(path.read_text(encoding="utf-8"))
    if set(index) != set(PARTS):
        raise InputError(f"{path}: found the parts {sorted(index)}, expected {sorted(PARTS)}.")
    for part, entries in index.items():
        for key, entry in entries.items():
            where = f"{path}: {part} {key!r}"
            if unknown := sorted(set(entry) - _FIELDS):
                raise InputError(f"{where} has the unknown field {unknown[0]!r}, expected some of {sorted(_FIELDS)}.")
            if missing := sorted(_REQUIRED - set(entry)):
                raise InputError(f"{where} lacks {missing[0]!r}, expected {sorted(_REQUIRED)}.")
            if entry["status"] not in STATUS:
                raise InputError(f"{where} has status {entry['status']!r}, expected one of {', '.join(STATUS)}.")
            if (entry["status"] == "needs data") != ("data" in entry):
                raise InputError(f"{where}: `data` goes with the status 'needs data', and says which data.")
    return index


def saved_names(root: Path = ROOT) -> dict[str, set[str]]:
    """Chapter → names of the results that its notebook saves; "*" stands for a part that is only known when it runs."""
    found: dict[str, set[str]] = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        names = found.setdefault(path.name[:2], set())
        for cell in code_cells(read_notebook(path)):
            for node in ast.walk(parse(cell.source) or ast.Module([], [])):
                saves = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "save"
                if saves and node.args:
                    name = node.args[0]
                    if isinstance(name, ast.Constant):
                        names.add(str(name.value))
                    elif isinstance(name, ast.JoinedStr):
                        parts = (str(p.value) if isinstance(p, ast.Constant) else "*" for p in name.values)
                        names.add("".join(parts))
    return found


def is_saved(name: str, by_chapter: set[str]) -> bool:
    """Whether a chapter that saves these names saves ``name``."""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), name) for pattern in by_chapter)


def import_dotted(name: str) -> Any:
    """The function, class or method ``name`` below ``difr3ct_core``.

    Raises:
        InputError: there is none.
    """
    words = ["difr3ct_core", *name.split(".")]
    for count in range(len(words) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for word in words[count:]:
                value = getattr(value, word)
            return value
        except AttributeError:
            break
    raise InputError(f"paper_index.yml: difr3ct_core.{name} does not exist, expected a function, class or method.")


def problems(root: Path = ROOT) -> list[str]:
    """What the index names and is not there, one sentence each; an entry "not yet" may name a chapter to come."""
    found, saved = [], saved_names(root)
    for part, entries in read_index(root).items():
        for key, entry in entries.items():
            where, open_ = PARTS[part][1].format(key), entry["status"] in ("not yet", "needs data")
            for name in entry["functions"]:
                try:
                    import_dotted(name)
                except InputError as error:
                    found.append(f"{where}: {error}")
            if entry["chapter"] not in saved and not open_:
                found.append(f"{where}: there is no chapter {entry['chapter']}.")
            for result in entry["results"]:
                if "/" in result:
                    if not (root / result).exists() and not open_:
                        found.append(f"{where}: {result} does not exist.")
                elif not is_saved(result, saved.get(entry["chapter"], set())):
                    found.append(f"{where}: chapter {entry['chapter']} saves no result {result!r}.")
            if not open_ and not (entry["functions"] and entry["results"]):
                found.append(f"{where}: is {entry['status']!r} but names no function or no result.")
    return found


def counts(index: dict[str, dict[str, dict[str, Any]]]) -> dict[str, int]:
    """Status → number of entries."""
    every = [entry["status"] for entries in index.values() for entry in entries.values()]
    return {status: every.count(status) for status in STATUS}


def page(root: Path = ROOT) -> str:
    """The text of paper_index.md."""
    index, notebooks = read_index(root), {p.name[:2]: p.stem for p in (root / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    number = counts(index)
    shown = [f"{number[status]} {words}" for status, words in STATUS.items()]
    lines = [
        "<!-- Written by book/paper_index.py from book/paper_index.yml: change that file, and run the script. -->",
        "# Paper index",
        "",
        "From an equation, figure, table or claim of the paper {cite}`sun2024difr3ct` to the chapter that shows it,",
        "the code that implements it and the saved result that it is drawn from. Functions are below `difr3ct_core`,",
        "results are `NAME.json` and `NAME.npz` in the run folder's `results` (`runs/tiny/results` after `make book`),",
        "unless a path says otherwise. *In phantom form*: the same study, on the synthetic patients of this book.",
        "",
        f"Of {sum(number.values())} entries: {', '.join(shown)}.",
        "`make verify` draws every figure again from the results and recomputes what can be recomputed.",
        "",
    ]
    for part, entries in index.items():
        heading, name = PARTS[part]
        lines += [f"## {heading}", "", "| | what | chapter | function | result | status |", "|---|---|---|---|---|---|"]
        for key, entry in entries.items():
            section = f" (§{entry['section']})" if "section" in entry else ""
            note = f"; {entry['note']}" if "note" in entry else ""
            data = f": {entry['data']}" if "data" in entry else ""
            chapter = entry["chapter"]
            if chapter in notebooks:
                chapter = f"[{chapter}](../notebooks/{notebooks[chapter]})"
            cells = [
                name.format(key),
                entry["what"] + section,
                chapter,
                ", ".join(f"`{function}`" for function in entry["functions"]) or "–",
                ", ".join(f"`{result}`" for result in entry["results"]) or "–",
                f"**{STATUS[entry['status']]}**{data}{note}",
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", action="store_true", help="write the counts into benchmarks/results/book.json")
    options = parser.parse_args(arguments)
    try:
        found = problems(root)
        for sentence in found:
            print(f"paper index: {sentence}", file=sys.stderr)
        if found:
            return 1
        with atomic_path(root / "book" / "paper_index.md") as temporary:
            temporary.write_text(page(root), encoding="utf-8")
        number = counts(read_index(root))
    except InputError as error:
        print(f"paper index: {error}", file=sys.stderr)
        return 2
    if options.figures:
        sys.path.insert(0, str(root / "benchmarks"))
        from _results import update_results

        done = sum(number[status] for status in ("reproduced", "phantom", "beyond"))
        figures = {
            "paper_index_entries": {"value": sum(number.values()), "unit": "entries"},
            "paper_index_reproduced": {"value": done, "unit": "entries"},
        }
        command = "python book/paper_index.py --figures"
        update_results(root / "benchmarks" / "results" / "book.json", figures, command=command)
    print(f"book/paper_index.md: {', '.join(f'{number[status]} {words}' for status, words in STATUS.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
