"""Parts that feature networks are made of, few enough that :mod:`pipeline.engine.onnx` can write each down."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_NORM_EPSILON = 1e-3


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y.add_(x)


class Branches(nn.Module):
    """The channels of every branch, one behind the other."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Pool(nn.Module):
    """Mean over the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def fold(state: Mapping[str, Tensor], weight: str, norm: str) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a convolution without bias with the batch normalisation behind it folded in."""
    scale = state[f"{norm}.weight"].double() / (state[f"{norm}.running_var"].double() + _NORM_EPSILON).sqrt()
    bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
    return state[weight].double() * scale[:, None, None, None], bias


def make_convolution(
    weight: Tensor, bias: Tensor, stride: int, padding: int | tuple[int, int], groups: int = 1
) -> nn.Conv2d:
    """A float32 convolution of given weights, in channels_last order."""
    channels_out, channels_per_group, height, width = weight.shape
    convolution = nn.Conv2d(
        groups * channels_per_group,
        channels_out,
        (height, width),
        stride,
        padding,
        groups=groups,
        device="meta",  # so that no initial weights are drawn from the global generator
    )
    convolution.weight = nn.Parameter(weight.float().contiguous(memory_format=torch.channels_last))
    convolution.bias = nn.Parameter(bias.float())
    return convolution
