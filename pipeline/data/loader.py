"""Batches of images in the global order, read where they are used."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.data.index import ShardIndex
from pipeline.data.order import Order, list_shards
from pipeline.data.sources import CachedSource
from pipeline.data.store import LocalSource, MixedStore, ShardSource, ShardStore
from pipeline.errors import UserError

AHEAD_STEPS = 64  # whose shards are fetched beforehand, where they lie elsewhere
RENEWAL_STEPS = 16  # how often that list is made anew


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Args:
        images: (b, c, h, w) uint8, or float32 moments of latents.
        labels: (b,) int64; -1 where there is no class.
        positions: (b,) int64 places in the global order.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class _Steps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Step number -> this rank's batch. A map-style data set, so that any number of workers gives the same order."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        order: Order,
        batch_size: int,
        share: slice,
        sources: Sequence[ShardSource] | None = None,
    ) -> None:
        sources = [LocalSource(index.folder) for index in indexes] if sources is None else sources
        stores = [ShardStore(index, source) for index, source in zip(indexes, sources, strict=True)]
        self.store = stores[0] if len(stores) == 1 else MixedStore(stores)
        size, channels = indexes[0].image_size, indexes[0].channels
        self.shape = (share.stop - share.start, channels, size, size)
        self.order = order
        self.batch_size = batch_size
        self.share = share

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = step * self.batch_size + self.share.start, step * self.batch_size + self.share.stop
        images = _empty(self.shape)
        positions = np.arange(start, stop)
        _, labels = self.store.read(self.order.images_at(positions), images.numpy())
        return images, torch.from_numpy(labels), torch.from_numpy(positions)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Room for a batch. In a worker it is shared memory, as in torch's own collation: the batch need not be copied
    there before it can go to the training process."""
    empty = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is None:
        return empty.new_empty(shape)
    storage = empty.untyped_storage()._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return empty.set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


def iterate_batches(
    indexes: Sequence[ShardIndex],
    order: Order,
    *,
    batch_size: int,
    steps: range,
    share: slice,
    workers: int = 0,
    pin_memory: bool = False,
    sources: Sequence[ShardSource] | None = None,
) -> Iterator[Batch]:
    """This rank's batches, one a step: step s is the global positions [s B, (s + 1) B), of which a rank reads a slice.

    Args:
        indexes: the shard sets, several if they are mixed; all hold images of one shape.
        order: the global order.
        batch_size: B, over all ranks.
        steps: which steps; to resume, start later. There is no other state.
        share: this rank's slice of [0, B).
        workers: loader processes beside this one; speed, never order.
        pin_memory: page-locked memory for asynchronous copies to a GPU.
        sources: where the tars of each set are; the indexes' folders if left out. A cache is told ahead what comes.
    """
    caches = [source if isinstance(source, CachedSource) else None for source in sources or ()]
    sizes = np.concatenate([index.shard_sizes for index in indexes])

    def announced() -> Iterator[int]:
        for place, step in enumerate(steps):  # as they are dealt to the workers
            if place % RENEWAL_STEPS == 0:
                ahead = steps[place : place + AHEAD_STEPS]
                _prefetch(caches, indexes, list_shards(order, sizes, batch_size=batch_size, steps=ahead, share=share))
            yield step

    loader = DataLoader(
        _Steps(indexes, order, batch_size, share, sources),
        batch_size=None,
        sampler=announced() if any(caches) else steps,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context="spawn" if workers else None,  # a fork would copy locks held by other threads
        worker_init_fn=_outlive_signals,
    )
    try:
        for images, labels, positions in loader:
            yield Batch(images, labels, positions)
    except UserError as error:  # from a worker it comes wrapped in that worker's traceback
        kind = f"{type(error).__module__}.{type(error).__name__}: "
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(kind)) from None


def _prefetch(caches: Sequence[CachedSource | None], indexes: Sequence[ShardIndex], numbers: list[int]) -> None:
    """Have shards fetched ahead. They are numbered through all sets in turn."""
    first = 0
    for cache, index in zip(caches, indexes, strict=True):
        stop = first + len(index.shards)
        if cache is not None:
            cache.prefetch(number - first for number in numbers if first <= number < stop)
        first = stop


def _outlive_signals(worker: int) -> None:
    """A stop reaches the whole process group; the step in which it comes still needs its data. torch ends the workers
    of a dead parent by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
