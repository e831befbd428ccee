"""One function over many tasks in several processes. The function and its tasks must not depend on who runs them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int, *, variable: str
) -> Iterator[Result]:
    """The results as they come, in no order that a caller may rely on.

    New processes are forked from a clean one that has imported the main module, not from this one, whose threads they
    would inherit; so the second call starts at once. They end with this one, however it ends. A closed iterator starts
    no more tasks. With one process or one task all runs here.

    Args:
        function: of a module, so that it can be imported by name.
        tasks: at most two a process are on their way at a time.
        processes: how many.
        variable: the setting of their number, for the message below.

    Raises:
        UserError: a process was killed, as the kernel does when memory runs out.
        Exception: what `function` raises.
    """
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from map(function, tasks)
        return
    rest = iter(tasks)
    waiting: set[Future[Result]] = set()
    with _one_thread_each():
        pool = ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"), _end_with_parent)
        try:
            while True:
                while len(waiting) < 2 * processes and (task := next(rest, None)) is not None:
                    waiting.add(pool.submit(function, task))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"a worker process was ended from outside, perhaps for want of memory: set {variable} to fewer than "
                f"{processes} and run again; what is finished is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In the new process: leave Ctrl-C to the one that asked for it, and end when that does, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside use one OpenMP thread: more would only wait for one another."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
