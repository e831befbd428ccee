"""What a model is, as model.json says it, and what it is built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import ddpm_core
from ddpm_core import (
    ClassEmbedding,
    Conditions,
    ContextConcat,
    DenoisingNetwork,
    DiT,
    NoiseSchedule,
    NoisyClassifier,
    UNet,
)
from ddpm_core.nn.attention import count_heads
from pipeline.data.index import ShardIndex
from pipeline.engine.context import LABEL, Colour, ContextMaker, Inpaint, SuperResolution
from pipeline.errors import UserError
from pipeline.sections import ClassifierParams, ModelParams, Params, ScheduleParams

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
