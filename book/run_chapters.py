"""Run the chapters through papermill and build the book: what `make book` and `make run` call.

    python book/run_chapters.py book --preset tiny [name=value ...]
    python book/run_chapters.py run 04 --preset tiny views=2view
    python book/run_chapters.py figures

What ran, from which inputs, how long it took and how much memory it needed stands in build/state.json. A part whose
inputs are unchanged is kept; after a kill the next call goes on behind the last finished part, and the training
inside a chapter goes on from its own checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from build_html import build_html
from display import Display, clock_text
from execution import MemoryWatch, end_orphans, now, only_one, refresh_text, run_notebook, run_script, stderr_to
from fingerprint import chapter_key, core_hash, digest
from notebook_checks import STANDARD_PARAMETERS, check_parameters, parameters_of, read_notebook

from difr3ct_core.files import InputError, read_json, write_json
from difr3ct_core.presets import get_preset

HTML = "pages"


@dataclass
class Book:
    """The project's folders, the plan of its chapters, and what has been done so far."""

    root: Path
    preset: str = "tiny"
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.build = self.root / "build"
        self.state_path = self.build / "state.json"
        self.step_file = self.build / "step.json"
        self.data = str(self.given.pop("data", "data"))
        self.run = str(self.given.pop("run", f"runs/{self.preset}"))
        plan = yaml.safe_load((self.root / "book" / "chapters.yml").read_text(encoding="utf-8"))
        self.steps: dict[str, dict[str, Any]] = plan["steps"] or {}
        self.chapters: dict[str, dict[str, Any]] = plan["chapters"]
        self.everything = read_json(self.state_path) if self.state_path.exists() else {}
        self.state: dict[str, Any] = self.everything.setdefault(self.preset, {})
        self.parts: dict[str, dict[str, Any]] = self.state.setdefault("parts", {})

    # Where things are -------------------------------------------------------------------------------------------

    def source(self, chapter: str) -> Path:
        """The notebook of a chapter, given by its number.

        Raises:
            InputError: none or several notebooks begin with it.
        """
        found = sorted((self.root / "notebooks").glob(f"{chapter}_*.ipynb")) if chapter else []
        if len(found) != 1:
            numbers = ", ".join(sorted(self.chapters))
            raise InputError(f"chapter {chapter!r}: {len(found)} notebooks begin with it, expected one of {numbers}.")
        return found[0]

    def label(self, part: str) -> str:
        """The name of a part as shown."""
        return self.source(part).stem if part in self.chapters else part

    def executed(self, chapter: str) -> Path:
        """Where the executed copy of a chapter is."""
        return self.build / "executed" / self.preset / self.source(chapter).name

    def fill(self, text: str) -> str:
        """``text`` with {preset}, {data}, {run} and {cohort}, the folder of the patients, filled in."""
        cohort = get_preset(self.preset).cohort_folder if "{cohort}" in text else ""
        return text.format(preset=self.preset, data=self.data, run=self.run, cohort=cohort)

    def parameters(self, chapter: str, only_known: bool) -> dict[str, Any]:
        """What is passed to a chapter; paths are relative to the project's root, as chapters take them."""
        values = {"preset": self.preset, "data": self.data, "run": self.run}
        known = parameters_of(read_notebook(self.source(chapter)), self.source(chapter))
        return values | {name: value for name, value in self.given.items() if not only_known or name in known}

    def check(self, chapters: Iterable[str]) -> None:
        """Refuse a parameter that no chapter knows, or that has a wrong type, before anything runs."""
        chapters = list(chapters)
        for chapter in chapters:
            path = self.source(chapter)
            check_parameters(read_notebook(path), path, self.parameters(chapter, only_known=len(chapters) > 1))
        known = set(STANDARD_PARAMETERS)
        for chapter in chapters:
            known |= set(parameters_of(read_notebook(self.source(chapter)), self.source(chapter)))
        if unknown := sorted(set(self.given) - known):
            raise InputError(f"parameter {unknown[0]!r}: unknown to every chapter, expected some of {sorted(known)}.")

    # What is to be done -----------------------------------------------------------------------------------------

    def step_key(self, step: str) -> str:
        """Hash of what a data step depends on."""
        source = (self.root / self.steps[step]["script"]).read_text(encoding="utf-8")
        words = [self.fill(word) for word in self.steps[step]["arguments"]]
        return digest([source, core_hash(self.root, source), words])

    def keys(self) -> dict[str, str]:
        """Hash of what each chapter depends on: its code, parameters, core, data, and the chapters before it."""
        outcomes = {step: f"{self.step_key(step)} {self.parts.get(step, {}).get('outcome')}" for step in self.steps}
        keys: dict[str, str] = {}
        for chapter, plan in self.chapters.items():
            inputs = outcomes | {before: keys[before] for before in plan["after"]}
            notebook = read_notebook(self.source(chapter))
            keys[chapter] = chapter_key(self.root, notebook, self.parameters(chapter, only_known=True), inputs)
        return keys

    def stale_steps(self) -> list[str]:
        """Data steps to run; the scripts themselves know what of it they can keep."""
        return [
            step
            for step in self.steps
            if self.parts.get(step, {}).get("key") != self.step_key(step)
            or not all((self.root / self.fill(path)).exists() for path in self.steps[step]["makes"])
        ]

    def stale_chapters(self) -> list[str]:
        """Chapters to run, in order."""
        keys = self.keys()
        return [
            chapter
            for chapter in self.chapters
            if self.parts.get(chapter, {}).get("key") != keys[chapter]
            or not self.executed(chapter).exists()
            or not all((self.root / path).exists() for path in self.parts[chapter]["made"])
        ]

    def expected(self, part: str) -> float:
        """Seconds that a part will need: as last time, else the plan's guess."""
        plan = self.steps.get(part) or self.chapters.get(part) or {"seconds": 20}
        return float(self.parts.get(part, {}).get("seconds", plan["seconds"]))

    # Doing it ---------------------------------------------------------------------------------------------------

    def note(self, part: str, began: float, memory: MemoryWatch, **more: Any) -> None:
        """Record a finished part."""
        self.parts[part] = {
            "seconds": round(time.monotonic() - began, 2),
            "peak_gb": round(memory.take_peak_gb(), 3),
            "finished": now(),
            **more,
        }
        self.save()

    def save(self) -> None:
        """Write the state."""
        write_json(self.state_path, self.everything)

    def run_step(self, step: str, memory: MemoryWatch) -> None:
        """Run a data step; one that may be missing is noted as missing and the book goes on.

        Raises:
            InputError: it failed.
        """
        plan, began = self.steps[step], time.monotonic()
        log = self.build / "logs" / f"{step.replace(' ', '_')}.log"
        memory.take_peak_gb()
        command = [plan["script"], *(self.fill(word) for word in plan["arguments"])]
        code = run_script(command, self.root, log, self.step_file)
        if code and code != plan.get("missing"):
            tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-600:]
            raise InputError(f"{plan['script']}: ended with exit code {code}, expected 0; it said: {tail}")
        outcome = "missing" if code else "made"
        self.note(step, began, memory, key=self.step_key(step) if not code else "", outcome=outcome)

    def run_chapter(self, chapter: str, memory: MemoryWatch, display: Display, own: bool = False) -> Path:
        """Run a chapter; with ``own`` parameters the copy goes beside the book's and the state is not touched."""
        source, executed = self.source(chapter), self.executed(chapter)
        parameters = self.parameters(chapter, only_known=not own)
        if own and self.given:
            words = ",".join(f"{name}={value}" for name, value in sorted(self.given.items())).replace("/", "_")
            executed = executed.with_name(f"{source.stem}.{words}.ipynb")
        began, before = time.monotonic(), self._made()
        memory.take_peak_gb()
        run_notebook(
            source, executed, parameters, self.root, self.step_file, lambda n, m: display.note(f"cell {n} of {m}")
        )
        if not (own and self.given):
            made = sorted(self._made() - before)
            # A chapter that only loaded what it had made earlier still stands for it.
            earlier = [path for path in self.parts.get(chapter, {}).get("made", []) if (self.root / path).exists()]
            self.note(chapter, began, memory, key=self.keys()[chapter], made=sorted({*made, *earlier}))
        return executed

    def _made(self) -> set[str]:
        """Files in the run folder, relative to the root."""
        files = (path for path in (self.root / self.run).rglob("*") if path.is_file() and ".tmp" not in path.name)
        return {os.path.relpath(path, self.root) for path in files}


def make_book(book: Book) -> int:
    """Everything: data, chapters, pages. Returns the exit code."""
    book.check(book.chapters)
    began, from_scratch = time.monotonic(), not book._made()
    steps, chapters = book.stale_steps(), book.stale_chapters()

    def parts() -> list[tuple[str, float]]:
        return [(book.label(name), book.expected(name)) for name in [*steps, *chapters, HTML]]

    kept = [chapter for chapter in book.chapters if chapter not in chapters]
    if kept:
        print(f"unchanged, kept: chapters {', '.join(kept)}", file=sys.stderr)
    ran, peak = [], 0.0
    with stderr_to(book.build / "logs" / "kernels.log") as stream:
        display = Display(parts(), stream, book.step_file)
        with contextlib.closing(display), MemoryWatch(book.build / "running.json") as memory:
            for step in steps:
                display.start(step)
                book.run_step(step, memory)
                peak = max(peak, book.parts[step]["peak_gb"])
                display.finish()
            chapters = book.stale_chapters()  # what the steps brought may change more than was foreseen
            display.parts = parts()
            for chapter in chapters:
                display.start(book.label(chapter))
                book.run_chapter(chapter, memory, display)
                peak = max(peak, book.parts[chapter]["peak_gb"])
                ran.append(chapter)
                display.finish()
            for chapter in book.chapters:
                refresh_text(read_notebook(book.source(chapter)), book.executed(chapter))
            display.start(HTML)
            started = time.monotonic()
            copies = {book.source(chapter).name: book.executed(chapter) for chapter in book.chapters}
            missing = build_html(book.root, copies, display.note)
            book.note(HTML, started, memory)
            display.finish()
            peak = max(peak, book.parts[HTML]["peak_gb"])
    seconds = time.monotonic() - began
    if from_scratch and len(ran) == len(book.chapters):
        book.state["whole_run"] = {"minutes": round(seconds / 60, 2), "peak_gb": peak, "finished": now()}
        book.save()
    missing += [plan["without"] for step, plan in book.steps.items() if book.parts[step].get("outcome") == "missing"]
    for what in missing:
        print(f"missing: {what}. `make book` tries again next time.")
    print(f"The book is ready after {clock_text(seconds)}: open {Path('build') / 'html' / 'index.html'} in a browser.")
    return 0


def run_one(book: Book, chapter: str) -> int:
    """One chapter, whether or not it changed. Returns the exit code."""
    book.check([chapter])
    steps = book.stale_steps()
    parts = [(book.label(name), book.expected(name)) for name in [*steps, chapter]]
    with stderr_to(book.build / "logs" / "kernels.log") as stream:
        display = Display(parts, stream, book.step_file)
        with contextlib.closing(display), MemoryWatch(book.build / "running.json") as memory:
            for step in steps:
                display.start(step)
                book.run_step(step, memory)
                display.finish()
            display.start(book.label(chapter))
            executed = book.run_chapter(chapter, memory, display, own=True)
            display.finish()
    print(f"Done: open {os.path.relpath(executed, book.root)} in JupyterLab or any notebook viewer.")
    return 0


def copy_figures(book: Book, bench: str) -> int:
    """Copy time and memory of the last run from scratch into benchmarks/results. Returns the exit code."""
    if "whole_run" not in book.state:
        raise InputError(
            f"{book.state_path}: holds no run from scratch at preset {book.preset!r}; remove build and "
            f"{book.run} and run `make book` first."
        )
    sys.path.insert(0, str(book.root / "benchmarks"))
    from _results import update_results

    whole = book.state["whole_run"]
    figures = {
        "book_minutes": {"value": whole["minutes"], "unit": "min"},
        "peak_gb": {"value": whole["peak_gb"], "unit": "GB"},
    }
    tests = book.build / "tests.json"
    if tests.exists():
        figures["test_minutes"] = {"value": read_json(tests)["minutes"], "unit": "min"}
    path = book.root / "benchmarks" / "results" / f"{bench}.json"
    update_results(path, figures, command="make book && make test && make figures")
    print(f"{path.relative_to(book.root)}: {', '.join(figures)}")
    return 0


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["book", "run", "figures"])
    parser.add_argument("chapter", nargs="?", default="", help="number of a chapter, for run")
    parser.add_argument("values", nargs="*", help="parameters of the chapters, name=value")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--bench", default="end_to_end", help="results file, for figures")
    options = parser.parse_intermixed_args(arguments)
    words = list(options.values)
    if options.action != "run" and options.chapter:
        words.insert(0, options.chapter)
    try:
        given = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise InputError(f"parameters: found {word!r}, expected name=value.")
            given[name] = yaml.safe_load(value)
        root = root or Path(__file__).resolve().parents[1]
        if options.action == "figures":
            return copy_figures(Book(root, options.preset), options.bench)
        with only_one(root / "build" / "lock"):
            end_orphans(root / "build" / "running.json")
            for left in (root / "build" / "executed").rglob(".*.tmp*"):
                left.unlink()
            book = Book(root, options.preset, given)
            return run_one(book, options.chapter) if options.action == "run" else make_book(book)
    except InputError as error:
        print(f"difr3ct: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("difr3ct: interrupted; what was finished is kept, the next call goes on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
