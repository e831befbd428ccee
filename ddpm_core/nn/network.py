"""What our denoisers share: how they are told the step and the condition, and blocks that save memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ddpm_core.conditioning import ClassEmbedding, Condition, timestep_embedding

if TYPE_CHECKING:
    from ddpm_core.guidance import Denoiser
    from ddpm_core.samplers.grid import Step


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

    def at_step(self, step: Step) -> Denoiser:
        """The same at one step of a chain: the step's embedding is computed here, once and for one row, not in every
        call for every sample."""
        weight = next(self.time_mlp.parameters())
        wave = timestep_embedding(torch.tensor([step.t], device=weight.device), self.wave_dim)
        return partial(self, time=self.time_mlp(wave.to(weight.dtype)))

    def embed(self, x_t: Tensor, t: Tensor, condition: Condition, time: Tensor | None = None) -> Tensor:
        """(b, embedding_dim) of step and condition, added and activated. `time`, (1, embedding_dim), is the step's part
        where the caller has it.

        Raises:
            ValueError: a condition is given to a network that takes none.
        """
        if time is None:
            time = self.time_mlp(timestep_embedding(t, self.wave_dim).to(x_t.dtype))
        embedding: Tensor = time.expand(len(x_t), -1)
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
