"""What draws images: a sampler, and the guidance around its network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

import ddpm_core
from ddpm_core import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    IntervalGuidance,
    NoiseSchedule,
)
from pipeline.build.networks import build_context, has_learned_variance
from pipeline.data.index import ShardIndex
from pipeline.engine.context import LABEL, RealContexts
from pipeline.engine.generate import ImageSampler
from pipeline.engine.latents import FirstStage
from pipeline.errors import UserError
from pipeline.sections import SampleParams


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
