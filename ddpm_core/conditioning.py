"""What the network is told beside the noisy image: the diffusion step and the class."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Condition = Tensor | Mapping[str, Tensor] | None
"""What a denoiser is told: (b,) labels or another (b, ...) query, several of them by name, or nothing."""


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of t at geometrically spaced frequencies.

    **Source**: Vaswani et al. 2017, section 3.5, with all cosines first, as Ho et al. 2020 use it.

    Args:
        t: (b,) diffusion steps, integer or float.
        dim: even size of the embedding.
        max_period: the slowest wave has this period over 2 pi.

    Returns:
        (b, dim) float32.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}, expected an even number")
    exponent = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angle = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


class ClassEmbedding(nn.Module):
    """A table with one row a class and a last one for "no class".

    Args:
        num_classes: at least 1.
        dim: size of a row.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def forward(self, labels: Tensor | None, batch_size: int) -> Tensor:
        """(b, dim) rows for (b,) int64 labels in [0, num_classes]; the null row for all when `labels` is None."""
        if labels is None:
            return self.table.weight[self.null_label].expand(batch_size, -1)
        return self.table(labels)  # type: ignore[no-any-return]


def drop_labels(labels: Tensor, drop: Tensor, null_label: int) -> Tensor:
    """Replace labels by the null label where `drop` is true, so that one network learns both with and without.

    **Source**: Ho and Salimans 2022, algorithm 1.

    Args:
        labels: (b,) int64.
        drop: (b,) bool, drawn by the caller.
        null_label: the number of classes.

    Returns:
        (b,) int64, a new tensor.

    Example:
        >>> drop_labels(torch.tensor([3, 1]), torch.tensor([False, True]), 10).tolist()
        [3, 10]
    """
    return torch.where(drop, torch.full_like(labels, null_label), labels)
