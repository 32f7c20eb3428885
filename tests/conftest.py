"""What all tests share: the modules of book/ and benchmarks/faults/, and the record of how long `make test` took."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "benchmarks" / "faults")]
_BEGAN = time.monotonic()


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the minutes of a complete passing run to the file that the environment names."""
    target = os.environ.get("DIFR3CT_TEST_RECORD")
    selected = session.config.getoption("-k") or session.config.getoption("file_or_dir")
    if target and exitstatus == 0 and not selected:
        path = ROOT / target
        path.parent.mkdir(parents=True, exist_ok=True)
        minutes = round((time.monotonic() - _BEGAN) / 60, 2)
        path.write_text(json.dumps({"minutes": minutes, "tests": session.testscollected}) + "\n", encoding="utf-8")
