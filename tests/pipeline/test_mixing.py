"""Drawing by class and from several sets: exact quotas, nothing left out, no memory of what came before."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.mixing import BLOCK, BalancedOrder, MixedOrder, MixedWindowedOrder, Quotas
from pipeline.data.order import RandomOrder
from pipeline.errors import UserError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array)
WEIGHTS = st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(labels=LABELS, seed=st.integers(0, 2**32 - 1))
def test_classes_come_equally_often_and_each_image_once_in_its_class_s_epoch(labels: np.ndarray, seed: int) -> None:
    order, kinds = BalancedOrder(labels, seed), np.unique(labels)
    ids = order.images_at(np.arange(200 * len(kinds)))
    assert (np.sort(labels[ids].reshape(200, -1), axis=1) == kinds).all()
    for kind in kinds:
        own, members = ids[labels[ids] == kind], np.flatnonzero(labels == kind)
        for start in range(0, 200 - len(members) + 1, len(members)):
            assert sorted(own[start : start + len(members)]) == members.tolist()


def test_ids_need_not_be_sorted_by_class() -> None:
    labels = np.array([2, 0, 2, 0, 0, 5])
    assert labels[BalancedOrder(labels, 0).images_at(np.arange(300))].tolist().count(5) == 100


def test_balance_needs_classes() -> None:
    with pytest.raises(UserError, match="class_balanced"):
        BalancedOrder(np.array([0, -1]), 0)


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_a_mix_keeps_its_weights_in_every_block_and_each_set_s_epochs(weights: list[float], seed: int) -> None:
    sizes = [70 + 4 * number for number in range(len(weights))]
    order = MixedOrder([RandomOrder(size, seed + 1) for size in sizes], sizes, weights, seed % 2**31)
    first = np.cumsum(sizes) - sizes
    blocks = order.images_at(np.arange(2 * BLOCK)).reshape(2, BLOCK)
    for block in blocks:
        counts = np.bincount(np.searchsorted(np.cumsum(sizes), block, side="right"), minlength=len(sizes))
        assert np.abs(counts - np.array(weights) / sum(weights) * BLOCK).max() <= 1
    ids = blocks.ravel()
    for number, size in enumerate(sizes):
        own = ids[(ids >= first[number]) & (ids < first[number] + size)] - first[number]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size].tolist()) == list(range(size))


def test_sets_are_spread_over_a_block_and_tied_to_no_slot_of_the_batch() -> None:
    """Timesteps may be stratified by slot: a set that came at the same slots always would see few of them."""
    sets, _ = Quotas([7.0, 1.0]).split(np.arange(400 * BLOCK), 0)
    places = np.flatnonzero(sets == 1)
    inside = np.diff(places)[np.diff(places // BLOCK) == 0]
    assert set(inside.tolist()) == {8}
    counts = np.bincount(places % 8, minlength=8)
    assert np.abs(counts / counts.mean() - 1).max() < 5 * (7 / 400) ** 0.5


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**32 - 1), lanes=st.integers(1, 5), batch=st.integers(1, 8),
       window=st.integers(1, 100))  # fmt: skip
def test_in_each_epoch_of_a_windowed_mix_the_lanes_together_show_each_image_of_a_set_once(
    weights: list[float], seed: int, lanes: int, batch: int, window: int
) -> None:
    sizes = [[15, 10 + number, 20] for number in range(len(weights))]
    order = MixedWindowedOrder(sizes, weights, seed, batch_size=batch, num_lanes=lanes, window_images=window)
    totals = np.array([sum(s) for s in sizes])
    positions = np.arange(BLOCK * batch)  # whole blocks of every lane
    ids = order.images_at(positions)
    sets = np.searchsorted(np.cumsum(totals), ids, side="right")
    counts = np.bincount(sets, minlength=len(sizes)) / len(ids)
    assert counts.tolist() == pytest.approx((np.array(weights) / sum(weights)).tolist(), abs=1 / BLOCK)
    lane_of = positions % batch * min(lanes, batch) // batch
    for number, total in enumerate(totals):
        lengths = np.diff(order._bounds[number])
        own = [ids[(sets == number) & (lane_of == lane)] for lane in range(len(lengths))]
        for epoch in range(min(len(seen) // length for seen, length in zip(own, lengths, strict=True))):
            parts = [seen[epoch * n : (epoch + 1) * n] for seen, n in zip(own, lengths, strict=True)]
            first = int(totals[:number].sum())
            assert sorted(np.concatenate(parts).tolist()) == list(range(first, first + total))


def test_lanes_of_one_length_are_in_step() -> None:
    """Each lane of a set of 24 images draws 6 of them again and again: after k epochs each has come k times."""
    order = MixedWindowedOrder([[8, 8, 8], [12, 12]], [1.0, 1.0], 0, batch_size=8, num_lanes=4, window_images=4)
    ids = order.images_at(np.arange(4 * BLOCK * 3))  # 1500 draws of each set and lane: 250 epochs of 6 images
    assert set(np.bincount(ids, minlength=48).tolist()) == {250}


def test_a_mixed_rank_stays_with_few_shards_of_each_set() -> None:
    sizes = [[10] * 40, [10] * 80]
    order = MixedWindowedOrder(sizes, [1.0, 2.0], 0, batch_size=16, num_lanes=8, window_images=30)
    positions = (np.arange(75)[:, None] * 16 + np.arange(4)).ravel()  # rank 0 of 4 in the first epoch
    shards = np.unique(order.images_at(positions) // 10)
    assert 28 <= len(shards) <= 30 + 4


def test_a_mix_is_a_function_of_the_position() -> None:
    mixed = MixedOrder([RandomOrder(30, 1), BalancedOrder(np.arange(9) % 3, 2)], [30, 9], [1.0, 3.0], 0)
    windowed = MixedWindowedOrder([[10, 20], [9]], [1.0, 3.0], 0, batch_size=7, num_lanes=3, window_images=5)
    for order in (mixed, windowed):
        whole = order.images_at(np.arange(5000))
        some = np.random.default_rng(0).permutation(5000)[:99]
        assert pickle.loads(pickle.dumps(order)).images_at(some).tolist() == whole[some].tolist()


def test_weights_and_lanes_that_can_not_be() -> None:
    with pytest.raises(UserError, match="below one in 1000"):
        Quotas([1.0, 1e-5])
    with pytest.raises(UserError, match=r"3 images can't be cut into 4 lanes"):
        MixedWindowedOrder([[3], [9]], [1.0, 1.0], 0, batch_size=8, num_lanes=4, window_images=2)
