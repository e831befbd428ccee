"""Rows, the machine in words, results files and the page made from them.

A benchmark is a module in bench/ with a function `measure() -> list[Row]`, closed by

    if __name__ == "__main__":
        run(__file__, measure)

`run` writes bench/results/NAME.json: a list of rows. `holds` is what was measured; no test asks it to be true.
"""

from __future__ import annotations

import ast
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.peers import NOT_RUN
from pipeline.runtime.files import load_json, save_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
HIGHER_IS_BETTER = {"images/s": True, "GFLOP/s": True, "s": False, "MB": False, "fair shares": False}
QUIET_LOAD = 0.5  # a core


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        bar: a short name that stays.
        ours, peer: medians, in `unit`.
        peer_name: with its version.
        unit: a key of `HIGHER_IS_BETTER`.
        target: the ratio asked for; None for a row that only informs.
        note: what a reader needs to judge the numbers.

    Example:
        >>> Row("import", ours=2.0, peer=3.0, peer_name="slow 1.0", unit="s", target=1.6).holds
        False
    """

    bar: str
    ours: float
    peer: float
    peer_name: str
    unit: str
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times better ours is, above 1 when it is: ours / peer for rates, peer / ours for times.

        Of the numbers as they are written, so that a reader finds the same.
        """
        ours, peer = _written(self.ours), _written(self.peer)
        return ours / peer if HIGHER_IS_BETTER[self.unit] else peer / ours

    @property
    def holds(self) -> bool | None:
        """Whether the ratio as written (three decimals) reaches the target; None without one."""
        return None if self.target is None else round(self.ratio, 3) >= self.target

    def to_json(self, machine: str) -> dict[str, Any]:
        """The row as it stands in a results file."""
        numbers = {"ours": _written(self.ours), "peer": _written(self.peer), "ratio": round(self.ratio, 3)}
        return {**asdict(self), **numbers, "holds": self.holds, "machine": machine}


def _written(number: float) -> float:
    return float(f"{number:.5g}")


def find_benchmarks() -> list[str]:
    """Names of the modules in bench/ that define `measure`, without importing them."""
    return sorted(
        path.stem
        for path in (ROOT / "bench").glob("*.py")
        if any(isinstance(n, ast.FunctionDef) and n.name == "measure" for n in ast.parse(path.read_text()).body)
    )


def run(file: str, measure: Callable[[], list[Row]]) -> None:
    """Measure, print and save the rows of one benchmark."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD * num_cores():
        print(f"bench: WARNING: load {load:.1f} on {num_cores()} cores: timings will be off", file=sys.stderr)
    before, began = _busy_seconds(), time.perf_counter()
    rows = measure()
    (busy, own), elapsed = _busy_seconds(), time.perf_counter() - began
    others = max(0.0, (busy - before[0]) - (own - before[1])) / (elapsed * (psutil.cpu_count() or 1))
    machine = describe_machine(load, others)
    table = [row.to_json(machine) for row in rows]
    save_json(RESULTS / f"{Path(file).stem}.json", table)
    print(make_table(table))
    print(machine)


def num_cores() -> int:
    """Cores this process may use: the number of threads of every side."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy_seconds() -> tuple[float, float]:
    """CPU seconds since the start of the whole machine (steal included), and of this process and its ended children."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user already
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times) - idle - guest, sum(u.ru_utime + u.ru_stime for u in usage)


def describe_machine(load: float, others: float) -> str:
    """The machine, its software and how quiet it was, in words."""
    from importlib.metadata import version

    busy = load > QUIET_LOAD * num_cores()
    commit = _git("rev-parse", "--short=10", "HEAD") or "unknown"
    return ", ".join(
        (
            _cpu_name(),
            f"{num_cores()} cores",
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            f"{platform.system()}, Python {platform.python_version()}",
            f"torch {version('torch')} on CPU with {num_cores()} threads",
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            f"commit {commit}{' with local changes' if _git('status', '--porcelain') else ''}",
            f"load {load:.2f} at the start{' (BUSY: more than 0.5 a core)' if busy else ''}",
            f"other processes took {others:.0%} of the CPU time while it ran",
        )
    )


def _cpu_name() -> str:
    if not Path("/proc/cpuinfo").exists():
        return platform.processor() or platform.machine()
    pairs = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(pairs)}
    vectors = max((f for f in facts.get("flags", "").split() if f in ("avx", "avx2", "avx512f")), key=len, default="")
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.machine())} ({family}, {vectors.upper() or 'no AVX'})"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def load_results() -> dict[str, list[dict[str, Any]]]:
    """Every results file by benchmark name."""
    return {path.stem: load_json(path) for path in sorted(RESULTS.glob("*.json"))}


def make_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = ["| bar | ours | peer | unit | against | ratio | target | holds |", "|---|--:|--:|---|---|--:|--:|---|"]
    verdict = {True: "yes", False: "**no**", None: "-"}
    for row in rows:
        target = "-" if row["target"] is None else f"{row['target']:g}"
        cells = (row["bar"], f"{row['ours']:.4g}", f"{row['peer']:.4g}", row["unit"], row["peer_name"],
                 f"{row['ratio']:.3f}", target, verdict[row["holds"]])  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_page() -> str:
    """docs/benchmarks.md from the results files and the benchmarks' docstrings."""
    parts = [
        "# Benchmarks",
        "Made by `make bench` from `bench/results/*.json`: don't edit. `python -m bench --docs` makes this page alone.",
        "`ratio` is how many times better ours is, above 1 when it is: ours / peer for rates, peer / ours for times. "
        "`holds` says whether it reached `target` in this run; a row without target only informs. All numbers of a "
        "table come from one run in which the sides took turns.",
    ]
    for name, rows in load_results().items():
        parts += [f"## {name}", ast.get_docstring(ast.parse((ROOT / "bench" / f"{name}.py").read_text())) or ""]
        parts.append(make_table(rows))
        parts.append("\n".join(f"- `{row['bar']}`: {row['note']}" for row in rows if row["note"]))
        parts += [f"Machine: {machine}." for machine in dict.fromkeys(row["machine"] for row in rows)]
    parts.append("## Peers that could not be run, and why")
    parts.append("\n".join(f"- **{name}**: {reason}" for name, reason in NOT_RUN.items()))
    return "\n\n".join(part for part in parts if part) + "\n"
