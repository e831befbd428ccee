"""The only place where a name in params.yaml or model.json becomes an object."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ddpm_core
from ddpm_core import ClassifierFreeGuidance, LinearOperator, NoiseSchedule, UNet
from pipeline.config import ModelParams, Params, SampleParams, ScheduleParams, TrainParams
from pipeline.data.index import ShardIndex
from pipeline.engine.generate import ImageSampler
from pipeline.errors import UserError

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet}
_MULTIPLIERS = {8: [1, 2], 16: [1, 2, 2], 32: [1, 2, 2, 2], 64: [1, 2, 3, 4]}


def make_model_spec(params: Params, index: ShardIndex) -> dict[str, Any]:
    """What model.json says of a model: enough to build it again, `auto` values resolved."""
    return {
        "network": {"name": "unet", **_network_arguments(params.model, index)},
        "schedule": params.schedule.model_dump(),
        "parameterization": params.model.parameterization,
        "classes": list(index.classes),
        "labels": [int(label) for label in np.unique(index.samples["label"]) if label >= 0],  # of classes with images
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


def build_operator(
    task: str, shape: tuple[int, int, int], *, seen: Tensor | None, factor: int | None, kernel: str | None
) -> LinearOperator:
    """What a restoration undoes, on images of `shape` (c, h, w).

    Args:
        task: denoise, inpaint, super_resolve, deblur or colourise.
        shape: of the restored image.
        seen: inpaint: (h, w) bool.
        factor: super_resolve: pixels a side of a block.
        kernel: deblur: as :func:`build_kernel` takes it.

    Raises:
        UserError: what the task needs is missing or does not fit the images.
    """
    try:
        match task:
            case "denoise":
                return ddpm_core.Denoise(shape)
            case "inpaint" if seen is not None:
                return ddpm_core.Inpaint(seen.expand(shape))
            case "super_resolve" if factor is not None:
                return ddpm_core.SuperResolve(shape, factor)
            case "deblur" if kernel is not None:
                return ddpm_core.Deblur(shape, build_kernel(kernel))
            case "colourise":
                if shape[0] != 3:
                    raise UserError("--task colourise needs a model of colour images; this one has 1 channel")
                return ddpm_core.Colourise(shape)
    except ValueError as error:
        raise UserError(f"--task {task}: {error}") from None
    needs = {"inpaint": "--mask FILE", "super_resolve": "--factor F", "deblur": "--kernel KERNEL"}
    raise UserError(f"--task {task} needs {needs[task]}")


def build_kernel(text: str) -> Tensor:
    """(k,) float64 weights of sum 1: `gaussian:DEVIATION_PX`, `box:WIDTH_PX` or the weights themselves, as `1,2,1`.

    Raises:
        UserError: the text is none of these.

    Example:
        >>> build_kernel("1,2,1").tolist()
        [0.25, 0.5, 0.25]
    """
    name, _, number = text.rpartition(":")
    try:
        match name:
            case "gaussian" if 0 < float(number) < math.inf:
                return ddpm_core.gaussian_kernel(float(number))
            case "box" if int(number) > 0:
                return torch.full((int(number),), 1 / int(number), dtype=torch.float64)
            case "":
                weights = torch.tensor([float(weight) for weight in number.split(",")], dtype=torch.float64)
                if 0 < float(weights.sum()) < math.inf:
                    return weights / weights.sum()
    except ValueError:
        pass  # no number where one belongs
    raise UserError(f"--kernel {text}: expected gaussian:DEVIATION, box:WIDTH or weights such as 1,2,1")
