"""The one place where stored bytes become the numbers of the model, and back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], contiguous: convolutions of another layout round otherwise."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def pixels_to_x0(images: Tensor, places: Tensor) -> Tensor:
    """uint8 pixels -> [-1, 1], whatever the place: what a step of training takes from the loader."""
    return to_unit_range(images)


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 by rounding, clipped; undoes :func:`to_unit_range` for all 256 levels.

    Example:
        >>> levels = torch.arange(256, dtype=torch.uint8)
        >>> torch.equal(to_uint8(to_unit_range(levels)), levels)
        True
    """
    return images.add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def make_grid(images: NDArray[np.uint8], columns: int, *, gap: int = 2, least_px: int = 32) -> NDArray[np.uint8]:
    """Lay images out row by row on white.

    Args:
        images: (n, c, h, w) with c of 1 or 3.
        columns: images a row.
        gap: white pixels between images.
        least_px: small images are enlarged by a whole factor, pixel by pixel, to at least this height.

    Returns:
        (H, W, 3) uint8.
    """
    num, _, height, width = images.shape
    factor = -(-least_px // height)
    rgb = np.broadcast_to(images, (num, 3, height, width)).repeat(factor, axis=2).repeat(factor, axis=3)
    tall, wide = height * factor + gap, width * factor + gap
    rows = -(-num // columns)
    canvas = np.full((rows * tall + gap, columns * wide + gap, 3), 255, dtype=np.uint8)
    for place, image in enumerate(rgb):
        top, left = gap + place // columns * tall, gap + place % columns * wide
        canvas[top : top + tall - gap, left : left + wide - gap] = image.transpose(1, 2, 0)
    return canvas
