"""Many independent jobs over the cores of one machine: one process a core, one thread each."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

J = TypeVar("J")
R = TypeVar("R")


def start_worker() -> None:
    """Initialiser of a worker: one thread, and an end when the parent ends."""
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    # A killed parent would leave its workers waiting for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()


def run_jobs(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[J, R | None]]:
    """Every job with its result, as they finish.

    If the system kills a worker (for memory, say), what is left is done one at a time, so that the culprit is known:
    its result is None.

    Args:
        function: of a module, so that another process finds it; it must not raise.
        jobs: its arguments; they must differ.
        workers: processes; 1 for none beside this one.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: how sums are rounded depends on it
        try:
            yield from ((job, function(job)) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    # "spawn": forking a process that already runs torch threads can hang.
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    while waiting:
        count = min(workers, len(waiting))
        try:
            with ProcessPoolExecutor(count, mp_context=context, initializer=start_worker) as pool:
                futures = {pool.submit(function, job): job for job in waiting}
                try:
                    for future in as_completed(futures):
                        result = future.result()
                        waiting.remove(futures[future])
                        yield futures[future], result
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool:
            if count == 1:
                yield waiting.pop(0), None
            workers = 1
