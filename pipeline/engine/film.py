"""How samples come out of noise, as one picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.pixels import make_grid
from pipeline.engine.generate import ImageSampler
from pipeline.runtime.rng import Stream, draw_normal


def draw_film(sampler: ImageSampler, seeds: Tensor, columns: int) -> NDArray[np.uint8]:
    """Two rows a sample, time from left to right: x_t as the network sees it, and below it the x0 it predicts from it.

    The samples are drawn anew, in a batch of their own: those that are kept stay as they are.

    Args:
        sampler: seeds -> images of 1 or 3 channels.
        seeds: (b,) int64 on the network's device.
        columns: steps shown, at most; evenly spread over all, with the first and the last, whose x0 is the sample.

    Returns:
        (H, W, 3) uint8.
    """
    before, predicted = [draw_normal(sampler.seed, Stream.SAMPLE, seeds, sampler.shape)], []

    def keep(k: int, x: Tensor, x0: Tensor) -> None:
        before.append(x)
        predicted.append(x0)

    sampler(seeds, callback=keep)
    steps = len(predicted)
    shown = torch.linspace(0, steps - 1, min(columns, steps)).round().int().tolist()
    frames = torch.stack([torch.stack([kept[step] for step in shown], dim=1) for kept in (before, predicted)], dim=1)
    return make_grid(sampler.to_pixels(frames.flatten(0, 2)).cpu().numpy(), len(shown))
