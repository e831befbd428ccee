"""The tars of a set: what is known of each, and the table of all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a set. It lies beside the index as `name`, or, if it is not ours, at `url`: a URL or a path."""

    name: str
    num_images: int
    num_bytes: int
    sha256: str
    url: str = ""


class ShardTable(Sequence[Shard]):
    """The tars of a set by number, in columns: 120 bytes each, where a hundred thousand objects in every loader process
    of a node would take gigabytes.

    Example:
        >>> table = ShardTable([Shard("00000.tar", 3, 10240, "ab")])
        >>> table[0].num_images, len(table)
        (3, 1)
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        kept = list(shards)
        self._names = np.array([shard.name for shard in kept], dtype=np.str_)
        self._sha256 = np.array([shard.sha256 for shard in kept], dtype=np.bytes_)
        self._urls = np.array([os.fsencode(shard.url) for shard in kept], dtype=np.bytes_)  # a byte each if empty
        self.num_images = np.array([shard.num_images for shard in kept], dtype=np.int64)
        self.num_bytes = np.array([shard.num_bytes for shard in kept], dtype=np.int64)

    @property
    def names(self) -> list[str]:
        """All names."""
        return self._names.tolist()  # type: ignore[no-any-return]

    @property
    def have_url(self) -> NDArray[np.bool_]:
        """Which tars don't lie beside the index."""
        return self._urls != b""  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> list[Shard]: ...
    def __getitem__(self, place: int | slice) -> Shard | list[Shard]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        counts = int(self.num_images[place]), int(self.num_bytes[place])
        return Shard(str(self._names[place]), *counts, self._sha256[place].decode(), os.fsdecode(self._urls[place]))
