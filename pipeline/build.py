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
from ddpm_core import (
    AutoGuidance,
    ClassEmbedding,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Conditions,
    ContextConcat,
    DenoisingNetwork,
    DiT,
    IntervalGuidance,
    LinearOperator,
    NoiseSchedule,
    NoisyClassifier,
    UNet,
)
from ddpm_core.nn.attention import count_heads
from pipeline.config import (
    ClassifierParams,
    ModelParams,
    OptimizerParams,
    Params,
    SampleParams,
    ScheduleParams,
    TrainParams,
)
from pipeline.data.index import ShardIndex
from pipeline.data.mixing import BalancedOrder, MixedOrder, MixedWindowedOrder
from pipeline.data.order import Order, RandomOrder, WindowedOrder
from pipeline.engine.context import LABEL, Colour, ContextMaker, Inpaint, RealContexts, SuperResolution
from pipeline.engine.generate import ImageSampler
from pipeline.engine.latents import FirstStage
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream, draw_integer

NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT, "noisy_classifier": NoisyClassifier}
CONTEXTS: dict[str, Callable[..., ContextMaker]] = {
    "inpaint": Inpaint,
    "super_resolution": SuperResolution,
    "colour": Colour,
}
_MULTIPLIERS = {8: [1, 2], 16: [1, 2, 2], 32: [1, 2, 2, 2], 64: [1, 2, 3, 4]}


def make_model_spec(
    params: Params, index: ShardIndex, *mixed: ShardIndex, first_stage: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What model.json says of a model: enough to build it again, `auto` values resolved.

    Args:
        params: of the run.
        index: what it is trained on.
        mixed: more sets with the same form and classes.
        first_stage: what the latents say of where they come from; None for a model of pixels.
    """
    labels = np.unique(np.concatenate([np.unique(one.labels) for one in (index, *mixed)]))
    context = _context_spec(params.model, index)
    spec = {
        "network": {
            "name": params.model.network,
            **_network_arguments(params.model, index),
            **_context_channels(context, index),
        },
        **context,
        "schedule": params.schedule.model_dump(),
        "parameterization": params.model.parameterization,
        "classes": list(index.classes),
        "labels": [int(label) for label in labels if label >= 0],  # of classes with images
    }
    if first_stage is None:
        return spec
    network = {**spec["network"], "channels": first_stage["network"]["latent_channels"]}  # half of the moments
    return {**spec, "network": network, "first_stage": first_stage}


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
    form = {"image_size": index.image_size, "channels": index.channels, "num_classes": index.num_classes}
    inside = {**_unet_arguments(config, index, section="classifier"), "dropout": config.dropout}
    return {
        "network": {"name": "noisy_classifier", **form, **inside, "pooling": config.pooling},
        "schedule": params.schedule.model_dump(),
        "classes": list(index.classes),
    }


def _network_arguments(params: ModelParams, index: ShardIndex) -> dict[str, Any]:
    match params.network:
        case "unet":
            inside = _unet_arguments(params, index)
        case "dit":
            inside = _dit_arguments(params, index)
    return {
        "image_size": index.image_size,
        "channels": index.channels,
        "num_classes": index.num_classes,
        **inside,
        "dropout": params.dropout,
        "learned_variance": params.learned_variance,
        "qk_norm": params.qk_norm,
    }


def _dit_arguments(params: ModelParams, index: ShardIndex) -> dict[str, Any]:
    if index.image_size % params.patch_size:
        raise UserError(
            f"params.yaml: model.patch_size is {params.patch_size}, which does not divide images of {index.image_size} "
            "px: use another, or another shard.image_size"
        )
    width = 4 * params.base_channels  # the size of the embedding, in both networks
    num_heads = count_heads(width) if params.num_heads == "auto" else params.num_heads
    if width % num_heads:
        raise UserError(
            f"params.yaml: model.num_heads is {num_heads}, which does not divide a width of {width}, four times "
            "model.base_channels: use auto"
        )
    return {"patch_size": params.patch_size, "width": width, "depth": params.depth, "num_heads": num_heads}


def _unet_arguments(
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
        "base_channels": params.base_channels,
        "channel_multipliers": multipliers,
        "num_blocks": params.num_blocks,
        "attention_resolutions": params.attention_resolutions,
    }


def has_learned_variance(spec: dict[str, Any]) -> bool:
    """Whether the network also gives the variance; a model.json older than that option does not say so."""
    return bool(spec["network"].get("learned_variance", False))


def _context_spec(params: ModelParams, index: ShardIndex) -> dict[str, Any]:
    """`context` of model.json; a model without one has no such key."""
    match params.context:
        case "none":
            return {}
        case "colour" if index.channels != 3:
            raise UserError("params.yaml: model.context is colour, but the images are grey: use images with colour")
        case "super_resolution" if index.image_size % params.context_factor:
            raise UserError(
                f"params.yaml: model.context_factor is {params.context_factor}, which does not divide the images' "
                f"{index.image_size} px: use one that does, or another shard.image_size"
            )
        case "super_resolution":
            return {"context": {"name": params.context, "factor": params.context_factor}}
    return {"context": {"name": params.context}}


def _context_channels(context: dict[str, Any], index: ShardIndex) -> dict[str, int]:
    maker = build_context(context)
    return {} if maker is None else {"context_channels": maker.num_channels(index.channels)}


def build_context(spec: dict[str, Any]) -> ContextMaker | None:
    """What makes the contexts of a model spec; None where it has none."""
    if "context" not in spec:
        return None
    arguments = dict(spec["context"])
    return CONTEXTS[arguments.pop("name")](**arguments)


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
        if "context" not in spec:
            return NETWORKS[name](**arguments)
        if num_classes := arguments.pop("num_classes"):  # beside a context, labels are one of several conditions
            width = arguments.get("width") or 4 * arguments["base_channels"]  # of the embedding
            embedding = ClassEmbedding(num_classes, width)
            arguments["embedder"] = Conditions({LABEL: embedding})
        return ContextConcat(NETWORKS[name](**arguments))


def inner_network(network: nn.Module) -> DenoisingNetwork:
    """The denoiser itself, without what gives it a context."""
    inner = network.network if isinstance(network, ContextConcat) else network
    assert isinstance(inner, DenoisingNetwork)
    return inner


def place_network(network: nn.Module, device: torch.device, channels_last: bool | None) -> nn.Module:
    """Move a network to its device, convolutions' weights with the channels last in memory if asked for; None: on CUDA,
    whose tensor cores want them so. Without effect on a network without convolutions."""
    network.to(device)
    if channels_last if channels_last is not None else device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


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


def build_optimizer(params: OptimizerParams, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )


def build_learning_rate(params: OptimizerParams) -> Callable[[int], float]:
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


def build_precision(precision: str, device: torch.device, *, section: str = "train") -> torch.dtype:
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
                raise UserError(
                    f"params.yaml: {section}.precision is bfloat16, which this GPU lacks: use auto or float32"
                )
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
    null = {LABEL: num_classes} if "context" in spec else num_classes  # the context stays in both calls
    plain = guided = network
    if params.autoguidance != 1:
        if guide is None:
            raise UserError("sample.autoguidance needs a model with a guide: set train.guide_images and train")
        guided = AutoGuidance(network, guide, params.autoguidance)
    if params.guidance != 1:
        guided = ClassifierFreeGuidance(guided, params.guidance, null=null)
    if params.guidance == 0:
        plain = ClassifierFreeGuidance(network, 0.0, null=null)
    if params.classifier_scale != 0:
        if "context" in spec:
            raise UserError("params.yaml: sample.classifier_scale is for models without a context: use 0")
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
    params: SampleParams,
    spec: dict[str, Any],
    network: nn.Module,
    schedule: NoiseSchedule,
    images: ShardIndex | None = None,
    first_stage: FirstStage | None = None,
    **guides: nn.Module,
) -> ImageSampler:
    """Seeds -> images, with the sampler, steps and guidance that params ask for.

    Args:
        images: real ones, for the contexts of a model that has one; without them the sampler's `method` alone works.
        first_stage: of a model of latents. They are nowhere clipped, and decoded at the end.

    Raises:
        UserError: as :func:`build_guidance`, which says also what `guides` may be; or dynamic thresholding is asked for
            a model of latents.
        ValueError: the model is one of latents and the first stage is missing, or the other way round.
    """
    if ("first_stage" in spec) != (first_stage is not None):
        raise ValueError("a model of latents needs its first stage, and one of pixels takes none")
    if first_stage is not None and params.dynamic_threshold is not None:
        raise UserError("params.yaml: sample.dynamic_threshold is for pixels, and this is a model of latents: set null")
    denoiser = build_guidance(params, spec, network, schedule, **guides)
    common = {
        "parameterization": spec["parameterization"],
        "learned_variance": has_learned_variance(spec),
        "num_steps": params.steps,
        "spacing": params.spacing,
        "clip_denoised": first_stage is None,
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
    maker = build_context(spec)
    contexts = None if maker is None or images is None else RealContexts(maker, images, params.seed)
    decode = None if first_stage is None else first_stage.decode
    return ImageSampler(method, seed=params.seed, classes=spec["labels"], shape=shape, contexts=contexts, decode=decode)


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
