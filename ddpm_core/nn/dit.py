"""The transformer that predicts eps, x0 or v."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ddpm_core.conditioning import ClassEmbedding, Condition, timestep_embedding
from ddpm_core.nn.attention import attend, make_head_norms
from ddpm_core.nn.blocks import zero_init
from ddpm_core.nn.network import DenoisingNetwork

WAVE_DIM = 256


def sine_cosine_positions(width: int, size: int) -> Tensor:
    """A fixed code for each place of a square grid: waves of the row, then waves of the column.

    **Source**: Vaswani et al. 2017, section 3.5, an axis each, as Peebles and Xie 2023 use it.

    Args:
        width: a multiple of 4.
        size: places along an axis.

    Returns:
        (size * size, width) float32, row by row.
    """
    waves = timestep_embedding(torch.arange(size), width // 2)
    rows, columns = waves[:, None].expand(-1, size, -1), waves[None].expand(size, -1, -1)
    return rearrange([rows, columns], "part y x d -> (y x) (part d)")


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale by 1 + `scale` and shift, each (b, 1, c), the (b, tokens, c) that a norm gave."""
    return tokens * (1 + scale) + shift


def xavier_init(layer: nn.Module) -> None:
    """Uniform weights whose variance is 2 / (fan in + fan out), and no bias; nothing for what has no weights."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class DiTBlock(nn.Module):
    """Self-attention, then an MLP, each behind a norm that the embedding modulates and a gate that starts closed.

    **Source**: Peebles and Xie 2023, section 3.2, adaLN-Zero.

    Args:
        width: channels of a token.
        num_heads: divides `width`.
        mlp_ratio: hidden channels of the MLP, in widths.
        dropout: probability, at the end of both branches.
        qk_norm: as in :func:`ddpm_core.nn.attention.make_head_norms`.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = make_head_norms(width // num_heads, qk_norm)
        self.to_out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        hidden = int(mlp_ratio * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)
        self.modulation = nn.Linear(width, 6 * width)
        for layer in (self.to_qkv, self.to_out, *self.mlp):
            xavier_init(layer)
        zero_init(self.modulation)

    def forward(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        """(b, width) activated, (b, tokens, width) -> (b, tokens, width)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(embedding)[:, None].chunk(6, dim=2)
        qkv = self.to_qkv(modulate(self.norm_attention(tokens), shift, scale))
        mixed = self.to_out(attend(qkv, self.num_heads, self.query_norm, self.key_norm))
        tokens = tokens + gate * self.dropout(mixed)
        hidden = self.mlp(modulate(self.norm_mlp(tokens), shift_mlp, scale_mlp))
        return tokens + gate_mlp * self.dropout(hidden)  # type: ignore[no-any-return]


class DiT(DenoisingNetwork):
    """A transformer over square patches of the image, told step and condition by adaptive layer norms.

    **Source**: Peebles and Xie 2023: patches as tokens, fixed sine-cosine positions, adaLN-Zero, final layer of zeros.
    Their DiT-S, -B and -L are width 384, 768 and 1024, depth 12, 12 and 24, heads 6, 12 and 16; the number behind the
    slash is `patch_size`.

    Args:
        image_size: height and width in pixels.
        channels: of the image.
        num_classes: 0 for a network without class embedding.
        patch_size: height and width of a patch in pixels; divides `image_size`. Halving it makes four times the tokens.
        width: channels of a token, and size of the embedding; a multiple of 4.
        depth: number of blocks.
        num_heads: of the attention; divides `width`.
        mlp_ratio: hidden channels of a block's MLP, in widths.
        dropout: in the blocks.
        context_channels, learned_variance, embedder, qk_norm: as in :class:`ddpm_core.UNet`; the embedder gives (b,
            width).

    Raises:
        ValueError: a size that must divide another does not, or both `num_classes` and `embedder` are given.

    Example:
        >>> network = DiT(image_size=8, channels=1, num_classes=10, width=32, depth=2, num_heads=2)
        >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.tensor([3, 10])).shape
        torch.Size([2, 1, 8, 8])
    """

    positions: Tensor

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int = 0,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        context_channels: int = 0,
        learned_variance: bool = False,
        embedder: nn.Module | None = None,
        qk_norm: bool = False,
    ) -> None:
        inside = channels + context_channels
        super().__init__(
            input_shape=(inside, image_size, image_size), wave_dim=WAVE_DIM, embedding_dim=width,
            num_classes=num_classes, embedder=embedder,
        )  # fmt: skip
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if width % 4 or width % num_heads:
            raise ValueError(f"width {width} is not a multiple of 4 and of num_heads {num_heads}")
        self.patch_size = patch_size
        self.patch_in = nn.Linear(inside * patch_size**2, width)
        positions = sine_cosine_positions(width, image_size // patch_size)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio, dropout, qk_norm) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * (1 + learned_variance) * patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        """As the authors do: small normal numbers for what embeds, zeros for what modulates the output and for it."""
        xavier_init(self.patch_in)
        for layer in self.time_mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        if isinstance(self.class_embedding, ClassEmbedding):
            nn.init.normal_(self.class_embedding.table.weight, std=0.02)
        zero_init(self.modulation_out)
        zero_init(self.patch_out)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition = None, time: Tensor | None = None) -> Tensor:
        """The network's output. Arguments, result and errors as those of :meth:`ddpm_core.UNet.forward`."""
        embedding, p = self.embed(x_t, t, condition, time), self.patch_size
        tokens = self.patch_in(rearrange(x_t, "b c (y p) (x q) -> b (y x) (c p q)", p=p, q=p)) + self.positions
        for block in self.blocks:
            tokens = self.run(block, embedding, tokens)
        shift, scale = self.modulation_out(embedding)[:, None].chunk(2, dim=2)
        patches = self.patch_out(modulate(self.norm_out(tokens), shift, scale))
        out: Tensor = rearrange(patches, "b (y x) (c p q) -> b c (y p) (x q)", y=x_t.shape[2] // p, p=p, q=p)
        return out
