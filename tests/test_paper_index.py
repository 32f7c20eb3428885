"""The paper index: nothing of the paper is left out, and nothing is named that is not there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from build_html import toc_files
from paper_index import counts, import_dotted, is_saved, main, page, problems, read_index, saved_names

from difr3ct_core.files import InputError

ROOT = Path(__file__).resolve().parents[1]


def test_every_equation_figure_and_table_has_an_entry() -> None:
    index = read_index()
    assert list(index["equations"]) == [str(number) for number in range(1, 16)]
    assert list(index["figures"]) == [str(number) for number in range(1, 10)]
    assert list(index["tables"]) == ["I", "II"]
    assert len(index["claims"]) >= 15


def test_what_the_index_names_is_there() -> None:
    assert problems() == []


def test_the_page_is_what_the_data_say_and_is_in_the_book() -> None:
    assert (ROOT / "book" / "paper_index.md").read_text(encoding="utf-8") == page(), "run python book/paper_index.py"
    assert "book/paper_index" in toc_files(ROOT)
    rows = [line for line in page().splitlines() if line.startswith("| ") and not line.startswith("| |")]
    assert len(rows) == sum(counts(read_index()).values())


def test_equations_that_the_code_names_lead_to_that_code() -> None:
    """A module whose text names an equation of the paper is in that equation's entry, or near it."""
    index = read_index()["equations"]
    named = {key: {name.split(".")[0] for name in entry["functions"]} for key, entry in index.items()}
    for key, module in (("10", "fusion"), ("10", "geometry"), ("15", "diffusion"), ("8", "sampling"), ("11", "vqgan")):
        text = (ROOT / "difr3ct_core" / f"{module}.py").read_text(encoding="utf-8")
        assert re.search(rf"Eq\. (?:\d+-)?{key}\b", text) and module in named[key]


def project(folder: Path, **change: object) -> Path:
    """A copy of what the index reads, with entry Eq. 10 changed."""
    for name in ("book", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copytree(ROOT / "benchmarks" / "results", folder / "benchmarks" / "results")
    path = folder / "book" / "paper_index.yml"
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    entry = data["equations"]["10"]
    entry.update({key: value for key, value in change.items() if value is not None})
    for key in [key for key, value in change.items() if value is None]:
        del entry[key]
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"functions": ["fusion.no_such_function"]}, "difr3ct_core.fusion.no_such_function does not exist"),
        ({"functions": ["no_module.f"]}, "difr3ct_core.no_module.f does not exist"),
        ({"results": ["no_such_result"]}, "chapter 03 saves no result 'no_such_result'"),
        ({"results": ["benchmarks/results/none.json"]}, "none.json does not exist"),
        ({"chapter": "42"}, "there is no chapter 42"),
        ({"functions": []}, "names no function"),
    ],
)
def test_what_is_not_there_is_found(tmp_path: Path, change: dict, word: str, capsys: pytest.CaptureFixture) -> None:
    folder = project(tmp_path, **change)
    before = (folder / "book" / "paper_index.md").read_bytes()
    assert main([], folder) == 1
    assert "Eq. 10" in (said := capsys.readouterr().err) and word in said
    assert (folder / "book" / "paper_index.md").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"status": "done"}, "status 'done', expected one of"),
        ({"status": "needs data"}, "says which data"),
        ({"what": None}, "lacks 'what'"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_bad_data_are_refused(tmp_path: Path, change: dict, word: str, capsys: pytest.CaptureFixture) -> None:
    assert main([], project(tmp_path, **change)) == 2
    assert word in capsys.readouterr().err


def test_an_entry_to_come_may_name_a_chapter_to_come(tmp_path: Path) -> None:
    folder = project(tmp_path, status="not yet", chapter="42", results=[], functions=[])
    assert problems(folder) == []
    assert main([], folder) == 0
    row = next(line for line in page(folder).splitlines() if line.startswith("| Eq. 10 "))
    assert "| 42 | – | – | **not yet**" in row


def test_results_are_found_in_the_notebooks() -> None:
    saved = saved_names()
    assert {"end_to_end", "schedules"} <= saved["04"] and "film" in saved["05"]
    assert is_saved("quickstart_real", saved["00"]) and not is_saved("quickstart_", saved["00"])
    assert not is_saved("film", saved["04"])


def test_dotted_names() -> None:
    assert import_dotted("vqgan.VQGAN.loss").__name__ == "loss"
    assert import_dotted("drr.project").__name__ == "project"
    with pytest.raises(InputError, match=r"difr3ct_core\.vqgan\.VQGAN\.lost does not exist"):
        import_dotted("vqgan.VQGAN.lost")


def test_the_counts_go_into_the_figures_file(tmp_path: Path) -> None:
    folder = project(tmp_path)
    shutil.copy(ROOT / "benchmarks" / "_results.py", folder / "benchmarks" / "_results.py")
    assert main(["--figures"], folder) == 0
    found = json.loads((folder / "benchmarks" / "results" / "book.json").read_text())
    number = counts(read_index())
    assert found["paper_index_entries"]["value"] == sum(number.values()) >= 40
    assert found["paper_index_reproduced"]["value"] == number["reproduced"] + number["phantom"] + number["beyond"]
