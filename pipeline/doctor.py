"""What this machine has, and what would fail on it: `python -m pipeline.doctor`. Exit code 1 if something would."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import psutil

from pipeline import paths
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.machine import Machine, load_machine
from pipeline.sections import Params

T = TypeVar("T")
GIB = 2**30
LEAST_FREE_GIB = 1.0
MARKS = {True: "ok  ", False: "FAIL", None: "note"}


@dataclass(frozen=True)
class Finding:
    """One line: `good` is True, False for what would fail, None for what is only good to know."""

    good: bool | None
    text: str


def examine() -> Iterator[Finding]:
    """All findings, the basics first; a check that needs what failed before is left out."""
    version = platform.python_version()
    yield Finding(sys.version_info >= (3, 11), f"Python {version} at {sys.executable}")
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(None, f"{cores} cores, {memory.total / GIB:.1f} GiB memory ({memory.available / GIB:.1f} free)")
    yield from torch_findings()
    params = yield from attempt("params.yaml is valid", load_params)
    machine = yield from attempt("environment (PIPELINE_*) is valid", load_machine)
    if params is not None:
        yield raw_finding(params)
    if machine is not None:
        yield from state_findings(machine)
    yield from tool_findings()
    yield tracking_finding()
    yield weights_finding()


def attempt(text: str, action: Callable[[], T]) -> Generator[Finding, None, T | None]:
    """Run a check that says what is wrong by a UserError; its value, or None, is the generator's return value."""
    try:
        value = action()
    except UserError as error:
        yield Finding(False, str(error))
        return None
    yield Finding(True, text)
    return value


def torch_findings() -> Iterator[Finding]:
    """PyTorch and the devices it sees."""
    try:
        import torch
    except ImportError as error:
        yield Finding(False, f"torch can't be imported ({error}): run `make test` or `pip install -e .` again")
        return
    yield Finding(True, f"torch {torch.__version__}, distributed {'yes' if torch.distributed.is_available() else 'no'}")
    if not torch.cuda.is_available():
        yield Finding(None, "no CUDA device: training runs on the CPU")
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        yield Finding(None, "no C compiler, which torch.compile needs on a GPU: install one, or set PIPELINE_COMPILE=0")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bfloat16 = "with" if torch.cuda.is_bf16_supported(including_emulation=False) else "without"
        size = properties.total_memory / GIB
        yield Finding(True, f"CUDA device {number}: {properties.name}, {size:.0f} GiB, {bfloat16} bfloat16")


def raw_finding(params: Params) -> Finding:
    """The folder of raw images."""
    raw = Path(params.data.raw)
    if raw == paths.RAW:
        return Finding(True, f"data.raw is {raw}, which the fetch stage fills from `{params.fetch.source}`")
    if raw.suffix == ".txt" and raw.is_file():
        return Finding(True, f"data.raw is {raw}, a list of tars")
    if not raw.is_dir():
        return Finding(False, f"data.raw is {raw}, which is no folder: set it in params.yaml")
    return Finding(True, f"data.raw is {raw}, a folder of yours")


def state_findings(machine: Machine) -> Iterator[Finding]:
    """Where resume state goes, and room on the disk."""
    existing = next(p for p in (machine.state, *machine.state.absolute().parents) if p.exists())
    writable = os.access(existing, os.W_OK)
    yield Finding(writable, f"resume state goes to {machine.state.absolute()}" + ("" if writable else ": not writable"))
    free = shutil.disk_usage(existing).free / GIB
    yield Finding(
        free >= LEAST_FREE_GIB, f"{free:.1f} GiB free there" + ("" if free >= LEAST_FREE_GIB else ": too few")
    )


def tool_findings() -> Iterator[Finding]:
    """git and DVC."""
    for tool, remedy in (("git", "install git"), ("dvc", "use `make repro`, or activate .venv")):
        found = shutil.which(tool)
        yield Finding(bool(found), f"{tool} at {found}" if found else f"{tool} is not on PATH: {remedy}")
    inside = Path(".dvc").is_dir() and paths.DVC_YAML.is_file()
    yield Finding(
        inside, "this folder is the DVC project" if inside else "run from the repository's root, or `dvc init`"
    )


def tracking_finding() -> Finding:
    """Whether the tracking server that is asked for answers. Runs are kept and sent later where it doesn't."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return Finding(
            True, f"runs go to {'mlflow.db in this folder' if not address else parts.scheme + ':' + parts.path}"
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=3).close()
    except OSError as error:
        return Finding(None, f"tracking server {parts.hostname}:{port} is away ({error}): runs are kept and sent later")
    return Finding(True, f"tracking server {parts.hostname}:{port} answers")


def weights_finding() -> Finding:
    """The feature network's weights."""
    from pipeline.engine.lite0 import find_weights, load_weights

    try:
        load_weights(find_weights())
    except UserError as error:
        return Finding(False, str(error))
    return Finding(True, "weights of the feature network are there and are the right ones")


def main() -> int:
    """Print every finding; 1 if one would fail."""
    failed = 0
    for finding in examine():
        print(MARKS[finding.good], finding.text)
        failed += finding.good is False
    print(f"{failed} would fail" if failed else "nothing would fail")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
