"""All that training changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpm_core import EMA

LOGGED = ("loss", "loss_simple", "loss_vlb", "grad_norm")
QUARTILES = ("loss_q0", "loss_q1", "loss_q2", "loss_q3")  # the loss by quarter of the chain, cleanest steps first
COLUMNS = ("images", *LOGGED, *QUARTILES, "learning_rate")
NUM_SUMS = len(LOGGED) + 2 * len(QUARTILES)


@dataclass
class TrainState:
    """Network, average, optimizer and how far they are. Randomness and data order need no state: both are keyed by
    position.

    Args:
        network: the bare network.
        ema: its average.
        optimizer: over the network's parameters.
        images_seen: progress.
        sums: (NUM_SUMS,) sums since the last row of `history`: of `LOGGED`, losses over images, the norm over steps;
            then of the losses in each quarter of the chain; then the number of images in each.
        history: the loss curve, one row of `COLUMNS` each time it was logged; a quarter that no image fell in is left
            out.
        guide: the average as it was at an earlier time, for autoguidance; None before that, or where none is asked for.
    """

    columns: ClassVar[tuple[str, ...]] = COLUMNS
    norm_place: ClassVar[int] = LOGGED.index("grad_norm")

    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    images_seen: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(NUM_SUMS, dtype=torch.float64))
    history: list[dict[str, float]] = field(default_factory=list)
    guide: dict[str, Tensor] | None = None

    def means(self, sums: Sequence[float], images: float, steps: float) -> dict[str, float]:
        """A row of the loss curve without its ends, from the sums over ranks since the last one."""
        logged, totals, counts = sums[: len(LOGGED)], sums[len(LOGGED) : -len(QUARTILES)], sums[-len(QUARTILES) :]
        divisors = (images, images, images, steps)
        row = {name: total / divisor for name, total, divisor in zip(LOGGED, logged, divisors, strict=True)}
        return row | {name: total / n for name, total, n in zip(QUARTILES, totals, counts, strict=True) if n}

    def tensors(self) -> dict[str, Any]:
        """What a resume needs beside `images_seen`, `history` and the average: tensors, numbers, dicts and lists."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "guide": self.guide,
        }

    def load(
        self,
        tensors: dict[str, Any],
        average: dict[str, Tensor],
        images_seen: int,
        history: list[dict[str, float]],
    ) -> None:
        """Take over what :meth:`tensors` gave. Strict: a missing or surplus weight is an error."""
        self.network.load_state_dict(tensors["network"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.ema.network.load_state_dict(average)
        self.sums.copy_(tensors["sums"])
        self.images_seen, self.history, self.guide = images_seen, history, tensors["guide"]
