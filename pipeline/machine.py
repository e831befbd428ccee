"""What this machine offers a run: processes, threads, micro-batch, folders. Speed, never results.

Everything here comes from the environment, so that moving to another machine leaves params.yaml, and with it every
DVC stage, as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

VARIABLES = {
    "PIPELINE_DEVICE": "cpu, cuda or auto (default auto: cuda if there is one)",
    "PIPELINE_PROCESSES": "training and sampling processes on this node (default: one a GPU, else 1)",
    "PIPELINE_THREADS": "CPU threads a process (default: the cores this process may use, shared out)",
    "PIPELINE_MICRO_BATCH": "images a forward pass in training (default: the whole share of a process)",
    "PIPELINE_SAMPLE_BATCH": "images a forward pass in sampling and feature extraction (default 100)",
    "PIPELINE_WORKERS": "loader processes beside each training process (default 0 on CPU, 2 on CUDA)",
    "PIPELINE_COMPILE": "1 or 0: torch.compile (default: only on CUDA)",
    "PIPELINE_CHANNELS_LAST": "1 or 0: convolutions with the channels last in memory (default: only on CUDA)",
    "PIPELINE_ACTIVATION_CHECKPOINTING": "1 or 0: train in less memory, computing activations twice (default 0)",
    "PIPELINE_FEATURES": "torch, onnx or auto: what runs feature networks on a CPU (default auto: onnx if installed)",
    "PIPELINE_TRACKING": "1 or 0: write runs to MLflow (default 1)",
    "PIPELINE_SHARD_PROCESSES": "processes that check and pack images (default: the cores this process may use)",
    "PIPELINE_SHARD_WORKER": "K/N: do the K-th of N parts of sharding, K from 0; see docs/sharding.md (default: all)",
    "PIPELINE_STATE": "folder for resume state and what the tracker could not send yet (default .state)",
}


@dataclass(frozen=True)
class Machine:
    """Settings as asked for; `None` means: decide where torch is at hand."""

    device: str
    processes: int | None
    threads: int | None
    micro_batch: int | None
    sample_batch: int
    workers: int | None
    compile: bool | None
    channels_last: bool | None
    activation_checkpointing: bool
    features: str
    tracking: bool
    state: Path
    shard_processes: int | None = None
    shard_worker: tuple[int, int] | None = None


def load_machine(environment: Mapping[str, str] | None = None) -> Machine:
    """Read the `PIPELINE_*` variables.

    Raises:
        UserError: a value is not allowed, or a variable is unknown (a typing slip would otherwise change nothing).
    """
    given = {k: v for k, v in (os.environ if environment is None else environment).items() if k.startswith("PIPELINE_")}
    if unknown := sorted(set(given) - set(VARIABLES)):
        raise UserError(f"environment: {', '.join(unknown)} is unknown; known: {', '.join(VARIABLES)}")

    def count(name: str, least: int) -> int | None:
        text = given.get(name, "")
        if text == "":
            return None
        if not text.isdecimal() or int(text) < least:
            raise UserError(f"environment: {name} is {text!r}, expected a whole number of at least {least}")
        return int(text)

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
        text = given.get(name, "") or default
        if text not in allowed:
            raise UserError(f"environment: {name} is {text!r}, expected one of {', '.join(allowed)}")
        return text

    def switch(name: str) -> bool | None:
        return {"0": False, "1": True, "auto": None}[choice(name, "auto", ("0", "1", "auto"))]

    def part(name: str) -> tuple[int, int] | None:
        text = given.get(name, "")
        if text == "":
            return None
        number, _, parts = text.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise UserError(f"environment: {name} is {text!r}, expected K/N with K from 0 to N - 1, such as 0/4")
        return int(number), int(parts)

    return Machine(
        device=choice("PIPELINE_DEVICE", "auto", ("auto", "cpu", "cuda")),
        processes=count("PIPELINE_PROCESSES", 1),
        threads=count("PIPELINE_THREADS", 1),
        micro_batch=count("PIPELINE_MICRO_BATCH", 1),
        sample_batch=count("PIPELINE_SAMPLE_BATCH", 1) or 100,
        workers=count("PIPELINE_WORKERS", 0),
        compile=switch("PIPELINE_COMPILE"),
        channels_last=switch("PIPELINE_CHANNELS_LAST"),
        activation_checkpointing=choice("PIPELINE_ACTIVATION_CHECKPOINTING", "0", ("0", "1")) == "1",
        features=choice("PIPELINE_FEATURES", "auto", ("torch", "onnx", "auto")),
        tracking=choice("PIPELINE_TRACKING", "1", ("0", "1")) == "1",
        state=Path(given.get("PIPELINE_STATE", "") or ".state"),
        shard_processes=count("PIPELINE_SHARD_PROCESSES", 1),
        shard_worker=part("PIPELINE_SHARD_WORKER"),
    )
