"""A random order of 0..n-1 that is known at any place without the others: no table, no state, any n.

A Feistel network is a permutation of the numbers of some bits whatever its round function is; a number that falls
outside 0..n-1 is sent through it again until it falls inside, which leaves a permutation of 0..n-1.

**Source**: Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, sections 3 and 4 (cycle walking);
Luby, Rackoff, 1988 (four rounds suffice for a perfect round function; eight are done here); the round function is the
finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 8
SORTED_COUNT = 32  # up to it the order is sorted from random words: a small network has few orders to choose from
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)

Words = NDArray[np.uint64]


def make_keys(seed: int, purpose: int, *parts: ArrayLike) -> Words:
    """One 64-bit key for each tuple of parts, by which no two purposes, seeds or tuples share an order.

    Args:
        seed: in [0, 2**32).
        purpose: in [0, 2**32): a :class:`pipeline.runtime.rng.Stream`.
        parts: integers of at least 0, broadcast against one another: an epoch, a lane.

    Returns:
        uint64 of the broadcast shape, at least `(1,)`.
    """
    keys = _scramble(np.array([seed << 32 | purpose], dtype=np.uint64) + _WEYL)
    for part in parts:
        keys = _scramble(keys + np.atleast_1d(part).astype(np.uint64) + _WEYL)
    return keys


def permute(places: NDArray[np.int64], counts: ArrayLike, keys: Words) -> NDArray[np.int64]:
    """What stands at some places of the random orders of 0..count-1 named by their keys.

    Args:
        places: `(b,)`, each in [0, count).
        counts: at least 1 and below 2**52, one or one a place.
        keys: one or one a place, as from :func:`make_keys`.

    Returns:
        `(b,)` int64. Over all places of one count and key each number occurs once.

    Example:
        >>> sorted(permute(np.arange(5), 5, make_keys(0, 1)).tolist())
        [0, 1, 2, 3, 4]
    """
    limits = np.broadcast_to(np.asarray(counts, dtype=np.int64), places.shape)
    keys = np.broadcast_to(keys, places.shape)
    found = np.empty(len(places), dtype=np.int64)
    small = limits <= SORTED_COUNT
    found[small] = _sort(places[small], limits[small], keys[small])
    waiting = np.flatnonzero(~small)
    values, limits, keys = places[waiting].astype(np.uint64), limits[waiting].astype(np.uint64), keys[waiting]
    bits = np.frexp(limits - np.uint64(1))[1].astype(np.uint64)
    while waiting.size:
        values = _encrypt(values, bits, keys)
        inside = values < limits
        found[waiting[inside]] = values[inside]
        outside = ~inside
        waiting, values, bits = waiting[outside], values[outside], bits[outside]
        limits, keys = limits[outside], keys[outside]
    return found


def _sort(places: NDArray[np.int64], limits: NDArray[np.int64], keys: Words) -> NDArray[np.int64]:
    """The small orders, by sorting a random word for each number."""
    numbers = np.arange(limits.max(initial=1))
    words = _scramble(keys[:, None] + _WEYL * numbers.astype(np.uint64))
    words[numbers >= limits[:, None]] = np.iinfo(np.uint64).max
    order = np.argsort(words, axis=1, kind="stable")
    found: NDArray[np.int64] = order[np.arange(len(places)), places]
    return found


def _encrypt(values: Words, bits: Words, keys: Words) -> Words:
    """A permutation of the numbers of `bits` bits: the two halves change each other in turn."""
    one = np.uint64(1)
    low_bits = bits >> one
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    low, high = values & low_mask, values >> low_bits
    for _ in range(ROUNDS // 2):
        keys = keys + _WEYL
        high ^= _scramble(low + keys) & high_mask
        keys = keys + _WEYL
        low ^= _scramble(high + keys) & low_mask
    whole: Words = high << low_bits | low
    return whole


def _scramble(words: Words) -> Words:
    """A bijection of 64-bit words in which each bit of the result depends on all."""
    first, second, third = _SHIFTS
    words = (words ^ words >> first) * _FIRST
    words = (words ^ words >> second) * _SECOND
    return words ^ words >> third
