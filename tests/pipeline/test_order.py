"""The global order: each image once an epoch, and the same for any world."""

import numpy as np
import pytest

from pipeline.data.order import Order


def test_an_epoch_holds_each_image_once_and_the_next_another_order() -> None:
    order = Order(num_images=101, seed=3)
    first, second = order.images(0, 101), order.images(101, 202)
    assert sorted(first) == sorted(second) == list(range(101))
    assert first.tolist() != second.tolist()
    assert Order(101, seed=4).images(0, 101).tolist() != first.tolist()


@pytest.mark.parametrize("world", range(1, 13))
def test_ranks_together_see_the_same_sequence_in_any_world(world: int) -> None:
    batch, total = 30, 303
    expected = Order(101, seed=0).images(0, total // batch * batch)
    orders = [Order(101, seed=0) for _ in range(world)]
    seen = []
    for step in range(total // batch):
        for rank, order in enumerate(orders):
            seen.append(order.images(step * batch + rank * batch // world, step * batch + (rank + 1) * batch // world))
    assert np.concatenate(seen).tolist() == expected.tolist()


def test_it_can_start_anywhere() -> None:
    whole = Order(10, seed=0).images(0, 47)
    assert Order(10, seed=0).images(33, 47).tolist() == whole[33:].tolist()
    assert Order(10, seed=0).images(5, 5).tolist() == []


def test_every_place_is_equally_likely() -> None:
    order, counts = Order(6, seed=0), np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), order.images(6 * epoch, 6 * epoch + 6)] += 1
    assert np.abs(counts - 500).max() < 4 * (3000 * 5 / 36) ** 0.5
