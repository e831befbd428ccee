"""A classifier of noisy images, for classifier guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core.conditioning import timestep_embedding
from ddpm_core.nn.attention import SelfAttention
from ddpm_core.nn.blocks import Downsample, ResidualBlock, make_norm

POOLINGS = ("attention", "mean")


class AttentionPool(nn.Module):
    """The mean pixel attends to itself and to every pixel.

    **Source**: Radford et al. 2021 (CLIP), section 2.4, which Dhariwal and Nichol 2021 end their classifiers with.

    Args:
        channels: of the feature map.
        num_pixels: of the feature map.
        head_channels: at most this many channels a head: the fewest heads that divide `channels`.
    """

    def __init__(self, channels: int, num_pixels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(-(-channels // head_channels), channels + 1) if channels % n == 0)
        self.positions = nn.Parameter(torch.randn(1 + num_pixels, channels) / channels**0.5)
        self.to_query = nn.Linear(channels, channels)
        self.to_key_value = nn.Linear(channels, 2 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c)."""
        pixels = rearrange(x, "b c h w -> b (h w) c")
        tokens = torch.cat((pixels.mean(1, keepdim=True), pixels), dim=1) + self.positions
        query = rearrange(self.to_query(tokens[:, :1]), "b s (n d) -> b n s d", n=self.num_heads)
        key, value = rearrange(self.to_key_value(tokens), "b s (two n d) -> two b n s d", two=2, n=self.num_heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(mixed, "b n 1 d -> b (n d)"))  # type: ignore[no-any-return]


class NoisyClassifier(nn.Module):
    """The way down of the U-Net and a head: log p(y | x_t), up to a constant, at any diffusion step.

    **Source**: Dhariwal and Nichol 2021, section 4 and appendix H.

    Args:
        image_size, channels, base_channels, channel_multipliers, num_blocks, attention_resolutions, dropout: as in
            :class:`ddpm_core.nn.unet.UNet`.
        num_classes: at least 2.
        pooling: one of `POOLINGS`.

    Raises:
        ValueError: the image size can't be halved that often, there are too few classes, or the pooling is unknown.

    Example:
        >>> classifier = NoisyClassifier(image_size=8, channels=1, num_classes=10, base_channels=16)
        >>> classifier(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999])).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        base_channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2),
        num_blocks: int = 1,
        attention_resolutions: Sequence[int] = (4, 8, 16),
        dropout: float = 0.0,
        pooling: str = "attention",
    ) -> None:
        super().__init__()
        halvings = len(channel_multipliers) - 1
        if image_size % 2**halvings:
            raise ValueError(f"image_size {image_size} can't be halved {halvings} times, once for each multiplier")
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, expected at least 2")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown; known: {', '.join(POOLINGS)}")
        embedding_dim = 4 * base_channels
        self.base_channels = base_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.conv_in = nn.Conv2d(channels, base_channels, 3, padding=1)
        width, size = base_channels, image_size
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(channel_multipliers):
            for _ in range(num_blocks):
                self.down.append(ResidualBlock(width, multiplier * base_channels, embedding_dim, dropout))
                width = multiplier * base_channels
                if size in attention_resolutions:
                    self.down.append(SelfAttention(width))
            if level < halvings:
                self.down.append(Downsample(width))
                size //= 2
        self.norm_out = make_norm(width)
        self.pool = AttentionPool(width, size * size) if pooling == "attention" else None
        self.head = nn.Linear(width, num_classes)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(b, channels, image_size, image_size), (b,) diffusion steps -> (b, num_classes) logits."""
        embedding = functional.silu(self.time_mlp(timestep_embedding(t, self.base_channels).to(x_t.dtype)))
        h = self.conv_in(x_t)
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, ResidualBlock) else layer(h)
        h = functional.silu(self.norm_out(h))
        return self.head(h.mean((2, 3)) if self.pool is None else self.pool(h))  # type: ignore[no-any-return]
