"""Run folders that share finished models, so that a chapter can run again without training again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def borrow_models(owner: Path, borrower: Path) -> list[str]:
    """Link every finished model of the run folder ``owner`` into ``borrower``; returns the names.

    A model is finished when it holds ``weights.safetensors``. Chapters only load such a model, so nothing is written
    through the link; an unfinished training is not linked, for two runs must not write into one checkpoint. Links are
    relative, so that the folders may move together. What the borrower has already is left alone.
    """
    names = []
    for weights in sorted(owner.glob("*/weights.safetensors")):
        borrower.mkdir(parents=True, exist_ok=True)
        model = weights.parent
        target = os.path.relpath(model.resolve(), borrower.resolve())
        with contextlib.suppress(FileExistsError):  # another chapter of the same run was faster
            (borrower / model.name).symlink_to(target, target_is_directory=True)
        names.append(model.name)
    return names
