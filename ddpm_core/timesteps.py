"""Which diffusion steps a batch is trained on, from uniform numbers that the caller draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HISTORY = 10
UNIFORM_SHARE = 1e-3


def uniform_timesteps(u: Tensor, num_timesteps: int) -> Tensor:
    """Every step equally often.

    Args:
        u: (b,) float64 in [0, 1).
        num_timesteps: T.

    Returns:
        (b,) int64 in [0, T).

    Example:
        >>> uniform_timesteps(torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64), 1000).tolist()
        [0, 500, 999]
    """
    return (u * num_timesteps).to(torch.int64)


def stratified_timesteps(u: Tensor, num_timesteps: int, places: Tensor, batch_size: int) -> Tensor:
    """One step from each of `batch_size` equal parts of the range, so that a batch's mean loss varies less.

    Averaged over the batch every step is equally often, so the gradient of the batch's mean is unbiased; a single
    place always gets the same part, hence the order of the images must be random.

    Args:
        u: (b,) float64 in [0, 1).
        num_timesteps: T.
        places: (b,) int64 in [0, batch_size), of the images in the whole batch; b may be a part of it.
        batch_size: of the whole batch, over all ranks.

    Returns:
        (b,) int64 in [0, T).

    Example:
        >>> u = torch.zeros(4, dtype=torch.float64)
        >>> stratified_timesteps(u, 1000, torch.arange(4), 4).tolist()
        [0, 250, 500, 750]
    """
    # The sum rounds: u a little below 1 in the last part may come out as T.
    return ((places + u) / batch_size * num_timesteps).to(torch.int64).clamp(max=num_timesteps - 1)


class LossAwareTimesteps:
    """Steps drawn in proportion to the root mean square of their last losses, with the weights that undo the bias.

    Uniform until every step has `HISTORY` losses. The state is a function of the sequence of (t, loss) pairs alone:
    with several ranks, gather the pairs of all, in the order of the images, and update each rank with all of them.

    **Source**: Nichol and Dhariwal 2021, section 3.3; 0.1 % uniform as in their code.

    Args:
        num_timesteps: T, at least 1.
        device: where the history is kept, and `t` and the losses are expected.

    Raises:
        ValueError: T is below 1.

    Example:
        >>> sampler = LossAwareTimesteps(2)
        >>> sampler.update(torch.tensor([0, 1]).repeat(10), torch.tensor([1.0, 3.0]).repeat(10))
        >>> [round(p, 5) for p in sampler.probabilities().tolist()]
        [0.25025, 0.74975]
    """

    def __init__(self, num_timesteps: int, device: torch.device | str = "cpu") -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is {num_timesteps}, expected at least 1")
        self.history = torch.zeros(num_timesteps, HISTORY, dtype=torch.float64, device=device)
        self.count = torch.zeros(num_timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """(T,) float64 that sum to 1, each at least 0.1 % of 1 / T."""
        size = self.history.square().mean(1).sqrt()
        total = size.sum()
        uniform = torch.full_like(size, 1 / len(size))
        ready = (self.count >= HISTORY).all() & (total > 0)
        aware = (1 - UNIFORM_SHARE) * size / torch.where(ready, total, 1.0) + UNIFORM_SHARE * uniform
        return torch.where(ready, aware, uniform)

    def timesteps(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Steps for a batch, by inversion of the cumulative distribution.

        Args:
            u: (b,) float64 in [0, 1).

        Returns:
            t (b,) int64 in [0, T), and weights (b,) float64, 1 / (T p_t): the mean of weight times loss estimates the
            mean loss under uniform steps without bias.
        """
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
        return t, 1 / (len(p) * p[t])

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in losses, without their weights; of more than `HISTORY` for one step the last ones stay.

        Args:
            t: (b,) int64 in [0, T); not checked.
            losses: (b,).

        Raises:
            ValueError: the shapes differ.
        """
        if t.shape != losses.shape or t.ndim != 1:
            raise ValueError(f"t {tuple(t.shape)} and losses {tuple(losses.shape)} must be (b,) alike")
        order = torch.argsort(t, stable=True)
        t, losses = t[order], losses[order].to(self.history.dtype)
        added = torch.bincount(t, minlength=len(self.count))
        rank = torch.arange(len(t), device=t.device) - (added.cumsum(0) - added)[t]  # place among the equal t
        kept = rank >= added[t] - HISTORY
        t, rank, losses = t[kept], rank[kept], losses[kept]
        self.history[t, (self.count[t] + rank) % HISTORY] = losses
        self.count += added

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the losses and of how many each step has had."""
        return {"history": self.history.clone(), "count": self.count.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: the state is of another T.
            KeyError: it lacks a tensor.
        """
        if state["history"].shape != self.history.shape or state["count"].shape != self.count.shape:
            raise ValueError(f"state is of {len(state['history'])} timesteps, expected {len(self.history)}")
        self.history.copy_(state["history"])
        self.count.copy_(state["count"])
