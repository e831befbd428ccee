"""What a person or a nightly job wants to know of a shard set: what is in it, and whether it is still whole."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import ShardIndex
from pipeline.data.pixels import make_grid
from pipeline.data.remote import PIECE_BYTES, Patience, read_pieces
from pipeline.data.sources import CachedSource
from pipeline.data.store import ShardSource
from pipeline.errors import UserError

MOST_NAMED = 20


def draw_sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images `(n, c, h, w)` row by row on a sheet that is about as wide as it is tall; uint8 `(H, W, 3)`."""
    return make_grid(images, int(np.ceil(np.sqrt(len(images)))))


def describe(
    indexes: Sequence[ShardIndex], ids: NDArray[np.int64], images: NDArray[np.uint8], labels: NDArray[np.int64]
) -> Iterator[str]:
    """Lines on some images: where they come from, their classes, and the mean and deviation of each channel."""
    for one in indexes:
        form = f"{one.image_size} px, {one.channels} channels, {one.encoding}"
        yield f"set      {one.sha256[:16]}: {one.num_images:,} images of {form}"
    index, names = indexes[0], [name for one in indexes for name in one.shards.names]
    ends = np.cumsum(np.concatenate([one.shard_sizes for one in indexes]))
    shards, per_shard = np.unique(np.searchsorted(ends, ids, side="right"), return_counts=True)
    yield f"ids      {_some([str(number) for number in ids.tolist()])}"
    named = [f"{names[n]} ({count})" for n, count in zip(shards.tolist(), per_shard.tolist(), strict=True)]
    yield f"shards   {len(named)}: {_some(named)}"
    if index.num_classes:
        found, counts = np.unique(labels, return_counts=True)
        names = [index.classes[label] if label >= 0 else "none" for label in found.tolist()]
        yield f"classes  {len(names)}: {_some([f'{a} ({b})' for a, b in zip(names, counts.tolist(), strict=True)])}"
    for channel, values in enumerate(images.swapaxes(0, 1)):
        yield f"channel  {channel}: mean {values.mean():.3f}, std {values.std():.3f}, in {values.min()}..{values.max()}"


def _some(words: list[str]) -> str:
    return " ".join(words[:MOST_NAMED]) + (f" and {len(words) - MOST_NAMED:,} more" if len(words) > MOST_NAMED else "")


def find_damage(
    index: ShardIndex, source: ShardSource, number: int, patience: Patience, progress: Callable[[int], object]
) -> str:
    """Read a shard through, where it lies and past the cache, and compare it with the index.

    Args:
        index: of the set.
        source: where its tars are.
        number: of the shard.
        patience: with the network.
        progress: is told how many bytes were read.

    Returns:
        One line on what is wrong, the first damaged image named; empty if all is as it should be.
    """
    shard = index.shards[number]
    lowest = int(index.shard_sizes[:number].sum())
    rows = np.sort(index.rows(np.arange(lowest, lowest + shard.num_images)), order="offset")
    waiting = iter(rows.tolist())
    digest, held, start, done, wrong = hashlib.sha256(), bytearray(), 0, 0, []
    row = next(waiting, None)
    try:
        for piece in _pieces(source, index, number, patience):
            progress(len(piece))
            digest.update(piece)
            done += len(piece)
            held += piece
            while row is not None and row[0] + row[1] <= done:
                if zlib.crc32(memoryview(held)[row[0] - start : row[0] - start + row[1]]) != row[4]:
                    wrong.append(row[0])
                row = next(waiting, None)
            keep = done if row is None else min(done, row[0])
            del held[: keep - start]
            start = keep
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"shard {shard.name}: {error.strerror or error}"
    problems = []
    if done != shard.num_bytes:
        problems.append(f"{done:,} bytes instead of {shard.num_bytes:,}")
    elif digest.hexdigest() != shard.sha256:
        problems.append("its sha256 differs from the index")
    missing = len([*waiting]) + (row is not None)
    if wrong or missing:
        first = f", the first at byte {wrong[0]:,}" if wrong else ""
        problems.append(f"{len(wrong) + missing:,} of {len(rows):,} images damaged{first}")
    return f"shard {shard.name}: {'; '.join(problems)}" if problems else ""


def _pieces(source: ShardSource, index: ShardIndex, number: int, patience: Patience) -> Iterator[bytes]:
    shard = index.shards[number]
    if isinstance(source, CachedSource) and (file := source.remote_file(shard)) is not None:
        try:
            yield from read_pieces(file, shard.num_bytes, patience)
        except UserError as error:
            raise UserError(f"shard {shard.name} from {error}") from None
        return
    with open(source.local_path(shard), "rb") as local:
        while piece := local.read(PIECE_BYTES):
            yield piece
