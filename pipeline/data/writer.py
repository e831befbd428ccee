"""Images in, WebDataset tars with an index out. The same samples give the same bytes, file by file."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.index import DTYPES, SAMPLE_DTYPE, Preparation, ShardIndex, load_index, save_index
from pipeline.data.shards import Shard
from pipeline.data.ustar import UstarWriter
from pipeline.errors import UserError
from pipeline.runtime.files import save_json, whole_folder

KEY_DIGITS = 8
JPEG_QUALITY = 95
_encode_json = json.JSONEncoder(sort_keys=True).encode
# The file of a record that holds the pixels; `original` keeps the name's own suffix.
SUFFIXES = {"raw": "npy", "png": "png", "jpeg": "jpg", "moments": "npy"}
# Whose version decides about the bytes of an encoding; the others' don't depend on any.
ENCODERS = {"png": f"Pillow {PIL.__version__}", "jpeg": f"simplejpeg {simplejpeg.__version__}"}


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard: `(h, w, c)`, its label or None, and anything JSON-able about it."""

    image: NDArray[Any]
    label: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class ShardFile:
    """One tar of a set, record by record. After the with-block `rows` and :meth:`describe` tell what it holds.

    Record `i` has the key `i` in decimal digits and up to three files: `KEY.cls` (label as ASCII; left out without
    one), `KEY.json` (meta, sorted keys) and the payload.
    """

    def __init__(self, path: Path, *, key_digits: int = KEY_DIGITS) -> None:
        self._path = path
        self._tar = UstarWriter(path)
        self._digits = key_digits
        self._rows: list[tuple[int, int, int, int, int]] = []

    def add(self, key: int, payload: bytes, suffix: str, label: int | None, meta: Mapping[str, Any]) -> None:
        """Append a record whose payload is the file `KEY.suffix`."""
        files = {"json": _encode_json(meta).encode("ascii"), suffix: payload}
        if label is not None:
            files["cls"] = b"%d" % label
        order = sorted(files)  # as webdataset's writer has them
        name = f"{key:0{self._digits}d}"
        offset = self._tar.add([(f"{name}.{part}", files[part]) for part in order])[order.index(suffix)]
        self._rows.append((offset, len(payload), 0, -1 if label is None else label, zlib.crc32(payload)))

    @property
    def rows(self) -> NDArray[np.void]:
        """One row a record of SAMPLE_DTYPE, `shard` still 0."""
        return np.array(self._rows, dtype=SAMPLE_DTYPE)

    def describe(self, name: str) -> Shard:
        """The finished tar as an entry of the index."""
        return Shard(name, len(self._rows), self._tar.num_bytes, self._tar.sha256)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.__exit__(kind, error, trace)


def write_shards(
    folder: str | Path,
    samples: Iterable[Sample],
    *,
    image_size: int,
    channels: int,
    encoding: str,
    classes: tuple[str, ...] | list[str],
    shard_images: int,
    jpeg_quality: int = JPEG_QUALITY,
    notes: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """Write a shard set; `folder` appears when all of it is on the disk, or not at all.

    Records are those of :class:`ShardFile` with keys of eight digits (more from a hundred million on); the pixels are
    `KEY.npy` (HWC, .npy version 1.0, so that all have one size), `KEY.png` or `KEY.jpg`. Names, times, owners
    and modes in the tar are fixed. One image at a time is held; 24 bytes stay in memory for each written.

    Args:
        folder: replaced if it exists.
        samples: images `(image_size, image_size, channels)` of the encoding's type, label in `[0, len(classes))` or
            None.
        encoding: `raw`, `png` or `jpeg` for uint8 pixels, `moments` for float32 latents. Bytes of PNG and JPEG depend
            on the encoder's version, the others don't.
        classes: class names by label; empty for an unconditional set.
        shard_images: images in one tar, at most.
        jpeg_quality: 1 to 100, for `jpeg` only.
        notes: file name -> JSON-able value, read after the last sample was written: what else the folder shall hold.

    Raises:
        UserError: there are no samples.
        ValueError: a sample has another shape or type, or a label without a class.
    """
    encode = make_encoder(encoding, jpeg_quality)
    shape = (image_size, image_size, channels)
    rest = iter(samples)
    shards: list[Shard] = []
    rows: list[NDArray[np.void]] = []
    start = 0
    with whole_folder(folder) as aside:
        while (first := next(rest, None)) is not None:
            group = chain([first], islice(rest, shard_images - 1))
            checked = (_checked(sample, shape, DTYPES[encoding], len(classes)) for sample in group)
            name = f"{len(shards):05d}.tar"
            with ShardFile(aside / name) as file:
                for key, sample in enumerate(checked, start):
                    file.add(key, encode(sample.image), SUFFIXES[encoding], sample.label, sample.meta)
            rows.append(file.rows)
            rows[-1]["shard"] = len(shards)
            shards.append(file.describe(name))
            start += len(rows[-1])
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
            preparation=Preparation(encoder=describe_encoder(encoding, jpeg_quality)),
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


def make_encoder(encoding: str, jpeg_quality: int = JPEG_QUALITY) -> Callable[[NDArray[np.uint8]], bytes]:
    """The function from pixels to the payload of a record.

    Raises:
        ValueError: there is none of that name.
    """
    if encoding == "jpeg":
        return lambda image: encode_jpeg(image, jpeg_quality)
    encoders: dict[str, Callable[[NDArray[Any]], bytes]] = {
        "raw": encode_npy, "png": encode_png, "moments": encode_npy,
    }  # fmt: skip
    if encoding not in encoders:
        raise ValueError(f"encoding is {encoding!r}, known: {', '.join(SUFFIXES)}")
    return encoders[encoding]


def describe_encoder(encoding: str, jpeg_quality: int = JPEG_QUALITY) -> str:
    """What else than the pixels decides about the bytes; empty for raw pixels and for files passed through.

    Example:
        >>> describe_encoder("raw"), describe_encoder("jpeg", 90).split(", ")[1:]
        ('', ['quality 90', '4:4:4'])
    """
    name = ENCODERS.get(encoding, "")
    return f"{name}, quality {jpeg_quality}, 4:4:4" if encoding == "jpeg" else name


def encode_npy(image: NDArray[Any]) -> bytes:
    """An array as a .npy file of format version 1.0, whose header has a length that depends on shape and type alone."""
    return _npy_header(image.shape, image.dtype.str) + image.tobytes()


@cache
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    memory = io.BytesIO()
    np.lib.format.write_array_header_1_0(memory, {"descr": dtype, "fortran_order": False, "shape": shape})
    return memory.getvalue()


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Pixels `(h, w, 1 | 3)` as a PNG file without any metadata."""
    memory = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(memory, "PNG")
    return memory.getvalue()


def encode_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """Pixels `(h, w, 1 | 3)` as a baseline JPEG file, colour at full resolution (4:4:4)."""
    colour = "GRAY" if image.shape[2] == 1 else "RGB"
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colour, "444", fastdct=False)
    return data
