"""What the network is told beside the noisy image: the step, the class, other queries by name, a clean context.

An embedder is a module called as `embedder(query, batch_size)` -> (b, dim); a query of None is "nothing" for all. Its
`null` is what stands for "nothing" in the place of one sample's query: a label one beyond the last, or NaN where
queries are numbers. That is how a condition is dropped in training and left out for classifier-free guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ddpm_core.guidance import Denoiser
    from ddpm_core.samplers.grid import Step

Condition = Tensor | Mapping[str, Tensor] | None
"""What a denoiser is told: (b,) labels or another (b, ...) query, several of them by name, or nothing."""

Null = int | Tensor
"""What stands for "nothing" in the place of one sample's query."""

CONTEXT = "context"
"""The name of the condition that :class:`ContextConcat` takes."""


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

    @property
    def null(self) -> int:
        """The same under the name that every embedder has."""
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


class Conditions(nn.Module):
    """Several conditions at once: each has an embedder, and the network gets the sum of what they say.

    A name that is left out counts as "nothing". In training under DDP give every name, dropped by
    :func:`drop_conditions` where need be: what a left-out name skips gets no gradient, which DDP takes for an error.

    Args:
        embedders: name -> embedder, all of one output size.

    Example:
        >>> conditions = Conditions({"class": ClassEmbedding(10, 8), "size": ClassEmbedding(3, 8)})
        >>> conditions({"class": torch.tensor([3, 1])}, 2).shape
        torch.Size([2, 8])
        >>> conditions.null
        {'class': 10, 'size': 3}
    """

    def __init__(self, embedders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not embedders:
            raise ValueError("no embedders: a network without conditions needs none")
        self.embedders = nn.ModuleDict(embedders)

    @property
    def null(self) -> dict[str, Null]:
        """Name -> what stands for "nothing" there; the `null` of guidance and of :func:`drop_conditions`."""
        return {name: embedder.null for name, embedder in self.embedders.items()}  # type: ignore[misc]

    def forward(self, condition: Condition, batch_size: int) -> Tensor:
        """The sum of the embeddings.

        Args:
            condition: name -> (b, ...) query as its embedder takes it; None is "nothing" everywhere.
            batch_size: b.

        Returns:
            (b, dim).

        Raises:
            TypeError: a condition without a name.
            ValueError: an unknown name.
        """
        if condition is None:
            condition = {}
        if isinstance(condition, Tensor):
            raise TypeError(f"one condition without a name, expected a mapping with names of {list(self.embedders)}")
        if unknown := sorted(set(condition) - set(self.embedders)):
            raise ValueError(f"conditions {unknown} are unknown; known: {', '.join(self.embedders)}")
        rows = [embedder(condition.get(name), batch_size) for name, embedder in self.embedders.items()]
        return torch.stack(rows).sum(0)


def drop_conditions(
    condition: Mapping[str, Tensor], drop: Mapping[str, Tensor], null: Mapping[str, Null]
) -> dict[str, Tensor]:
    """:func:`drop_labels` for several conditions, each with a mask of its own.

    Args:
        condition: name -> (b, ...).
        drop: name -> (b,) bool, drawn by the caller; a name that is left out is never dropped.
        null: name -> null, as `Conditions.null`.

    Returns:
        name -> (b, ...), new tensors where something may be dropped.

    Raises:
        ValueError: `drop` has a name that the condition or the nulls lack.

    Example:
        >>> query = {"class": torch.tensor([3, 1]), "angle": torch.tensor([[0.5], [0.1]])}
        >>> both = {"class": torch.tensor([True, False]), "angle": torch.tensor([False, True])}
        >>> dropped = drop_conditions(query, both, {"class": 10, "angle": torch.tensor(torch.nan)})
        >>> dropped["class"].tolist(), dropped["angle"].flatten().tolist()
        ([10, 1], [0.5, nan])
    """
    if unknown := sorted(drop.keys() - (condition.keys() & null.keys())):
        raise ValueError(f"can't drop {unknown}; conditions: {sorted(condition)}, with a null: {sorted(null)}")

    def dropped(name: str, query: Tensor) -> Tensor:
        mask = drop[name].reshape(-1, *(1,) * (query.ndim - 1))
        return torch.where(mask, torch.as_tensor(null[name], dtype=query.dtype, device=query.device), query)

    return {name: dropped(name, query) if name in drop else query for name, query in condition.items()}


class ContextConcat(nn.Module):
    """A network that also sees clean channels: they are put after those of x_t and never noised, predicted or returned.

    Losses and samplers know nothing of it: what they noise is x_t, what they get back is of x_t.

    **Source**: Saharia et al. 2022 (SR3), section 2.3; Rombach et al. 2022, section 3.3.

    Args:
        network: takes (b, c + k, ...) and returns (b, c, ...), as `UNet` with `context_channels` k does. It gets the
            conditions other than "context", by name, or None where there are none.

    Example:
        >>> from ddpm_core import UNet
        >>> network = ContextConcat(UNet(image_size=8, channels=3, context_channels=1, base_channels=8))
        >>> network(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]), {"context": torch.zeros(2, 1, 8, 8)}).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def at_step(self, step: Step) -> Denoiser:
        """The same around what the network is at one step of a chain."""
        if not hasattr(type(self.network), "at_step"):
            return self
        return partial(self, **self.network.at_step(step).keywords)  # type: ignore[operator]

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition = None, **known: Tensor) -> Tensor:
        """The network's output.

        Args:
            x_t: (b, c, ...).
            t: (b,) diffusion steps.
            condition: must have "context", (b, k, ...) of x_t's other sizes.
            known: passed on: what :meth:`at_step` computed once.

        Returns:
            what the network returns: (b, c, ...), or twice the channels with a learned variance.

        Raises:
            ValueError: there is no context, or it is of other images than x_t.
        """
        if condition is None or isinstance(condition, Tensor) or CONTEXT not in condition:
            raise ValueError(f"the network needs a condition named {CONTEXT!r}: {{{CONTEXT!r}: (b, k, ...)}}")
        rest = dict(condition)
        context = rest.pop(CONTEXT)
        if (len(context), *context.shape[2:]) != (len(x_t), *x_t.shape[2:]):
            raise ValueError(
                f"context has shape {tuple(context.shape)}, x_t {tuple(x_t.shape)}: only axis 1 may differ"
            )
        output: Tensor = self.network(torch.cat((x_t, context.to(x_t.dtype)), dim=1), t, rest or None, **known)
        return output


def composite(x0: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """mask x0 + (1 - mask) known: what is known comes back exactly. To be done after a sampler's last step.

    Args:
        x0: (b, c, ...) samples.
        known: of that shape; what it holds under the mask does not matter, as long as it is finite.
        mask: broadcasts to that shape; 1 where x0 counts, 0 where the known does.

    Returns:
        of that shape.

    Example:
        >>> composite(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0]), torch.tensor([1.0, 0.0])).tolist()
        [1.0, 6.0]
    """
    return mask * x0 + (1 - mask) * known
