"""Self-attention over the pixels of a feature map."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core.nn.blocks import make_norm, zero_init


class SelfAttention(nn.Module):
    """Every pixel attends to every pixel; added to the input, starting as the identity.

    Args:
        channels: of the feature map.
        head_channels: at most this many channels a head: the fewest heads that divide `channels`.
    """

    def __init__(self, channels: int, head_channels: int = 64) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(-(-channels // head_channels), channels + 1) if channels % n == 0)
        self.norm = make_norm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        height = x.shape[2]
        query, key, value = rearrange(
            self.to_qkv(self.norm(x)), "b (three n d) h w -> three b n (h w) d", three=3, n=self.num_heads
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return x + self.to_out(rearrange(mixed, "b n (h w) d -> b (n d) h w", h=height))  # type: ignore[no-any-return]
