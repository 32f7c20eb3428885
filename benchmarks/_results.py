"""One form for every file of measured figures: ``{"key": {"value": 1.0, "unit": "dB"}, ..., "provenance": {...}}``."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from difr3ct_core.files import InputError, read_json, write_json
from difr3ct_core.results import device_name, git_commit


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``, so that two scripts that merge into one file do not lose each other's keys."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows; there the last writer wins
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def update_results(
    path: str | Path,
    figures: Mapping[str, Mapping[str, Any]],
    command: str,
    device: str | None = None,
    measured: bool = True,
) -> None:
    """Merge figures into a file and say where they came from; keys that are not given stay as they are.

    Args:
        path: the JSON file, made if missing.
        figures: ``{"key": {"value": number, "unit": "dB"}}``; further entries beside value and unit are kept.
        command: what to type to measure them again.
        device: where they were measured; this machine's processor if not given.
        measured: false where figures that are there only get something added: they stay from where they were.

    Raises:
        InputError: a figure without a finite value or without a unit; nothing is written then.
    """
    for key, figure in figures.items():
        value = figure.get("value")
        if key == "provenance" or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{path}: figure {key!r} is {dict(figure)!r}, expected a number under 'value'.")
        if not math.isfinite(value) or not isinstance(figure.get("unit"), str):
            raise InputError(f"{path}: figure {key!r} is {dict(figure)!r}, expected a finite value and a unit.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    origin = {
        "commit": git_commit(),
        "device": device or device_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "difr3ct-core")},
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with _alone(path.parent):
        content = read_json(path) if path.exists() else {}
        keys = content.pop("provenance", {}).get("keys", {})
        content.update({key: dict(figure) for key, figure in figures.items()})
        own = {"command": command, **{name: origin[name] for name in ("commit", "device", "time")}}
        keys.update({key: own for key in figures if measured or key not in keys})
        write_json(path, {**content, "provenance": {**origin, "keys": keys}})
