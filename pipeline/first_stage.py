"""The first stage of latent diffusion: built, as trained, as the latents know it, and inside a model's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_core import KLAutoencoder, PatchDiscriminator
from pipeline import paths
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.pixels import pixels_to_x0
from pipeline.engine.checkpoint import load_model_spec, load_weights
from pipeline.engine.latents import FirstStage, make_latents
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, sha256_file
from pipeline.sections import AutoencoderParams

NOTE = "latents.json"  # beside the index of the latents: scale, and which first stage made them
WEIGHTS = "weights.safetensors"
WEIGHTS_IN_MODEL = "first_stage.safetensors"
_MULTIPLIERS = [1, 2, 4, 4]


def make_autoencoder_spec(params: AutoencoderParams, index: ShardIndex) -> dict[str, Any]:
    """What model.json of a first stage says.

    Raises:
        UserError: the images can't be divided by the factor.
    """
    if index.image_size % params.factor:
        raise UserError(
            f"params.yaml: autoencoder.factor is {params.factor}, but images of {index.image_size} px can't be divided "
            "by it: use a smaller one, or another shard.image_size"
        )
    auto = _MULTIPLIERS[: params.factor.bit_length()]
    return {
        "network": {
            "channels": index.channels,
            "latent_channels": params.latent_channels,
            "factor": params.factor,
            "base_channels": params.base_channels,
            "channel_multipliers": auto if params.channel_multipliers == "auto" else params.channel_multipliers,
            "num_blocks": params.num_blocks,
        },
        "image_size": index.image_size,
    }


def build_autoencoder(spec: dict[str, Any], *, seed: int = 0) -> KLAutoencoder:
    """The autoencoder of a spec, initialised from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KLAutoencoder(**spec["network"])


def build_discriminator(params: AutoencoderParams, index: ShardIndex) -> PatchDiscriminator:
    """The adversary of the first stage, initialised from the seed.

    Raises:
        UserError: images are too small for so many layers.
    """
    least = 3 * 2**params.discriminator_layers
    if index.image_size < least:
        raise UserError(
            f"params.yaml: autoencoder.discriminator_layers is {params.discriminator_layers}, for images of {least} px "
            f"at least, but they have {index.image_size}: use fewer"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed + 1)
        return PatchDiscriminator(
            channels=index.channels,
            base_channels=params.discriminator_channels,
            num_layers=params.discriminator_layers,
        )


@dataclass(frozen=True)
class LatentSet:
    """What a latent model is trained on.

    Args:
        index: the moments of all images.
        spec: of the first stage: network, scale, image size, sha256 of its weights.
    """

    index: ShardIndex
    spec: dict[str, Any]

    @property
    def sha256(self) -> str:
        return sha256_file(self.index.folder / NOTE)


def load_latents(folder: Path = paths.LATENTS) -> LatentSet:
    """The encode stage's output.

    Raises:
        UserError: it is missing or damaged.
    """
    index = load_index(folder)
    try:
        note = load_json(folder / NOTE)
        spec = note["first_stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / NOTE}: cannot be read ({error}); make it again with `dvc repro encode`") from None
    return LatentSet(index, spec)


def load_trained(folder: Path = paths.FIRST_STAGE) -> tuple[FirstStage, dict[str, Any]]:
    """The autoencoder stage's output, on the CPU and without a scale, and its model.json.

    Raises:
        UserError: it is missing or of another format.
    """
    spec = load_model_spec(folder, stage="autoencoder")
    network = build_autoencoder(spec)
    load_weights(folder, network)
    return FirstStage(network), spec


def load_first_stage(spec: dict[str, Any], weights: Path, device: torch.device | str) -> FirstStage | None:
    """The first stage that a model was trained on, from a file that must be the very same weights.

    Args:
        spec: of the model.
        weights: `first_stage.safetensors` in the model's folder, or the first stage's own file.
        device: where to decode.

    Returns:
        None for a model of pixels.

    Raises:
        UserError: the weights are missing or others.
    """
    if "first_stage" not in spec:
        return None
    first_stage = spec["first_stage"]
    if not weights.is_file():
        raise UserError(f"{weights} is missing, and the model's latents can't be decoded without: copy it again")
    found, expected = sha256_file(weights), first_stage["weights_sha256"]
    if found != expected:
        raise UserError(
            f"{weights} has sha256 {found[:12]}..., but the model was trained on latents of {expected[:12]}...: put "
            "the right weights back, or run `dvc repro` to encode and train again"
        )
    network = build_autoencoder(first_stage)
    load_weights(weights.parent, network, weights.name)
    return FirstStage(network.to(device), first_stage["scale"])


def build_x0(spec: dict[str, Any], seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What the loader gives, and places in the global order -> the data to noise: pixels, or drawn latents."""
    if "first_stage" not in spec:
        return pixels_to_x0
    return partial(make_latents, seed=seed, scale=spec["first_stage"]["scale"])
