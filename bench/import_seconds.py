"""Seconds that an import takes in a fresh process, the start of Python itself left out.

`import torch` is the floor under everything here. Median of five rounds in turning order, after one that fills the
page cache. There is no target: the rows tell what our own modules add to torch, and how that compares with the
libraries beside them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from bench.peers import python_for
from bench.report import ROOT, Row, run

ROUNDS = 5
TORCH, CORE, TRAIN = "import torch", "import ddpm_core", "import pipeline.train"
DIFFUSERS = "from diffusers import UNet2DModel, DDPMScheduler"
OTHERS = {
    "diffusers": DIFFUSERS,
    "diffusers_bare": "import diffusers",
    "mlflow": "import mlflow",
    "dvc": "import dvc.api",
}
CODE = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def time_import(statement: str, python: str) -> float:
    """Seconds for the statement in a new process."""
    command = [python, "-W", "ignore", "-c", CODE.format(statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure() -> list[Row]:
    """Our imports against torch alone and against the libraries beside us."""
    others = dict(OTHERS)
    pythons = {}
    try:
        pythons = dict.fromkeys((DIFFUSERS, OTHERS["diffusers_bare"]), python_for("diffusers"))
    except RuntimeError as error:
        others = {name: statement for name, statement in OTHERS.items() if not name.startswith("diffusers")}
        print(f"bench: left out: {error}", file=sys.stderr)
    statements = [TORCH, CORE, TRAIN, *others.values()]
    seconds: dict[str, list[float]] = {statement: [] for statement in statements}
    for round_ in range(-1, ROUNDS):
        for place in range(len(statements)):
            statement = statements[(round_ + place) % len(statements)]
            taken = time_import(statement, pythons.get(statement, sys.executable))
            if round_ >= 0:
                seconds[statement].append(taken)

    def row(bar: str, ours: str, peer: str) -> Row:
        spread = "; ".join(f"`{s}` {min(seconds[s]):.2f} to {max(seconds[s]):.2f} s" for s in (ours, peer))
        return Row(bar, statistics.median(seconds[ours]), statistics.median(seconds[peer]), peer, "s", note=spread)

    rows = [row("import_core", CORE, TORCH), row("import_train", TRAIN, TORCH)]
    return rows + [row(f"import_train_{name}", TRAIN, statement) for name, statement in others.items()]


if __name__ == "__main__":
    run(__file__, measure)
