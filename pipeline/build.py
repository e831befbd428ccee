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
from ddpm_core import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    IntervalGuidance,
    NoiseSchedule,
    NoisyClassifier,
    UNet,
)
from pipeline.config import ClassifierParams, ModelParams, Params, SampleParams, ScheduleParams, TrainParams
from pipeline.data.index import ShardIndex
from pipeline.engine.generate import ImageSampler
from pipeline.errors import UserError

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "noisy_classifier": NoisyClassifier}
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


def make_classifier_spec(params: Params, index: ShardIndex) -> dict[str, Any]:
    """The same of a classifier of noisy images.

    Raises:
        UserError: params.yaml has no section `classifier`, or there are fewer than two classes.
    """
    config = params.classifier
    if config is None:
        raise UserError("params.yaml: there is no section classifier: copy that of recipes/guided/params.yaml")
    if index.num_classes < 2:
        raise UserError(f"{index.folder} has {index.num_classes} classes: a classifier needs at least two sub-folders")
    arguments = _network_arguments(config, index, section="classifier")
    return {
        "network": {"name": "noisy_classifier", **arguments, "pooling": config.pooling},
        "schedule": params.schedule.model_dump(),
        "classes": list(index.classes),
    }


def _network_arguments(
    params: ModelParams | ClassifierParams, index: ShardIndex, section: str = "model"
) -> dict[str, Any]:
    multipliers = params.channel_multipliers
    if multipliers == "auto":
        nearest = max((size for size in _MULTIPLIERS if size <= index.image_size), default=8)
        multipliers = _MULTIPLIERS[nearest]
        while index.image_size % 2 ** (len(multipliers) - 1):
            multipliers = multipliers[:-1]
    if index.image_size % 2 ** (len(multipliers) - 1):
        raise UserError(
            f"params.yaml: {section}.channel_multipliers has {len(multipliers)} entries, but images of "
            f"{index.image_size} px can't be halved {len(multipliers) - 1} times: use fewer, or another "
            "shard.image_size"
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


def build_optimizer(params: TrainParams | ClassifierParams, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )


def build_learning_rate(params: TrainParams | ClassifierParams) -> Callable[[int], float]:
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


def build_guidance(
    params: SampleParams,
    spec: dict[str, Any],
    network: ddpm_core.Denoiser,
    schedule: NoiseSchedule,
    guide: ddpm_core.Denoiser | None = None,
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> ddpm_core.Denoiser:
    """The network behind the guidance that params ask for; the network itself where they ask for none.

    Raises:
        UserError: guidance by classes is asked for a model without classes, or what guides is not there.
    """
    num_classes = len(spec["classes"])
    for name, off in (("guidance", 1), ("classifier_scale", 0)):
        if getattr(params, name) != off and not num_classes:
            asked = f"sample.{name} is {getattr(params, name)}"
            raise UserError(f"params.yaml: {asked}, but the model has no classes: use {off}")
    plain = guided = network
    if params.autoguidance != 1:
        if guide is None:
            raise UserError("sample.autoguidance needs a model with a guide: set train.guide_images and train")
        guided = AutoGuidance(network, guide, params.autoguidance)
    if params.guidance != 1:
        guided = ClassifierFreeGuidance(guided, params.guidance, null=num_classes)
    if params.guidance == 0:
        plain = ClassifierFreeGuidance(network, 0.0, null=num_classes)
    if params.classifier_scale != 0:
        if classifier is None:
            raise UserError(
                "sample.classifier_scale needs a classifier: train one with `python -m pipeline.classifier`"
            )
        guided = ClassifierGuidance(guided, classifier, params.classifier_scale, schedule, spec["parameterization"])
    if params.guidance_interval is None:
        return guided
    low, high = params.guidance_interval
    return IntervalGuidance(guided, plain, schedule, (low, high))


def build_sampler(
    params: SampleParams, spec: dict[str, Any], network: nn.Module, schedule: NoiseSchedule, **guides: nn.Module
) -> ImageSampler:
    """Seeds -> images, with the sampler, steps and guidance that params ask for.

    Raises:
        UserError: as :func:`build_guidance`, which says also what `guides` may be.
    """
    denoiser = build_guidance(params, spec, network, schedule, **guides)
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
