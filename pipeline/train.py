"""Stage: train the diffusion model on the shards. `python -m pipeline.train`, or the same under torchrun."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_core import count_cost, p_losses
from pipeline import paths
from pipeline.build.networks import (
    build_context,
    build_network,
    build_schedule,
    has_learned_variance,
    inner_network,
    make_model_spec,
    place_network,
)
from pipeline.build.sampling import build_sampler
from pipeline.build.training import (
    build_batches,
    build_learning_rate,
    build_order,
    build_precision,
    build_state,
    build_timestep_sampling,
    check_batch_size,
    count_steps,
    wants_compile,
)
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardIndex
from pipeline.data.sources import open_sets
from pipeline.data.store import LocalSource, ShardSource
from pipeline.engine.checkpoint import CheckpointFolder, save_model, save_model_spec
from pipeline.engine.generate import GRID_ROWS
from pipeline.engine.loop import LoopPlan, Observers, save_curve, train
from pipeline.engine.runs import describe_run
from pipeline.engine.state import TrainState
from pipeline.engine.step import StepPlan, TrainStep
from pipeline.first_stage import WEIGHTS, WEIGHTS_IN_MODEL, LatentSet, build_x0, load_first_stage, load_latents
from pipeline.lineage import source_sha256, stage_key
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import load_json, locked_folder, save_json, sha256_json
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import StopRequest, restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import Tracker, open_tracker
from pipeline.sections import Params, SampleParams, TrainParams

log = logging.getLogger(__name__)
PREVIEW = SampleParams(
    seed=0, num_samples=80, sampler="ddim", steps=25, spacing="trailing", eta=0.0, guidance=1.0, guidance_interval=None,
    autoguidance=1.0, classifier_scale=0.0, dynamic_threshold=None,
)  # fmt: skip # of the pictures drawn while training; no parameter of the stage, as they change no result


def main() -> None:
    """Train, or go on where an earlier start with the same result was stopped."""
    params, machine = load_params(), load_machine()
    restart_under_torchrun("pipeline.train", machine)
    stop = StopRequest()
    latents = load_latents() if params.encode else None
    indexes, sources = open_training_sets(params, machine, latents)
    spec = make_model_spec(params, *indexes, first_stage=latents.spec if latents else None)
    with start_topology(machine) as topology:
        dtype = build_precision(params.train.precision, topology.device)
        lineage = make_lineage(params, indexes, dtype, latents)
        checkpoints = CheckpointFolder(machine.state / "train" / lineage["train_key"])
        with (
            locked_folder(checkpoints.root) if topology.is_main else nullcontext(),
            open_run(params, machine, topology, indexes, lineage) as tracker,
        ):
            step = make_step(params, machine, topology, spec, dtype)
            preview = make_preview(step, spec, indexes[0], tracker, topology)
            if topology.is_main:
                report_model(step, spec, tracker)
                save_model_spec(checkpoints.root, spec, lineage)
            checkpoints.resume(step.state, topology, step.plan.section)
            order = build_order(params, indexes)
            batches = build_batches(
                params.train, machine, topology, indexes, order, images_seen=step.state.images_seen, sources=sources
            )
            observers = Observers(metrics=tracker.log_metrics, preview=preview)
            train(step, batches, make_plan(params.train), checkpoints, observers, topology, lambda: stop.requested)
            if topology.is_main:
                publish(step.state, spec, lineage, tracker)
            topology.barrier()


def make_lineage(
    params: Params, indexes: Sequence[ShardIndex], dtype: torch.dtype, latents: LatentSet | None = None
) -> dict[str, Any]:
    """Where the model comes from; its `train_key` names the resume state and the MLflow run."""
    sections = (params.schedule, params.model, params.train, params.order)
    hashes = [index.sha256 for index in indexes]
    shards = hashes[0] if len(hashes) == 1 else sha256_json(hashes)
    precision = str(dtype).removeprefix("torch.")
    inputs = {"shards": shards, "precision": precision} | ({"latents": latents.sha256} if latents else {})
    return {
        "train_key": stage_key("pipeline.train", sections, inputs),
        "precision": precision,
        "shard_index_sha256": shards,
        "code_sha256": source_sha256("pipeline.train"),
        "train": params.train.model_dump(mode="json"),
        "order": params.order.model_dump(mode="json"),
    }


def open_training_sets(
    params: Params, machine: Machine, latents: LatentSet | None
) -> tuple[tuple[ShardIndex, ...], tuple[ShardSource, ...]]:
    """What training draws from: the latents, which the encode stage puts here, or the shards from where they are."""
    if latents:
        return (latents.index,), (LocalSource(latents.index.folder),)
    folders = [entry.shards for entry in params.order.mix] if params.order.mix else [paths.SHARDS]
    return open_sets(folders, machine.shards, ShardCache(machine.cache, machine.cache_bytes))


def open_run(
    params: Params, machine: Machine, topology: Topology, indexes: Sequence[ShardIndex], lineage: dict[str, Any]
) -> Tracker:
    """The model's MLflow run, with what is known before the first step; silent on other ranks."""
    index = indexes[0]
    name = f"{index.num_classes or 'no'}-class-{index.image_size}px-{lineage['train_key'][:6]}"
    tags = {
        "shard_index_sha256": lineage["shard_index_sha256"],
        "precision": lineage["precision"],
        **describe_run(topology, "pipeline.train"),
    }
    tracker = open_tracker(
        machine.state, lineage["train_key"], run_name=name, tags=tags, enabled=topology.is_main and machine.tracking
    )
    sections: Mapping[str, Any] = params.model_dump(mode="json", include={"schedule", "model", "train", "order"})
    tracker.log_params({f"{s}.{key}": value for s, content in sections.items() for key, value in content.items()})
    num_images = sum(one.num_images for one in indexes)
    data = {"num_images": num_images, "num_classes": index.num_classes, "image_size": index.image_size}
    tracker.log_params({f"data.{key}": value for key, value in {"raw": params.data.raw, **data}.items()})
    log_audit(tracker)
    tracker.set_dataset(
        Path(params.data.raw).name, lineage["shard_index_sha256"][:16], source=params.data.raw, profile=data
    )
    return tracker


def log_audit(tracker: Tracker) -> None:
    """What the stage `shard` found in the raw images, where its report is: numbers as `data/...`, tables, the sheet."""
    for path in (paths.SHARD_REPORT, paths.REFUSED, paths.DUPLICATES, paths.CLASSES, paths.CONTACT_SHEET):
        if path.is_file():
            tracker.log_artifact(path, "data")
    if paths.SHARD_REPORT.is_file():
        tracker.log_metrics(flatten("data", load_json(paths.SHARD_REPORT)), 0)


def flatten(name: str, value: Any) -> dict[str, float]:
    """Numbers in nested dictionaries under names joined by slashes.

    Example:
        >>> flatten("data", {"num_images": 3, "channel_mean": {"grey": 7.5}})
        {'data/num_images': 3.0, 'data/channel_mean/grey': 7.5}
    """
    if isinstance(value, dict):
        return {key: number for k, v in value.items() for key, number in flatten(f"{name}/{k}", v).items()}
    return {name: float(value)}


def make_step(
    params: Params, machine: Machine, topology: Topology, spec: dict[str, Any], dtype: torch.dtype
) -> TrainStep:
    """Network, average and optimizer on this rank's device, and the step that trains them."""
    config = params.train
    check_batch_size(config, topology, section="train")
    device = topology.device
    network = place_network(build_network(spec, seed=config.seed), device, machine.channels_last)
    inner_network(network).activation_checkpointing = machine.activation_checkpointing
    plan = StepPlan(
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch=machine.micro_batch or config.batch_size,
        null_label=len(spec["classes"]) or None,
        label_dropout=config.label_dropout,
        horizontal_flip=config.horizontal_flip,
        max_grad_norm=config.max_grad_norm,
        dtype=dtype,
        learning_rate=build_learning_rate(config),
        loss=partial(
            p_losses,
            parameterization=spec["parameterization"],
            learned_variance=has_learned_variance(spec),
            loss_type=config.loss_type,
            l_simple_weight=config.l_simple_weight,
            original_elbo_weight=config.original_elbo_weight,
            min_snr_gamma=config.min_snr_gamma,
        ),
        timesteps=build_timestep_sampling(config),
        to_x0=build_x0(spec, config.seed),
        compile=wants_compile(machine, device),
        context=build_context(spec),
        guide_images=config.guide_images,
    )
    return TrainStep(plan, build_state(config, network, device), build_schedule(spec).to(device), topology)


def report_model(step: TrainStep, spec: dict[str, Any], tracker: Tracker) -> None:
    """Say how large the network is, what an image costs it, and how much of the image the last step leaves."""
    inner = inner_network(step.state.network)
    cost = count_cost(inner, inner.input_shape)
    gflop = cost.flop_per_image / 1e9
    tracker.log_params({"model.parameters": cost.parameters, "model.gflop_per_image": round(gflop, 6)})
    signal = float(step.schedule.sqrt_alphas_cumprod[-1])
    log.info("train: %s, %s parameters, %.3g GFLOP an image forward; the chain ends at sqrt(abar) %.2g",
             spec["network"]["name"], f"{cost.parameters:,}", gflop, signal)  # fmt: skip


def make_preview(
    step: TrainStep, spec: dict[str, Any], images: ShardIndex, tracker: Tracker, topology: Topology
) -> Callable[[int], None]:
    """What draws a picture of samples by the average, given the images seen; `images` are for contexts.

    Raises:
        UserError: the first stage of latents is missing or not theirs.
    """
    first_stage = load_first_stage(spec, paths.FIRST_STAGE / WEIGHTS, topology.device)
    quick = PREVIEW.model_copy(update={"steps": min(PREVIEW.steps, step.schedule.num_timesteps)})
    sampler = build_sampler(quick, spec, step.state.ema.network, step.schedule, images, first_stage)

    def preview(images_seen: int) -> None:
        pixels = sampler(torch.arange(GRID_ROWS * sampler.columns, device=topology.device))
        tracker.log_image("samples", sampler.picture(pixels.cpu().numpy()), images_seen)

    return preview


def make_plan(config: TrainParams) -> LoopPlan:
    """When to stop, log, save and draw."""
    return LoopPlan(
        total_images=count_steps(config) * config.batch_size,
        log_every_images=config.log_every_images,
        checkpoint_every_images=config.checkpoint_every_images,
        preview_every_images=config.preview_every_images,
    )


def publish(state: TrainState, spec: dict[str, Any], lineage: dict[str, Any], tracker: Tracker) -> None:
    """Write the stage's outputs: equal training gives equal bytes."""
    files = {WEIGHTS_IN_MODEL: paths.FIRST_STAGE / WEIGHTS} if "first_stage" in spec else {}
    lineage = {**lineage, "images_seen": state.images_seen}
    save_model(paths.MODEL, state.ema.network, spec, lineage, guide=state.guide, files=files)
    save_curve(paths.LOSS_CURVE, state)
    parameters = sum(p.numel() for p in state.network.parameters())
    save_json(paths.TRAIN_METRICS, {**state.history[-1], "parameters": parameters})
    memory = peak_memory_gib()
    peaks = {"train/peak_memory_gib": memory}
    if next(state.network.parameters()).is_cuda:
        peaks["train/peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    tracker.log_metrics(peaks, state.images_seen, replace=True)
    tracker.log_artifact(paths.MODEL / "model.json", "model")
    tracker.log_artifact(paths.LOSS_CURVE, "plots")
    log.info("train: done, %s images, %s parameters, loss %.4f, peak memory %.2f GiB a process",
             f"{state.images_seen:,}", f"{parameters:,}", state.history[-1]["loss"], memory)  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
