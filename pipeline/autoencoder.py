"""Stage: train the first stage of latent diffusion on the shards. `python -m pipeline.autoencoder`, or the same under
torchrun."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from ddpm_core import EMA, KLAutoencoder, first_stage_loss
from pipeline import paths
from pipeline.build.training import (
    build_batches,
    build_learning_rate,
    build_optimizer,
    build_precision,
    check_batch_size,
    count_steps,
    wants_compile,
)
from pipeline.config import load_params
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.order import RandomOrder
from pipeline.data.pixels import make_grid
from pipeline.data.store import ShardStore
from pipeline.engine.autoencoder import LOGGED, Adversary, AutoencoderPlan, AutoencoderState, AutoencoderStep
from pipeline.engine.checkpoint import CheckpointFolder, save_model
from pipeline.engine.latents import FirstStage, interleave
from pipeline.engine.loop import LoopPlan, Observers, save_curve, train
from pipeline.engine.perceptual import PerceptualFeatures
from pipeline.engine.runs import describe_run
from pipeline.errors import UserError
from pipeline.first_stage import build_autoencoder, build_discriminator, make_autoencoder_spec
from pipeline.lineage import source_sha256, stage_key
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import locked_folder, save_json
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import StopRequest, restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import Tracker, open_tracker
from pipeline.sections import AutoencoderParams

log = logging.getLogger(__name__)
PREVIEW_IMAGES = 40
COLUMNS = 10


def main() -> None:
    """Train, or go on where an earlier start with the same result was stopped."""
    params, machine = load_params().autoencoder, load_machine()
    if params is None:
        raise UserError("params.yaml has no section `autoencoder`, so there is no first stage: see recipes/latent")
    restart_under_torchrun("pipeline.autoencoder", machine)
    stop = StopRequest()
    index = load_index(paths.SHARDS)
    spec = make_autoencoder_spec(params, index)
    with start_topology(machine) as topology:
        dtype = build_precision(params.precision, topology.device, section="autoencoder")
        lineage = make_lineage(params, index, dtype)
        checkpoints = CheckpointFolder(machine.state / "autoencoder" / lineage["train_key"])
        with (
            locked_folder(checkpoints.root) if topology.is_main else nullcontext(),
            open_run(params, machine, topology, index, lineage) as tracker,
        ):
            step = make_step(params, machine, topology, index, spec, dtype)
            checkpoints.resume(step.state, topology, step.plan.section)
            run_loop(step, params, machine, topology, index, checkpoints, tracker, stop)
            if topology.is_main:
                publish(step.state, spec, lineage, tracker)
            topology.barrier()


def make_lineage(params: AutoencoderParams, index: ShardIndex, dtype: torch.dtype) -> dict[str, Any]:
    """Where the first stage comes from; its `train_key` names the resume state and the MLflow run."""
    precision = str(dtype).removeprefix("torch.")
    inputs = {"shards": index.sha256, "precision": precision}
    return {
        "train_key": stage_key("pipeline.autoencoder", [params], inputs),
        "precision": precision,
        "shard_index_sha256": index.sha256,
        "code_sha256": source_sha256("pipeline.autoencoder"),
        "autoencoder": params.model_dump(mode="json"),
    }


def open_run(
    params: AutoencoderParams, machine: Machine, topology: Topology, index: ShardIndex, lineage: dict[str, Any]
) -> Tracker:
    """The first stage's MLflow run; silent on other ranks."""
    tracker = open_tracker(
        machine.state,
        lineage["train_key"],
        run_name=f"first-stage-f{params.factor}-{index.image_size}px-{lineage['train_key'][:6]}",
        tags={
            "shard_index_sha256": index.sha256,
            "precision": lineage["precision"],
            **describe_run(topology, "pipeline.autoencoder"),
        },
        enabled=topology.is_main and machine.tracking,
    )
    tracker.log_params({f"autoencoder.{key}": value for key, value in params.model_dump(mode="json").items()})
    tracker.log_params({"data.num_images": index.num_images, "data.image_size": index.image_size})
    return tracker


def make_step(
    params: AutoencoderParams,
    machine: Machine,
    topology: Topology,
    index: ShardIndex,
    spec: dict[str, Any],
    dtype: torch.dtype,
) -> AutoencoderStep:
    """Networks, average and optimizers on this rank's device, and the step that trains them."""
    check_batch_size(params, topology, section="autoencoder")
    device = topology.device
    network = build_autoencoder(spec, seed=params.seed).to(device)
    adversary = None
    if params.adversarial_weight > 0:
        critic = build_discriminator(params, index).to(device)
        adversary = Adversary(critic, build_optimizer(params, critic))
    state = AutoencoderState(
        network, EMA(network, params.ema_half_life_images), build_optimizer(params, network),
        sums=torch.zeros(len(LOGGED), dtype=torch.float64, device=device), adversary=adversary,
    )  # fmt: skip
    plan = AutoencoderPlan(
        seed=params.seed,
        batch_size=params.batch_size,
        micro_batch=machine.micro_batch or params.batch_size,
        max_grad_norm=params.max_grad_norm,
        dtype=dtype,
        learning_rate=build_learning_rate(params),
        compile=wants_compile(machine, device) and adversary is None,
        horizontal_flip=params.horizontal_flip,
        loss=partial(
            first_stage_loss,
            loss_type=params.loss_type,
            kl_weight=params.kl_weight,
            features=PerceptualFeatures(device) if params.perceptual_weight > 0 else None,
            perceptual_weight=params.perceptual_weight,
        ),
        adversarial_weight=params.adversarial_weight,
        adversarial_start_images=params.adversarial_start_images,
    )
    return AutoencoderStep(plan, state, topology)


def run_loop(
    step: AutoencoderStep,
    params: AutoencoderParams,
    machine: Machine,
    topology: Topology,
    index: ShardIndex,
    checkpoints: CheckpointFolder,
    tracker: Tracker,
    stop: StopRequest,
) -> None:
    """Feed the loop with batches from where the state is to the last step."""
    state = step.state
    order = RandomOrder(index.num_images, params.seed)
    batches = build_batches(params, machine, topology, [index], order, images_seen=state.images_seen)
    ids = np.linspace(0, index.num_images - 1, min(PREVIEW_IMAGES, index.num_images)).astype(np.int64)

    def preview(images_seen: int) -> None:
        images = torch.from_numpy(ShardStore(index).read(ids)[0]).to(topology.device)
        assert isinstance(state.ema.network, KLAutoencoder)
        made = FirstStage(state.ema.network).reconstruct(images)
        tracker.log_image("reconstructions", make_grid(interleave(images, made, COLUMNS), COLUMNS), images_seen)

    plan = LoopPlan(
        total_images=count_steps(params) * params.batch_size,
        log_every_images=params.log_every_images,
        checkpoint_every_images=params.checkpoint_every_images,
        preview_every_images=params.preview_every_images,
    )
    train(step, batches, plan, checkpoints, Observers(tracker.log_metrics, preview), topology, lambda: stop.requested)


def publish(state: AutoencoderState, spec: dict[str, Any], lineage: dict[str, Any], tracker: Tracker) -> None:
    """Write the stage's outputs: equal training gives equal bytes."""
    save_model(paths.FIRST_STAGE, state.ema.network, spec, {**lineage, "images_seen": state.images_seen})
    save_curve(paths.AUTOENCODER_CURVE, state)
    parameters = sum(p.numel() for p in state.network.parameters())
    save_json(paths.AUTOENCODER_METRICS, {**state.history[-1], "parameters": parameters})
    tracker.log_artifact(paths.FIRST_STAGE / "model.json", "model")
    tracker.log_artifact(paths.AUTOENCODER_CURVE, "plots")
    log.info("autoencoder: done, %s images, %s parameters, reconstruction %.4f, peak memory %.2f GiB a process",
             f"{state.images_seen:,}", f"{parameters:,}", state.history[-1]["reconstruction"],
             peak_memory_gib())  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
