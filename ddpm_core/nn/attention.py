"""Self-attention: over tokens, and over the pixels of a feature map."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core.nn.blocks import make_norm, zero_init


def count_heads(channels: int, head_channels: int = 64) -> int:
    """The fewest heads that divide `channels` into at most `head_channels` each.

    Example:
        >>> count_heads(48), count_heads(96), count_heads(384)
        (1, 2, 6)
    """
    return next(n for n in range(-(-channels // head_channels), channels + 1) if channels % n == 0)


class HeadNorm(nn.RMSNorm):
    """Root-mean-square norm of the last axis with a learned scale, computed in the scale's precision.

    Under autocast the scale is float32 and the input bfloat16, which torch's own refuses to fuse, with a warning.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), of the dtype of x."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def make_head_norms(head_channels: int, qk_norm: bool) -> tuple[nn.Module, nn.Module]:
    """Norms of queries and keys, each within a head, or nothing in their place.

    They bound the logits of attention, which otherwise grow in long trainings until bfloat16 fails.

    **Source**: Henry et al. 2020 (QKNorm), in the form of Esser et al. 2024, section 5.3.2.
    """
    if not qk_norm:
        return nn.Identity(), nn.Identity()
    return HeadNorm(head_channels, eps=1e-6), HeadNorm(head_channels, eps=1e-6)


def attend(qkv: Tensor, num_heads: int, query_norm: nn.Module, key_norm: nn.Module) -> Tensor:
    """Scaled dot-product attention of all tokens to all.

    Args:
        qkv: (b, tokens, 3 c): queries, keys and values, each by head.
        num_heads: divides c.
        query_norm, key_norm: applied to (b, heads, tokens, c / heads).

    Returns:
        (b, tokens, c).
    """
    query, key, value = rearrange(qkv, "b s (three n d) -> three b n s d", three=3, n=num_heads)
    mixed = functional.scaled_dot_product_attention(query_norm(query), key_norm(key), value)
    return rearrange(mixed, "b n s d -> b s (n d)")


class SelfAttention(nn.Module):
    """Every pixel attends to every pixel; added to the input, starting as the identity.

    Args:
        channels: of the feature map.
        head_channels: at most this many channels a head, as in :func:`count_heads`.
        qk_norm: normalise queries and keys, as in :func:`make_head_norms`.
    """

    def __init__(self, channels: int, head_channels: int = 64, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = count_heads(channels, head_channels)
        self.norm = make_norm(channels)
        # Linear on (b, pixels, c), not 1 x 1 convolutions: heads come out with unit stride, as fused kernels want.
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))
        self.query_norm, self.key_norm = make_head_norms(channels // self.num_heads, qk_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        out = self.to_out(attend(self.to_qkv(tokens), self.num_heads, self.query_norm, self.key_norm))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])  # type: ignore[no-any-return]
