"""Measured numbers in the text come from results; a typed one is found, and a number that nobody measured is not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from prose import check_prose, measured_numbers, text_of

from difr3ct_core.files import InputError

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("book/*.md")])


def test_no_measured_number_is_typed() -> None:
    assert check_prose(ROOT, PAGES) == []


@pytest.mark.parametrize(
    "text",
    [
        "The model reaches 27.2 dB here.",
        "**Notice.** A gap of -3 dB",
        "an error of 120 HU",
        "It took 13 minutes",
        "It took thirteen\nor rather twelve minutes.",
        "with 1.8 GB of memory",
        "covers 63 % of the voxels, and 63% too",
        "about 5 per cent",
        "in less than an hour",
        "half a minute later",
        "**Time and hardware.** 35 s on two cores.",
        "a 3-minute training",
    ],
)
def test_a_typed_number_is_found(text: str) -> None:
    assert len(measured_numbers(text)) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "It reaches {glue:text}`psnr:.1f` dB, within {glue:text}`off:.2f` %.",
        "call `window(2500 HU)` and\n\n```python\nx = 3  # 3 dB\n```\n",
        "with $20 \\log_{10} 4095 = 72.2\\,$ and $$ 5 dB $$",
        "128³ voxels of 10 mm, 20 steps, 8 views, two CPU cores",
        "minutes on a laptop, seconds afterwards",
        "**Time and hardware.** Half a minute on two CPU cores\nonce trained.\n\nText.",
        "## Exercises\n\n**1.** At least 95 % in 3 minutes.\n",
        "<!-- 27.2 dB -->",
        "see [there](../a/27 dB)",
        "In 1990s style; 3 samples; 4 heads",
    ],
)
def test_what_nobody_measured_passes(text: str) -> None:
    assert measured_numbers(text) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".ipynb")])
def test_no_name_in_the_text_is_given_twice(page: str) -> None:
    """The pages are built without a warning, and two values of one name are one; this says so before an hour's run."""
    cells = json.loads((ROOT / page).read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = re.findall(r'\bglue\("([^"{}]+)"', code)
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_text_after_the_exercises_counts() -> None:
    assert len(measured_numbers("## Exercises\n\n95 %\n\n## Summary\n\nIt has 27 dB.\n")) == 1


def project(folder: Path, add: str = "", exact: str = "") -> list[str]:
    (folder / "book").mkdir()
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "05_sampling.ipynb", folder / "notebooks")
    path = folder / "notebooks" / "05_sampling.ipynb"
    content = json.loads(path.read_text())
    cell = next(cell for cell in content["cells"] if "**Notice.**" in "".join(cell["source"]))
    cell["source"] = [*cell["source"], add]
    path.write_text(json.dumps(content))
    (folder / "book" / "exact_numbers.yml").write_text(exact)
    return check_prose(folder, ["notebooks/05_sampling.ipynb"])


def test_a_number_typed_into_a_chapter_is_named_with_its_page(tmp_path: Path) -> None:
    (problem,) = project(tmp_path, "\nThe film ends at 27.2 dB, as it should.")
    assert problem.startswith("notebooks/05_sampling.ipynb: '...") and "27.2 dB" in problem and "glue it" in problem


def test_an_exact_number_is_let_through_and_an_old_entry_is_named(tmp_path: Path) -> None:
    exact = 'notebooks/05_sampling.ipynb:\n  - ["ends at 27.2 dB", theory]\n  - ["4 HU", gone]\n'
    (problem,) = project(tmp_path, "\nThe film ends\nat 27.2 dB, as it should.", exact)
    assert "no longer holds '4 HU'" in problem


def test_a_list_without_reasons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a list of"):
        project(tmp_path, "", "notebooks/05_sampling.ipynb: [x]\n")


def test_the_readme_says_what_was_measured() -> None:
    said = re.search(r"took (\d+) minutes.*?with ([\d.]+) GB", text_of(ROOT / "README.md"), re.S)
    measured = json.loads((ROOT / "benchmarks" / "results" / "end_to_end.json").read_text())
    assert said, "the README says how long `make book` takes, and with how much memory"
    assert abs(int(said[1]) - measured["book_minutes"]["value"]) <= 0.5
    assert abs(float(said[2]) - measured["peak_gb"]["value"]) <= 0.05
