"""Small checks of what a user passes, each with one clear sentence when it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .files import InputError


def number(name: str, value: Any, unit: str, positive: bool = False) -> float:
    """``value`` as a finite float. Booleans and strings are not numbers.

    Raises:
        InputError: not a number, not finite, or not positive where it must be.
    """
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise InputError(f"{name}: found {value!r}, expected a number in {unit}.")
    result = float(value)
    if not math.isfinite(result) or (positive and result <= 0):
        kind = "positive, finite" if positive else "finite"
        raise InputError(f"{name}: found {result:g}, expected a {kind} number in {unit}.")
    return result


def pair(name: str, value: Any, positive: bool = False) -> tuple[float, float]:
    """Two lengths (v, u) in mm."""
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__len__") or len(value) != 2:
        raise InputError(f"{name}: found {value!r}, expected two numbers (v, u) in mm.")
    return (number(name, value[0], "mm", positive), number(name, value[1], "mm", positive))


def shape(name: str, value: Any, order: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, as many as ``order``, for example "(z, y, x)", names."""
    count = order.count(",") + 1
    expected = f"{count} whole numbers {order} of at least 1"
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__len__") or len(value) != count:
        raise InputError(f"{name}: found {value!r}, expected {expected}.")
    for item in value:
        if isinstance(item, bool) or not hasattr(item, "__index__") or int(item) < 1:
            raise InputError(f"{name}: found {value!r}, expected {expected}.")
    return tuple(int(item) for item in value)


def pick_device(device: str | torch.device) -> torch.device:
    """The device called ``device``; "auto" is the GPU if there is one, else the CPU.

    Raises:
        InputError: a device that this machine or torch does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device: found {str(device)!r}, which cannot be used ({reason}); expected auto, cpu or cuda."
        ) from error
