"""The convolutional parts of the U-Net and the autoencoder."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def make_norm(channels: int, *, affine: bool = True) -> nn.GroupNorm:
    """Group normalisation in at most 32 groups of equal size."""
    return nn.GroupNorm(math.gcd(32, channels), channels, affine=affine)


def zero_init(module: Layer) -> Layer:
    """The same layer with weights and bias of zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, modulated norm, SiLU, dropout, zero-initialised conv; added to the (projected) input.

    The embedding scales and shifts the second norm (adaptive group norm). **Source**: Dhariwal and Nichol 2021,
    section 3 and appendix A.

    Args:
        in_channels, out_channels: multiples of 8 keep the groups of the norm large enough.
        embedding_dim: size of the embedding of step and class; None for a block without one, whose second norm learns
            its own scale and shift.
        dropout: probability, before the last convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_in = make_norm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = None if embedding_dim is None else nn.Linear(embedding_dim, 2 * out_channels)
        self.norm_out = make_norm(out_channels, affine=embedding_dim is None)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(b, in, h, w), (b, embedding_dim) -> (b, out, h, w). The embedding comes already activated."""
        h = self.norm_out(self.conv_in(functional.silu(self.norm_in(x))))
        if self.modulation is not None:
            scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv_out(self.dropout(functional.silu(h)))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h / 2, w / 2)."""
        return self.conv(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, 2 h, 2 w)."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
