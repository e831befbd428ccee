"""The only place where a name in params.yaml or model.json becomes an object."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ddpm_core
from ddpm_core import ClassifierFreeGuidance, NoiseSchedule, UNet
from pipeline.config import ModelParams, Params, SampleParams, ScheduleParams, TrainParams
from pipeline.data.index import ShardIndex
from pipeline.data.mixing import BalancedOrder, MixedOrder, MixedWindowedOrder
from pipeline.data.order import Order, RandomOrder, WindowedOrder
from pipeline.engine.generate import ImageSampler
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream, draw_integer

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet}
_MULTIPLIERS = {8: [1, 2], 16: [1, 2, 2], 32: [1, 2, 2, 2], 64: [1, 2, 3, 4]}


def make_model_spec(params: Params, index: ShardIndex, *mixed: ShardIndex) -> dict[str, Any]:
    """What model.json says of a model: enough to build it again, `auto` values resolved.

    Args:
        params: of the run.
        index: the shards it is trained on.
        mixed: more sets with the same form and classes.
    """
    labels = np.unique(np.concatenate([np.unique(one.labels) for one in (index, *mixed)]))
    return {
        "network": {"name": "unet", **_network_arguments(params.model, index)},
        "schedule": params.schedule.model_dump(),
        "parameterization": params.model.parameterization,
        "classes": list(index.classes),
        "labels": [int(label) for label in labels if label >= 0],  # of classes with images
    }


def _network_arguments(params: ModelParams, index: ShardIndex) -> dict[str, Any]:
    multipliers = params.channel_multipliers
    if multipliers == "auto":
        nearest = max((size for size in _MULTIPLIERS if size <= index.image_size), default=8)
        multipliers = _MULTIPLIERS[nearest]
        while index.image_size % 2 ** (len(multipliers) - 1):
            multipliers = multipliers[:-1]
    if index.image_size % 2 ** (len(multipliers) - 1):
        raise UserError(
            f"params.yaml: model.channel_multipliers has {len(multipliers)} entries, but images of {index.image_size} "
            f"px can't be halved {len(multipliers) - 1} times: use fewer, or another shard.image_size"
        )
    return {
        "image_size": index.image_size,
        "channels": index.channels,
        "num_classes": index.num_classes,
        "base_channels": params.base_channels,
        "channel_multipliers": multipliers,
        "num_blocks": params.num_blocks,
        "attention_resolutions": params.attention_resolutions,
        "dropout": params.dropout,
    }


def build_network(spec: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """The network of a model spec, initialised from `seed` alone.

    Raises:
        UserError: the spec names an unknown network.
    """
    arguments = dict(spec["network"])
    name = arguments.pop("name")
    if name not in NETWORKS:
        raise UserError(f"model.json: network {name!r} is unknown; known: {', '.join(NETWORKS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](**arguments)


def build_schedule(spec: dict[str, Any]) -> NoiseSchedule:
    """The noise schedule of a model spec.

    Raises:
        UserError: the parameters give no valid schedule.
    """
    schedule = ScheduleParams.model_validate(spec["schedule"])
    try:
        return ddpm_core.register_schedule(**schedule.model_dump())
    except ValueError as error:
        raise UserError(f"params.yaml: schedule: {error}") from None


def build_order(params: Params, indexes: Sequence[ShardIndex]) -> Order:
    """The order in which training sees the images of the sets, which are those of order.mix where there is one.

    Raises:
        UserError: the sets can't be drawn from so.
    """
    config, seed = params.order, params.train.seed
    weights = [entry.weight for entry in config.mix] if config.mix else [1.0]
    if config.kind == "windowed":
        sizes = [index.shard_sizes for index in indexes]
        form = {"batch_size": params.train.batch_size, "num_lanes": config.lanes, "window_images": config.window_images}
        if len(indexes) == 1:
            return WindowedOrder(sizes[0], seed, **form)
        return MixedWindowedOrder(sizes, weights, seed, **form)

    def order_of(index: ShardIndex, own_seed: int) -> Order:
        return (
            BalancedOrder(index.labels, own_seed) if config.class_balanced else RandomOrder(index.num_images, own_seed)
        )

    if len(indexes) == 1:
        return order_of(indexes[0], seed)
    seeds = [draw_integer(seed, Stream.MIX, number) for number in range(len(indexes))]
    orders = [order_of(index, own_seed) for index, own_seed in zip(indexes, seeds, strict=True)]
    return MixedOrder(orders, [index.num_images for index in indexes], weights, seed)


def build_optimizer(params: TrainParams, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )


def build_learning_rate(params: TrainParams) -> Callable[[int], float]:
    """Images seen -> learning rate: linear warm-up times the schedule."""

    def rate(images_seen: int) -> float:
        warmup = min(1.0, images_seen / params.warmup_images) if params.warmup_images else 1.0
        match params.learning_rate_schedule:
            case "constant":
                factor = 1.0
            case "cosine":
                factor = 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / params.total_images)))
        return params.learning_rate * warmup * factor

    return rate


def build_timestep_sampling(params: TrainParams) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Uniform numbers and places in the global order -> diffusion steps, the same for any number of ranks."""
    match params.timestep_sampling:
        case "uniform":
            return lambda u, places, num_timesteps: ddpm_core.uniform_timesteps(u, num_timesteps)
        case "stratified":
            size = params.batch_size
            return lambda u, places, num_timesteps: ddpm_core.stratified_timesteps(
                u, num_timesteps, places % size, size
            )


def build_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix work. `auto` is bfloat16 on CUDA devices that have it in hardware, else float32.

    Raises:
        UserError: bfloat16 is asked for on a CUDA device without it.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    match precision:
        case "auto":
            return torch.bfloat16 if has_bfloat16 else torch.float32
        case "bfloat16":
            if device.type == "cuda" and not has_bfloat16:
                raise UserError("params.yaml: train.precision is bfloat16, which this GPU lacks: use auto or float32")
            return torch.bfloat16
    return torch.float32


def build_sampler(
    params: SampleParams, spec: dict[str, Any], network: nn.Module, schedule: NoiseSchedule
) -> ImageSampler:
    """Seeds -> images, with the sampler, steps and guidance that params ask for.

    Raises:
        UserError: guidance is asked for a model without classes.
    """
    num_classes = len(spec["classes"])
    denoiser: ddpm_core.Denoiser = network
    if params.guidance != 1:
        if not num_classes:
            raise UserError(f"params.yaml: sample.guidance is {params.guidance}, but the model has no classes: use 1")
        denoiser = ClassifierFreeGuidance(network, params.guidance, null_label=num_classes)
    common = {
        "parameterization": spec["parameterization"],
        "num_steps": params.steps,
        "spacing": params.spacing,
        "dynamic_threshold": params.dynamic_threshold,
    }
    method: Callable[..., Tensor]
    match params.sampler:
        case "ddim":
            method = partial(ddpm_core.sample_ddim, denoiser, schedule, eta=params.eta, **common)
        case "ddpm":
            method = partial(ddpm_core.sample_ddpm, denoiser, schedule, **common)
        case "dpm_solver":
            method = partial(ddpm_core.sample_dpm_solver, denoiser, schedule, **common)
        case "heun":
            method = partial(ddpm_core.sample_heun, denoiser, schedule, **common)
    shape = (spec["network"]["channels"], *2 * [spec["network"]["image_size"]])
    return ImageSampler(method, seed=params.seed, classes=spec["labels"], shape=shape)
