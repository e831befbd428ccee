"""What our denoisers share: how they are told the step and the condition, and blocks that save memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ddpm_core.conditioning import ClassEmbedding, Condition, timestep_embedding


class DenoisingNetwork(nn.Module):
    """A denoiser's outside: `network(x_t, t, condition)`. A subclass adds the inside and `forward`.

    Set `activation_checkpointing` to keep only the inputs of the blocks in the forward pass and to compute the rest
    again in the backward pass: a third more computation, a fraction of the memory, the same gradients bit for bit.
    Dropout draws the same again.

    Args:
        input_shape: (channels + context_channels, height, width) of x_t.
        wave_dim: even number of sines and cosines that stand for a step.
        embedding_dim: size of the embedding.
        num_classes: 0 for a network without class embedding.
        embedder: instead of `num_classes`, what else makes an embedding of a condition: `embedder(condition,
            batch_size)` -> (b, embedding_dim).

    Raises:
        ValueError: both `num_classes` and `embedder` are given.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[int, int, int],
        wave_dim: int,
        embedding_dim: int,
        num_classes: int,
        embedder: nn.Module | None,
    ) -> None:
        super().__init__()
        if num_classes and embedder is not None:
            raise ValueError("num_classes and embedder are both given: the embedder alone knows the condition")
        self.input_shape = input_shape
        self.activation_checkpointing = False
        self.wave_dim = wave_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(wave_dim, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim)
        )
        self.class_embedding = ClassEmbedding(num_classes, embedding_dim) if num_classes else embedder

    def embed(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """(b, embedding_dim) of step and condition, added and activated.

        Raises:
            ValueError: a condition is given to a network that takes none.
        """
        embedding: Tensor = self.time_mlp(timestep_embedding(t, self.wave_dim).to(x_t.dtype))
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(condition, len(x_t))
        elif condition is not None:
            raise ValueError("a condition is given, but the network was built with num_classes=0 and no embedder")
        return functional.silu(embedding)

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, without what it computes on the way being kept where `activation_checkpointing` is set."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]
