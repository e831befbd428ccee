"""How a stage starts, stops, and ends together with the DVC that started it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from pipeline.errors import Stopped, UserError
from pipeline.machine import Machine

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved, run the same command again
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def run_stage(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` as a program: one-line errors, documented exit codes, no life after DVC's.

    Exit codes: 0 done, 2 a :class:`UserError`, 75 stopped and resumable, 130 interrupted before anything was worth
    saving; a traceback and 1 are a bug of ours.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank not in (None, "0") else ""
    end_with_dvc()
    try:
        main()
    except UserError as error:
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except Stopped as error:
        if not prefix:
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_STOPPED)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which not every stage imports
            raise
        print(f"{prefix}error: out of GPU memory ({error}): set PIPELINE_MICRO_BATCH (training) or "
              "PIPELINE_SAMPLE_BATCH (sampling, features) to fewer images", file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(EXIT_USER_ERROR)
    sys.exit(0)


def end_with_dvc() -> None:
    """Under DVC or torchrun: arrange for SIGTERM to this process when its parent, or the `dvc` above it, is gone.

    DVC leaves its child running when it is killed itself, and a second `dvc repro` would then train on the same state.
    The kernel's parent-death signal covers a direct child; a shell or torchrun may sit between, so a thread watches
    the `dvc` process too.
    """
    under_dvc = "DVC_STAGE" in os.environ
    # A stage that a person started by hand may outlive the shell it was started from (nohup).
    if sys.platform == "linux" and (under_dvc or "RANK" in os.environ):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if not under_dvc:
        return
    dvc = next((p for p in psutil.Process().parents() if _is_dvc(p)), None)
    if dvc is None:
        return

    def watch() -> None:
        while dvc.is_running() and dvc.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-dvc", daemon=True).start()


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(Path(word).name == "dvc" for word in process.cmdline()[:4])
    except psutil.Error:
        return False


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads.

    A second Ctrl-C acts at once. A second SIGTERM doesn't: the kernel, torchrun and the watcher of DVC may each send
    one for the same end, and none may cut short the saving that the first one asked for.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


def restart_under_torchrun(module: str, machine: Machine, arguments: Sequence[str] = ()) -> None:
    """Replace this process by torchrun when the machine calls for several processes; else return.

    Args:
        module: the stage, as in `python -m MODULE`.
        machine: says how many processes; by default one a GPU.
        arguments: of its command line.
    """
    if "RANK" in os.environ:
        return
    processes = machine.processes
    if processes is None:
        import torch  # slow to import, and of no use to the stages before training

        processes = max(1, torch.cuda.device_count()) if machine.device != "cpu" else 1
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        os.execv(sys.executable, [*command, "-m", module, *arguments])
