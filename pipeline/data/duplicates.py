"""Equal and nearly equal images: perceptual hashes, groups of near ones, and a split that no group straddles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.data.listing import Found

HASH_BITS = 64
MEAN_TOLERANCE = 8  # grey levels by which the channels' means of near duplicates may differ
MAX_DUPLICATE_ROWS = 10_000  # in the table; the report counts them all
_COSINE_SCALE = 2**9


def perceptual_hashes(images: NDArray[np.float64]) -> NDArray[np.uint64]:
    """pHash: which of the 8 x 8 lowest frequencies of an image's cosine transform lie above their median.

    Scaling brightness or contrast leaves it, resampling and compressing change a few bits. All arithmetic is on whole
    numbers that float64 holds exactly, so a hash does not depend on the images beside it or on the BLAS.

    **Source**: C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1; the
    transform is taken of the whole image instead of one reduced to 32 x 32.

    Args:
        images: `(n, s, s)`, whole numbers in 0..765 (one channel, or three summed), s up to 4096.

    Returns:
        `(n,)`.
    """
    basis = _cosines(images.shape[1])
    low = (basis @ images @ basis.T).reshape(-1, HASH_BITS)
    middle = np.partition(low, (HASH_BITS // 2 - 1, HASH_BITS // 2), axis=1)
    above = 2 * low > (middle[:, HASH_BITS // 2 - 1] + middle[:, HASH_BITS // 2])[:, None]
    return np.packbits(above, axis=1).view(">u8")[:, 0].astype(np.uint64)


@cache
def _cosines(side: int) -> NDArray[np.float64]:
    frequency, place = np.arange(8)[:, None], np.arange(side)[None]
    basis: NDArray[np.float64] = np.rint(_COSINE_SCALE * np.cos(np.pi * frequency * (2 * place + 1) / (2 * side)))
    return basis


class Groups:
    """A partition of `0 .. n-1`, joined pair by pair; a group is named by its smallest member."""

    def __init__(self, num: int) -> None:
        self._parent = np.arange(num)

    def join(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        """Put `first[i]` and `second[i]` into one group, for every i."""
        while True:
            a, b = self._parent[first], self._parent[second]
            apart = a != b
            if not apart.any():
                return
            first, second, a, b = first[apart], second[apart], a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            self._flatten()

    def _flatten(self) -> None:
        while not np.array_equal(above := self._parent[self._parent], self._parent):
            self._parent = above

    @property
    def names(self) -> NDArray[np.int64]:
        """The group of each, `(n,)`."""
        return self._parent


def find_near(hashes: NDArray[np.uint64], means: NDArray[np.float64], bits: int) -> NDArray[np.int64]:
    """Groups of nearly equal images: the connected parts of the graph that joins any two with hashes at most `bits`
    bits apart and means of every channel at most :data:`MEAN_TOLERANCE` apart (hashes don't see brightness).

    Exact, without comparing all pairs: the hash is cut into `bits + 3` blocks; two hashes within `bits` agree in at
    least three whole blocks, so only images that share a choice of three are compared.

    **Source**: Manku, Jain, Das Sarma, Detecting Near-Duplicates for Web Crawling (WWW 2007), section 3.

    Args:
        hashes: `(n,)`.
        means: `(n, c)` in grey levels.
        bits: 0 to 8.

    Returns:
        `(n,)`: the smallest index of the group that each is in.

    Example:
        >>> find_near(np.array([0b1111, 7 << 40, 0b1110], np.uint64), np.zeros((3, 1)), 1).tolist()
        [0, 1, 0]
    """
    groups = Groups(len(hashes))
    edges = np.linspace(0, HASH_BITS, bits + 4).astype(int).tolist()
    blocks = [(1 << b) - (1 << a) for a, b in pairwise(edges)]
    for chosen in combinations(blocks, 3):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys, kind="stable")
        _join_runs(groups, order, keys[order], hashes[order], means[order], bits)
    return groups.names


def _join_runs(
    groups: Groups,
    order: NDArray[np.int64],
    keys: NDArray[np.uint64],
    hashes: NDArray[np.uint64],
    means: NDArray[np.float64],
    bits: int,
) -> None:
    """Compare every two of a run of equal keys: neighbours first, then those two apart, and so on."""
    left = np.arange(len(keys) - 1)
    step = 1
    while len(left := left[: np.searchsorted(left, len(keys) - step)]):
        left = left[keys[left] == keys[left + step]]
        near = left[np.bitwise_count(hashes[left] ^ hashes[left + step]) <= bits]
        near = near[(np.abs(means[near] - means[near + step]) <= MEAN_TOLERANCE).all(axis=1)]
        groups.join(order[near], order[near + step])
        step += 1


@dataclass(frozen=True)
class Duplicates:
    """Images by the pictures they show: `pictures[i]` is equal for equal pixels, `groups[i]` for nearly equal ones."""

    pictures: NDArray[np.int64]
    groups: NDArray[np.int64]

    @property
    def num_exact(self) -> int:
        """Images whose pixels another one before them has."""
        return len(self.pictures) - len(np.unique(self.pictures))

    @property
    def num_near(self) -> int:
        """Pictures that nearly equal another one before them."""
        return len(np.unique(self.pictures)) - len(np.unique(self.groups))

    @property
    def largest_group(self) -> int:
        return int(np.bincount(self.groups).max(initial=0))


def find_duplicates(rows: NDArray[np.void], channels: int, image_size: int, bits: int | None) -> Duplicates:
    """Exact duplicates by the digest of the pixels; near ones among what is left, unless `bits` is None."""
    _, first, pictures = np.unique(rows["digest"], return_index=True, return_inverse=True)
    if bits is None:
        return Duplicates(pictures, pictures)
    one = rows[first]
    means = one["sums"][:, :channels] / float(image_size**2)
    return Duplicates(pictures, find_near(one["phash"], means, bits)[pictures])


def list_duplicates(images: Sequence[Found], duplicates: Duplicates) -> list[tuple[object, ...]]:
    """`(group, kind, path)` of every image that has a duplicate, group by group in the order of the first paths.

    An image is `exact` if another has its very pixels, else `near`. Ends with the last whole group before
    :data:`MAX_DUPLICATE_ROWS`.
    """
    group_sizes = np.bincount(duplicates.groups)
    picture_sizes = np.bincount(duplicates.pictures)
    members: dict[int, list[int]] = {}
    for place in np.flatnonzero(group_sizes[duplicates.groups] > 1).tolist():
        members.setdefault(int(duplicates.groups[place]), []).append(place)
    rows: list[tuple[object, ...]] = [("group", "kind", "path")]
    for number, places in enumerate(members.values(), 1):
        if len(rows) + len(places) > MAX_DUPLICATE_ROWS + 1:
            break
        kinds = ("exact" if picture_sizes[duplicates.pictures[place]] > 1 else "near" for place in places)
        rows += [(number, kind, images[place].path) for kind, place in zip(kinds, places, strict=True)]
    return rows


def draw_held_out(digests: NDArray[np.bytes_], groups: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which images are held out: those whose group's smallest digest, as a fraction of all digests, is below `share`.

    Equal pixels have equal digests, so neither exact nor near duplicates (one group) lie on both sides. It depends on
    the pixels alone: other files, names and the order don't matter, unless they join groups.

    Args:
        digests: `(n,)` of 16 bytes, spread evenly.
        groups: `(n,)`, equal for images that must stay together.
        share: in [0, 1].
    """
    # The first eight bytes as a number: digests are sixteen bytes, and ties of eight don't matter here.
    numbers = np.frombuffer(digests.tobytes(), ">u8").reshape(-1, 2)[:, 0].astype(np.uint64)
    smallest = np.full(groups.max(initial=-1) + 1, np.iinfo(np.uint64).max)
    np.minimum.at(smallest, groups, numbers)
    held_out: NDArray[np.bool_] = smallest[groups] < share * 2.0**64
    return held_out
