"""Bytes of samples by number, read from local tars at known offsets: no tar parser, and no decoder for raw records."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.audit import to_pixels
from pipeline.data.index import Shard, ShardIndex
from pipeline.data.npy import open_original
from pipeline.data.writer import encode_npy
from pipeline.errors import UserError

MAX_OPEN_FILES = 128

Row = tuple[int, int, int, int, int]  # the fields of SAMPLE_DTYPE


class ShardSource(Protocol):
    """Where the tars of a set come from."""

    def local_path(self, shard: Shard) -> Path:
        """A tar as a file on this machine, fetched first where it is not. It may be removed once it is open."""
        ...


class LocalSource:
    """Tars that lie in a folder of this machine."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()

    def local_path(self, shard: Shard) -> Path:
        """The tar's place in the folder."""
        return self._folder / shard.name


class ShardStore:
    """Random access to the images of a shard set.

    Files are opened when first read and the least recently used is closed above :data:`MAX_OPEN_FILES`. Reads carry
    their own offset, so a forked process may go on with what it inherited; a pickled store carries no descriptors.
    Not for several threads at once.

    Args:
        index: the set.
        source: where its tars are; the index's own folder if left out. Pickled with the store.

    Example:
        >>> import tempfile
        >>> from pipeline.data.writer import Sample, write_shards
        >>> grey = [Sample(np.full((8, 8, 1), value, np.uint8)) for value in range(5)]
        >>> folder = tempfile.mkdtemp() + "/shards"
        >>> form = dict(image_size=8, channels=1, encoding="raw", classes=(), shard_images=2)
        >>> store = ShardStore(write_shards(folder, grey, **form))
        >>> images, labels = store.read(np.array([4, 0]))
        >>> images.shape, images[:, 0, 0, 0].tolist(), labels.tolist()
        ((2, 1, 8, 8), [4, 0], [-1, -1])
    """

    def __init__(self, index: ShardIndex, source: ShardSource | None = None) -> None:
        self.index = index
        self._source = source or LocalSource(index.folder)
        self._shape = (index.image_size, index.image_size, index.channels)
        self._head = encode_npy(np.zeros(self._shape, np.uint8))[: -int(np.prod(self._shape))]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        files = self.__dict__.get("_files", {})
        while files:
            os.close(files.popitem()[1])

    def read(self, ids: NDArray[np.integer[Any]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The images and labels of some samples, in the order asked for.

        Args:
            ids: sample numbers `(b,)` in `[0, num_images)`; may repeat.

        Returns:
            Images uint8 `(b, channels, image_size, image_size)`, contiguous, and labels int64 `(b,)`, -1 for none.

        Raises:
            UserError: a record is not what its crc32 in the index says, or a tar cannot be read.
            IndexError: an id is out of range.
        """
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.index.num_images:
            raise IndexError(f"ids in [{ids.min()}, {ids.max()}], but the set has {self.index.num_images} images")
        rows = self.index.samples[ids]
        labels = rows["label"].astype(np.int64)
        read = self._read_raw if self.index.encoding == "raw" else self._read_png
        pixels = read(ids, rows)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels

    def _read_raw(self, ids: NDArray[np.integer[Any]], rows: NDArray[np.void]) -> NDArray[np.uint8]:
        head = len(self._head)
        size = head + int(np.prod(self._shape))
        buffer = np.empty((len(ids), size), np.uint8)
        for place, number, (offset, row_size, shard, _, crc32) in _by_shard(ids, rows):
            payload = buffer[place]
            good = row_size == size and self._fill(shard, payload.data, offset) == size
            if not good or zlib.crc32(payload.data) != crc32:
                raise self._damaged(number, shard)
        return buffer[:, head:].reshape(len(ids), *self._shape)

    def _read_png(self, ids: NDArray[np.integer[Any]], rows: NDArray[np.void]) -> NDArray[np.uint8]:
        images = np.empty((len(ids), *self._shape), np.uint8)
        for place, number, (offset, size, shard, _, crc32) in _by_shard(ids, rows):
            payload = bytearray(size)
            if self._fill(shard, memoryview(payload), offset) != size or zlib.crc32(payload) != crc32:
                raise self._damaged(number, shard)
            if self.index.encoding == "original":
                images[place] = decode_original(bytes(payload), self._shape)
                continue
            with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
                images[place] = np.asarray(image).reshape(self._shape)
        return images

    def _fill(self, shard: int, target: memoryview, offset: int) -> int:
        """Bytes read into `target`; fewer than it holds only at the file's end."""
        descriptor = self._open(shard)
        done = 0
        try:
            while done < len(target) and (more := os.preadv(descriptor, [target[done:]], offset + done)):
                done += more
        except OSError as error:
            raise UserError(f"{self._path(shard)}: {error.strerror}; check the disk and run again") from None
        return done

    def _open(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is not None:
            self._files.move_to_end(shard)
            return descriptor
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"{self._path(shard)}: {error.strerror}; fetch the folder again (`dvc checkout`) or rebuild it"
            ) from None
        self._files[shard] = descriptor
        return descriptor

    def _path(self, shard: int) -> Path:
        return self._source.local_path(self.index.shards[shard])

    def _damaged(self, number: int, shard: int) -> UserError:
        return UserError(
            f"{self._path(shard)}: sample {number:08d} is damaged (its crc32 differs from the index); delete the "
            "folder and fetch it again (`dvc checkout`) or rebuild it (`dvc repro --force shard`), and check the disk"
        )


def decode_original(payload: bytes, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Any image file, brought to `(h, w, c)` by the audit's rules."""
    return to_pixels(open_original(payload), shape[0], shape[2])


def _by_shard(ids: NDArray[np.integer[Any]], rows: NDArray[np.void]) -> Iterator[tuple[int, int, Row]]:
    """(place in the batch, sample number, row), shard after shard, so that each file is opened once a batch."""
    order = np.argsort(rows["shard"], kind="stable")
    yield from zip(order.tolist(), ids[order].tolist(), rows[order].tolist(), strict=True)
