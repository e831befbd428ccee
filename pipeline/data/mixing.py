"""Orders that draw by class or from several sets, in exact quotas: as much a function of the position as any other.

A place is found without replaying what came before: positions are cut into blocks that hold fixed numbers of each
class or set, so how many of its kind came before is the number of whole blocks times the quota, and arithmetic within
the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import Ids, Lanes, Order, ShardStream, each_value
from pipeline.data.shuffle import make_keys, permute
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream

BLOCK = 1000  # draws in which the weights of sets are kept exactly


class BalancedOrder:
    """Every class equally often: each run of as many draws as there are classes holds each class once.

    The images of a class come in epochs of their own: each once, in a random order, before one comes again.

    Args:
        labels: `(N,)` the classes of the images, none below 0.
        seed: in [0, 2**32).

    Raises:
        UserError: an image has no class.

    Example:
        >>> order = BalancedOrder(np.array([0, 0, 0, 1]), seed=0)
        >>> ids = order.images_at(np.arange(6))
        >>> sorted(ids.tolist())
        [0, 1, 2, 3, 3, 3]
    """

    def __init__(self, labels: NDArray[np.integer], seed: int) -> None:
        if labels.min() < 0:
            raise UserError("params.yaml: order.class_balanced is true, but some images have no class: use false")
        # Shards are written class by class, so the ids of a class are neighbours and need no table.
        self._ids = None if bool((labels[1:] >= labels[:-1]).all()) else np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        self._starts, self._counts = (np.cumsum(counts) - counts)[counts > 0], counts[counts > 0]
        self._seed = seed

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        num_classes = len(self._counts)
        blocks, slots = np.divmod(positions, num_classes)
        classes = permute(slots, num_classes, make_keys(self._seed, Stream.BALANCE, blocks))
        counts = self._counts[classes]
        epochs, places = np.divmod(blocks, counts)
        ids = self._starts[classes] + permute(places, counts, make_keys(self._seed, Stream.ORDER, epochs, classes))
        return ids if self._ids is None else self._ids[ids]


class Quotas:
    """Which set each draw comes from: fixed numbers in each :data:`BLOCK` draws, the weights by largest remainder.

    A set's draws are spread evenly over a block, shifted by a random phase of the block's own.

    Args:
        weights: of the sets, above 0, on any scale.

    Raises:
        UserError: a weight is too small for a single draw in a block.

    Example:
        >>> quotas = Quotas([3.0, 1.0])
        >>> quotas.counts.tolist()
        [750, 250]
        >>> sets, draws = quotas.split(np.arange(8), 0)
        >>> sorted(sets.tolist()), draws[sets == 0].tolist()
        ([0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = np.asarray(weights) / sum(weights) * BLOCK
        self.counts = np.floor(exact).astype(np.int64)
        largest = np.argsort(self.counts - exact, kind="stable")
        self.counts[largest[: BLOCK - int(self.counts.sum())]] += 1
        if not self.counts.all():
            raise UserError(f"params.yaml: order.mix: a weight is below one in {BLOCK} draws; leave that set out")

    def split(self, draws: Ids, seed: int, *lanes: Ids) -> tuple[Ids, Ids]:
        """The set of each draw, and how many draws from that set come before it.

        Args:
            draws: `(b,)`, counted from 0 in each lane.
            seed: in [0, 2**32).
            lanes: `(b,)` where each lane has phases of its own.
        """
        blocks, places = np.divmod(draws, BLOCK)
        sets, before = np.full(len(draws), len(self.counts) - 1), np.zeros_like(draws)
        waiting, left = np.ones(len(draws), dtype=np.bool_), BLOCK
        for number, count in enumerate(self.counts.tolist()):
            # Of the `left` places that earlier sets leave, `count` are this one's: those where the sum of steps of
            # count / left, begun at the phase, passes a whole number.
            keys = make_keys(seed, Stream.MIX, blocks, *lanes, number)
            sums = places * count + (keys % np.uint64(left)).astype(np.int64)
            earlier = sums // left
            taken = waiting & ((sums + count) // left > earlier)
            sets[taken], before[taken] = number, earlier[taken]
            waiting &= ~taken
            places, left = places - earlier, left - count
        return sets, blocks * self.counts[sets] + before


class MixedOrder:
    """Draws from several sets by weight, each in its own order.

    An epoch is a set's own: its images come once each before one comes again. Ids count on from set to set.

    Args:
        orders: of the sets.
        num_images: of the sets.
        weights: of the sets, kept exactly in each :data:`BLOCK` draws.
        seed: in [0, 2**32).
    """

    def __init__(self, orders: Sequence[Order], num_images: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        self._first_ids = np.cumsum(num_images) - num_images
        self._quotas = Quotas(weights)
        self._seed = seed

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        sets, draws = self._quotas.split(positions, self._seed)
        ids = np.empty(len(positions), dtype=np.int64)
        for number, here in each_value(sets):
            ids[here] = self._first_ids[number] + self._orders[number].images_at(draws[here])
        return ids


class MixedWindowedOrder:
    """Draws from several sets by weight, while each rank stays with few shards of each.

    As :class:`pipeline.data.order.WindowedOrder`, but a lane has its own stretch of every set, draws from them by
    weight, and comes to the end of a stretch at its own time: the epochs of a set's lanes are not in step, by a few
    images. In each epoch of all lanes each image comes once.

    Args:
        shard_sizes: images in each shard of each set.
        weights: of the sets, kept exactly in each :data:`BLOCK` draws of a lane.
        seed: in [0, 2**32).
        batch_size, num_lanes, window_images: as for a single set.

    Raises:
        UserError: a set has fewer images than there are lanes.
    """

    def __init__(
        self, shard_sizes: Sequence[Sequence[int]], weights: Sequence[float], seed: int,
        *, batch_size: int, num_lanes: int, window_images: int,
    ) -> None:  # fmt: skip
        self._lanes = Lanes(batch_size, num_lanes)
        seeds = make_keys(seed, Stream.MIX, np.arange(len(weights))) >> np.uint64(32)
        self._streams = [
            ShardStream(sizes, int(own), window_images) for sizes, own in zip(shard_sizes, seeds, strict=True)
        ]
        num_images = np.array([stream.num_images for stream in self._streams])
        self._bounds = num_images[:, None] * self._lanes.first_slots // batch_size
        if not np.diff(self._bounds).all():
            raise UserError(f"params.yaml: order.mix: a set of {num_images.min():,} images can't be cut into "
                            f"{self._lanes.num_lanes} lanes: lower order.lanes")  # fmt: skip
        self._first_ids = np.cumsum(num_images) - num_images
        self._quotas = Quotas(weights)
        self._seed = seed

    def images_at(self, positions: Ids) -> Ids:
        """Ids of the images at positions `(b,)`."""
        lanes = self._lanes.lane_of(positions)
        sets, draws = self._quotas.split(self._lanes.count_before(positions, lanes), self._seed, lanes)
        starts = self._bounds[sets, lanes]
        counts = self._bounds[sets, lanes + 1] - starts
        epochs, places = np.divmod(draws, counts)
        ids: Ids = self._first_ids[sets]
        for number, of_set in each_value(sets):
            for epoch, of_epoch in each_value(epochs):
                here = of_set & of_epoch
                own = (lanes[here], places[here], starts[here], counts[here])
                ids[here] += self._streams[number].images_at(epoch, *own)
        return ids
