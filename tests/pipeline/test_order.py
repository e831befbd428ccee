"""The global order: each image once an epoch, and the same for any world."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import order as order_module
from pipeline.data.order import Order, RandomOrder, WindowedOrder, list_shards
from pipeline.runtime.rng import Stream, draw_permutation


def images(order: Order, start: int, stop: int) -> list[int]:
    return order.images_at(np.arange(start, stop)).tolist()


SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@st.composite
def orders(draw: st.DrawFn) -> tuple[Order, int]:
    """Any order of one set, and its number of images."""
    sizes, seed = draw(SIZES), draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        return RandomOrder(sum(sizes), seed), sum(sizes)
    form = {name: draw(st.integers(1, 40)) for name in ("batch_size", "num_lanes", "window_images")}
    return WindowedOrder(sizes, seed, **form), sum(sizes)


@settings(max_examples=150, deadline=None)
@given(made=orders(), epoch=st.integers(0, 2**20))
def test_every_epoch_holds_each_image_once(made: tuple[Order, int], epoch: int) -> None:
    order, num_images = made
    assert sorted(images(order, epoch * num_images, (epoch + 1) * num_images)) == list(range(num_images))


@settings(max_examples=60, deadline=None)
@given(made=orders(), start=st.integers(0, 200), data=st.data())
def test_it_can_start_anywhere_and_be_asked_in_any_pieces(
    made: tuple[Order, int], start: int, data: st.DataObject
) -> None:
    order, num_images = made
    whole = images(order, 0, start + 3 * num_images)
    copy = pickle.loads(pickle.dumps(order))
    assert images(copy, start, start + 3 * num_images) == whole[start:]
    some = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=20)), dtype=np.int64)
    assert order.images_at(some).tolist() == [whole[place] for place in some]


@pytest.mark.parametrize("large", [False, True])
def test_epochs_and_seeds_differ(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(order_module, "TABLE_IMAGES", 10)
    form = {"batch_size": 8, "num_lanes": 2, "window_images": 20}
    for make in (lambda seed: RandomOrder(101, seed), lambda seed: WindowedOrder([50, 51], seed, **form)):
        first, second = images(make(3), 0, 101), images(make(3), 101, 202)
        assert sorted(first) == sorted(second) == list(range(101))
        assert first != second
        assert images(make(4), 0, 101) != first


def test_a_small_set_keeps_the_order_of_earlier_versions_and_a_large_one_has_no_table() -> None:
    drawn = [draw_permutation(7, Stream.ORDER, 1797, draw=epoch) for epoch in range(2)]
    assert images(RandomOrder(1797, 7), 0, 2 * 1797) == [*drawn[0].tolist(), *drawn[1].tolist()]
    assert images(RandomOrder(10, 0), 0, 12) == [5, 9, 7, 4, 1, 6, 3, 0, 2, 8, 0, 2]
    large = RandomOrder(order_module.TABLE_IMAGES + 1, 0)
    assert images(large, 10**15, 10**15 + 3) == images(large, 10**15, 10**15 + 3)
    assert len(pickle.dumps(large)) < 1000
    whole = large.images_at(np.arange(large.num_images))
    assert np.bincount(whole).tolist() == [1] * large.num_images


def test_every_place_is_equally_likely() -> None:
    order, counts = RandomOrder(6, seed=0), np.zeros((6, 6))
    for epoch in range(1000):
        counts[np.arange(6), images(order, 6 * epoch, 6 * epoch + 6)] += 1
    assert np.abs(counts - 1000 / 6).max() < 4 * (1000 * 5 / 36) ** 0.5


def test_every_shard_is_equally_likely_at_every_place_over_the_epochs() -> None:
    order = WindowedOrder([2, 2, 2], 0, batch_size=2, num_lanes=2, window_images=4)
    places = np.arange(6 * 1500)
    counts = np.bincount(places % 6 * 3 + order.images_at(places) // 2, minlength=18)
    assert np.abs(counts - 500).max() < 5 * (1500 * 2 / 9) ** 0.5


def test_a_batch_takes_its_share_from_every_lane_and_a_rank_few_shards() -> None:
    """Eight ranks, eight lanes: what a rank reads in an epoch is an eighth of the data and at most one shard more."""
    sizes = [100] * 64
    order = WindowedOrder(sizes, 0, batch_size=32, num_lanes=8, window_images=150)
    steps, whole = range(0, 6400 // 32), set()
    for rank in range(8):
        share = slice(rank * 4, rank * 4 + 4)
        needed = list_shards(order, sizes, batch_size=32, steps=steps, share=share)
        assert 8 <= len(needed) <= 9
        whole |= set(needed)
        at_once = list_shards(order, sizes, batch_size=32, steps=range(10, 20), share=share)
        assert len(at_once) <= 4  # 40 images out of windows of 150
    assert whole == set(range(64))
    scattered = list_shards(RandomOrder(6400, 0), sizes, batch_size=32, steps=steps, share=slice(0, 4))
    assert len(scattered) == 64


def test_shards_are_listed_by_first_use() -> None:
    sizes = [5, 0, 7, 3]
    order = WindowedOrder(sizes, 3, batch_size=4, num_lanes=3, window_images=2)
    shard_of = np.repeat(np.arange(4), sizes)
    expected: list[int] = []
    for step in range(2, 9):
        for shard in shard_of[images(order, step * 4 + 1, step * 4 + 3)].tolist():
            if shard not in expected[-10:]:
                expected.append(shard)
    assert list_shards(order, sizes, batch_size=4, steps=range(2, 9), share=slice(1, 3)) == expected


def test_the_shuffle_reaches_over_shards_inside_a_window() -> None:
    order = WindowedOrder([10] * 10, 1, batch_size=10, num_lanes=1, window_images=50)
    shards = np.array(images(order, 0, 100)) // 10
    assert np.mean([len(set(shards[start : start + 10])) for start in range(0, 100, 10)]) > 3
