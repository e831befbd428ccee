"""Stage `fetch`: a data set this machine already has -> image files under data/fetched, one sub-folder a class.

Run as `python -m pipeline.fetch`. Nothing is downloaded: `digits` and `photo_tiles` come with scikit-learn, `idx` reads
MNIST-style files (Debian's package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist). `auto` is
`idx` where that folder is, else `digits`; which it was is printed, and is part of the output, `SOURCE.txt`. When
`data.raw` names a folder of your own, only a note is written.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline import paths
from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.runtime.files import whole_folder
from pipeline.runtime.process import run_stage
from pipeline.sections import FetchParams

IDX_IMAGES = "train-images-idx3-ubyte"
IDX_LABELS = "train-labels-idx1-ubyte"
UNSIGNED_BYTE = 0x08
SOURCE = "fetch.source is auto: {source}, as {idx_dir} is {state} here.\n"
TILE_PX = 32
TILE_STEP_PX = 16
NOTE = "data.raw in params.yaml is {raw}, a folder of your own, so nothing was fetched.\n"


def load_idx(path: str | Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, plain or gzipped (by its suffix .gz).

    **Source**: the format's definition on yann.lecun.com/exdb/mnist: two zero bytes, the type (8 is unsigned byte), the
    number of dimensions, each dimension as a big-endian 32-bit integer, then the values in row-major order.

    Raises:
        UserError: unreadable, another type or number of dimensions, or not exactly as long as its header says.
    """
    path = Path(path)
    try:
        with cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")) as file:
            head = file.read(4 + 4 * num_dimensions)
            if head[:4] != bytes([0, 0, UNSIGNED_BYTE, num_dimensions]):
                raise UserError(
                    f"{path}: begins with {head[:4].hex() or 'nothing'}, but an IDX file of bytes in {num_dimensions} "
                    f"dimensions begins with 0000{UNSIGNED_BYTE:02x}{num_dimensions:02x}; is it the right file?"
                )
            shape = tuple(int(size) for size in np.frombuffer(head[4 : len(head) // 4 * 4], ">u4"))
            values = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); copy it again from its source") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; fetch.idx_dir must hold a readable file") from None
    if len(shape) != num_dimensions or len(values) != math.prod(shape):
        kind = "more" if len(values) > math.prod(shape) else "less"
        raise UserError(f"{path}: {kind} data than its header {shape} says; copy it again from its source")
    return np.frombuffer(values, np.uint8).reshape(shape)


def load_idx_pair(folder: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images uint8 `(n, h, w)` and labels uint8 `(n,)` of the training part in an MNIST-style folder.

    Raises:
        UserError: a file is missing or damaged, empty, or the two do not belong together.
    """
    images, labels = (
        load_idx(_idx_path(Path(folder), *file)[0], file[1]) for file in ((IDX_IMAGES, 3), (IDX_LABELS, 1))
    )
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images):,} images but {len(labels):,} labels; the two files do not match")
    if not images.size:
        raise UserError(f"{folder}: no images in {IDX_IMAGES} (its header says {images.shape})")
    return images, labels


def _idx_path(folder: Path, name: str, num_dimensions: int) -> tuple[Path, int]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path, num_dimensions
    raise UserError(f"{folder}: neither {name} nor {name}.gz; set fetch.idx_dir to the folder that holds them")


def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8: their 17 greys 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    return np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.uint8)


def load_photo_tiles() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """scikit-learn's two photographs (a temple, a flower) in colour, cut into tiles that overlap by half."""
    from sklearn.datasets import load_sample_images

    photos = [np.asarray(photo, dtype=np.uint8) for photo in load_sample_images().images]
    tiles = [make_tiles(photo, TILE_PX, TILE_STEP_PX) for photo in photos]
    labels = np.repeat(np.arange(len(tiles), dtype=np.uint8), [len(part) for part in tiles])
    return np.concatenate(tiles), labels


def make_tiles(photo: NDArray[np.uint8], size: int, step: int) -> NDArray[np.uint8]:
    """All squares of `size` px, `step` px apart, that lie inside a photo, row by row.

    Example:
        >>> make_tiles(np.zeros((40, 64, 3), np.uint8), 32, 16).shape
        (3, 32, 32, 3)
    """
    windows = np.lib.stride_tricks.sliding_window_view(photo, (size, size), axis=(0, 1))[::step, ::step]
    return np.ascontiguousarray(windows.reshape(-1, photo.shape[2], size, size).transpose(0, 2, 3, 1))


def load_source(params: FetchParams) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images `(n, h, w)` or `(n, h, w, 3)` and labels `(n,)` of the source that params.yaml names, evenly thinned to
    `max_images`.

    A folder that is there but damaged or incomplete is an error for `auto` too.
    """
    match choose_source(params):
        case "digits":
            images, labels = load_digits()
        case "photo_tiles":
            images, labels = load_photo_tiles()
        case _:
            assert params.idx_dir is not None, "config checks this"
            images, labels = load_idx_pair(params.idx_dir)
    if params.max_images is None or params.max_images >= len(images):
        return images, labels
    kept = np.arange(params.max_images) * len(images) // params.max_images
    return images[kept], labels[kept]


def choose_source(params: FetchParams) -> str:
    """The source, `auto` decided by what this machine has."""
    if params.source != "auto":
        return params.source
    assert params.idx_dir is not None, "config checks this"
    return "idx" if Path(params.idx_dir).is_dir() else "digits"


def save_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    """Write `LABEL/PLACE.png` for every image, PLACE counted over the whole set."""
    width = max(4, len(str(len(images) - 1)))
    for label in np.unique(labels):
        (folder / str(label)).mkdir()
    for place, (image, label) in enumerate(_pairs(images, labels)):
        Image.fromarray(image).save(folder / str(label) / f"{place:0{width}d}.png", "PNG")


def _pairs(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], int]]:
    pairs = zip(images, labels.tolist(), strict=True)
    yield from tqdm(pairs, desc="fetch", total=len(images), unit="img", disable=None)


def main() -> None:
    params = load_params(paths.PARAMS)
    with whole_folder(paths.RAW, durable=False) as folder:
        if Path(params.data.raw).resolve() != paths.RAW.resolve():
            note = NOTE.format(raw=params.data.raw)
            (folder / "NOTE.txt").write_text(note, encoding="utf-8")
            print(note, end="")
            return
        images, labels = load_source(params.fetch)
        save_images(folder, images, labels)
        if params.fetch.source == "auto":
            source, idx_dir = choose_source(params.fetch), params.fetch.idx_dir
            text = SOURCE.format(source=source, idx_dir=idx_dir, state="a folder" if source == "idx" else "absent")
            (folder / "SOURCE.txt").write_text(text, encoding="utf-8")
            print(text, end="")
    print(f"{len(images):,} images of {images.shape[2]} x {images.shape[1]} px in {paths.RAW}")


if __name__ == "__main__":
    run_stage(main)
