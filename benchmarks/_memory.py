"""The kernel's account of this process's memory (Linux)."""

from __future__ import annotations

from pathlib import Path


def status_bytes(field: str) -> int:
    """Bytes of one field of ``/proc/self/status``, such as ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak() -> int:
    """Let ``VmHWM`` begin again from what is held now, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")
