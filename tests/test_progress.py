"""Progress: items pass through unchanged, a bar on the terminal, or a file for the runner of the book."""

from __future__ import annotations

import json

import pytest

from difr3ct_core import progress as module
from difr3ct_core.progress import ENVIRONMENT, progress


@pytest.fixture
def target(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv(ENVIRONMENT, str(path))
    monkeypatch.setattr(module, "_INTERVAL_S", -1.0)  # report every step
    return path


def read(path) -> tuple:
    values = json.loads(path.read_text())
    return values["label"], values["step"], values["total"]


@pytest.mark.parametrize("items", [[3, 1, 2], range(5), [], iter("abc")])
def test_items_pass_through(items, monkeypatch, capsys):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    expected = list(items) if not hasattr(items, "__next__") else ["a", "b", "c"]
    assert list(progress(items, "label")) == expected


def test_a_bar_with_label_and_total(monkeypatch, capsys):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    list(progress(range(10, 20), "training", total=20, initial=10))
    said = capsys.readouterr().err
    assert "training" in said and "/20" in said


def test_the_file_counts(target, capsys):
    seen = []
    for item in progress(range(4), "drawing"):
        seen.append(read(target))
        assert seen[-1] == ("drawing", item, 4)
    assert read(target) == ("drawing", 4, 4)
    assert capsys.readouterr().err == ""  # no bar beside it
    assert [p.name for p in target.parent.iterdir()] == ["progress.json"]


def test_after_a_resume(target):
    steps = [read(target) for _ in progress(range(7, 10), "training", total=10, initial=7)]
    assert steps == [("training", 7, 10), ("training", 8, 10), ("training", 9, 10)]
    assert read(target) == ("training", 10, 10)
    list(progress(range(7, 10), "training", initial=7))  # the total is 10 without being told
    assert read(target) == ("training", 10, 10)


def test_an_unknown_total(target):
    list(progress(iter("ab"), "reading"))
    assert read(target) == ("reading", 2, None)


def test_not_at_every_step(target, monkeypatch):
    """The file would slow a fast loop down."""
    monkeypatch.setattr(module, "_INTERVAL_S", 1000.0)
    reports = []
    monkeypatch.setattr(module, "_report", lambda *values: reports.append(values[2]))
    list(progress(range(10_000), "fast"))
    assert reports == [0, 10_000]  # the first and the last


def test_a_report_that_fails_does_not_stop_the_work(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "no" / "such" / "folder" / "progress.json"))
    assert list(progress(range(3), "work")) == [0, 1, 2]


def test_errors_pass_through(target):
    with pytest.raises(RuntimeError, match="inside"):
        for item in progress(range(5), "work"):
            if item == 2:
                raise RuntimeError("inside")
    assert read(target)[1] == 2

    def failing():
        yield 1
        raise ValueError("source")

    with pytest.raises(ValueError, match="source"):
        list(progress(failing(), "work"))
