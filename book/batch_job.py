"""One job of a batch: a chapter, a training or a script, with a record of what became of it.

    python book/batch_job.py chapter notebooks/05_sampling.ipynb --executed OUT.ipynb --record R.json name=value ...
    python book/batch_job.py train ldm --views 2view --run RUN --preset paper --gpus 4 --record R.json
    python book/batch_job.py script data_scripts/make_phantoms.py --record R.json -- --preset tiny

The record is written when the job begins and when it ends, so that a job which was killed is seen as such; a later
attempt adds to it. `--done FILE` gets a copy of the record of a job that succeeded, and nothing otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from execution import MemoryWatch, end_orphans, now, run_notebook
from run_folders import borrow_models

from difr3ct_core.files import InputError, read_json, write_json
from difr3ct_core.results import git_commit

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def claimed_gpus(count: int, total: int, folder: Path) -> Iterator[list[int]]:
    """Hold ``count`` GPUs of this machine until the block ends, so that jobs side by side do not share one.

    A cluster's scheduler has chosen already when it set CUDA_VISIBLE_DEVICES; then nothing is claimed.

    Args:
        count: how many; 0 claims none.
        total: how many this machine has; where it has none, the job runs on the processor.
        folder: of the locks, one file a GPU; a lock ends with its process, however that ends.

    Raises:
        InputError: more are asked for than there are.
    """
    if not count or not total or os.environ.get("CUDA_VISIBLE_DEVICES"):
        yield []
        return
    if count > total:
        raise InputError(f"gpus: the job asks for {count}, this machine has {total}; lower `gpus` of the study.")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        held: list[int] = []
        while True:
            for gpu in set(range(total)) - set(held):
                handle = open(folder / f"gpu-{gpu}.lock", "a")  # noqa: SIM115, the lock lives as long as the file is open
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    handle.close()
                    continue
                stack.enter_context(handle)
                held.append(gpu)
                if len(held) == count:
                    yield sorted(held)
                    return
            stack.pop_all().close()  # never wait while holding some: two such jobs would wait for each other
            held = []
            time.sleep(1.0)


class Record:
    """The record of a job, on disk from its first moment."""

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path = path
        try:
            earlier = read_json(path).get("attempts", []) if path.exists() else []
        except (InputError, AttributeError):  # cut off by a full disk: what it said is lost, the job is not
            earlier = []
        for attempt in earlier:
            if attempt["outcome"] == "running":
                attempt["outcome"], attempt["error"] = "killed", "it was killed, or its machine went down"
        self.content = {**job, "attempts": earlier}
        self.attempt: dict[str, Any] = {
            "began": now(), "outcome": "running", "host": platform.node(), "commit": git_commit(), "gpus": 0,
            "peak_gb": 0.0,
        }  # fmt: skip
        self.content["attempts"].append(self.attempt)
        self.began = time.monotonic()
        self.write()

    def write(self) -> None:
        """Write it; called again while the job runs, so that a killed one has its time."""
        self.attempt["seconds"] = round(time.monotonic() - self.began, 2)
        write_json(self.path, self.content)

    def end(self, error: str, peak_gb: float) -> None:
        """Write how it ended."""
        self.attempt.update({"finished": now(), "peak_gb": round(peak_gb, 3), "outcome": "failed" if error else "done"})
        if error:
            self.attempt["error"] = error
        self.write()


class Watch(MemoryWatch):
    """Watches memory, and writes the time so far into the record, so that a killed job has it."""

    def __init__(self, note: Path, record: Record, every_s: float = 30.0) -> None:
        super().__init__(note)
        self.record, self.every_s, self.written = record, every_s, time.monotonic()

    def sample(self) -> None:
        super().sample()
        if self.record.attempt["outcome"] == "running" and time.monotonic() - self.written > self.every_s:
            self.written = time.monotonic()
            self.record.attempt["peak_gb"] = round(self.peak_bytes / 1e9, 3)
            with contextlib.suppress(OSError, InputError):  # a full disk is reported by whoever writes results
                self.record.write()


def run_command(command: list[str], root: Path, log: Path, visible: list[int]) -> None:
    """Run a command, what it says to ``log``.

    Raises:
        InputError: it failed; the message ends with its last words.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
    if visible:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
    with open(log, "a", encoding="utf-8") as handle:
        code = subprocess.run(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT,
            check=False,
        ).returncode  # fmt: skip
    if code:
        tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-500:]
        raise InputError(f"{' '.join(command[1:4])}: ended with exit code {code}, expected 0; {log} ends: {tail}")


def training_command(options: argparse.Namespace, processes: int) -> list[str]:
    """The command of a training, under accelerate when there are several GPUs."""
    command = [sys.executable, "-m"]
    if processes > 1:
        # Port 0: a free one, for two trainings on one machine.
        command += [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    command += ["difr3ct_core.training", "--stage", options.what, "--run", options.run, "--preset", options.preset]
    command += ["--data", options.data, "--seed", str(options.seed), "--device", options.device]
    if options.views:
        command += ["--views", options.views]
    return [*command, "--set", *options.set] if options.set else command


def do(options: argparse.Namespace, root: Path, record: Record, log: Path) -> None:
    """The job itself."""
    import torch

    total = torch.cuda.device_count() if options.gpus and options.device != "cpu" else 0
    locks = Path(tempfile.gettempdir()) / f"difr3ct-gpus-{os.getuid()}"
    with claimed_gpus(options.gpus, total, locks) as visible:
        record.attempt["gpus"] = min(options.gpus, total)
        record.write()
        if options.kind == "train":
            run_command(training_command(options, min(options.gpus, total)), root, log, visible)
        elif options.kind == "script":
            run_command([sys.executable, options.what, *options.rest], root, log, visible)
        else:
            parameters = {}
            for word in options.rest:
                name, equals, value = word.partition("=")
                if not equals:
                    raise InputError(f"parameters: found {word!r}, expected name=value.")
                parameters[name] = yaml.safe_load(value)
            if options.models:
                borrow_models(root / options.models, root / str(parameters["run"]))
            if visible:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, visible))
            run_notebook(root / options.what, root / options.executed, parameters, root, log.with_suffix(".step.json"))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["chapter", "train", "script"])
    parser.add_argument("what", help="notebook, stage or script")
    parser.add_argument("rest", nargs="*", help="of a chapter, name=value; of a script, its arguments after --")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--done", type=Path)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--executed", default="")
    parser.add_argument("--models", default="", help="run folder whose models the chapter uses")
    parser.add_argument("--run", default="")
    parser.add_argument("--preset", default="")
    parser.add_argument("--data", default="data")
    parser.add_argument("--views", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    # What stands behind -- belongs to the script, dashes and all.
    words = sys.argv[1:] if arguments is None else arguments
    own, behind = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_intermixed_args(own)
    options.rest += behind
    path, error = root / options.record, ""
    log = path.with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    end_orphans(path.with_suffix(".pids"))
    given = {"kind": options.kind, "what": options.what, "gpus_asked": options.gpus, "arguments": options.rest}
    if options.kind == "train":
        given |= {"preset": options.preset, "views": options.views, "seed": options.seed}
    try:
        record = Record(path, given)
        with Watch(path.with_suffix(".pids"), record) as memory:
            try:
                do(options, root, record, log)
            except InputError as failure:
                error = str(failure)
            except KeyboardInterrupt:
                error = "interrupted"
        record.end(error, memory.take_peak_gb())
        if not error and options.done:
            write_json(root / options.done, record.content)
    except InputError as failure:
        error = str(failure)
    if error:
        print(f"batch_job: {error}", file=sys.stderr)
    return 1 if error else 0


if __name__ == "__main__":
    sys.exit(main())
