"""The table of contents of a shard set: where every sample lies, byte for byte.

A set is one folder: `00000.tar`, `00001.tar`, ... (WebDataset tars), `samples.npy` (one row a sample) and `index.json`,
which holds the sha256 of all the others. So the sha256 of `index.json` names the whole set.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.runtime.files import save_json, sha256_file, whole_file

FORMAT = "ddpm-shards"
VERSION = 1
INDEX_NAME = "index.json"
SAMPLES_NAME = "samples.npy"
ENCODINGS = ("raw", "png")

# offset and size are of the payload (KEY.npy or KEY.png) in its tar; label -1 is none; crc32 is of the payload.
SAMPLE_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("label", "<i4"), ("crc32", "<u4")])


@dataclass(frozen=True)
class Shard:
    """One tar of a set. It lies beside the index as `name`, or, if it is not ours, at `url`: a URL or a path."""

    name: str
    num_images: int
    num_bytes: int
    sha256: str
    url: str = ""


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A set of shards, as :func:`load_index` reads it.

    `samples` is `(num_images,)` of :data:`SAMPLE_DTYPE`, mapped read-only; row `i` is the sample with key `i`.
    `classes` is empty for an unconditional set; else label `l` is named `classes[l]`. `sha256` is that of index.json's
    bytes and thereby covers every shard. Two indexes compare by `sha256`; pickling carries no samples, the receiver
    maps the file again.
    """

    folder: Path
    image_size: int
    channels: int
    encoding: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: NDArray[np.void]
    sha256: str

    @property
    def num_images(self) -> int:
        return len(self.samples)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardIndex) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = (self.image_size, self.channels, self.encoding, self.classes, self.shards)
        return _attach, (self.folder.absolute(), *fields, self.sha256)


def _attach(
    folder: Path,
    image_size: int,
    channels: int,
    encoding: str,
    classes: tuple[str, ...],
    shards: tuple[Shard, ...],
    sha256: str,
) -> ShardIndex:
    samples = _map_samples(folder / SAMPLES_NAME)
    return ShardIndex(folder, image_size, channels, encoding, classes, shards, samples, sha256)


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
) -> None:
    """Write `samples.npy` and then `index.json` into a folder that holds the tars already.

    The tars are not opened: sizes and hashes are the caller's.

    Raises:
        ValueError: `samples` is no vector of SAMPLE_DTYPE, or does not add up with `shards`.
    """
    if samples.dtype != SAMPLE_DTYPE or samples.ndim != 1:
        raise ValueError(f"samples is {samples.dtype} of shape {samples.shape}, expected (N,) of SAMPLE_DTYPE")
    if len(samples) != sum(shard.num_images for shard in shards):
        raise ValueError(f"{len(samples)} samples, but the shards count {sum(s.num_images for s in shards)}")
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
    save_json(folder / INDEX_NAME, content)


def load_index(folder: str | Path, *, tars_elsewhere: bool = False) -> ShardIndex:
    """Open a shard set and check that it is whole.

    Checked: the format version, the sha256 of samples.npy, the presence and size of every tar that should lie here.
    The tars' content is not read: DVC hashes it, and :class:`pipeline.data.store.ShardStore` checks each record it
    reads.

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
        shards = tuple(Shard(**entry) for entry in content["shards"])
        fields = (content["image_size"], content["channels"], content["encoding"], tuple(content["classes"]))
        num_images, expected = content["num_images"], content["samples_sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); {_REBUILD}") from None
    for shard in shards:
        _check_shard(folder, shard, tars_elsewhere)
    samples_path = folder / SAMPLES_NAME
    if not samples_path.is_file():
        raise UserError(f"{samples_path}: missing; {_REBUILD}")
    if sha256_file(samples_path) != expected:
        raise UserError(f"{samples_path}: differs from the sha256 in {INDEX_NAME}; {_REBUILD}")
    index = _attach(folder, *fields, shards, hashlib.sha256(data).hexdigest())
    if not index.num_images == num_images == sum(shard.num_images for shard in shards):
        raise UserError(f"{path}: the numbers of images do not add up; {_REBUILD}")
    return index


def _check_shard(folder: Path, shard: Shard, elsewhere: bool) -> None:
    path = folder / shard.name
    if Path(shard.name).name != shard.name:
        raise UserError(f"{folder / INDEX_NAME}: shard {shard.name!r} lies outside the folder; {_REBUILD}")
    if elsewhere or shard.url:
        return
    if not path.is_file():
        raise UserError(f"{path}: missing; {_REBUILD}")
    found = path.stat().st_size
    if found != shard.num_bytes:
        raise UserError(f"{path}: {found:,} bytes instead of {shard.num_bytes:,}; {_REBUILD}")
