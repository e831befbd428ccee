"""The keyed bijection: a permutation for every count, each equally likely as far as counting shows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shuffle import make_keys, permute


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**32 - 1), part=st.integers(0, 2**62))
def test_each_number_comes_once(count: int, seed: int, part: int) -> None:
    assert sorted(permute(np.arange(count), count, make_keys(seed, 1, part)).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 2**16 - 1, 2**16, 2**16 + 1, 2**20 + 1])
def test_each_number_comes_once_around_powers_of_two(count: int) -> None:
    assert np.bincount(permute(np.arange(count), count, make_keys(0, 1)), minlength=count).tolist() == [1] * count


def test_a_place_does_not_depend_on_the_others_asked_for() -> None:
    places, keys = np.array([7, 3, 99, 3]), make_keys(5, 2, np.array([0, 1, 2, 3]))
    counts = np.array([10, 20, 100, 4])
    together = permute(places, counts, keys)
    alone = [int(permute(places[i : i + 1], int(counts[i]), keys[i : i + 1])[0]) for i in range(4)]
    assert together.tolist() == alone
    assert (together < counts).all()


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from what is expected of equally likely cells."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("count", [3, 6, 17, 100])
def test_every_number_is_equally_likely_at_every_place(count: int) -> None:
    draws = 60_000 // count
    keys = np.repeat(make_keys(1, 2, np.arange(draws)), count)
    places = np.tile(np.arange(count), draws)
    found = permute(places, count, keys)
    cells = np.bincount(places * count + found, minlength=count * count)
    # Each place's and each number's total is fixed: (count - 1)^2 free cells, hence the smaller spread.
    expected = draws / count
    freedom = (count - 1) ** 2
    assert abs(((cells - expected) ** 2 / expected).sum() * (count - 1) / count - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("count", [1000, 1_500_000])
def test_neighbours_land_anywhere(count: int) -> None:
    """The distance between the images of neighbouring places, and their halves, as if drawn independently."""
    draws = 40_000
    keys = make_keys(3, 4, np.arange(draws))
    place = np.arange(draws) % (count - 1)
    one, two = permute(place, count, keys), permute(place + 1, count, keys)
    assert (one != two).all()
    assert abs(chi_square(np.bincount((two - one) % count * 20 // count, minlength=20))) < 5
    assert abs(chi_square(np.bincount(one * 8 // count * 8 + two * 8 // count, minlength=64))) < 5
    order = permute(np.arange(min(count, draws)), count, make_keys(3, 5))  # one order, from place to place
    assert abs(chi_square(np.bincount((order[1:] - order[:-1]) % count * 20 // count, minlength=20))) < 5


@pytest.mark.parametrize("count", [4, 5])
def test_all_orders_of_a_few_occur_alike(count: int) -> None:
    draws = 24_000
    keys = make_keys(9, 1, np.arange(draws))
    digits = [permute(np.full(draws, place), count, keys) for place in range(count)]
    _, counts = np.unique(sum(d * count**i for i, d in enumerate(digits)), return_counts=True)
    assert counts.size == np.prod(np.arange(1, count + 1))
    assert abs(chi_square(counts)) < 5


def test_keys_differ_by_seed_purpose_and_part() -> None:
    keys = [make_keys(seed, purpose, part)[0] for seed in range(4) for purpose in range(4) for part in range(4)]
    keys += [make_keys(0, 0, 1, 2)[0], make_keys(0, 0, 2, 1)[0], make_keys(0, 0)[0]]
    assert len(set(keys)) == len(keys)
