"""Numbers in the text of the book: measured ones come from results, by ``glue``, and are not typed.

The rule: outside code, formulas, roles and exercises, a number (in digits or in words) before a unit of what is
measured here (dB, HU, GB, %, seconds, minutes, hours) must be glued. A chapter's paragraph "Time and hardware" may
say in words about how long it takes ("half a minute"), never in digits. Numbers that nobody measured, such as a
definition, stand in exact_numbers.yml with the reason.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from notebook_checks import read_notebook

from difr3ct_core.files import InputError

_UNITS = r"(?:dB|HU|GB|MB|%|per cent|percent|hours?|minutes?|min|seconds?|ms|s|h)"
_WORDS = (
    "half an?|an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|"
    "sixty|ninety|a hundred|a thousand"
)
#: (Years, as in the 1990s, are no seconds.)
_DIGITS = re.compile(rf"(?<![\w.])(?!(?:19|20)\d\ds)[-+−±]?\d[\d.,]*[\s-]?{_UNITS}(?!\w)")
#: "a minute" and "an hour" count as one. Single letters are no units here: they would match too much.
_SPELLED = re.compile(rf"(?i)\b(?!an? second\b)(?:{_WORDS})(?:\s|-)(?:dB|HU|GB|per cent|hours?|minutes?|seconds?)\b")
_HIDDEN = (
    r"(?ms)^(`{3,}|~{3,}).*?^\1",  # code
    r"(?s)<!--.*?-->",
    r"(?s)\$\$.*?\$\$",
    r"\{[\w:]+\}`[^`]*`",  # roles, glue among them
    r"`[^`]*`",
    r"(?s)\$[^$\n]+(?:\n[^$\n]+)?\$",
    r"\]\([^)]*\)",  # targets of links
    r"(?ms)^## Exercises.*?(?=^## |\Z)",  # an exercise poses its own numbers
)


def measured_numbers(text: str) -> list[str]:
    """Numbers with a unit that are typed in Markdown ``text``, each with the words around it."""
    shown = text
    for pattern in _HIDDEN:
        shown = re.sub(pattern, " ", shown)
    found = list(_DIGITS.finditer(shown))
    rough = [m.span() for m in re.finditer(r"(?ms)^\*\*Time and hardware\.\*\*.*?(?=\n\s*\n|\Z)", shown)]
    for match in _SPELLED.finditer(shown):
        if not any(begin <= match.start() < end for begin, end in rough):
            found.append(match)
    around = (shown[max(0, m.start() - 40) : m.end() + 25] for m in sorted(found, key=lambda match: match.start()))
    return [" ".join(words.split()) for words in around]


def text_of(path: Path) -> str:
    """The prose of a page: Markdown cells of a notebook, or a Markdown file."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")


def check_prose(root: Path, pages: list[str]) -> list[str]:
    """Typed numbers on pages (paths from the root), and entries of exact_numbers.yml that no page holds any more.

    Raises:
        InputError: exact_numbers.yml is not what its first lines say.
    """
    listed = root / "book" / "exact_numbers.yml"
    exact: dict[str, Any] = yaml.safe_load(listed.read_text(encoding="utf-8")) or {}
    problems = []
    for page, entries in exact.items():
        if not isinstance(entries, list) or not all(isinstance(e, list) and len(e) == 2 for e in entries):
            raise InputError(f"{listed}: {page} holds {entries!r}, expected a list of [words of the text, why].")
        if page not in pages:
            problems.append(f"{listed.name}: there is no page {page}")
    for page in pages:
        text = text_of(root / page)
        flat = " ".join(text.split())
        for words, _ in exact.get(page, []):
            if words not in flat:
                problems.append(f"{listed.name}: {page} no longer holds {words!r}, remove the entry")
            text = re.sub(r"\s+".join(map(re.escape, words.split())), " ", text)
        problems += [f"{page}: '...{around}...' is typed; glue it from a result" for around in measured_numbers(text)]
    return problems
