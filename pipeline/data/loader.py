"""Batches of images in the global order, read where they are used."""

from __future__ import annotations

import atexit
import math
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data.index import DTYPES, ShardIndex
from pipeline.data.order import Order, list_shards
from pipeline.data.sources import CachedSource
from pipeline.data.store import LocalSource, MixedStore, ShardSource, ShardStore
from pipeline.errors import UserError

PREFETCH = 2  # batches ahead, a worker
SHARED_MEMORY = "/dev/shm"
AHEAD_STEPS = 64  # whose shards are fetched beforehand, where they lie elsewhere
RENEWAL_STEPS = 16  # how often that list is made anew


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Args:
        images: (b, c, h, w) uint8, or float32 moments of latents; channels last in memory, as they are stored.
        labels: (b,) int64; -1 where there is no class.
        positions: (b,) int64 places in the global order.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor


class _Steps(Dataset[int]):
    """Step number -> this rank's batch. A map-style data set, so that any number of workers gives the same order.

    Workers write into a ring of shared buffers that are there from the start, labels, positions and images of a batch
    in one, and send the number of the buffer. torch's own way, new shared memory for each tensor, takes longer than to
    read small images, and as long as to decode large ones.
    """

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
        self.shape = (share.stop - share.start, size, size, channels)
        self.dtype = torch.from_numpy(np.empty(0, DTYPES[indexes[0].encoding])).dtype
        self.image_bytes = math.prod(self.shape) * self.dtype.itemsize
        self.num_bytes = 2 * 8 * self.shape[0] + -(-self.image_bytes // 8) * 8  # the next buffer begins with int64
        self.order = order
        self.batch_size = batch_size
        self.share = share
        self.ring = torch.empty((0, 0), dtype=torch.uint8)

    def __getitem__(self, step: int) -> int:
        number = step % len(self.ring)
        self.read(step, self.ring[number])
        return number

    def read(self, step: int, buffer: Tensor) -> Batch:
        """Fill a buffer of `num_bytes`."""
        batch = self.unpack(buffer)
        start = step * self.batch_size
        torch.arange(start + self.share.start, start + self.share.stop, out=batch.positions)
        ids = self.order.images_at(batch.positions.numpy())
        batch.labels.numpy()[:] = self.store.fill(ids, batch.images.permute(0, 2, 3, 1).numpy())
        return batch

    def unpack(self, buffer: Tensor) -> Batch:
        """The three parts of a buffer, without copying."""
        size = 8 * self.shape[0]
        labels, positions = buffer[:size].view(torch.int64), buffer[size : 2 * size].view(torch.int64)
        images = buffer[2 * size : 2 * size + self.image_bytes].view(self.dtype).view(self.shape)
        return Batch(images.permute(0, 3, 1, 2), labels, positions)


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

    With workers and without `pin_memory` a batch is valid until the next but one is asked for: its memory is then
    written again. Copy what is to be kept.

    Args:
        indexes: the shard sets, several if they are mixed; all hold images of one shape.
        order: the global order.
        batch_size: B, over all ranks.
        steps: which steps, one after another; to resume, start later. There is no other state.
        share: this rank's slice of [0, B).
        workers: loader processes beside this one, for all steps; speed, never order.
        pin_memory: page-locked memory for asynchronous copies to a GPU.
        sources: where the tars of each set are; the indexes' folders if left out. A cache is told ahead what comes.

    Raises:
        UserError: a record is damaged, or there is too little shared memory for the workers.
    """
    caches = [source if isinstance(source, CachedSource) else None for source in sources or ()]
    sizes = np.concatenate([index.shard_sizes for index in indexes])

    def announced() -> Iterator[int]:
        for place, step in enumerate(steps):  # as they are dealt to the workers
            if place % RENEWAL_STEPS == 0:
                ahead = steps[place : place + AHEAD_STEPS]
                _prefetch(caches, indexes, list_shards(order, sizes, batch_size=batch_size, steps=ahead, share=share))
            yield step

    data = _Steps(indexes, order, batch_size, share, sources)
    turns: Iterable[int] = announced() if any(caches) else steps
    for buffer in _fill_here(data, turns) if workers == 0 else _fill_in_workers(data, turns, workers):
        yield data.unpack(buffer.pin_memory() if pin_memory else buffer)


def _fill_here(data: _Steps, steps: Iterable[int]) -> Iterator[Tensor]:
    for step in steps:
        buffer = torch.empty(data.num_bytes, dtype=torch.uint8)
        data.read(step, buffer)
        yield buffer


def _fill_in_workers(data: _Steps, steps: Iterable[int], workers: int) -> Iterator[Tensor]:
    # While the caller holds a batch the workers are at most PREFETCH each ahead of it; one more stays for the caller.
    places = workers * PREFETCH + 2
    _check_shared_memory(places * data.num_bytes)
    data.ring = torch.zeros((places, data.num_bytes), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        multiprocessing_context="spawn",  # a fork would copy locks held by other threads
        worker_init_fn=_outlive_signals,
    )
    numbers: Any = iter(loader)
    # At the interpreter's end, too: multiprocessing would send SIGTERM, which they outlive, and wait for ever.
    atexit.register(numbers._shutdown_workers)
    try:
        for number in numbers:
            yield data.ring[number]
    except UserError as error:  # from a worker it comes wrapped in that worker's traceback
        kind = f"{type(error).__module__}.{type(error).__name__}: "
        raise UserError(str(error).strip().splitlines()[-1].removeprefix(kind)) from None
    finally:
        numbers._shutdown_workers()
        atexit.unregister(numbers._shutdown_workers)


def _prefetch(caches: Sequence[CachedSource | None], indexes: Sequence[ShardIndex], numbers: list[int]) -> None:
    """Have shards fetched ahead. They are numbered through all sets in turn."""
    first = 0
    for cache, index in zip(caches, indexes, strict=True):
        stop = first + len(index.shards)
        if cache is not None:
            cache.prefetch(number - first for number in numbers if first <= number < stop)
        first = stop


def _check_shared_memory(needed: int) -> None:
    """Without room the kernel would end this process at the first write."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # no such place: another system, which has its own way
        return
    if needed > free:
        raise UserError(
            f"the loader's workers need {needed / 2**20:,.0f} MiB of shared memory, but {SHARED_MEMORY} has "
            f"{free / 2**20:,.0f} free: give more (docker run --shm-size=...), or lower PIPELINE_WORKERS"
        )


def _outlive_signals(worker: int) -> None:
    """A stop reaches the whole process group; the step in which it comes still needs its data. torch ends the workers
    of a dead parent by itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
