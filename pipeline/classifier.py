"""Stage: train the classifier of noisy images for classifier guidance. `python -m pipeline.classifier`.

Of the recipes that have a section `classifier` in their params.yaml, such as recipes/guided.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import classifier_loss
from pipeline import paths
from pipeline.build.networks import build_network, build_schedule, make_classifier_spec, place_network
from pipeline.build.training import (
    build_batches,
    build_learning_rate,
    build_precision,
    build_state,
    check_batch_size,
    count_steps,
    wants_compile,
)
from pipeline.config import load_params
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.order import SubsetOrder
from pipeline.engine.checkpoint import CheckpointFolder, save_model
from pipeline.engine.classify import accuracy_by_quarter, split_held_out
from pipeline.engine.loop import LoopPlan, Observers, train
from pipeline.engine.runs import describe_run
from pipeline.engine.state import TrainState
from pipeline.engine.step import StepPlan, TrainStep
from pipeline.lineage import source_sha256, stage_key
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import locked_folder, save_json
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import StopRequest, restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import Tracker, open_tracker
from pipeline.sections import ClassifierParams

log = logging.getLogger(__name__)


def main() -> None:
    """Train on all but the held-out images, or go on where an earlier start was stopped; then measure on those."""
    params, machine = load_params(), load_machine()
    restart_under_torchrun("pipeline.classifier", machine)
    stop = StopRequest()
    index = load_index(paths.SHARDS)
    spec = make_classifier_spec(params, index)
    config = params.classifier
    assert config is not None  # or there were no spec
    ids, held_out = split_held_out(index.num_images, config.held_out, config.seed)
    with start_topology(machine) as topology:
        dtype = build_precision(config.precision, topology.device, section="classifier")
        inputs = {"shards": index.sha256, "precision": str(dtype)}
        key = stage_key("pipeline.classifier", [params.schedule, config], inputs)
        checkpoints = CheckpointFolder(machine.state / "classifier" / key)
        with (
            locked_folder(checkpoints.root) if topology.is_main else nullcontext(),
            open_run(config, machine, topology, index, key) as tracker,
        ):
            step = make_step(config, machine, topology, spec, dtype)
            checkpoints.resume(step.state, topology, step.plan.section)
            run_loop(step, config, machine, topology, index, ids, checkpoints, tracker, stop)
            measured = held_out if len(held_out) else ids
            accuracy = accuracy_by_quarter(
                step.state.ema.network, step.schedule, index, measured, topology, seed=config.seed,
                batch_size=machine.sample_batch,
            )  # fmt: skip
            if topology.is_main:
                scores = {**accuracy, "num_images": len(measured), "held_out": bool(len(held_out))}
                lineage = {"train_key": key, "shard_index_sha256": index.sha256, "precision": inputs["precision"]}
                publish(step.state, spec, lineage, scores, tracker)
            topology.barrier()


def open_run(config: ClassifierParams, machine: Machine, topology: Topology, index: ShardIndex, key: str) -> Tracker:
    """The classifier's own MLflow run; silent on other ranks."""
    tags = {"shard_index_sha256": index.sha256, **describe_run(topology, "pipeline.classifier")}
    tracker = open_tracker(
        machine.state, key, run_name=f"classifier-{index.image_size}px-{key[:6]}", tags=tags,
        enabled=topology.is_main and machine.tracking,
    )  # fmt: skip
    tracker.log_params({f"classifier.{name}": value for name, value in config.model_dump(mode="json").items()})
    return tracker


def make_step(
    config: ClassifierParams, machine: Machine, topology: Topology, spec: dict[str, Any], dtype: torch.dtype
) -> TrainStep:
    """Network, average and optimizer on this rank's device, and the step that trains them."""
    check_batch_size(config, topology, section="classifier")
    device = topology.device
    network = place_network(build_network(spec, seed=config.seed), device, machine.channels_last)
    plan = StepPlan(
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch=machine.micro_batch or config.batch_size,
        null_label=len(spec["classes"]),
        label_dropout=0.0,
        horizontal_flip=config.horizontal_flip,
        max_grad_norm=config.max_grad_norm,
        dtype=dtype,
        learning_rate=build_learning_rate(config),
        loss=classifier_loss,
        section="classifier",
        compile=wants_compile(machine, device),
    )
    return TrainStep(plan, build_state(config, network, device), build_schedule(spec).to(device), topology)


def run_loop(
    step: TrainStep,
    config: ClassifierParams,
    machine: Machine,
    topology: Topology,
    index: ShardIndex,
    ids: NDArray[np.int64],
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    stop: StopRequest,
) -> None:
    """Feed the loop with batches of the images `ids` from where the state is to the last step."""
    order = SubsetOrder(ids, config.seed)
    batches = build_batches(config, machine, topology, [index], order, images_seen=step.state.images_seen)
    total = count_steps(config) * config.batch_size
    plan = LoopPlan(total, config.log_every_images, config.checkpoint_every_images, preview_every_images=total)
    observers = Observers(metrics=tracker.log_metrics, preview=lambda images_seen: None)
    train(step, batches, plan, checkpoints, observers, topology, lambda: stop.requested)


def publish(
    state: TrainState, spec: dict[str, Any], lineage: dict[str, Any], scores: dict[str, Any], tracker: Tracker
) -> None:
    """Write the stage's outputs: equal training gives equal bytes."""
    lineage = {**lineage, "code_sha256": source_sha256("pipeline.classifier"), "images_seen": state.images_seen}
    save_model(paths.CLASSIFIER, state.ema.network, spec, lineage)
    save_json(paths.CLASSIFIER_METRICS, {**scores, "loss": state.history[-1]["loss"]})
    numbers = {f"classifier/{name}": value for name, value in scores.items() if isinstance(value, float)}
    tracker.log_metrics(numbers, state.images_seen, replace=True)
    tracker.log_artifact(paths.CLASSIFIER_METRICS, "metrics")
    shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if isinstance(value, float))
    log.info("classifier: done, %s images, %s on %s images, peak memory %.2f GiB a process",
             f"{state.images_seen:,}", shown, f"{scores['num_images']:,}", peak_memory_gib())  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
