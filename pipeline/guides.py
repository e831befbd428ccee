"""What a sampling needs beside the model itself: its guides, and the images that contexts are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import paths
from pipeline.build.networks import build_network, build_schedule
from pipeline.data.index import ShardIndex, load_index
from pipeline.engine.checkpoint import GUIDE_NAME, load_model_spec, load_weights
from pipeline.errors import UserError
from pipeline.sections import SampleParams


def load_context_images(spec: dict[str, Any]) -> ShardIndex | None:
    """The real images that contexts are made of; None for a model without a context.

    Raises:
        UserError: they are not of the model's size, channels and classes.
    """
    if "context" not in spec:
        return None
    images, network = load_index(paths.SHARDS), spec["network"]
    found = (images.image_size, images.channels, list(images.classes))
    if found != (network["image_size"], network["channels"], spec["classes"]):
        raise UserError(f"{paths.SHARDS} holds other images than the model was trained on: run `dvc repro`")
    return images


def load_guide(folder: Path, spec: dict[str, Any], device: torch.device) -> nn.Module:
    """The model as it was at an earlier time, for autoguidance.

    Raises:
        UserError: the model was trained without one.
    """
    if not (folder / GUIDE_NAME).is_file():
        raise UserError(
            f"{folder} holds no {GUIDE_NAME}: set train.guide_images and train, or sample.autoguidance to 1"
        )
    network = build_network(spec)
    load_weights(folder, network, GUIDE_NAME)
    return network.to(device).eval().requires_grad_(False)


def load_classifier(folder: Path, spec: dict[str, Any], device: torch.device) -> nn.Module:
    """The classifier of noisy images for a model.

    Raises:
        UserError: there is none, or it was trained on other classes, images or noise.
    """
    if not (folder / "model.json").is_file():
        raise UserError(
            f"{folder} holds no classifier: train one with `python -m pipeline.classifier` as recipes/guided does, or "
            "set sample.classifier_scale to 0"
        )
    mine = load_model_spec(folder)
    shapes = ("image_size", "channels", "num_classes")
    same = mine["classes"] == spec["classes"] and all(mine["network"][k] == spec["network"][k] for k in shapes)
    if not same or not torch.equal(build_schedule(mine).betas, build_schedule(spec).betas):
        raise UserError(f"{folder} was trained on other classes, images or noise than the model: train it again")
    network = build_network(mine)
    load_weights(folder, network)
    return network.to(device).eval().requires_grad_(False)


def load_guides(
    params: SampleParams, spec: dict[str, Any], device: torch.device, *, model: Path, classifier: Path
) -> dict[str, nn.Module]:
    """What guides the sampling beside the model itself, under the names that `build_sampler` takes; nothing is
    read that params don't ask for."""
    guides = {}
    if params.autoguidance != 1:
        guides["guide"] = load_guide(model, spec, device)
    if params.classifier_scale != 0 and spec["classes"]:
        guides["classifier"] = load_classifier(classifier, spec, device)
    return guides
