"""The book: its chapters are complete and clean, its table of contents whole, its pages read offline."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from build_html import build_html, check_pages, foreign_addresses, toc_files
from nbformat import write
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_checks import STANDARD_PARAMETERS, check_clean, parameters_of, read_notebook

from difr3ct_core.files import InputError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_is_clean_and_has_the_standard_parameters(path: Path) -> None:
    notebook = read_notebook(path)
    check_clean(notebook, path)
    assert set(STANDARD_PARAMETERS) <= set(parameters_of(notebook, path))
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "parameters" in first.metadata.get("tags", []), "the parameters come first"
    assert notebook.cells[0].source.startswith("# "), "a chapter begins with its title"
    assert len(re.findall(r"^# ", notebook.cells[0].source, re.M)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_says_what_can_go_wrong_and_where_to_read_on(path: Path) -> None:
    text = "\n".join(cell.source for cell in read_notebook(path).cells if cell.cell_type == "markdown")
    assert text.count("## What can go wrong") == 1 and text.count("**Further reading.**") == 1
    known = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.M))
    cited, to_read = (
        {key for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", part) for key in keys.split(",")}
        for part in (text, text.split("**Further reading.**")[1])
    )
    assert to_read and cited <= known


def test_the_table_of_contents_and_the_plan_list_every_chapter(root: Path) -> None:
    pages = toc_files(root)
    listed = sorted(page.removeprefix("notebooks/") for page in pages if page.startswith("notebooks/"))
    assert listed == [path.stem for path in NOTEBOOKS]
    plan = yaml.safe_load((root / "book" / "chapters.yml").read_text())
    order = list(plan["chapters"])
    assert sorted(order) == sorted(path.stem[:2] for path in NOTEBOOKS)
    for chapter, entry in plan["chapters"].items():
        for before in entry["after"]:
            assert order.index(before) < order.index(chapter), f"{chapter} runs before {before}, which it needs"
    for page in pages:
        assert (root / f"{page}.md").exists() or (root / f"{page}.ipynb").exists(), page
    for step in plan["steps"].values():
        assert (root / step["script"]).exists()


def test_pages_link_only_to_what_is_there(root: Path) -> None:
    for page in (root / "book").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)|^:link: (\S+)", page.read_text(), re.M):
            name = target[0] or target[1]
            candidates = [page.parent / f"{name}{suffix}" for suffix in ("", ".md", ".ipynb")]
            assert any(path.exists() for path in candidates), f"{page.name} links to {name}"


def test_what_the_text_names_in_the_code_is_there(root: Path) -> None:
    """`module.name` in the notation exists in that module."""
    text = (root / "book" / "notation.md").read_text()
    named = re.findall(r"`(?:difr3ct_core\.)?([a-z_]+)\.([A-Za-z_]+)(?:\.[a-z_]+)?`", text)
    checked = 0
    for module, name in named:
        folder = root / "difr3ct_core"
        path = folder / f"{module}.py" if (folder / f"{module}.py").exists() else folder / module / "__init__.py"
        if path.exists():
            assert re.search(rf"\b{name}\b", path.read_text()), f"{module}.{name}"
            checked += 1
    assert checked >= 15


def test_every_citation_is_in_the_bibliography(root: Path) -> None:
    keys = set(re.findall(r"@\w+\{(\w+),", (root / "book" / "references.bib").read_text()))
    assert "sun2024difr3ct" in keys
    cited = set()
    for path in [*(root / "book").glob("*.md"), *NOTEBOOKS]:
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text()):
            cited |= {key.strip() for key in group.split(",")}
    assert cited and cited <= keys, cited - keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', 1),
        ('<img src="http://example.org/a.png"><iframe src="https://e.org"></iframe>', 2),
        ("<style>@font-face { src: url('https://fonts.example/a.woff2') }</style>", 1),
        ('<a href="https://arxiv.org/abs/2408.15118">paper</a><link rel="canonical" href="https://e.org">', 0),
        ('<script src="../_static/a.js"></script><img src="data:image/png;base64,aa">', 0),
    ],
)
def test_addresses_on_other_servers_are_found(tmp_path: Path, text: str, expected: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(text)
    assert len(foreign_addresses(page)) == expected
    if expected:
        with pytest.raises(InputError, match=r"page\.html: loads .*, expected only files of the book"):
            check_pages(tmp_path, ["page"])


def test_a_missing_page_and_a_traceback_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was not built"):
        check_pages(tmp_path, ["intro"])
    (tmp_path / "intro.html").write_text("<pre>Traceback (most recent call last)</pre>")
    with pytest.raises(InputError, match="shows a traceback"):
        check_pages(tmp_path, ["intro"])


def executed_copy(path: Path, *, count: int | None = 1) -> Path:
    """A chapter with a title, a formula and one figure."""
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    figure = new_output("display_data", {"image/png": png, "text/plain": "<Figure>"})
    cell = new_code_cell("show()", execution_count=count, outputs=[figure] if count else [])
    text = new_markdown_cell(f"# {path.stem}\n\nWith $x^2$, see [Notation](../book/notation).")
    path.parent.mkdir(parents=True, exist_ok=True)
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    write(new_notebook(cells=[text, cell], metadata=language), str(path))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """The real text with trivial chapters; npm is not asked (its network is not the test's business)."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("_config.yml", "package.json", "package-lock.json"):
        shutil.copy(ROOT / name, folder / name)
    names = [page.removeprefix("notebooks/") for page in toc_files(folder) if page.startswith("notebooks/")]
    return folder, {f"{name}.ipynb": executed_copy(folder / "run" / f"{name}.ipynb") for name in names}


def test_the_book_builds_without_a_warning_and_reads_offline(
    project: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copies = project
    fake = {}
    for name in ("vendor/tex-svg-full.js", "vendor/require.js", "vendor/embed-amd.js"):
        fake[name] = folder / "fake" / Path(name).name
        fake[name].parent.mkdir(exist_ok=True)
        fake[name].write_text("// script\n")
    monkeypatch.setattr("build_html.fetch_assets", lambda root: fake)
    notes: list[str] = []
    assert build_html(folder, copies, notes.append) == []
    html = folder / "build" / "html"
    assert (html / "index.html").exists() and "jupyter-book" in notes
    intro = (html / "book" / "intro.html").read_text()
    assert "how far to believe it" in intro and "logo.svg" in intro
    assert "vendor/tex-svg-full.js" in (html / "book" / "notation.html").read_text()
    assert list(html.rglob("*.png")) or "data:image/png" in (html / "notebooks" / "00_quickstart.html").read_text()
    assert not list((folder / "notebooks").glob("*")) if (folder / "notebooks").exists() else True
    # Nothing changed: jupyter-book is not asked again, unless a copy is no longer complete.
    notes.clear()
    build_html(folder, copies, notes.append)
    assert "jupyter-book" not in notes
    name = next(iter(copies))
    executed_copy(copies[name], count=None)
    with pytest.raises(InputError, match=f"{name}.*was not executed"):
        build_html(folder, copies, notes.append)
    assert (html / "index.html").exists(), "the earlier book stays"
    # A warning of jupyter-book is an error with its words, and the earlier book stays too.
    executed_copy(copies[name])
    with open(folder / "book" / "intro.md", "a") as handle:
        handle.write("\n[gone](no_such_page.md)\n")
    with pytest.raises(InputError, match="no_such_page"):
        build_html(folder, copies, notes.append)
    assert "no_such_page" not in (html / "book" / "intro.html").read_text()
