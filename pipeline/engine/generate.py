"""Samples that depend on their seed and label alone, made by all ranks in blocks that survive a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from pipeline.data.pixels import make_grid, to_uint8
from pipeline.engine.context import RealContexts, to_condition
from pipeline.errors import UserError
from pipeline.runtime.files import whole_file
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.runtime.topology import Topology

GRID_ROWS = 8
GRID_COLUMNS = 10
TRIPTYCH_COLUMNS = 4
TRIPTYCH_GAP_PX = 12


class ImageSampler:
    """Seeds -> images.

    Args:
        method: `method(x_noisy, noise, condition=labels)`, a sampler of ddpm_core with all else bound.
        seed: of the whole set, in [0, 2**32).
        classes: the labels to ask for; they go round with the seed, so any range of seeds is balanced. Empty: the model
            has none.
        shape: of what the network works on, (c, h, w).
        contexts: for a model with a context: those of the seeds, whose labels then count instead of `classes`.
        decode: what the network works on -> images in [-1, 1]: the first stage of a latent model.
    """

    def __init__(
        self,
        method: Callable[..., Tensor],
        *,
        seed: int,
        classes: Sequence[int],
        shape: tuple[int, ...],
        contexts: RealContexts | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.method = method
        self.seed = seed
        self.classes = tuple(classes)
        self.shape = shape
        self.contexts = contexts
        self.decode = decode

    def labels(self, seeds: Tensor) -> Tensor | None:
        """(b,) int64 labels of (b,) seeds; None without classes."""
        if not self.classes:
            return None
        if self.contexts is not None:
            return self.contexts.labels(seeds)
        return torch.tensor(self.classes, device=seeds.device)[seeds % len(self.classes)]

    def __call__(self, seeds: Tensor, callback: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """(b,) int64 seeds on the network's device -> (b, c, h, w) uint8 there; the callback is the method's."""

        def noise(k: int) -> Tensor:
            return draw_normal(self.seed, Stream.SAMPLE, seeds, self.shape, draw=k)

        context = None if self.contexts is None else self.contexts(seeds)
        watched = {} if callback is None else {"callback": callback}
        x = self.method(noise(0), noise, condition=to_condition(self.labels(seeds), context), **watched)
        return self.to_pixels(x if context is None else context.complete(x))

    def to_pixels(self, x: Tensor) -> Tensor:
        """What the method gives -> (b, c, h, w) uint8."""
        return to_uint8(x if self.decode is None else self.decode(x))

    @property
    def columns(self) -> int:
        """Of a picture of samples: one a class, as far as they fit."""
        return min(GRID_COLUMNS, len(self.classes) or GRID_COLUMNS) if self.contexts is None else TRIPTYCH_COLUMNS

    def picture(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The images of seeds 0..n-1, (n, c, h, w), as one (H, W, 3); those with a context between it and the
        original."""
        if self.contexts is None:
            return make_grid(images, self.columns)
        return make_grid(self.contexts.triptychs(images), self.columns, gap=TRIPTYCH_GAP_PX)


def generate_blocks(
    sampler: Callable[[Tensor], Tensor],
    folder: Path,
    num_samples: int,
    block_size: int,
    topology: Topology,
    *,
    label: str = "sample",
) -> list[Path]:
    """Sample seeds 0..num_samples-1 in blocks of `block_size`, dealt to the ranks in turn; a block on disk is kept.

    A block is one batch, so the same block size gives the same bits for any number of ranks.

    Args:
        sampler: seeds -> images.
        folder: where blocks are kept, shared by all ranks; it must belong to this model, sampler and block size.
        num_samples: at least 1.
        block_size: images a forward pass.
        topology: the world.
        label: of the progress bar.

    Returns:
        the paths of all blocks in the order of seeds, complete on every rank.

    Raises:
        UserError: a rank can't see another's blocks.
    """
    starts = range(0, num_samples, block_size)
    blocks = [folder / f"seeds-{start:09d}.npy" for start in starts]
    mine = [
        (start, path) for start, path in list(zip(starts, blocks, strict=True))[topology.rank :: topology.world_size]
    ]
    with tqdm(total=num_samples, unit="img", disable=None if topology.is_main else True, desc=label) as bar:
        for start, path in mine:
            count = min(block_size, num_samples - start)
            if not path.exists():
                images = sampler(torch.arange(start, start + count, device=topology.device))
                with whole_file(path) as aside, open(aside, "wb") as file:
                    np.save(file, images.cpu().numpy())
            bar.update(count if topology.world_size == 1 else min(count * topology.world_size, num_samples - bar.n))
    topology.barrier()
    if missing := [path for path in blocks if not path.exists()]:
        raise UserError(
            f"{missing[0]} is not visible on this node: PIPELINE_STATE must be a folder shared by all nodes"
        )
    return blocks


def read_blocks(blocks: Iterable[Path]) -> Iterator[NDArray[Any]]:
    """The images of all blocks, one (c, h, w) after another."""
    for path in blocks:
        yield from np.load(path, allow_pickle=False)
