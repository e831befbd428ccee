"""Denoisers that wrap a denoiser: a sampler sees no difference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (b, ...), t (b,) int64, condition or None) -> the network's output, of the shape of x_t."""


class ClassifierFreeGuidance:
    """null + scale * (conditional - null): 1 is purely conditional, 0 purely unconditional, above 1 sharpens.

    Both are one batched call; at 0 and 1 only the one that counts is made. eps, x0 and v are linear in each other given
    x_t, so guiding any of them guides all.

    **Source**: Ho and Salimans 2022, equation 6, whose w is our scale - 1.

    Args:
        denoiser: takes labels in [0, null_label].
        scale: the guidance scale.
        null_label: the label of "no class".
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_label: int) -> None:
        self.denoiser = denoiser
        self.scale = scale
        self.null_label = null_label

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided output; with `condition` None it is the unconditional one.

        Args:
            x_t: (b, ...).
            t: (b,) int64.
            condition: (b,) int64 labels or None.

        Raises:
            TypeError: several conditions by name.
        """
        if condition is None or self.scale == 1:
            return self.denoiser(x_t, t, condition)
        if not isinstance(condition, Tensor):
            raise TypeError("guidance knows a null for labels alone, not for several conditions")
        labels = condition
        null = torch.full_like(labels, self.null_label)
        if self.scale == 0:
            return self.denoiser(x_t, t, null)
        both = self.denoiser(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((labels, null)))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)
