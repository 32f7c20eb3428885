"""One progress display over a run of several parts: which part, the step within it, time gone and time left.

On a terminal one line is rewritten; in a log a line is written every 15 seconds and at every change of
part. Standard library only, because the installation shows its progress with it too.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

LOG_INTERVAL_S = 15.0
TTY_INTERVAL_S = 0.5


def clock_text(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def read_step(path: Path) -> tuple[str, int, int | None] | None:
    """(label, step, total) that a chapter wrote last, or None when it wrote nothing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        label, step, total = str(value["label"]), int(value["step"]), value["total"]
        return label, step, None if total is None else int(total)
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Display:
    """Shows a run of named parts with an estimate of the time left.

    Args:
        parts: (name, expected seconds) in the order in which they will run. What was measured last time is the
            best expectation; after a part has run, the ratio of measured to expected scales the rest.
        stream: where to write; standard error unless told.
        step_file: what the running chapter writes through ``difr3ct_core.progress``.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, float]],
        stream: TextIO | None = None,
        step_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parts = list(parts)
        self.stream = sys.stderr if stream is None else stream
        self.step_file = step_file
        self.clock = clock
        self.began = clock()
        self.index = -1
        self.part_began = self.began
        self.text = ""
        self.step: tuple[str, int, int | None] | None = None
        self.step_began: tuple[str, float, int] | None = None
        self.spent_s = 0.0  # measured, over the finished parts
        self.expected_s = 0.0  # expected, over the same parts
        self.tty = bool(getattr(self.stream, "isatty", lambda: False)())
        self._written = float("-inf")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self, name: str) -> None:
        """Begin the part called ``name``."""
        self.index = [part for part, _ in self.parts].index(name)
        self.part_began = self.clock()
        self.text, self.step, self.step_began = "", None, None
        if self.step_file:
            self.step_file.unlink(missing_ok=True)  # the last step of another part, or of an earlier run
        if self._thread.ident is None:
            self._thread.start()
        self.show(force=True)

    def note(self, text: str) -> None:
        """What the running part is at, in a few words."""
        self.text = text
        self.show()

    def finish(self) -> None:
        """The running part is done."""
        self.poll()
        seconds = self.clock() - self.part_began
        expected = self.parts[self.index][1]
        if seconds > 0.2 * expected:  # a part that found its work done says nothing about this machine's speed
            self.spent_s += seconds
            self.expected_s += expected
        self.say(f"{self._head()} done in {clock_text(seconds)}")

    def say(self, message: str) -> None:
        """Write a line that stays."""
        with self._lock:
            self.stream.write(("\r\x1b[K" if self.tty else "") + message + "\n")
            self.stream.flush()
            self._written = self.clock()

    def close(self) -> None:
        """Stop the display."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.tty:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def poll(self) -> None:
        """Read what the running chapter reports."""
        step = read_step(self.step_file) if self.step_file else None
        if step and (self.step_began is None or self.step_began[0] != step[0] or step[1] < self.step_began[2]):
            self.step_began = (step[0], self.clock(), step[1])
        self.step = step

    def remaining_s(self) -> float:
        """Estimated seconds until the whole run is done."""
        # Short parts say little about this machine's speed, so a minute of "as expected" is mixed in.
        pace = (self.spent_s + 60.0) / (self.expected_s + 60.0)
        waiting = sum(seconds for _, seconds in self.parts[self.index + 1 :]) * pace
        if self.index < 0:
            return waiting
        left = max(0.0, self.parts[self.index][1] * pace - (self.clock() - self.part_began))
        if self.step and self.step_began:
            (_, step, total), (_, began, first) = self.step, self.step_began
            if total and step > first:  # the loop's own pace is a floor: it knows when this machine is slower
                left = max(left, (self.clock() - began) / (step - first) * (total - step))
        return waiting + left

    def line(self) -> str:
        """The line as shown."""
        words = [self._head()]
        if self.step:
            label, step, total = self.step
            words.append(f"{label} {step}/{total}" if total else f"{label} {step}")
        elif self.text:
            words.append(self.text)
        words.append(f"{clock_text(self.clock() - self.began)} gone, about {clock_text(self.remaining_s())} left")
        return " · ".join(words)

    def show(self, force: bool = False) -> None:
        """Write the line when it is due."""
        due = self.clock() - self._written >= (TTY_INTERVAL_S if self.tty else LOG_INTERVAL_S)
        if self.index < 0 or not (due or (force and self.tty)):
            return
        self.poll()
        line = self.line()
        with self._lock:
            if self.tty:
                width = shutil.get_terminal_size().columns - 1
                self.stream.write("\r\x1b[K" + line[:width])
            else:
                self.stream.write(line + "\n")
            self.stream.flush()
            self._written = self.clock()

    def _head(self) -> str:
        return f"[{self.index + 1}/{len(self.parts)}] {self.parts[self.index][0]}"

    def _watch(self) -> None:
        while not self._stop.wait(TTY_INTERVAL_S):
            self.show()
