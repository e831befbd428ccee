"""Exponential moving average of a network's weights, with a half-life counted in images."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A float32 copy of a network that follows it.

    **Source**: Karras et al. 2022 (EDM), appendix F.2: decay 0.5 ** (images / half-life), so that the width does not
    change with the batch size.

    Args:
        network: the bare network, not one wrapped for distributed training.
        half_life_images: images after which an old weight counts half; above 0.

    Raises:
        ValueError: the half-life is not positive.
    """

    def __init__(self, network: nn.Module, half_life_images: float) -> None:
        if half_life_images <= 0:
            raise ValueError(f"half_life_images is {half_life_images}, expected a positive number")
        self.half_life_images = half_life_images
        self.network = copy.deepcopy(network).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, num_images: int) -> None:
        """Follow `network` after an optimizer step over `num_images` images. Buffers are copied, not averaged."""
        decay = 0.5 ** (num_images / self.half_life_images)
        averages: list[Tensor] = list(self.network.parameters())
        current = [p.detach().float() for p in network.parameters()]
        torch._foreach_lerp_(averages, current, 1.0 - decay)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
