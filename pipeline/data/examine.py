"""What the stage `shard` finds out about one file, and the survey behind `auto`. Each a pure function of the file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipeline.data.audit import Refused, decode, is_grey, open_image, read_file, read_header, to_pixels
from pipeline.data.catalogue import KEY_DTYPE, name_pack, save_pack
from pipeline.data.duplicates import perceptual_hashes
from pipeline.data.writer import make_encoder
from pipeline.runtime.files import whole_file

# `reason` is 0 for an accepted file; the rest of the row then counts. `sums` and `squares` are of the pixels by
# channel, `digest` is of the pixels, `width` and `height` are the file's own. The payload is in the pack's .bin at
# `offset`, or it is the file itself (NOT_COPIED).
RESULT_DTYPE = np.dtype(
    [("file", KEY_DTYPE), ("reason", "<u4"), ("width", "<u4"), ("height", "<u4"), ("digest", "S16"), ("phash", "<u8"),
     ("sums", "<u8", 3), ("squares", "<u8", 3), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")]
)  # fmt: skip
HEADER_DTYPE = np.dtype([("file", KEY_DTYPE), ("reason", "<u4"), ("side", "<u4"), ("grey", "?")])
AUTO_SIZES = (64, 32, 16, 8)
NOT_COPIED = np.iinfo(np.uint64).max
COPIED_BYTES = 2**14  # a file passed through: up to this, a second copy costs less than opening the file again
BATCH_BYTES = 2**18  # of pixels whose statistics are taken at once


@dataclass(frozen=True)
class Form:
    """What an image is brought to: the part of params.yaml that decides about its payload, `auto` resolved."""

    image_size: int
    channels: Literal[1, 3]
    encoding: str
    jpeg_quality: int
    resize_filter: str
    crop: str


@dataclass(frozen=True)
class Files:
    """Some files to look at: paths relative to the folder `raw`, their keys, and the catalogue that gets the rows."""

    raw: str
    paths: tuple[str, ...]
    keys: NDArray[np.bytes_]
    catalogue: Path


def read_pixels(data: bytes, form: Form) -> tuple[NDArray[np.uint8], int, int]:
    """An image file's bytes as pixels in the form asked for, and the image's own width and height.

    Raises:
        Refused: as :func:`pipeline.data.audit.open_image`.
    """
    image = decode(data)
    width, height = (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
    return to_pixels(image, form.image_size, form.channels, form.resize_filter, form.crop), width, height


def examine_files(files: Files, form: Form) -> int:
    """Check and encode files, and add what was found to the catalogue as one pack; returns how many were looked at."""
    name = name_pack(files.keys)
    prefix = os.path.join(files.raw, "")
    encode = None if form.encoding == "original" else make_encoder(form.encoding, form.jpeg_quality)
    rows = np.zeros(len(files.paths), RESULT_DTYPE)
    rows["file"] = files.keys
    reasons: list[str] = []
    accepted: list[tuple[int, int, int, bytes, int, int, int]] = []
    pending: list[NDArray[np.uint8]] = []
    statistics = []
    most_pending = max(1, BATCH_BYTES // (form.image_size**2 * form.channels))
    offset = 0
    files.catalogue.mkdir(parents=True, exist_ok=True)
    with whole_file(files.catalogue / f"{name}.bin", durable=False) as aside, open(aside, "wb", 1 << 20) as payloads:
        for place, path in enumerate(files.paths):
            try:
                payload = read_file(prefix + path)
                pixels, width, height = read_pixels(payload, form)
            except Refused as refusal:
                reasons.append(str(refusal))
                rows["reason"][place] = len(reasons)
                continue
            digest = hashlib.sha256(pixels.data).digest()[:16]
            if encode is not None:
                payload = encode(pixels)
            copied = encode is not None or len(payload) <= COPIED_BYTES
            where = offset if copied else NOT_COPIED
            accepted.append((place, width, height, digest, where, len(payload), crc32(payload)))
            if copied:
                offset += payloads.write(payload)
            pending.append(pixels)
            if len(pending) >= most_pending:
                statistics.append(measure_pixels(np.stack(pending)))
                pending.clear()
    if pending:
        statistics.append(measure_pixels(np.stack(pending)))
    if accepted:
        places, *columns = zip(*accepted, strict=True)
        index = np.array(places)
        for field, column in zip(("width", "height", "digest", "offset", "size", "crc32"), columns, strict=True):
            rows[field][index] = column
        for field, parts in zip(("sums", "squares", "phash"), zip(*statistics, strict=True), strict=True):
            rows[field][index] = np.concatenate(parts)
    save_pack(files.catalogue, name, rows, reasons)
    return len(rows)


def measure_pixels(
    pixels: NDArray[np.uint8],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]:
    """Sums and sums of squares by channel, and perceptual hashes.

    Args:
        pixels: `(n, s, s, c)`.

    Returns:
        `(n, 3)`, `(n, 3)` (unused channels are 0) and `(n,)`. Exact: floats hold whole numbers below 2^53 on the way.
    """
    num, side, _, channels = pixels.shape
    planes = pixels.reshape(num, side * side, channels).transpose(0, 2, 1).astype(np.float64, order="C")
    sums, squares = np.zeros((2, num, 3), np.uint64)
    sums[:, :channels] = planes.sum(axis=2)
    squares[:, :channels] = np.einsum("ncp,ncp->nc", planes, planes)
    return sums, squares, perceptual_hashes(planes.sum(axis=1).reshape(num, side, side))


def survey_files(files: Files) -> int:
    """Read headers, and add what they say to the catalogue as one pack; returns how many were looked at."""
    rows = np.zeros(len(files.paths), HEADER_DTYPE)
    rows["file"] = files.keys
    for place, path in enumerate(files.paths):
        try:
            rows["side"][place], rows["grey"][place] = read_header(os.path.join(files.raw, path))
        except Refused:
            rows["reason"][place] = 1
    files.catalogue.mkdir(parents=True, exist_ok=True)
    save_pack(files.catalogue, name_pack(files.keys), rows, ["unreadable"])
    return len(rows)


def find_colour(paths: Sequence[str]) -> bool:
    """Whether a readable image among these has colour; stops at the first."""
    for path in paths:
        try:
            if not is_grey(open_image(path)):
                return True
        except Refused:
            continue
    return False


def auto_size(sides: NDArray[np.unsignedinteger]) -> int:
    """The largest of 8, 16, 32, 64 px that the lower median of the shorter sides fills, at least 8; 8 without any.

    Example:
        >>> auto_size(np.array([31, 32, 33, 90], np.uint32))
        32
    """
    median = np.sort(sides)[(len(sides) - 1) // 2] if len(sides) else 0
    return next((size for size in AUTO_SIZES if size <= median), AUTO_SIZES[-1])
