"""One set of versions: pyproject.toml, constraints.txt and environment.yml say the same; make knows its targets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from environment import constraints_text, stamp_of
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


def pinned(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows), "every line of constraints.txt is NAME==VERSION"
    return {canonicalize_name(name): version for name, version in rows}


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def test_torch_is_pinned_exactly_and_without_a_local_version(root: Path) -> None:
    assert pinned(root)["torch"] == "2.13.0"


def test_every_requirement_is_pinned_within_its_bounds(root: Path) -> None:
    versions, settings = pinned(root), project(root)
    groups = {"": settings["dependencies"], **settings["optional-dependencies"]}
    checked = 0
    for extra, requirements in groups.items():
        for text in requirements:
            requirement = Requirement(text)
            if requirement.url:  # TIGRE: only from its repository, PyPI's package of that name is another program
                assert extra == "tigre"
                continue
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), f"{text} excludes {version}"
            checked += 1
    assert checked > 20


def test_the_extras_are_those_of_the_readme_and_make(root: Path) -> None:
    extras = set(project(root)["optional-dependencies"])
    assert {"book", "rt", "lidc", "tigre", "dev", "bench"} <= extras
    named = re.findall(r"call environment,([a-z$(),]+?)\)\n", (root / "Makefile").read_text())
    used = {word for group in named for word in group.replace("$(comma)", ",").split(",")}
    assert used and used <= extras


def test_conda_and_pip_agree(root: Path) -> None:
    versions, settings = pinned(root), project(root)
    environment = yaml.safe_load((root / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    exact = dict(entry.split("=") for entry in conda if re.fullmatch(r"[\w-]+=[\w.]+", entry))
    assert SpecifierSet(settings["requires-python"]).contains(exact.pop("python") + ".0")
    assert exact.pop("tigre") == "3.1.3"
    assert exact, "conda packages with exact versions"
    for name, version in exact.items():
        assert versions[canonicalize_name(name)] == version, name
    assert "--constraint constraints.txt" in pip
    assert f"torch=={versions['torch']}" in pip
    (editable,) = [line for line in pip if line.startswith("--editable")]
    extras = set(re.search(r"\[(.*)\]", editable).group(1).split(","))
    assert extras <= set(settings["optional-dependencies"])
    assert "tigre" not in extras  # comes from conda here
    assert any(channel.startswith("ccpi") for channel in environment["channels"])


def test_another_torch_changes_one_line_and_the_stamp(root: Path) -> None:
    before, after = constraints_text("").splitlines(), constraints_text("2.11.0").splitlines()
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [("torch==2.13.0", "torch==2.11.0")]
    assert stamp_of("\n".join(before)) != stamp_of("\n".join(after))
    assert stamp_of("\n".join(before)) == stamp_of("\n".join(before))


def test_an_environment_with_a_fresh_stamp_is_not_touched(root: Path, tmp_path: Path) -> None:
    """No network, no pip: the call returns at once, and notices a changed stamp."""
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("#!/bin/sh\necho touched; exit 9\n")
    (venv / "bin" / "python").chmod(0o755)
    (venv / "bin" / "pip").write_text("")
    stamp = venv / "difr3ct.json"
    stamp.write_text(json.dumps({"stamp": stamp_of(constraints_text("")), "extras": ["dev", "node", "book"]}))
    command = [sys.executable, "book/environment.py", "--extras", "book,dev", "--venv", str(venv)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    stamp.write_text('{"stamp": "older", "extras": ["dev", "node", "book"]}')
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert "the installation failed" in run.stderr and "touched" in run.stderr
    assert stamp.read_text().startswith('{"stamp": "older"'), "a failed installation leaves no fresh stamp"


def test_an_old_python_gets_a_clear_message(root: Path) -> None:
    """The check itself, under a pretended Python 3.9 with no other one on the PATH."""
    script = (
        "import sys; sys.path.insert(0, 'book'); import environment, shutil; sys.version_info = (3, 9, 1);"
        "shutil.which = lambda name: None; environment.require_python()"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert "this is Python 3.9, and 3.11 or newer is needed" in run.stderr
    assert "Traceback" not in run.stderr


def test_no_python_at_all_gets_a_clear_message(root: Path) -> None:
    command = ["make", "test", "PYTHON=python-that-is-not-there"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert run.returncode != 0
    assert "no python-that-is-not-there found; install Python 3.11 or newer" in run.stderr


def test_help_lists_every_target(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*)$", makefile, re.M).group(1).split())
    assert targets == set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    shown = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert targets <= set(re.findall(r"^  ([a-z-]+) ", shown, re.M))
    assert {"book", "test", "run", "lab", "help"} <= targets


def test_ci_runs_the_readmes_test_command(root: Path) -> None:
    script = (root / ".ci" / "run").read_text()
    assert "make test" in script.splitlines() and "make test" in (root / "README.md").read_text()
    assert (root / ".ci" / "run").stat().st_mode & 0o100


@pytest.mark.parametrize("name", ["README.md", "CITATION.cff", "LICENSE"])
def test_paper_and_licence_are_named(root: Path, name: str) -> None:
    text = (root / name).read_text()
    assert ("Apache License" if name == "LICENSE" else "2408.15118") in text
    if name == "CITATION.cff":
        citation = yaml.safe_load(text)
        authors = [author["family-names"] for author in citation["preferred-citation"]["authors"]]
        assert authors == ["Sun", "Baroudi", "Netherton", "Court", "Mawlawi", "Veeraraghavan", "Balakrishnan"]
        assert citation["license"] == "Apache-2.0"
