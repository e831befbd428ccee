"""Stage: exact bits per dimension of training and held-out images. `python -m pipeline.likelihood`.

Off by default (`likelihood.images: 0`), as it takes one network call for each of the schedule's steps and batch: it
then writes that nothing was measured. The gap between the two sets is the alarm for memorisation.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping
from typing import Any

from pipeline import paths
from pipeline.build.networks import build_network, build_schedule
from pipeline.config import load_params
from pipeline.data.index import ShardIndex, load_index
from pipeline.engine.checkpoint import load_model_spec, load_weights
from pipeline.engine.likelihood import Likelihood, measure_likelihood, spread_ids
from pipeline.errors import UserError
from pipeline.lineage import provenance
from pipeline.machine import load_machine
from pipeline.runtime.files import save_json, save_text, whole_folder
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import open_tracker
from pipeline.sections import LikelihoodParams

log = logging.getLogger(__name__)
SETS = ("train", "held_out")


def main() -> None:
    """Measure both sets over all ranks; written as metrics, a curve and a table, and to the model's run."""
    params, machine = load_params().likelihood, load_machine()
    if params.images == 0:
        publish({}, {"images": 0, **summary({}), "train_key": None})
        log.info("likelihood: not asked for (params.yaml: likelihood.images is 0)")
        return
    restart_under_torchrun("pipeline.likelihood", machine)
    spec = load_model_spec(paths.MODEL)
    sets = {"train": load_index(paths.SHARDS)}
    if paths.HELD_OUT.exists():
        sets["held_out"] = load_index(paths.HELD_OUT)
    with start_topology(machine) as topology:
        found = measure(params, spec, sets, topology, machine.sample_batch)
        if not topology.is_main:
            return
    lineage = spec["lineage"]
    scores = {"images": params.images, **summary(found), "train_key": lineage["train_key"]}
    publish(found, scores)
    tags = {f"likelihood.{name}": value for name, value in {**provenance(), "images": str(params.images)}.items()}
    with open_tracker(
        machine.state, lineage["train_key"], run_name="likelihood", tags=tags, enabled=machine.tracking
    ) as tracker:
        numbers = {f"likelihood/{k}": float(v) for k, v in summary(found).items() if v is not None}
        tracker.log_metrics(numbers, int(lineage["images_seen"]), replace=True)
        tracker.log_artifact(paths.LIKELIHOOD_METRICS, "metrics")
        tracker.log_artifact(paths.LIKELIHOOD_CURVE, "plots")
    shown = ", ".join(f"{k} {v:.4g}" for k, v in summary(found).items() if v is not None)
    log.info("likelihood: %s; peak memory %.2f GiB a process", shown, peak_memory_gib())


def measure(
    params: LikelihoodParams, spec: dict[str, Any], sets: Mapping[str, ShardIndex], topology: Topology, batch_size: int
) -> dict[str, Likelihood]:
    """The likelihood of each set under the trained model.

    Raises:
        UserError: the model is not one of these images, or needs more than their classes.
    """
    wanted = spec["network"]
    for name, index in sets.items():
        if (wanted["channels"], wanted["image_size"]) != (index.channels, index.image_size):
            raise UserError(
                f"{index.folder}: images of {index.channels} x {index.image_size} px, but the model is one of "
                f"{wanted['channels']} x {wanted['image_size']} px: bits per dimension of {name} are not defined"
            )
    if wanted.get("context_channels"):
        raise UserError("params.yaml: likelihood.images must be 0 for a model that needs context channels")
    network = build_network(spec)
    load_weights(paths.MODEL, network)
    network.to(topology.device).eval().requires_grad_(False)
    schedule = build_schedule(spec).to(topology.device)
    return {
        name: measure_likelihood(
            network, schedule, index, spread_ids(index.num_images, params.images), topology, seed=params.seed,
            set_number=SETS.index(name), batch_size=batch_size, parameterization=spec["parameterization"],
            learned_variance=bool(wanted.get("learned_variance")), label=f"likelihood {name}",
        )
        for name, index in sets.items()
    }  # fmt: skip


def summary(found: Mapping[str, Likelihood]) -> dict[str, float | int | None]:
    """Means, their standard errors and the gap; None for what was not measured."""
    scores: dict[str, float | int | None] = {}
    for name in SETS:
        one = found.get(name)
        scores[f"bits_per_dim_{name}"] = one.bits_per_dim if one else None
        scores[f"standard_error_{name}"] = one.standard_error if one else None
        scores[f"num_{name}"] = len(one.ids) if one else None
    both = [found[name] for name in SETS if name in found]
    scores["gap"] = both[1].bits_per_dim - both[0].bits_per_dim if len(both) == 2 else None
    errors = [one.standard_error for one in both if one.standard_error is not None]
    scores["standard_error_gap"] = float(sum(e**2 for e in errors) ** 0.5) if len(errors) == 2 else None
    return scores


def publish(found: Mapping[str, Likelihood], scores: dict[str, Any]) -> None:
    """Write the metrics, the terms of each step and the bits of each image."""
    steps = len(found["train"].terms) if found else 0
    # A set that is not there is "nan": a plot takes an empty cell for 0.
    curve = [[step, *(found[name].terms[step] if name in found else "nan" for name in SETS)] for step in range(steps)]
    images = [
        [name, number, total, prior]
        for name, one in found.items()
        for number, total, prior in zip(one.ids, one.total, one.prior, strict=True)
    ]
    with whole_folder(paths.LIKELIHOOD) as aside:
        save_text(aside / "images.csv", _table(["set", "image", "bits_per_dim", "prior"], images))
    save_text(paths.LIKELIHOOD_CURVE, _table(["t", *SETS], curve))
    save_json(paths.LIKELIHOOD_METRICS, scores)


def _table(header: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


if __name__ == "__main__":
    run_stage(main)
