"""Run one chapter through papermill or one data script, and watch its memory.

Nothing unfinished is ever taken for a result: the executed copy is written beside its place, checked, and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil
from nbformat import NotebookNode
from nbformat import write as write_notebook
from notebook_checks import check_clean, check_executed, check_parameters, code_cells, read_notebook, tags

from difr3ct_core.files import InputError, atomic_path, write_json

SAMPLE_INTERVAL_S = 1.0


class MemoryWatch:
    """Samples the resident memory of this process and all below it; also notes who they are.

    The note (a JSON file) lets the next run end a kernel that outlived a killed run and would still be writing.
    """

    def __init__(self, note: Path) -> None:
        self.note = note
        self.peak_bytes = 0
        self._noted: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.note.unlink(missing_ok=True)

    def take_peak_gb(self) -> float:
        """Peak in GB (10⁹ bytes) since the last call."""
        self.sample()
        peak, self.peak_bytes = self.peak_bytes, 0
        return peak / 1e9

    def sample(self) -> None:
        """Look once."""
        total, processes = 0, {}
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
                if process.pid != own.pid:
                    processes[str(process.pid)] = process.create_time()
        self.peak_bytes = max(self.peak_bytes, total)
        if processes != self._noted:
            self._noted = processes
            with contextlib.suppress(OSError, InputError):  # a full disk is reported by whoever writes results
                write_json(self.note, processes)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self.sample()


def end_orphans(note: Path, patience_s: float = 5.0) -> None:
    """End the processes that a killed run left behind, as it noted them."""
    try:
        noted = {int(pid): created for pid, created in json.loads(note.read_text()).items()}
        processes = [psutil.Process(pid) for pid in noted if psutil.pid_exists(pid)]
        alive = [process for process in processes if abs(process.create_time() - noted[process.pid]) < 0.01]
    except (OSError, ValueError, AttributeError, psutil.Error):
        return
    _, alive = psutil.wait_procs(alive, timeout=patience_s)  # kernels leave by themselves when their parent is gone
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=patience_s)
    note.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold the lock of this build folder.

    Raises:
        InputError: another run holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise InputError(
                f"{lock}: held by process {handle.read().strip() or '?'}, expected no other run in this folder; "
                "wait for it or end it."
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[TextIO]:
    """Send standard error, also that of kernels started meanwhile, to ``log``; yields the old one for the display.

    Kernels remark on sockets and, at Ctrl-C, on their own death; that would tear the display's line apart.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w") as old, open(log, "a", encoding="utf-8") as handle:
        os.dup2(handle.fileno(), 2)
        try:
            yield old
        finally:
            sys.stderr.flush()
            old.flush()
            os.dup2(old.fileno(), 2)


def run_script(command: list[str], root: Path, log: Path, step_file: Path) -> int:
    """Run a Python script of the project, everything it says to ``log``; returns its exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DIFR3CT_PROGRESS": str(step_file)}
    with open(log, "w", encoding="utf-8") as handle:
        return subprocess.run(
            [sys.executable, *command], cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=handle,
            stderr=subprocess.STDOUT, check=False,
        ).returncode  # fmt: skip


def run_notebook(
    source: Path,
    executed: Path,
    parameters: dict[str, Any],
    root: Path,
    step_file: Path,
    on_cell: Callable[[int, int], None] = lambda number, total: None,
) -> None:
    """Execute ``source`` with ``parameters`` and leave the checked copy at ``executed``.

    Args:
        source: a notebook without outputs.
        executed: where the copy goes, atomically; an earlier copy stays until then.
        parameters: for its cell tagged ``parameters``.
        root: of the project, where the kernel starts.
        step_file: where the chapter's loops report their steps.
        on_cell: called with (number, total) when a cell starts.

    Raises:
        InputError: an unknown parameter, a source with outputs, a failed cell, or a copy that does not pass the checks.
            A failed copy is kept beside as ``NAME.failed.ipynb``.
    """
    notebook = read_notebook(source)
    check_clean(notebook, source)
    check_parameters(notebook, source, parameters)
    executed.parent.mkdir(parents=True, exist_ok=True)
    failed = executed.with_suffix(".failed.ipynb")
    with atomic_path(executed) as partial:
        try:
            _papermill(source, partial, parameters, root, step_file, on_cell)
        except InputError as error:
            if partial.stat().st_size:
                os.replace(partial, failed)
                raise InputError(f"{error} The copy up to there is {failed}.") from error
            raise
        try:
            check_executed(read_notebook(partial), source)
        except InputError as error:
            os.replace(partial, failed)
            raise InputError(f"{error} The copy is {failed}.") from error
    failed.unlink(missing_ok=True)


def _papermill(
    source: Path,
    target: Path,
    parameters: dict[str, Any],
    root: Path,
    step_file: Path,
    on_cell: Callable[[int, int], None],
) -> None:
    """papermill.execute_notebook with one more callback and errors in one sentence."""
    import papermill  # imported here: it takes seconds, which a run with nothing to do should not
    from nbclient.exceptions import DeadKernelError
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> Any:
            total, began = len(nb_man.nb.cells), nb_man.cell_start

            def cell_start(cell: NotebookNode, cell_index: int | None = None, **more: Any) -> Any:
                on_cell((cell_index or 0) + 1, total)
                return began(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, *arguments, **options)

    papermill_engines.register("difr3ct", Engine)
    # BOOK_STATIC tells a chapter that nobody will press a button: widgets that need a live kernel show a picture.
    # The environment's own kernel goes before one of the same name in the user's home.
    extra = {"DIFR3CT_PROGRESS": str(step_file), "BOOK_STATIC": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        papermill.execute_notebook(
            str(source), str(target), parameters=parameters, engine_name="difr3ct", kernel_name="python3",
            cwd=str(root), progress_bar=False, request_save_on_cell_execute=True,
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        where = f"cell In[{error.exec_count}]" if error.exec_count else "a cell"
        what = f"{error.ename}: {' '.join(str(error.evalue).split())}"
        raise InputError(f"{source}: {where} ended with {what}, expected no error; mend it and run again.") from error
    except DeadKernelError as error:
        raise InputError(
            f"{source}: the kernel died, expected it to finish; most often the memory was full, close other programs "
            "and run again (finished chapters are kept, training continues)."
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def refresh_text(source: NotebookNode, executed_path: Path) -> bool:
    """Bring changed prose into an executed copy whose code is unchanged, without running it.

    Returns:
        whether the copy had to change.
    """
    executed = read_notebook(executed_path)
    old = [cell for cell in code_cells(executed) if "injected-parameters" not in tags(cell)]
    injected = [cell for cell in code_cells(executed) if "injected-parameters" in tags(cell)]
    cells, ran = [], iter(old)
    for cell in source.cells:
        if cell.cell_type == "code" and cell.source.strip():
            cells.append(next(ran))
            if "parameters" in tags(cell):
                cells += injected
        else:
            cells.append(cell)
    if [_content(cell) for cell in cells] == [_content(cell) for cell in executed.cells]:
        return False
    executed.cells = cells
    with atomic_path(executed_path) as temporary:
        write_notebook(executed, str(temporary))
    return True


def _content(cell: NotebookNode) -> tuple[str, str, list[str]]:
    return cell.cell_type, cell.source, sorted(tags(cell))


def now() -> str:
    """The moment, as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
