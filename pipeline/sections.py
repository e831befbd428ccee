"""The sections of params.yaml as frozen, strict, typed objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline import paths

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversion from text, no change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataParams(Section):
    raw: str

    @model_validator(mode="after")
    def _images_are_safe(self) -> DataParams:
        if paths.RAW.absolute() in Path(self.raw).absolute().parents:
            raise ValueError(f"raw lies inside {paths.RAW}, which DVC deletes before each fetch: move your images")
        if re.search(r"\w://([^/\s]*@|[^\s]*\?)", self.raw):
            raise ValueError("raw is a URL with a password or token: give that in the environment, this file is public")
        return self


class FetchParams(Section):
    source: Literal["digits", "idx", "photo_tiles", "auto"]
    idx_dir: str | None
    max_images: Positive | None = None

    @model_validator(mode="after")
    def _idx_needs_a_folder(self) -> FetchParams:
        if self.source in ("idx", "auto") and self.idx_dir is None:
            raise ValueError(f"source is {self.source}, so idx_dir must name the folder with the *-ubyte files")
        return self


class ShardParams(Section):
    image_size: Annotated[int, Field(ge=4, le=4096)] | Literal["auto"]
    channels: Literal[1, 3, "auto"]
    resize_filter: Literal["bicubic", "lanczos", "bilinear", "box"]
    crop: Literal["center", "none"]
    encoding: Literal["raw", "png", "jpeg", "original", "auto"]
    jpeg_quality: Annotated[int, Field(ge=1, le=100)]
    class_key: str | None
    shard_images: Positive
    max_broken_share: Share
    near_duplicate_bits: Annotated[int, Field(ge=0, le=8)] | None
    held_out_share: Annotated[float, Field(ge=0.0, lt=1.0)]


class ReferenceParams(Section):
    extractor: Literal["efficientnet_lite0", "inception", "inception_clean"]
    inception_weights: str | None
    statistics: str | None
    floor_images: Annotated[int, Field(ge=2)] | Literal["auto"]


class ScheduleParams(Section):
    beta_schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"]
    timesteps: Annotated[int, Field(ge=2)]
    linear_start: Annotated[float, Field(gt=0.0, lt=1.0)]
    linear_end: Annotated[float, Field(gt=0.0, lt=1.0)]
    cosine_s: Annotated[float, Field(ge=0.0)]
    sigmoid_start: float
    sigmoid_end: float
    sigmoid_tau: Annotated[float, Field(gt=0.0)]
    zero_terminal_snr: bool
    v_posterior: Share

    @model_validator(mode="after")
    def _sigmoid_rises(self) -> ScheduleParams:
        if self.sigmoid_start >= self.sigmoid_end:
            raise ValueError(f"sigmoid_start is {self.sigmoid_start}, not below sigmoid_end, {self.sigmoid_end}")
        return self


class ModelParams(Section):
    network: Literal["unet", "dit"]
    parameterization: Literal["eps", "x0", "v"]
    learned_variance: bool
    base_channels: Annotated[int, Field(ge=8, multiple_of=8)]
    channel_multipliers: Annotated[list[Positive], Field(min_length=1)] | Literal["auto"]
    num_blocks: Positive
    attention_resolutions: list[Positive]
    patch_size: Positive
    depth: Positive
    num_heads: Positive | Literal["auto"]
    qk_norm: bool
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    context: Literal["none", "inpaint", "super_resolution", "colour"]
    context_factor: Annotated[int, Field(ge=2)]


class OptimizerParams(Section):
    """What every training needs."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    total_images: Positive
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0.0)]
    learning_rate_schedule: Literal["constant", "cosine"]
    warmup_images: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Annotated[float, Field(gt=0.0)]
    ema_half_life_images: Positive


class TrainParams(OptimizerParams):
    guide_images: Positive | None
    label_dropout: Share
    horizontal_flip: bool
    loss_type: Literal["l1", "l2", "huber"]
    l_simple_weight: Annotated[float, Field(ge=0.0)]
    original_elbo_weight: Annotated[float, Field(ge=0.0)]
    min_snr_gamma: Annotated[float, Field(gt=0.0)] | None
    timestep_sampling: Literal["uniform", "stratified"]
    precision: Literal["float32", "bfloat16", "auto"]
    log_every_images: Positive
    checkpoint_every_images: Positive
    preview_every_images: Positive

    @model_validator(mode="after")
    def _some_loss_is_left(self) -> TrainParams:
        if self.l_simple_weight == 0.0 and self.original_elbo_weight == 0.0:
            raise ValueError("l_simple_weight and original_elbo_weight are both 0, so there is nothing to minimise")
        return self

    @model_validator(mode="after")
    def _guide_is_reached(self) -> TrainParams:
        if self.guide_images is not None and self.guide_images > self.total_images:
            raise ValueError(f"guide_images is {self.guide_images}, more than the {self.total_images} of total_images")
        return self


class ClassifierParams(OptimizerParams):
    """Of the recipes with classifier guidance."""

    held_out: Annotated[float, Field(ge=0.0, lt=1.0)]
    horizontal_flip: bool
    precision: Literal["float32", "bfloat16", "auto"]
    log_every_images: Positive
    checkpoint_every_images: Positive
    base_channels: Annotated[int, Field(ge=8, multiple_of=8)]
    channel_multipliers: Annotated[list[Positive], Field(min_length=1)] | Literal["auto"]
    num_blocks: Positive
    attention_resolutions: list[Positive]
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    pooling: Literal["attention", "mean"]


class MixedSet(Section):
    """One of several shard sets to draw from."""

    shards: str
    weight: Annotated[float, Field(gt=0.0)]


class OrderParams(Section):
    kind: Literal["random", "windowed"]
    lanes: Positive
    window_images: Positive
    class_balanced: bool
    mix: Annotated[list[MixedSet], Field(min_length=1)] | None

    @model_validator(mode="after")
    def _balance_is_random(self) -> OrderParams:
        if self.class_balanced and self.kind == "windowed":
            raise ValueError(
                "class_balanced is true, but kind is windowed: classes lie in different shards, so that no rank could "
                "stay with few; use kind: random, or one shard set a class and order.mix"
            )
        return self


class SampleParams(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    num_samples: Annotated[int, Field(ge=2)]
    sampler: Literal["ddim", "ddpm", "dpm_solver", "heun"]
    steps: Positive
    spacing: Literal["trailing", "leading", "linspace", "quad", "logsnr"]
    eta: Share
    guidance: float
    guidance_interval: Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=2, max_length=2)] | None
    autoguidance: float
    classifier_scale: float
    dynamic_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None

    @model_validator(mode="after")
    def _guidance_is_one(self) -> SampleParams:
        if self.autoguidance != 1 and self.guidance not in (0, 1):
            raise ValueError("autoguidance and guidance are both on: set guidance to 1, or to 0, or autoguidance to 1")
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {self.guidance_interval}, expected two rising noise levels")
        return self


class EvaluateParams(Section):
    real_images: Annotated[int, Field(ge=10)]
    neighbours: Positive
    kid_subsets: Positive
    kid_size: Annotated[int, Field(ge=2)]
    bootstrap: Annotated[int, Field(ge=0)]
    extrapolation: Annotated[int, Field(ge=0)]


class AutoencoderParams(OptimizerParams):
    """The first stage of latent diffusion; None in params.yaml of a pipeline on pixels."""

    factor: Literal[2, 4, 8]
    latent_channels: Positive
    base_channels: Annotated[int, Field(ge=8, multiple_of=8)]
    channel_multipliers: Annotated[list[Positive], Field(min_length=2)] | Literal["auto"]
    num_blocks: Positive
    horizontal_flip: bool
    loss_type: Literal["l1", "l2", "huber"]
    kl_weight: Annotated[float, Field(ge=0.0)]
    perceptual_weight: Annotated[float, Field(ge=0.0)]
    adversarial_weight: Annotated[float, Field(ge=0.0)]
    adversarial_start_images: Annotated[int, Field(ge=0)]
    discriminator_channels: Annotated[int, Field(ge=8, multiple_of=8)]
    discriminator_layers: Positive
    precision: Literal["float32", "bfloat16", "auto"]
    log_every_images: Positive
    checkpoint_every_images: Positive
    preview_every_images: Positive

    @model_validator(mode="after")
    def _a_multiplier_a_resolution(self) -> AutoencoderParams:
        levels = self.factor.bit_length()
        if self.channel_multipliers != "auto" and len(self.channel_multipliers) != levels:
            raise ValueError(f"channel_multipliers has not the {levels} entries that factor {self.factor} needs")
        return self


class EncodeParams(Section):
    shard_images: Positive


class LikelihoodParams(Section):
    images: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]


class Params(Section):
    """The whole of params.yaml. With `autoencoder` and `encode` the diffusion model works on latents."""

    data: DataParams
    fetch: FetchParams
    shard: ShardParams
    reference: ReferenceParams
    schedule: ScheduleParams
    model: ModelParams
    train: TrainParams
    order: OrderParams
    sample: SampleParams
    evaluate: EvaluateParams
    likelihood: LikelihoodParams
    classifier: ClassifierParams | None = None
    autoencoder: AutoencoderParams | None = None
    encode: EncodeParams | None = None

    @model_validator(mode="after")
    def _latents_fit_the_rest(self) -> Params:
        if (self.autoencoder is None) != (self.encode is None):
            raise ValueError("autoencoder and encode belong together: give both sections for latents, none for pixels")
        if self.encode is not None and self.train.horizontal_flip:
            raise ValueError("train.horizontal_flip is true, but a mirrored latent is no latent of the mirrored image: "
                             "use autoencoder.horizontal_flip")  # fmt: skip
        if self.encode is not None and self.sample.dynamic_threshold is not None:
            raise ValueError("sample.dynamic_threshold is for pixels: latents have no [-1, 1] to return to; set null")
        if self.encode is not None and self.order.mix:
            raise ValueError("order.mix names shards of pixels, and the latents are one set: use null")
        if self.encode is not None and self.model.context != "none":
            raise ValueError(
                f"model.context is {self.model.context}, which is made of pixels, not of latents: use none"
            )
        return self

    @model_validator(mode="after")
    def _eps_needs_signal(self) -> Params:
        if self.schedule.zero_terminal_snr and self.model.parameterization == "eps":
            raise ValueError(
                "schedule.zero_terminal_snr is true, so model.parameterization must be v or x0: at the last step eps "
                "says nothing of the image"
            )
        return self

    @model_validator(mode="after")
    def _one_bound_for_one_variance(self) -> Params:
        if self.model.learned_variance and self.train.original_elbo_weight != 0.0:
            raise ValueError(
                f"train.original_elbo_weight is {self.train.original_elbo_weight}, the weight of a fixed variance's "
                "bound, so it must be 0 where model.learned_variance is true"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit_the_schedule(self) -> Params:
        if self.sample.steps > self.schedule.timesteps:
            raise ValueError(
                f"sample.steps is {self.sample.steps}, more than the {self.schedule.timesteps} of schedule.timesteps"
            )
        return self
