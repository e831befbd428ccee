"""The training loop: steps, and what happens between them."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.data.loader import Batch
from pipeline.engine.checkpoint import CheckpointFolder
from pipeline.engine.state import TrainState
from pipeline.engine.step import OptimizerStep
from pipeline.errors import Stopped, UserError
from pipeline.runtime.files import save_text
from pipeline.runtime.topology import Topology

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopPlan:
    """When things happen, in images seen.

    Args:
        total_images: the end; a multiple of the batch size.
        log_every_images, checkpoint_every_images, preview_every_images: intervals.
    """

    total_images: int
    log_every_images: int
    checkpoint_every_images: int
    preview_every_images: int


@dataclass(frozen=True)
class Observers:
    """What the loop tells the world, on the main rank.

    Args:
        metrics: called with values by name and the images seen.
        preview: called with the images seen.
    """

    metrics: Callable[[dict[str, float], int], None]
    preview: Callable[[int], None]


def train(
    step: OptimizerStep,
    batches: Iterator[Batch],
    plan: LoopPlan,
    checkpoints: CheckpointFolder,
    observers: Observers,
    topology: Topology,
    stop_requested: Callable[[], bool],
) -> None:
    """Train to the end, or until a stop is asked for.

    Raises:
        Stopped: a rank was asked to stop; the state is saved.
        UserError: the loss is no longer finite; the last checkpoint stands.
    """
    state, name = step.state, step.plan.section
    started, first = time.monotonic(), state.images_seen
    window = (started, first)

    def due(every: int) -> bool:
        before = state.images_seen - step.plan.batch_size
        return state.images_seen // every > before // every or state.images_seen >= plan.total_images

    hidden = None if topology.is_main else True
    with tqdm(total=plan.total_images, initial=first, unit="img", disable=hidden, desc=name) as bar:
        for batch in batches:
            step(batch)
            bar.update(step.plan.batch_size)
            if due(plan.log_every_images):
                row = _log_row(state, step, topology)
                now = time.monotonic()
                speed = (state.images_seen - window[1]) / (now - window[0])
                window = (now, state.images_seen)
                bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                if topology.is_main:
                    named = {f"{name}/{key}": value for key, value in row.items() if key != "images"}
                    observers.metrics({**named, f"{name}/images_per_second": speed}, state.images_seen)
            stopping = topology.agree_to_stop(stop_requested())
            if stopping or due(plan.checkpoint_every_images):
                _save(step, checkpoints, topology)
                if bar.disable and topology.is_main:  # no terminal: one line a checkpoint
                    speed_overall = (state.images_seen - first) / (time.monotonic() - started)
                    log.info("%s: %s of %s images, %.0f images/s", name, f"{state.images_seen:,}",
                             f"{plan.total_images:,}", speed_overall)  # fmt: skip
            if topology.is_main and due(plan.preview_every_images):
                observers.preview(state.images_seen)
            if stopping and state.images_seen < plan.total_images:
                topology.barrier()  # a rank that leaves while another saves would have it killed
                raise Stopped(
                    f"at {state.images_seen:,} of {plan.total_images:,} images, saved in {checkpoints.root}; "
                    "run the same command to go on"
                )


def _log_row(state: TrainState, step: OptimizerStep, topology: Topology) -> dict[str, float]:
    """Close a row of the loss curve: means since the last one, over all ranks. The one place that waits for the
    device."""
    section = step.plan.section
    images = state.images_seen - (int(state.history[-1]["images"]) if state.history else 0)
    sums = topology.sum_(state.sums).tolist()
    state.sums.zero_()
    row = state.means(sums, images, images / step.plan.batch_size)
    if not all(math.isfinite(value) for value in row.values()):
        raise UserError(
            f"the loss is not finite at {state.images_seen:,} images ({row}); the last checkpoint stands: "
            f"lower {section}.learning_rate or {section}.max_grad_norm, or set {section}.precision to float32"
        )
    row = {"images": state.images_seen, **row, "learning_rate": step.plan.learning_rate(state.images_seen)}
    state.history.append(row)
    return row


def save_curve(path: Path, state: TrainState) -> None:
    """The loss curve as a table, one row a log."""
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=state.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(state.history)
    save_text(path, table.getvalue())


def _save(step: OptimizerStep, checkpoints: CheckpointFolder, topology: Topology) -> None:
    state = step.state
    topology.sum_(state.sums)
    if not bool(torch.isfinite(state.sums).all()):
        raise UserError(
            f"the loss is not finite before {state.images_seen:,} images: lower {step.plan.section}.learning_rate"
        )
    if topology.is_main:
        checkpoints.save(state)
    else:
        state.sums.zero_()
