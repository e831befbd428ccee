"""The U-Net that predicts eps, x0 or v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core.conditioning import Condition
from ddpm_core.nn.attention import SelfAttention
from ddpm_core.nn.blocks import Downsample, ResidualBlock, Upsample, make_norm, zero_init
from ddpm_core.nn.network import DenoisingNetwork


class Stage(nn.Module):
    """A residual block and, where asked for, self-attention after it."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, dropout: float, attend: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, embedding_dim, dropout)
        self.attention = SelfAttention(out_channels, qk_norm=qk_norm) if attend else nn.Identity()

    def forward(self, embedding: Tensor, x: Tensor, *skip: Tensor) -> Tensor:
        """(b, embedding_dim), (b, in, h, w), or that in two parts -> (b, out, h, w)."""
        x = torch.cat((x, *skip), dim=1) if skip else x
        return self.attention(self.block(x, embedding))  # type: ignore[no-any-return]


class UNet(DenoisingNetwork):
    """Residual blocks down and up a pyramid of resolutions, joined by skip connections.

    **Source**: Ho et al. 2020, appendix B, with the adaptive group norm, zero-initialised residual outputs and heads of
    64 channels of Dhariwal and Nichol 2021.

    Args:
        image_size: height and width in pixels; divisible by 2 ** (levels - 1).
        channels: of the image.
        num_classes: 0 for a network without class embedding.
        base_channels: channels at full resolution; a multiple of 8.
        channel_multipliers: one for each resolution, full resolution first.
        num_blocks: residual blocks at each resolution on the way down (one more on the way up).
        attention_resolutions: heights in pixels at which blocks are followed by self-attention.
        dropout: in the residual blocks.
        context_channels: clean channels that the caller puts after those of x_t; never predicted.
        learned_variance: predict also the interpolation between the bounds of the variance: twice the output channels.
        embedder: instead of `num_classes`, what else makes an embedding of a condition: `embedder(condition,
            batch_size)` -> (b, 4 * base_channels).
        qk_norm: normalise queries and keys of the attention, for long trainings in bfloat16.

    Raises:
        ValueError: the image size can't be halved that often, or both `num_classes` and `embedder` are given.

    Example:
        >>> network = UNet(image_size=8, channels=1, num_classes=10, base_channels=16)
        >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        base_channels: int = 64,
        channel_multipliers: Sequence[int] = (1, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 8, 16),
        dropout: float = 0.0,
        context_channels: int = 0,
        learned_variance: bool = False,
        embedder: nn.Module | None = None,
        qk_norm: bool = False,
    ) -> None:
        embedding_dim = 4 * base_channels
        super().__init__(
            input_shape=(channels + context_channels, image_size, image_size), wave_dim=base_channels,
            embedding_dim=embedding_dim, num_classes=num_classes, embedder=embedder,
        )  # fmt: skip
        levels = len(channel_multipliers)
        if image_size % 2 ** (levels - 1):
            raise ValueError(f"image_size {image_size} can't be halved {levels - 1} times, once for each multiplier")
        self.conv_in = nn.Conv2d(channels + context_channels, base_channels, 3, padding=1)

        def stage(inside: int, outside: int, size: int) -> Stage:
            return Stage(inside, outside, embedding_dim, dropout, size in attention_resolutions, qk_norm)

        width, size, skips = base_channels, image_size, [base_channels]
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(num_blocks):
                self.down.append(stage(width, multiplier * base_channels, size))
                width = multiplier * base_channels
                skips.append(width)
            if level < levels - 1:
                self.down.append(Downsample(width))
                size //= 2
                skips.append(width)
        self.middle_in = Stage(width, width, embedding_dim, dropout, attend=True, qk_norm=qk_norm)
        self.middle_out = Stage(width, width, embedding_dim, dropout, attend=False, qk_norm=qk_norm)
        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(num_blocks + 1):
                self.up.append(stage(width + skips.pop(), multiplier * base_channels, size))
                width = multiplier * base_channels
            if level > 0:
                self.up.append(Upsample(width))
                size *= 2
        self.norm_out = make_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, channels * (1 + learned_variance), 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition = None, time: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x_t: (b, channels + context_channels, image_size, image_size).
            t: (b,) diffusion steps.
            condition: (b,) int64 labels in [0, num_classes], num_classes being "no class"; None is "no class" for all.
                With an embedder: what that takes.
            time: (1, embedding_dim) of the step where all have the same, as :meth:`at_step` gives it.

        Returns:
            (b, channels, image_size, image_size); twice the channels with a learned variance.

        Raises:
            ValueError: a condition is given to a network that takes none.
        """
        embedding = self.embed(x_t, t, condition, time)
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = self.run(layer, embedding, h) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        h = self.run(self.middle_out, embedding, self.run(self.middle_in, embedding, h))
        for layer in self.up:
            h = self.run(layer, embedding, h, skips.pop()) if isinstance(layer, Stage) else layer(h)
        return self.conv_out(functional.silu(self.norm_out(h)))  # type: ignore[no-any-return]
