"""Images in, WebDataset tars with an index out. The same samples give the same bytes, file by file."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.index import DTYPES, SAMPLE_DTYPE, Shard, ShardIndex, load_index, save_index
from pipeline.errors import UserError
from pipeline.runtime.files import save_json, sha256_file, whole_folder


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard: `(h, w, c)`, its label or None, and anything JSON-able about it."""

    image: NDArray[Any]
    label: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def write_shards(
    folder: str | Path,
    samples: Iterable[Sample],
    *,
    image_size: int,
    channels: int,
    encoding: str,
    classes: tuple[str, ...] | list[str],
    shard_images: int,
    notes: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """Write a shard set; `folder` appears when all of it is on the disk, or not at all.

    Record `i` has the key `i` in eight digits (more from a hundred million on) and three files: `KEY.cls` (label as
    ASCII; left out without one), `KEY.json` (meta, sorted keys), and the pixels as `KEY.npy` (HWC, .npy version
    1.0, so that all have one size) or `KEY.png`. Names, times, owners and modes in the tar are fixed. One image at a
    time is held; 24 bytes stay in memory for each written.

    Args:
        folder: replaced if it exists.
        samples: images `(image_size, image_size, channels)` of the encoding's type, label in `[0, len(classes))` or
            None.
        encoding: `raw` or `png` for uint8 pixels, `moments` for float32 latents. PNG bytes depend on Pillow's version,
            the others do not.
        classes: class names by label; empty for an unconditional set.
        shard_images: images in one tar, at most.
        notes: file name -> JSON-able value, read after the last sample was written: what else the folder shall hold.

    Raises:
        UserError: there are no samples.
        ValueError: a sample has another shape or type, or a label without a class.
    """
    if encoding not in DTYPES:
        raise ValueError(f"encoding is {encoding!r}, known: {', '.join(DTYPES)}")
    shape = (image_size, image_size, channels)
    rest = iter(samples)
    shards: list[Shard] = []
    rows: list[NDArray[np.void]] = []
    start = 0
    with whole_folder(folder) as aside:
        while (first := next(rest, None)) is not None:
            group = chain([first], islice(rest, shard_images - 1))
            name = f"{len(shards):05d}.tar"
            checked = (_checked(sample, shape, DTYPES[encoding], len(classes)) for sample in group)
            shard_rows = _write_tar(aside / name, checked, start, encoding)
            shard_rows["shard"] = len(shards)
            rows.append(shard_rows)
            size = (aside / name).stat().st_size
            shards.append(Shard(name, len(shard_rows), size, sha256_file(aside / name)))
            start += len(shard_rows)
        if not shards:
            raise UserError(f"{folder}: no images to write")
        save_index(
            aside,
            image_size=image_size,
            channels=channels,
            encoding=encoding,
            classes=classes,
            shards=shards,
            samples=np.concatenate(rows),
        )
        for name, note in (notes or {}).items():
            save_json(aside / name, note)
    return load_index(folder)


def _checked(sample: Sample, shape: tuple[int, int, int], dtype: np.dtype[Any], num_classes: int) -> Sample:
    if sample.image.shape != shape or sample.image.dtype != dtype:
        raise ValueError(f"image is {sample.image.dtype} {sample.image.shape}, expected {dtype} {shape}")
    if sample.label is not None and not 0 <= sample.label < num_classes:
        raise ValueError(f"label {sample.label} with {num_classes} classes")
    return sample


def _write_tar(path: Path, samples: Iterator[Sample], start: int, encoding: str) -> NDArray[np.void]:
    """Write one tar and return its rows, `shard` still 0. Offsets are read back from the tar by the standard library,
    not computed; the crc32 is of the bytes that were meant to be written."""
    from webdataset import TarWriter

    suffix = "png" if encoding == "png" else "npy"
    encode = encode_png if encoding == "png" else encode_npy
    rows = []
    with open(path, "wb") as file, TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0) as tar:
        for key, sample in enumerate(samples, start):
            payload = encode(sample.image)
            record: dict[str, Any] = {"__key__": f"{key:08d}", suffix: payload}
            record["json"] = json.dumps(sample.meta, sort_keys=True).encode("ascii")
            if sample.label is not None:
                record["cls"] = str(int(sample.label)).encode("ascii")
            tar.write(record)
            rows.append((0, len(payload), 0, -1 if sample.label is None else sample.label, zlib.crc32(payload)))
    table = np.array(rows, dtype=SAMPLE_DTYPE)
    with tarfile.open(path, "r:") as tar:
        members = [(member.offset_data, member.size) for member in tar if member.name.endswith(f".{suffix}")]
    offsets, sizes = zip(*members, strict=True)
    if len(members) != len(table) or not np.array_equal(sizes, table["size"]):
        raise UserError(f"{path}: what was written cannot be read back; check the disk and run again")
    table["offset"] = offsets
    return table


def encode_npy(image: NDArray[Any]) -> bytes:
    """An array as a .npy file of format version 1.0, whose header has a length that depends on the shape alone."""
    memory = io.BytesIO()
    np.lib.format.write_array(memory, np.ascontiguousarray(image), version=(1, 0))
    return memory.getvalue()


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Pixels `(h, w, 1 | 3)` as a PNG file without any metadata."""
    memory = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(memory, "PNG")
    return memory.getvalue()
