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
        # Linear on (b, pixels, c), not 1 x 1 convolutions: heads come out with unit stride, as fused kernels want.
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        height = x.shape[2]
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(
            self.to_qkv(tokens), "b s (three n d) -> three b n s d", three=3, n=self.num_heads
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out = self.to_out(rearrange(mixed, "b n s d -> b s (n d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=height)  # type: ignore[no-any-return]
