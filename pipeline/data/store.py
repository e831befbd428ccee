"""Images of samples by number, read from tars at known offsets: no tar parser, and no decoder for raw records."""

from __future__ import annotations

import json
import math
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.audit import Refused
from pipeline.data.decode import make_decoder
from pipeline.data.index import DTYPES, ShardIndex
from pipeline.data.shards import Shard
from pipeline.data.writer import encode_npy
from pipeline.errors import UserError

MAX_OPEN_FILES = 128
MAX_GAP_BYTES = 8192  # what is skipped between two payloads by reading it; in our tars their other members
MAX_NEIGHBOURS = 64  # payloads that one call reads

Ids = NDArray[np.integer[Any]]
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
        """The tar's place in the folder, or the path that the index gives for one made by others."""
        return Path(shard.url) if shard.url else self._folder / shard.name


class ShardStore:
    """Random access to the images of a shard set.

    Files are opened when first read and the least recently used is closed above :data:`MAX_OPEN_FILES`. Reads carry
    their own offset, so a forked process may go on with what it inherited; a pickled store carries no descriptors.
    Not for several threads at once.

    Args:
        index: the set; `shape` (h, w, c) and `dtype` are those of its images.
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
        self.shape = (index.image_size, index.image_size, index.channels)
        self.dtype = DTYPES.get(index.encoding, np.dtype("u1"))
        empty = np.zeros(self.shape, self.dtype)
        self._head = encode_npy(empty)[: -empty.nbytes]
        self._gap = memoryview(bytearray(MAX_GAP_BYTES))
        self._files: OrderedDict[int, int] = OrderedDict()
        if index.encoding not in DTYPES:
            raise UserError(f"{index.folder}: encoding {index.encoding!r} is unknown; known: {', '.join(DTYPES)}")
        self._decode = make_decoder(index)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardStore, (self.index, self._source)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        files = self.__dict__.get("_files", {})
        while files:
            os.close(files.popitem()[1])

    def read(self, ids: NDArray[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The images and labels of some samples, in the order asked for.

        Args:
            ids: sample numbers `(b,)` in `[0, num_images)`; may repeat.

        Returns:
            Images uint8 (float32 for moments) `(b, channels, image_size, image_size)`, contiguous, and labels int64
            `(b,)`, -1 for none.

        Raises:
            UserError: a record is not what its crc32 in the index says or no such image, or a tar cannot be read.
            IndexError: an id is out of range.
        """
        pixels = np.empty((len(ids), *self.shape), self.dtype)
        labels = self.fill(ids, pixels)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels

    def fill(self, ids: NDArray[np.integer[Any]], pixels: NDArray[Any]) -> NDArray[np.int64]:
        """As :meth:`read`, but every image goes straight to its place, as it is stored: channels last.

        Payloads that lie close together in a tar are read by one call.

        Args:
            ids: as there.
            pixels: `(b, image_size, image_size, channels)`, C-contiguous; filled.

        Returns:
            labels int64 `(b,)`, -1 for none.
        """
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.index.num_images:
            raise IndexError(f"ids in [{ids.min()}, {ids.max()}], but the set has {self.index.num_images} images")
        rows = self.index.rows(ids)
        order = np.lexsort((rows["offset"], rows["shard"]))
        fill = self._fill_raw if self._decode is None else self._fill_encoded
        fill(ids[order], rows[order], order, pixels)
        return rows["label"].astype(np.int64)

    def _fill_raw(self, ids: Ids, rows: NDArray[np.void], places: Ids, pixels: NDArray[Any]) -> None:
        head, size = len(self._head), math.prod(self.shape) * self.dtype.itemsize
        for place in np.flatnonzero(rows["size"] != head + size)[:1]:
            raise self._damaged(ids[place], rows[place]["shard"])
        if not pixels.size:
            return
        heads, target = memoryview(bytearray(head * len(ids))), pixels.data.cast("B")
        self._fetch(ids, rows, [
            (heads[place * head : (place + 1) * head], target[place * size : (place + 1) * size])
            for place in places.tolist()
        ])  # fmt: skip

    def _fill_encoded(self, ids: Ids, rows: NDArray[np.void], places: Ids, pixels: NDArray[np.uint8]) -> None:
        decode = self._decode
        assert decode is not None
        for start in range(0, len(ids), MAX_NEIGHBOURS):  # bounds the memory: an original may have megabytes
            part = slice(start, start + MAX_NEIGHBOURS)
            payloads = [bytearray(size) for size in rows["size"][part].tolist()]
            self._fetch(ids[part], rows[part], [(memoryview(payload),) for payload in payloads])
            for number, place, payload in zip(ids[part], places[part], payloads, strict=True):
                try:
                    decode(payload, pixels[place])
                except Refused as refusal:
                    raise UserError(
                        f"{self._name(self.index.samples[number]['shard'])}: sample {number:08d} {refusal}; leave it "
                        "out or repair it, and write the shards again"
                    ) from None

    def _fetch(self, ids: Ids, rows: NDArray[np.void], views: Sequence[tuple[memoryview, ...]]) -> None:
        """Read and check payloads, sorted by their place, each into its pieces of memory. One call reads a run of
        neighbours, with the gaps between them into a scratch buffer."""
        offsets = rows["offset"].astype(np.int64)
        gaps = (offsets[1:] - offsets[:-1] - rows["size"][:-1]).tolist()
        values, count, start, shard, descriptor = rows.tolist(), len(rows), 0, -1, -1
        while start < count:
            offset, size, own, _, _ = values[start]
            if own != shard:
                shard, descriptor = own, self._open(own)
            vectors, stop = [*views[start]], start + 1
            while stop < count and values[stop][2] == shard and 0 <= (gap := gaps[stop - 1]) <= MAX_GAP_BYTES:
                if stop - start == MAX_NEIGHBOURS:
                    break
                vectors += (self._gap[:gap], *views[stop])
                size += gap + values[stop][1]
                stop += 1
            try:
                whole = os.preadv(descriptor, vectors, offset) == size or _read_rest(descriptor, vectors, offset)
            except OSError as error:
                raise UserError(f"{self._name(shard)}: {error.strerror}; check the disk and run again") from None
            for place in range(start, stop):
                crc = 0
                for view in views[place]:
                    crc = zlib.crc32(view, crc)
                if not whole or crc != values[place][4]:
                    raise self._damaged(ids[place], shard)
            start = stop

    def _open(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is not None:
            self._files.move_to_end(shard)
            return descriptor
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            path = self._source.local_path(self.index.shards[shard])
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(
                f"{self._name(shard)}: {error.strerror}; fetch the folder again (`dvc checkout`) or rebuild it"
            ) from None
        self._files[shard] = descriptor
        return descriptor

    def _name(self, shard: int) -> str:
        return str(self.index.folder / self.index.shards[shard].name)

    def _damaged(self, number: int, shard: int) -> UserError:
        return UserError(
            f"{self._name(shard)}: sample {number:08d} is damaged (its crc32 differs from the index); delete the "
            "folder and fetch it again (`dvc checkout`) or rebuild it (`dvc repro --force shard`), and check the disk"
        )


def read_meta(index: ShardIndex) -> list[dict[str, Any]]:
    """What the record of each sample says of it, `KEY.json`, in the order of the samples.

    Raises:
        UserError: a tar can't be read.
    """
    found: list[dict[str, Any]] = []
    for shard in index.shards:
        path = index.folder / shard.name
        try:
            with tarfile.open(path, "r:") as tar:
                records = (tar.extractfile(member) for member in tar if member.name.endswith(".json"))
                found += [json.load(record) for record in records if record is not None]
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(f"{path}: cannot be read ({error}); fetch the folder again or rebuild it") from None
    return found


class MixedStore:
    """Several sets read as one, ids counting on from set to set.

    Args:
        stores: of sets that hold images of one shape.
    """

    def __init__(self, stores: Sequence[ShardStore]) -> None:
        self._stores = stores
        self._ends = np.cumsum([store.index.num_images for store in stores])

    def read(self, ids: NDArray[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """As :meth:`ShardStore.read`."""
        pixels = np.empty((len(ids), *self._stores[0].shape), self._stores[0].dtype)
        labels = self.fill(ids, pixels)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), labels

    def fill(self, ids: NDArray[np.integer[Any]], pixels: NDArray[Any]) -> NDArray[np.int64]:
        """As :meth:`ShardStore.fill`."""
        labels = np.empty(len(ids), np.int64)
        sets = np.searchsorted(self._ends, ids, side="right")
        for number in np.unique(sets).tolist():
            here, store = sets == number, self._stores[number]
            part = np.empty((int(here.sum()), *store.shape), store.dtype)
            labels[here] = store.fill(ids[here] - (self._ends[number] - store.index.num_images), part)
            pixels[here] = part
        return labels


def _read_rest(descriptor: int, vectors: list[memoryview], offset: int) -> bool:
    """What a call left out that stopped early, at 2 GiB for one; False if the file ends before."""
    for vector in vectors:
        done = 0
        while done < len(vector):
            if not (more := os.preadv(descriptor, [vector[done:]], offset + done)):
                return False
            done += more
        offset += len(vector)
    return True
