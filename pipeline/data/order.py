"""Which image is seen when: a pure function of (seed, position), for any number of nodes, ranks and workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.rng import Stream, draw_permutation


class Order:
    """Position -> image. Epoch e is positions [e N, (e + 1) N), each image once, in an order of its own.

    Batches are ranges of positions, so one may straddle two epochs and none is dropped.

    Args:
        num_images: N, at least 1.
        seed: in [0, 2**32).
    """

    def __init__(self, num_images: int, seed: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def images(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the images at positions [start, stop).

        Example:
            >>> order = Order(num_images=5, seed=0)
            >>> sorted(order.images(5, 10).tolist())
            [0, 1, 2, 3, 4]
        """
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_images)
            count = min(stop - start, self.num_images - offset)
            parts.append(self._permutation_of(epoch)[offset : offset + count])
            start += count
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permutation_of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = draw_permutation(self.seed, Stream.ORDER, self.num_images, draw=epoch).numpy()
            self._epoch = epoch
        return self._permutation


class SubsetOrder(Order):
    """The same over some of the images.

    Args:
        ids: (N,) of the images, at least 1.
        seed: in [0, 2**32).
    """

    def __init__(self, ids: NDArray[np.int64], seed: int) -> None:
        super().__init__(len(ids), seed)
        self.ids = ids

    def images(self, start: int, stop: int) -> NDArray[np.int64]:
        """Ids of the images at positions [start, stop).

        Example:
            >>> sorted(SubsetOrder(np.array([7, 2, 9]), seed=0).images(3, 6).tolist())
            [2, 7, 9]
        """
        return self.ids[super().images(start, stop)]
