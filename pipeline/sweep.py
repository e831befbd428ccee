"""Score models and checkpoints straight from the sampler, nothing stored: `python -m pipeline.sweep --help`. No stage.

`make eval CKPT=... STEPS=5,10,25 SAMPLER=ddim,heun` scores every combination, keeps each in PIPELINE_STATE and writes
one table and one picture (docs/evaluate.md).
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.sources import open_shards
from pipeline.engine.candidates import AVERAGE, Candidate, as_fetched, find_candidates
from pipeline.engine.reference import load_reference
from pipeline.engine.runs import describe_run
from pipeline.engine.sweep_report import Scored, log_point, log_sweep, write_report
from pipeline.engine.sweeps import AXES, GridPoint, make_grid, parse_axis, parse_ema, varying
from pipeline.errors import UserError
from pipeline.lineage import KEY_LENGTH
from pipeline.loading import weight_hashes
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import load_json, locked_folder, save_json, sha256_json
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import StopRequest, restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import Tracker, open_tracker
from pipeline.scoring import Scorer, Target, check_images, point_key

log = logging.getLogger(__name__)
_NAMES = {
    "CKPT": "models, checkpoints, patterns of them, models:/NAME@best; A=PLACE calls one A (default: model)",
    "EMA": "average | network (of checkpoints, as trained) | the average's half-life in images (default: average)",
    "SAMPLER": "ddim | ddpm | dpm_solver | heun",
    "STEPS": "of the sampler",
    "SPACING": "of the steps: trailing | leading | linspace | quad | logsnr",
    "ETA": "of ddim: 0 is deterministic, 1 ancestral",
    "GUIDANCE": "classifier-free; 1 is none",
    "N": "samples, at least 2",
    "SEED": "of the samples; with several the picture has bars",
    "NAME": f"of the folder in {paths.SWEEPS}/ (default: what varies, and a hash)",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m pipeline.sweep --help")


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], bool]:
    """The command line: what was asked for by name, and whether to score again what is kept.

    Raises:
        UserError: a word is no NAME=VALUE, or the name is unknown.

    Example:
        >>> parse(["STEPS=5,10", "--again"])
        ({'STEPS': '5,10'}, True)
    """
    listed = "\n".join(f"  {name:10}{text}" for name, text in _NAMES.items())
    parser = _Parser(
        prog="python -m pipeline.sweep", usage="%(prog)s [NAME=VALUE[,VALUE...] ...] [--again]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\nNames, each with one value or more by comma; others are as in params.yaml:\n{listed}",
    )  # fmt: skip
    parser.add_argument("words", nargs="*", metavar="NAME=VALUE", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="score also what is kept from an earlier start")
    args, asked = parser.parse_args(arguments), {}
    for word in args.words:
        name, equals, value = word.partition("=")
        if not equals or name not in _NAMES:
            raise UserError(f"{word!r} is unknown; expected NAME=VALUE with a name of {', '.join(_NAMES)}")
        if value:
            asked[name] = value
    name = asked.get("NAME", "sweep")
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"NAME is {name!r}, expected the name of a folder, which is made in {paths.SWEEPS}/")
    return asked, args.again


def main() -> None:
    """Check everything that was asked for, then score point by point; what an earlier start has scored is kept."""
    (asked, again), params, machine = parse(sys.argv[1:]), load_params(), load_machine()
    candidates = find_candidates(asked.get("CKPT", paths.MODEL.as_posix()), machine.state)
    axes = {name: parse_axis(name, asked[name]) for name in AXES if name in asked}
    grid = make_grid(candidates, parse_ema(asked.get("EMA", AVERAGE)), params.sample, axes)
    real, source = open_shards(paths.SHARDS, machine.shards, ShardCache(machine.cache, machine.cache_bytes))
    check_images(candidates, real)
    target = Target(load_reference(paths.REFERENCE, real), real, source, params.evaluate)
    words = [f"{name}={value}" for name, value in {**asked, "CKPT": as_fetched(candidates)}.items()]
    restart_under_torchrun("pipeline.sweep", machine, [*words, *["--again"] * again])
    stop = StopRequest()
    points: dict[str, GridPoint] = {}
    for point in grid:
        points.setdefault(point_key(point, target), point)
    key = sha256_json([asked.get("NAME"), sorted(points)])[:KEY_LENGTH]
    name = asked.get("NAME") or "-".join([*(varying([point.settings() for point in grid]) or ["point"]), key[:6]])
    with (
        start_topology(machine) as topology,
        locked_folder(machine.state / "sweep" / key) if topology.is_main else nullcontext(),
        open_sweep_run(name, key, candidates, machine, topology) as tracker,
    ):
        if topology.is_main and len(points) < len(grid):
            log.info("sweep: %d points for %d: some are of equal weights and settings", len(points), len(grid))
        scorer = Scorer(target, machine, topology, stop)
        results = score_points(points, scorer, machine.state / "sweep", tracker, again=again)
        if topology.is_main:
            publish(name, results, target, tracker)
        topology.barrier()


def open_sweep_run(
    name: str, key: str, candidates: Sequence[Candidate], machine: Machine, topology: Topology
) -> Tracker:
    """The sweep's run in MLflow, below that of the training if all candidates are of one."""
    keys = {one.train_key for one in candidates}
    return open_tracker(
        machine.state, key, run_name=f"sweep-{name}", tags=describe_run(topology, "pipeline.sweep"),
        key_tag="sweep_key", parent_key=keys.pop() if len(keys) == 1 else None,
        enabled=topology.is_main and machine.tracking,
    )  # fmt: skip


def score_points(
    points: Mapping[str, GridPoint], scorer: Scorer, folder: Path, tracker: Tracker, *, again: bool
) -> list[Scored]:
    """Every point, from the folder where an earlier start has scored it; complete on the main rank.

    Args:
        points: key -> point.
        scorer: scores one, on all ranks.
        folder: of `KEY.json`, one a point, and of what is there of unfinished ones.
        tracker: told of each.
        again: score also what is kept.
    """
    topology, results = scorer.topology, []
    for number, (key, point) in enumerate(points.items(), start=1):
        kept = load_kept(folder / f"{key}.json") if topology.is_main and not again else None
        topology.barrier()
        if not topology.from_main(int(kept is not None)):
            unfinished = folder / f"{key}-{scorer.machine.sample_batch}"
            result = scorer(point, unfinished, f"{number} of {len(points)}")
            if topology.is_main:
                hashes = weight_hashes(point.candidate, point.ema, point.sample)
                save_json(folder / f"{key}.json", {**result, "hashes": hashes})
                shutil.rmtree(unfinished, ignore_errors=True)
        if topology.is_main:
            one = Scored(key, point, **(kept or load_json(folder / f"{key}.json")))
            results.append(one)
            log_point(tracker, one)
            done = f"{number} of {len(points)}{' (kept)' if kept else ''}"
            log.info("sweep: %s, %s", done, one.summary(scorer.target.headline))
    return results


def load_kept(path: Path) -> dict[str, Any] | None:
    """What an earlier start found; None if there is nothing that can be used."""
    try:
        content: dict[str, Any] = load_json(path)
        return content
    except (OSError, ValueError):
        return None


def publish(name: str, results: Sequence[Scored], target: Target, tracker: Tracker) -> None:
    """Write the folder, send it to MLflow, and print the table."""
    folder, command = paths.SWEEPS / name, " ".join(["python -m pipeline.sweep", *map(shlex.quote, sys.argv[1:])])
    table = write_report(folder, results, target.headline, target.reference.description, command)
    log_sweep(tracker, folder, results, target.headline)
    print(f"\n{table}\n", flush=True)
    log.info("sweep: done, %d points, in %s; peak memory %.2f GiB a process", len(results), folder, peak_memory_gib())


if __name__ == "__main__":
    run_stage(main)
