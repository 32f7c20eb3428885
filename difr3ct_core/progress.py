"""One way to show progress: a bar where a person looks, and a small file for whoever runs the chapter.

``make book`` runs each chapter in its own process and shows one display over the whole run. It sets
``DIFR3CT_PROGRESS`` to a file name, and every bar of the project writes its label, step and total there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
ENVIRONMENT = "DIFR3CT_PROGRESS"
_INTERVAL_S = 0.5


def progress(items: Iterable[T], label: str, total: int | None = None, initial: int = 0) -> Iterator[T]:
    """Iterate over ``items`` with a bar called ``label``.

    Args:
        items: what to go through.
        label: a few words, shown before the bar.
        total: number of items, when ``len(items)`` cannot tell.
        initial: items already done before a resume.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items) + initial  # type: ignore[arg-type]
    target = os.environ.get(ENVIRONMENT)
    last = 0.0
    # Under the book's runner the bar would only fill the page with carriage returns.
    with tqdm(desc=label, total=total, initial=initial, disable=bool(target), leave=False) as bar:
        done = initial
        for item in items:
            now = time.monotonic()
            if target and now - last > _INTERVAL_S:
                _report(Path(target), label, done, total)
                last = now
            yield item
            done += 1
            bar.update()
        if target:
            _report(Path(target), label, done, total)


def _report(path: Path, label: str, step: int, total: int | None) -> None:
    """Replace the progress file; a reader never sees half of it. A failure to report must not stop the work."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps({"label": label, "step": step, "total": total}), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        pass
