"""Batches of images in the global order, read where they are used."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.index import ShardIndex
from pipeline.data.order import Order
from pipeline.data.sources import CachedSource
from pipeline.data.store import ShardSource, ShardStore
from pipeline.errors import UserError

AHEAD_STEPS = 64  # whose shards are fetched beforehand, where they lie elsewhere
RENEWAL_STEPS = 16  # how often that list is made anew


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Args:
        images: (b, c, h, w) uint8.
        labels: (b,) int64; -1 where there is no class.
        positions: (b,) int64 places in the global order.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class _Steps(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Step number -> this rank's batch. A map-style data set, so that any number of workers gives the same order."""

    def __init__(
        self, index: ShardIndex, order: Order, batch_size: int, share: slice, source: ShardSource | None
    ) -> None:
        self.store = ShardStore(index, source)
        self.order = order
        self.batch_size = batch_size
        self.share = share

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = step * self.batch_size + self.share.start, step * self.batch_size + self.share.stop
        images, labels = self.store.read(self.order.images(start, stop))
        return torch.from_numpy(images), torch.from_numpy(labels), torch.arange(start, stop)

    def shards(self, steps: range) -> list[int]:
        """Numbers of the shards that some steps need, by first use."""
        found: dict[int, None] = {}
        for step in steps:
            start, stop = step * self.batch_size + self.share.start, step * self.batch_size + self.share.stop
            numbers = self.store.index.samples["shard"][self.order.images(start, stop)]
            found.update(dict.fromkeys(numbers.tolist()))
        return list(found)


def iterate_batches(
    index: ShardIndex,
    order: Order,
    *,
    batch_size: int,
    steps: range,
    share: slice,
    workers: int = 0,
    pin_memory: bool = False,
    source: ShardSource | None = None,
) -> Iterator[Batch]:
    """This rank's batches, one a step: step s is the global positions [s B, (s + 1) B), of which a rank reads a slice.

    Args:
        index: the shards.
        order: the global order.
        batch_size: B, over all ranks.
        steps: which steps; to resume, start later. There is no other state.
        share: this rank's slice of [0, B).
        workers: loader processes beside this one; speed, never order.
        pin_memory: page-locked memory for asynchronous copies to a GPU.
        source: where the tars are; the index's folder if left out. A cache is told ahead what comes.
    """
    data = _Steps(index, order, batch_size, share, source)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=steps if not isinstance(source, CachedSource) else _announced(steps, data, source),
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


def _announced(steps: range, data: _Steps, source: CachedSource) -> Iterator[int]:
    """The steps as they are dealt to the workers; beside them, what the next ones need is fetched."""
    for place, step in enumerate(steps):
        if place % RENEWAL_STEPS == 0:
            source.prefetch(data.shards(steps[place : place + AHEAD_STEPS]))
        yield step


def _outlive_signals(worker: int) -> None:
    """A stop reaches the whole process group; the step in which it comes still needs its data. torch ends the workers
    of a dead parent by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
