"""The form of the files of measured figures, and that two writers do not lose each other's keys."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from difr3ct_core.files import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def update_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _results import update_results

    return update_results


def test_figures_merge_and_remember_their_own_command(update_results, tmp_path):
    path = tmp_path / "results" / "bench.json"
    update_results(path, {"a": {"value": 1.5, "unit": "dB"}, "b": {"value": 2, "unit": "s"}}, "make first")
    update_results(path, {"b": {"value": 3, "unit": "s", "fastest_peer": "X"}}, "make second", device="GPU Y")
    content = json.loads(path.read_text())
    assert content["a"] == {"value": 1.5, "unit": "dB"}
    assert content["b"] == {"value": 3, "unit": "s", "fastest_peer": "X"}
    origin = content["provenance"]
    assert set(content) == {"a", "b", "provenance"}
    assert {"commit", "device", "versions", "time", "keys"} == set(origin)
    assert origin["keys"]["a"]["command"] == "make first"
    assert origin["keys"]["b"]["command"] == "make second"
    assert origin["keys"]["b"]["device"] == "GPU Y"
    assert {"python", "torch", "numpy", "difr3ct-core"} == set(origin["versions"])


def test_a_figure_that_gets_something_added_stays_from_where_it_was(update_results, tmp_path):
    path = tmp_path / "bench.json"
    update_results(path, {"a": {"value": 1.0, "unit": "dB"}}, "make first", device="GPU Y")
    more = {"a": {"value": 1.0, "unit": "dB", "p": 0.1}, "b": {"value": 2.0, "unit": "dB"}}
    update_results(path, more, "make second", measured=False)
    content = json.loads(path.read_text())
    assert content["a"]["p"] == 0.1
    keys = content["provenance"]["keys"]
    assert (keys["a"]["command"], keys["a"]["device"]) == ("make first", "GPU Y")
    assert keys["b"]["command"] == "make second"  # it was not there before


@pytest.mark.parametrize(
    "figures",
    [
        {"a": {"value": math.nan, "unit": "dB"}},
        {"a": {"value": "1", "unit": "dB"}},
        {"a": {"value": True, "unit": "dB"}},
        {"a": {"value": 1.0}},
        {"provenance": {"value": 1.0, "unit": "dB"}},
    ],
)
def test_a_figure_that_is_none_is_refused_and_nothing_changes(update_results, tmp_path, figures):
    path = tmp_path / "bench.json"
    update_results(path, {"a": {"value": 1.0, "unit": "dB"}}, "make")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"bench\.json: figure"):
        update_results(path, figures, "make")
    assert path.read_bytes() == before


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "bench.json"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from _results import update_results\n"
        "for i in range(8):\n"
        "    update_results(sys.argv[2], {sys.argv[3] + str(i): {'value': i, 'unit': 's'}}, 'make')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(BENCHMARKS), str(path), name]) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    keys = set(json.loads(path.read_text())) - {"provenance"}
    assert keys == {name + str(i) for name in "abc" for i in range(8)}
