"""Perceptual hashes, groups of near duplicates, and a split that no group straddles."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data import duplicates as module
from pipeline.data.duplicates import (
    MEAN_TOLERANCE,
    Duplicates,
    draw_held_out,
    find_near,
    list_duplicates,
    perceptual_hashes,
)
from pipeline.data.listing import Found

SIDES = st.sampled_from([4, 8, 9, 32, 65])


def _hash(*images: np.ndarray) -> np.ndarray:
    return perceptual_hashes(np.stack(images).astype(np.float64))


def _distance(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.bitwise_count(_hash(first) ^ _hash(second))[0])


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Squares of two photographs, grey, 64 px."""
    photos = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    boxes = [(left, top, left + 200, top + 200) for left in (0, 210, 420) for top in (0, 210)]
    return [np.asarray(photo.crop(box).resize((64, 64))) for photo in photos for box in boxes]


def test_a_hash_survives_what_leaves_the_picture_alone(photos: list[np.ndarray]) -> None:
    for photo in photos:
        memory = io.BytesIO()
        Image.fromarray(photo).save(memory, "JPEG", quality=60)
        again = np.asarray(Image.open(memory))
        smaller = np.asarray(Image.fromarray(photo).resize((48, 48)).resize((64, 64)))
        assert _distance(photo, again) <= 3
        assert _distance(photo, smaller) <= 6
        assert _distance(photo, np.minimum(photo, 225) + 30) <= 6
    others = [_distance(a, b) for place, a in enumerate(photos) for b in photos[:place]]
    assert min(others) > 8
    assert 28 < np.mean(others) < 36  # as random bits are


@settings(deadline=None)
@given(data=st.data(), side=SIDES, num=st.integers(1, 5))
def test_a_hash_does_not_depend_on_the_images_beside_it(data: st.DataObject, side: int, num: int) -> None:
    images = data.draw(arrays(np.float64, (num, side, side), elements=st.integers(0, 765)))
    together = perceptual_hashes(images)
    assert together.tolist() == [perceptual_hashes(image[None])[0] for image in images]


def test_the_largest_images_are_hashed_exactly() -> None:
    """Whole numbers stay below 2^53, so the order of summation can't matter."""
    basis = module._cosines(4096)
    assert np.abs(basis).sum(axis=1).max() ** 2 * 765 < 2**53


def _near_by_all_pairs(hashes: np.ndarray, means: np.ndarray, bits: int) -> list[int]:
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= bits
    near &= (np.abs(means[:, None] - means[None]) <= MEAN_TOLERANCE).all(axis=2)
    names = np.arange(len(hashes))
    for _ in names:
        names = np.array([names[row].min() for row in near])
    return names.tolist()


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(0, 8))
def test_groups_are_those_that_comparing_all_pairs_gives(data: st.DataObject, bits: int) -> None:
    bases = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    flips = st.lists(st.integers(0, 63), max_size=bits + 2)
    hashes = list(bases)
    for place in data.draw(st.lists(st.integers(0, len(bases) - 1), max_size=20)):
        flipped = hashes[place]
        for bit in data.draw(flips):
            flipped ^= 1 << bit
        hashes.append(flipped)
    means = data.draw(arrays(np.float64, (len(hashes), 1), elements=st.sampled_from([0.0, 8.0, 9.0, 16.0, 100.0])))
    found = find_near(np.array(hashes, np.uint64), means, bits)
    assert found.tolist() == _near_by_all_pairs(np.array(hashes, np.uint64), means, bits)


def test_many_images_are_compared_in_a_moment() -> None:
    """A hundred thousand, with pairs planted at the very distance: all pairs would be five thousand million."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 100_000, dtype=np.uint64)
    for bit in (3, 31, 62):
        hashes[50_000:50_100] = (hashes[:100] if bit == 3 else hashes[50_000:50_100]) ^ np.uint64(1 << bit)
    groups = find_near(hashes, np.zeros((100_000, 3)), 3)
    expected = np.arange(100_000)
    expected[50_000:50_100] = np.arange(100)
    assert np.array_equal(groups, expected)


@settings(deadline=None)
@given(st.data())
def test_no_group_straddles_the_split_and_order_does_not_matter(data: st.DataObject) -> None:
    num = data.draw(st.integers(1, 60))
    groups = data.draw(arrays(np.int64, num, elements=st.integers(0, num - 1)))
    digests = np.array([data.draw(st.binary(min_size=16, max_size=16)) for _ in range(num)], "S16")
    share = data.draw(st.floats(0, 1, exclude_max=True))
    held_out = draw_held_out(digests, groups, share)
    for group in set(groups.tolist()):
        assert len(set(held_out[groups == group].tolist())) == 1
    order = np.array(data.draw(st.permutations(range(num))))
    assert np.array_equal(draw_held_out(digests[order], groups[order], share), held_out[order])
    assert not draw_held_out(digests, groups, 0.0).any()


def test_the_share_is_about_what_was_asked_for() -> None:
    digests = np.frombuffer(np.random.default_rng(0).bytes(16 * 20_000), "S16")
    assert abs(draw_held_out(digests, np.arange(20_000), 0.1).mean() - 0.1) < 0.01


def test_the_table_says_which_are_equal_and_ends_with_a_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Found(f"{number}.png", None) for number in range(6)]
    found = Duplicates(np.array([0, 1, 0, 2, 3, 3]), np.array([0, 1, 0, 0, 3, 3]))
    assert (found.num_exact, found.num_near, found.largest_group) == (2, 1, 3)
    rows = [
        (1, "exact", "0.png"),
        (1, "exact", "2.png"),
        (1, "near", "3.png"),
        (2, "exact", "4.png"),
        (2, "exact", "5.png"),
    ]
    assert list_duplicates(images, found)[1:] == rows
    monkeypatch.setattr(module, "MAX_DUPLICATE_ROWS", 4)
    assert list_duplicates(images, found)[1:] == rows[:3]
