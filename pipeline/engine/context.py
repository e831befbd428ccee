"""What a model is told of an image beside noise: clean channels, made of the image itself.

A maker turns images into contexts, the same way in training, in sampling from the shards and for a user's own images.
Its only randomness is `u(k)`: the k-th number in [0, 1) of each image, which the caller keys by place or by seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ddpm_core import Condition, composite
from ddpm_core.conditioning import CONTEXT
from pipeline.data.index import ShardIndex
from pipeline.data.pixels import to_uint8, to_unit_range
from pipeline.data.store import ShardStore
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream, draw_permutation, draw_uniform

LABEL = "label"
_LUMA = (19595, 38470, 7471)  # ITU-R 601 in parts of 2**16, as Pillow turns colour into grey
_CHUNK = 1000

Uniform = Callable[[int], Tensor]


@dataclass(frozen=True)
class Context:
    """Contexts of b images.

    Args:
        channels: (b, k, h, w) what the network sees.
        picture: (b, c, h, w) in [-1, 1], the same for the eye; where `mask` is 0 it is the image itself.
        mask: (b, 1, h, w), 1 where pixels are to be predicted; None: everywhere.
        hole: (b, 4) int64 of top, left, height and width of a rectangle that holds all of them; None without one.
    """

    channels: Tensor
    picture: Tensor
    mask: Tensor | None = None
    hole: Tensor | None = None

    def complete(self, samples: Tensor) -> Tensor:
        """A sampler's (b, c, h, w) result with the known pixels in their place."""
        return samples if self.mask is None else composite(samples, self.picture, self.mask)


class ContextMaker(Protocol):
    """One kind of context."""

    def num_channels(self, channels: int) -> int:
        """Channels of the context for images of so many."""
        ...

    def __call__(self, x0: Tensor, u: Uniform) -> Context:
        """Contexts of (b, c, h, w) images in [-1, 1]."""
        ...

    def from_user(self, images: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Context:
        """Contexts from what a user has.

        Args:
            images: (b, c, h, w) float in [-1, 1], of the levels of uint8.
            mask: (b, 1, h, w) bool, true where pixels are to be predicted, or None.
            shape: (c, h, w) of the model's images.

        Raises:
            UserError: these are not what this kind takes.
        """
        ...


@dataclass(frozen=True)
class Inpaint:
    """The image with a rectangle left out, and where that is. Sides are a quarter to three quarters of the image's."""

    def num_channels(self, channels: int) -> int:
        return channels + 1

    def __call__(self, x0: Tensor, u: Uniform) -> Context:
        hole = draw_hole(u, x0.shape[2], x0.shape[3])
        top, left, height, width = hole[:, :, None, None].unbind(1)
        row = torch.arange(x0.shape[2], device=x0.device)[:, None]
        column = torch.arange(x0.shape[3], device=x0.device)
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        return self._make(x0, inside[:, None].float(), hole)

    def from_user(self, images: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Context:
        _check_shape(images, shape, "images to paint into")
        if mask is None or mask.shape != (len(images), 1, *shape[1:]):
            found = "none" if mask is None else str(tuple(mask.shape))
            raise UserError(f"mask is {found}, expected {(len(images), 1, *shape[1:])}: true where pixels are missing")
        return self._make(images, mask.float(), None)

    def _make(self, x0: Tensor, mask: Tensor, hole: Tensor | None) -> Context:
        picture = x0 * (1 - mask)  # mid-grey where unknown
        return Context(torch.cat((picture, 2 * mask - 1), dim=1), picture, mask, hole)


def draw_hole(u: Uniform, height: int, width: int) -> Tensor:
    """(b, 4) int64 top, left, height, width of rectangles inside an image.

    Example:
        >>> draw_hole(lambda k: torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64), 8, 8).tolist()
        [[0, 0, 2, 2], [2, 2, 4, 4], [2, 2, 6, 6]]
    """
    parts = []
    for k, side in enumerate((height, width)):
        least, most = max(1, side // 4), max(1, 3 * side // 4)
        size = least + (u(2 * k) * (most - least + 1)).long()
        parts.append(((u(2 * k + 1) * (side - size + 1)).long(), size))
    return torch.stack((parts[0][0], parts[1][0], parts[0][1], parts[1][1]), dim=1)


@dataclass(frozen=True)
class SuperResolution:
    """The image made `factor` times smaller by averaging (in levels of uint8, as a file holds it), and large again by
    bicubic interpolation."""

    factor: int

    def num_channels(self, channels: int) -> int:
        return channels

    def __call__(self, x0: Tensor, u: Uniform) -> Context:
        small = functional.avg_pool2d(to_uint8(x0).float(), self.factor).round().to(torch.uint8)
        return self._enlarge(to_unit_range(small))

    def from_user(self, images: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Context:
        _refuse_mask(mask)
        _check_shape(images, (shape[0], *(side // self.factor for side in shape[1:])), "small images")
        return self._enlarge(images)

    def _enlarge(self, small: Tensor) -> Context:
        large = functional.interpolate(small, scale_factor=self.factor, mode="bicubic", align_corners=False)
        large = large.clamp(-1, 1)
        return Context(large, large)


@dataclass(frozen=True)
class Colour:
    """The grey version of a colour image."""

    def num_channels(self, channels: int) -> int:
        return 1

    def __call__(self, x0: Tensor, u: Uniform) -> Context:
        red, green, blue = to_uint8(x0).long().split(1, dim=1)  # type: ignore[no-untyped-call]
        grey = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue + (1 << 15)) >> 16
        return self._make(to_unit_range(grey))

    def from_user(self, images: Tensor, mask: Tensor | None, shape: tuple[int, ...]) -> Context:
        _refuse_mask(mask)
        _check_shape(images, (1, *shape[1:]), "grey images")
        return self._make(images)

    def _make(self, grey: Tensor) -> Context:
        return Context(grey, grey.expand(-1, 3, -1, -1))


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise UserError("mask is given, but this model predicts every pixel: leave it out")


def _check_shape(images: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(images.shape[1:]) != shape:
        raise UserError(f"context has shape {tuple(images.shape)}, expected {what} (n, {', '.join(map(str, shape))})")


def to_condition(labels: Tensor | None, context: Context | None) -> Condition:
    """Labels alone, or all by name where there is a context."""
    if context is None:
        return labels
    told = {CONTEXT: context.channels}
    return told if labels is None else {**told, LABEL: labels}


class RealContexts:
    """Contexts of real images for samples: sample i gets image permutation(seed)[i], going round where images run out.

    Args:
        maker: image -> context.
        images: the shards.
        seed: of the samples, in [0, 2**32).
    """

    def __init__(self, maker: ContextMaker, images: ShardIndex, seed: int) -> None:
        self.maker, self.images, self.seed = maker, images, seed
        self._store = ShardStore(images)
        self._order = draw_permutation(seed, Stream.SAMPLE_IMAGE, images.num_images)

    def ids(self, seeds: Tensor) -> Tensor:
        """(b,) int64 numbers of the images of (b,) seeds, on the CPU."""
        return self._order[seeds.cpu() % len(self._order)]

    def labels(self, seeds: Tensor) -> Tensor:
        """(b,) int64 labels of these images, on the seeds' device."""
        return torch.from_numpy(self.images.samples["label"][self.ids(seeds).numpy()].astype(np.int64)).to(seeds.device)

    def originals(self, seeds: Tensor) -> Tensor:
        """(b, c, h, w) uint8 images, on the seeds' device."""
        return torch.from_numpy(self._store.read(self.ids(seeds).numpy())[0]).to(seeds.device)

    def __call__(self, seeds: Tensor) -> Context:
        """The contexts of (b,) seeds, on their device."""

        def u(k: int) -> Tensor:
            return draw_uniform(self.seed, Stream.SAMPLE_CONTEXT, seeds, draw=k)

        return self.maker(to_unit_range(self.originals(seeds)), u)

    def notes(self, seeds: Tensor) -> list[dict[str, Any]]:
        """What the record of each sample says of its context: the image's number, and the hole if there is one."""
        found: list[dict[str, Any]] = []
        for part in torch.split(seeds, _CHUNK):
            hole = self(part).hole
            holes = [{}] * len(part) if hole is None else [{"hole": numbers} for numbers in hole.tolist()]
            found += [{"image": i, **note} for i, note in zip(self.ids(part).tolist(), holes, strict=True)]
        return found

    def triptychs(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Context, sample and original of seeds 0..n-1 side by side, white lines between: (n, c, h, 3 w + 2)."""
        seeds = torch.arange(len(images))
        line = np.full((*images.shape[:3], 1), 255, dtype=np.uint8)
        context, original = to_uint8(self(seeds).picture).numpy(), self.originals(seeds).numpy()
        return np.concatenate((context, line, images, line, original), axis=3)


def training_context(maker: ContextMaker, x0: Tensor, seed: int, places: Tensor) -> Context:
    """Contexts of a training batch, keyed by the images' places in the global order."""
    return maker(x0, partial(_draw, seed, places))


def _draw(seed: int, places: Tensor, k: int) -> Tensor:
    return draw_uniform(seed, Stream.CONTEXT, places, draw=k)
