"""Which image is seen when: a pure function of (seed, position), for any number of nodes, ranks and workers.

Batch `s` of `B` images is the positions [s B, (s + 1) B), of which rank `r` of `W` takes a slice. No order knows `W`
or how many workers read, so both may change at any step: the whole state is one integer, the position. Positions have
no end: an epoch of `N` images is `N` positions, and a batch may straddle two, so no remainder is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.shuffle import make_keys, permute
from pipeline.runtime.rng import Stream, draw_permutation

TABLE_IMAGES = 2**20
KEPT_EPOCHS = 2  # a batch, and what is fetched ahead of it

Ids = NDArray[np.int64]
T = TypeVar("T")


class Order(Protocol):
    """Position -> image."""

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`, which need not be neighbours."""
        ...


class RandomOrder:
    """Each image equally likely at each place: for data that every rank can read anywhere.

    Epoch `e` is positions [e N, (e + 1) N), each image once, in an order of its own. Up to :data:`TABLE_IMAGES` images
    that order is a sorted table (:func:`pipeline.runtime.rng.draw_permutation`), above it a keyed bijection that needs
    none (:func:`pipeline.data.shuffle.permute`). The rule depends on `N` alone and is part of the order.

    Args:
        num_images: N, at least 1 and below 2**52.
        seed: in [0, 2**32).

    Example:
        >>> order = RandomOrder(num_images=5, seed=0)
        >>> sorted(order.images_at(np.arange(5, 10)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._tables = _Kept(self._draw_table)

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        epochs, places = np.divmod(positions, self.num_images)
        if self.num_images > TABLE_IMAGES:
            return permute(places, self.num_images, make_keys(self.seed, Stream.ORDER, epochs))
        ids = np.empty(len(positions), dtype=np.int64)
        for epoch, here in each_value(epochs):
            ids[here] = self._tables[epoch][places[here]]
        return ids

    def _draw_table(self, epoch: int) -> Ids:
        return draw_permutation(self.seed, Stream.ORDER, self.num_images, draw=epoch).numpy()


class SubsetOrder(RandomOrder):
    """The same over some of the images.

    Args:
        ids: `(N,)` of the images, at least 1.
        seed: in [0, 2**32).

    Example:
        >>> sorted(SubsetOrder(np.array([7, 2, 9]), seed=0).images_at(np.arange(3, 6)).tolist())
        [2, 7, 9]
    """

    def __init__(self, ids: Ids, seed: int) -> None:
        super().__init__(len(ids), seed)
        self.ids = ids

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        return self.ids[super().images_at(positions)]


class Lanes:
    """The parts of a batch: slot `k` of `B` belongs to lane `k C // B`, so a rank's slice lies in few lanes.

    Args:
        batch_size: B.
        num_lanes: C; above B, B are used.
    """

    def __init__(self, batch_size: int, num_lanes: int) -> None:
        self.batch_size = batch_size
        self.num_lanes = min(num_lanes, batch_size)
        self.first_slots = -(-np.arange(self.num_lanes + 1) * batch_size // self.num_lanes)
        self._widths = np.diff(self.first_slots)

    def lane_of(self, positions: Ids) -> Ids:
        """The lanes that positions belong to."""
        return positions % self.batch_size * self.num_lanes // self.batch_size

    def count_before(self, positions: ArrayLike, lanes: Ids) -> Ids:
        """How many earlier positions belong to the lanes."""
        batches, slots = np.divmod(positions, self.batch_size)
        widths = self._widths[lanes]
        return batches * widths + np.clip(slots - self.first_slots[lanes], 0, widths)


class ShardStream:
    """The images of a set one after another, shard by shard in an order of each epoch's own, and shuffled in windows.

    Args:
        shard_sizes: images in each shard; the ids of a shard follow on those of the one before.
        seed: in [0, 2**32).
        window_images: images that are shuffled together.
    """

    def __init__(self, shard_sizes: Sequence[int] | Ids, seed: int, window_images: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first_ids = np.cumsum(self._sizes) - self._sizes
        self.num_images = int(self._sizes.sum())
        self._seed = seed
        self._window = window_images
        self._epochs = _Kept(self._draw_epoch)

    def images_at(self, epoch: int, lanes: Ids, places: Ids, starts: Ids, counts: Ids) -> Ids:
        """Images at places inside stretches of one epoch's stream, one stretch a lane.

        Args:
            epoch: which.
            lanes: `(b,)`; with the epoch, they name the shuffle.
            places: `(b,)`, each in [0, count).
            starts: `(b,)` where the lane's stretch begins.
            counts: `(b,)` its length.

        Returns:
            `(b,)` ids.
        """
        phase = (make_keys(self._seed, Stream.WINDOW, epoch, lanes) % np.uint64(self._window)).astype(np.int64)
        windows = (places + phase) // self._window
        first = np.maximum(0, windows * self._window - phase)
        size = np.minimum(counts, (windows + 1) * self._window - phase) - first
        keys = make_keys(self._seed, Stream.WINDOW, epoch, lanes, windows + 1)
        stream = starts + first + permute(places - first, size, keys)
        shards, ends = self._epochs[epoch]
        number = np.searchsorted(ends, stream, side="right")
        shard = shards[number]
        ids: Ids = self._first_ids[shard] + self._sizes[shard] - (ends[number] - stream)
        return ids

    def _draw_epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """The shards in this epoch's order, and where each ends in the stream."""
        shards = np.argsort(make_keys(self._seed, Stream.SHARDS, epoch, np.arange(len(self._sizes))), kind="stable")
        return shards, np.cumsum(self._sizes[shards])


class WindowedOrder:
    """Each rank stays with few shards: for data that must be fetched first.

    In each epoch the shards are put in a random order, the stream of their images is cut into lanes, and the images of
    a lane are shuffled in windows (whose bounds differ from lane to lane and epoch to epoch). Every batch takes its
    share from each lane. Epoch `e` is positions [e N, (e + 1) N), each image once: a lane is as long as the number of
    those positions that belong to it, so nothing is left over for any `B`, `C` and sizes of shards.

    A rank reads `1 / W` of the data, and little more where `W` divides the number of lanes: a shard that two lanes
    share is fetched for both. `batch_size` is part of this order; the number of ranks is not.

    Args:
        shard_sizes: images in each shard; the ids of a shard follow on those of the one before.
        seed: in [0, 2**32).
        batch_size: B, over all ranks.
        num_lanes: C. As many as ranks there usually are, or a small multiple.
        window_images: images shuffled together in a lane; several shards' worth mixes well.

    Example:
        >>> order = WindowedOrder([3, 2, 4], seed=0, batch_size=4, num_lanes=2, window_images=3)
        >>> sorted(order.images_at(np.arange(9)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8]
    """

    def __init__(
        self, shard_sizes: Sequence[int] | Ids, seed: int, *, batch_size: int, num_lanes: int, window_images: int
    ) -> None:
        self._stream = ShardStream(shard_sizes, seed, window_images)
        self._lanes = Lanes(batch_size, num_lanes)
        self.num_images = self._stream.num_images

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        ids = np.empty(len(positions), dtype=np.int64)
        every = np.arange(self._lanes.num_lanes)
        for epoch, here in each_value(positions // self.num_images):
            before = self._lanes.count_before(epoch * self.num_images, every)
            counts = self._lanes.count_before((epoch + 1) * self.num_images, every) - before
            starts = np.cumsum(counts) - counts
            lanes = self._lanes.lane_of(positions[here])
            places = self._lanes.count_before(positions[here], lanes) - before[lanes]
            ids[here] = self._stream.images_at(epoch, lanes, places, starts[lanes], counts[lanes])
        return ids


def list_shards(
    order: Order, shard_sizes: Sequence[int] | Ids, *, batch_size: int, steps: range, share: slice
) -> list[int]:
    """The shards that a rank needs for some steps, by first use: what to fetch ahead.

    Args:
        order: the global order.
        shard_sizes: images in each shard, of all sets in turn where several are mixed.
        batch_size: B, over all ranks.
        steps: which steps, ascending.
        share: the rank's slice of [0, B).

    Example:
        >>> order = WindowedOrder([4] * 8, seed=0, batch_size=4, num_lanes=2, window_images=4)
        >>> len(list_shards(order, [4] * 8, batch_size=4, steps=range(0, 8), share=slice(0, 2)))
        4
    """
    ends = np.cumsum(shard_sizes)
    slots = np.arange(share.start, share.stop)
    found: dict[int, None] = {}
    for start in range(steps.start, steps.stop, 1024):  # bounds the memory
        some = np.arange(start, min(start + 1024, steps.stop))
        ids = order.images_at((some[:, None] * batch_size + slots).ravel())
        shards, first = np.unique(np.searchsorted(ends, ids, side="right"), return_index=True)
        found.update(dict.fromkeys(shards[np.argsort(first)].tolist()))
    return list(found)


def each_value(values: Ids) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Each distinct value, and where it stands."""
    for value in np.unique(values).tolist():
        yield value, values == value


class _Kept(Generic[T]):
    """What is made for an epoch, kept for the last few asked for; not pickled."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}

    def __getitem__(self, epoch: int) -> T:
        if epoch not in self._made:
            while len(self._made) >= KEPT_EPOCHS:
                del self._made[next(iter(self._made))]
            self._made[epoch] = self._make(epoch)
        return self._made[epoch]

    def __getstate__(self) -> dict[str, object]:
        return {"_make": self._make, "_made": {}}
