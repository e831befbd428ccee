"""The table of contents of a shard set: where every sample lies, byte for byte.

A set is one folder: `00000.tar`, `00001.tar`, ... (WebDataset tars), `samples.npy` (one row a sample) and `index.json`,
which holds the sha256 of all the others. So the sha256 of `index.json` names the whole set.

When is what checked? At opening: that every file is there and every tar has its size; the hash of `samples.npy` too, up
to one block of it. In a larger one each block of rows is hashed by each process before it uses the first row of it
(about a millisecond). A payload's crc32 is in its row and is checked at every read. The tars' own sha256 is for
`dvc` and `python -m pipeline.data verify`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.shards import Shard, ShardTable
from pipeline.errors import UserError
from pipeline.runtime.files import save_json, sha256_file, whole_file

FORMAT = "ddpm-shards"
VERSION = 1
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
# Pixels, but for moments: what a first stage makes of them, mean, then log-variance, channel by channel.
DTYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("raw", "png", "jpeg", "original"), np.dtype("u1")),
    "moments": np.dtype("<f4"),
}

# offset and size are of the payload (KEY.npy, KEY.png, ...) in its tar; label -1 is none; crc32 is of the payload.
SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<i4"), ("crc32", "<u4")])
BLOCK_ROWS = 2**16  # of samples.npy, under one hash


@dataclass(frozen=True)
class Preparation:
    """How files became payloads. For encoding `original` the reader does this part: the payload is the file itself.

    `resize_filter` and `crop` as in params.yaml; `encoder` names what else decides about the payloads' bytes. An
    index.json without them means these defaults.
    """

    resize_filter: str = "bicubic"
    crop: str = "center"
    encoder: str = ""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A set of shards, as :func:`load_index` reads it.

    `samples` is `(num_images,)` of :data:`SAMPLE_DTYPE`, mapped read-only and so shared by all processes; row `i` is
    the sample with key `i`, shard after shard. Taken from there it is unchecked: use :meth:`rows` and :attr:`labels`.
    `classes` is empty for an unconditional set; else label `l` is named `classes[l]`. `sha256` is that of index.json's
    bytes and thereby covers every shard. Two indexes compare by `sha256`; pickling carries no samples, the receiver
    maps the file again.
    """

    folder: Path
    image_size: int
    channels: int
    encoding: str
    classes: tuple[str, ...]
    shards: ShardTable
    samples: NDArray[np.void]
    sha256: str
    samples_sha256: str = ""
    block_sha256: tuple[str, ...] = ()
    preparation: Preparation = Preparation()
    _checked: set[int] = field(default_factory=set)

    @property
    def num_images(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> NDArray[np.int32]:
        """The label of every sample, `(num_images,)`; reads the whole file."""
        self._check_blocks(range(len(self.block_sha256)))
        return self.samples["label"]

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Images in each shard."""
        return self.shards.num_images

    def rows(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.void]:
        """Copies of the rows of some samples, their blocks checked.

        Raises:
            UserError: a block of samples.npy is not what index.json says.
        """
        if self.block_sha256:
            self._check_blocks(np.unique(np.asarray(ids) // BLOCK_ROWS).tolist())
        rows: NDArray[np.void] = self.samples[ids]
        return rows

    def _check_blocks(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block not in self._checked:
                start = block * BLOCK_ROWS
                if _sha256_rows(self.samples[start : start + BLOCK_ROWS]) != self.block_sha256[block]:
                    raise UserError(
                        f"{self.folder / SAMPLES_NAME}: the rows from {start:,} on differ from their sha256 in "
                        f"{INDEX_NAME}; {_REBUILD}"
                    )
                self._checked.add(block)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardIndex) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.image_size, self.channels, self.encoding, self.classes, self.shards)
        more = (self.samples_sha256, self.block_sha256, self.preparation)
        return _attach, (self.folder.absolute(), *fields, self.sha256, *more)


def _attach(
    folder: Path,
    image_size: int,
    channels: int,
    encoding: str,
    classes: tuple[str, ...],
    shards: ShardTable,
    sha256: str,
    samples_sha256: str,
    block_sha256: tuple[str, ...],
    preparation: Preparation,
) -> ShardIndex:
    samples = _map_samples(folder / SAMPLES_NAME)
    form = (image_size, channels, encoding, classes, shards)
    return ShardIndex(folder, *form, samples, sha256, samples_sha256, block_sha256, preparation)


def _map_samples(path: Path) -> NDArray[np.void]:
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {_REBUILD}") from None
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        raise UserError(f"{path}: holds {samples.dtype} of shape {samples.shape}, not a list of samples; {_REBUILD}")
    return samples  # type: ignore[no-any-return]


_REBUILD = "fetch the folder again (`dvc checkout`) or rebuild it (`dvc repro`)"


def save_index(
    folder: str | Path,
    *,
    image_size: int,
    channels: int,
    encoding: str,
    classes: tuple[str, ...] | list[str],
    shards: tuple[Shard, ...] | list[Shard],
    samples: NDArray[np.void],
    preparation: Preparation = Preparation(),
) -> None:
    """Write `samples.npy` and then `index.json` into a folder that holds the tars already.

    The tars are not opened: sizes and hashes are the caller's.

    Raises:
        ValueError: `samples` is no vector of SAMPLE_DTYPE, or does not add up with `shards`, or does not go through
            them in turn.
    """
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        raise ValueError(f"samples is {samples.dtype} of shape {samples.shape}, expected (N,) of SAMPLE_DTYPE")
    if len(samples) != sum(shard.num_images for shard in shards):
        raise ValueError(f"{len(samples)} samples, but the shards count {sum(s.num_images for s in shards)}")
    if not np.array_equal(samples["shard"], np.repeat(np.arange(len(shards)), [s.num_images for s in shards])):
        raise ValueError("the samples do not go through the shards in turn")
    folder = Path(folder)
    memory = io.BytesIO()
    np.lib.format.write_array(memory, np.ascontiguousarray(samples), version=(1, 0))
    with whole_file(folder / SAMPLES_NAME) as aside:
        aside.write_bytes(memory.getbuffer())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "image_size": image_size,
        "channels": channels,
        "encoding": encoding,
        "num_images": len(samples),
        "classes": list(classes),
        "samples_sha256": hashlib.sha256(memory.getbuffer()).hexdigest(),
        "shards": [{key: value for key, value in asdict(shard).items() if key != "url" or value} for shard in shards],
    }
    if len(samples) > BLOCK_ROWS:
        starts = range(0, len(samples), BLOCK_ROWS)
        content["block_sha256"] = [_sha256_rows(samples[start : start + BLOCK_ROWS]) for start in starts]
    if preparation != Preparation() or encoding == "original":
        content["preparation"] = asdict(preparation)
    save_json(folder / INDEX_NAME, content)


def load_index(folder: str | Path, *, tars_elsewhere: bool = False) -> ShardIndex:
    """Open a shard set and check that it is whole, without reading it: 10 million samples in well under 0.1 s.

    Checked: the format version, the presence and size of every tar that should lie here, and the sha256 of
    samples.npy, if not now then at the first use of each block (see above). The tars' content is not read: DVC hashes
    it, and :class:`pipeline.data.store.ShardStore` checks each record it reads.

    Args:
        folder: where index.json and samples.npy are.
        tars_elsewhere: no tar lies here (:func:`pipeline.data.sources.open_shards` knows where they are).

    Raises:
        UserError: any of these does not hold; the message names the file and the remedy.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} not found: {folder} is no folder of shards; make it with `dvc repro`") from None
    try:
        content = json.loads(data)
        known = (content["format"], content["version"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not an index of shards; {_REBUILD}") from None
    if known != (FORMAT, VERSION):
        raise UserError(
            f"{path}: format {known[0]} version {known[1]}, but this program reads {FORMAT} version {VERSION}; "
            "rebuild the folder with `dvc repro --force shard`, or use the program's version that wrote it"
        )
    try:
        shards = ShardTable(Shard(**entry) for entry in content["shards"])
        fields = (content["image_size"], content["channels"], content["encoding"], tuple(content["classes"]))
        num_images, expected = content["num_images"], content["samples_sha256"]
        blocks = tuple(content.get("block_sha256", ()))
        preparation = Preparation(**content.get("preparation", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); {_REBUILD}") from None
    _check_shards(folder, shards, tars_elsewhere)
    samples_path = folder / SAMPLES_NAME
    if not samples_path.is_file():
        raise UserError(f"{samples_path}: missing; {_REBUILD}")
    index = _attach(folder, *fields, shards, hashlib.sha256(data).hexdigest(), expected, blocks, preparation)
    if not blocks:
        verify_samples(index)
    if not index.num_images == num_images == int(shards.num_images.sum()):
        raise UserError(f"{path}: the numbers of images do not add up; {_REBUILD}")
    if blocks and len(blocks) != -(-num_images // BLOCK_ROWS):
        raise UserError(f"{path}: {len(blocks)} hashes of blocks for {num_images:,} images; {_REBUILD}")
    return index


def check_alike(indexes: Sequence[ShardIndex]) -> None:
    """Refuse sets that can't be drawn from as one.

    Raises:
        UserError: they differ in size, channels or classes.
    """
    first = indexes[0]
    for other in indexes[1:]:
        for name in ("image_size", "channels", "classes"):
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                differ = (
                    f"{len(one)} and {len(two)} classes, or other names" if name == "classes" else f"{one} and {two}"
                )
                raise UserError(f"{first.folder} and {other.folder} can't be mixed: they differ in {name} ({differ}); "
                                "write them with the same shard parameters and class folders")  # fmt: skip


def verify_samples(index: ShardIndex) -> None:
    """Compare the whole of samples.npy with its sha256 in index.json.

    Raises:
        UserError: they differ.
    """
    path = index.folder / SAMPLES_NAME
    if sha256_file(path) != index.samples_sha256:
        raise UserError(f"{path}: differs from the sha256 in {INDEX_NAME}; {_REBUILD}")


def _sha256_rows(rows: NDArray[np.void]) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8).data).hexdigest()


def _check_shards(folder: Path, shards: ShardTable, elsewhere: bool) -> None:
    """Every tar that should lie here is there and has its size. By columns and without pathlib: there may be a hundred
    thousand."""
    prefix = f"{folder}{os.sep}"
    away = np.ones(len(shards), bool) if elsewhere else shards.have_url
    for name, num_bytes, is_away in zip(shards.names, shards.num_bytes.tolist(), away.tolist(), strict=True):
        if os.sep in name:
            raise UserError(f"{folder / INDEX_NAME}: shard {name!r} lies outside the folder; {_REBUILD}")
        if is_away:
            continue
        try:
            found = os.stat(prefix + name)
        except OSError:
            raise UserError(f"{prefix}{name}: missing; {_REBUILD}") from None
        if found.st_size != num_bytes or not stat.S_ISREG(found.st_mode):
            raise UserError(f"{prefix}{name}: {found.st_size:,} bytes instead of {num_bytes:,}; {_REBUILD}")
