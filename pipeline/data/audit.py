"""A folder of image files, each opened, checked and brought to one form, or refused with a reason. Nothing is edited.

Every file under the folder is exactly one of three: an image that is tried (then accepted or refused), refused by its
name or kind, or skipped because it is no image and does not claim to be one.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import UserError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
# Companions of images: captions, tables, metadata, Windows' Thumbs.db, DVC's pointers.
OTHER_SUFFIXES = frozenset(
    (".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml", ".html", ".pdf", ".ini", ".db", ".dvc")
)
OTHER_NAMES = frozenset(("license", "readme"))
# Only these decoders are tried, whatever the suffix: others may start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The machine's trouble, not the file's: dropping an image for these would change the result from run to run.
MACHINE_ERRORS = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM))
AUTO_SIZES = (64, 32, 16, 8)


class Refused(Exception):  # noqa: N818
    """Why a file is left out of the set."""


class Found(NamedTuple):
    """A file by its path relative to the raw folder (posix) and its class, None in a flat folder."""

    path: str
    class_name: str | None


@dataclass(frozen=True)
class Listing:
    """What lies in a raw folder. `images` is sorted by class, then path; `classes` is empty for a flat folder."""

    images: list[Found]
    classes: tuple[str, ...]
    refused: list[tuple[str, str]]
    num_hidden: int
    num_other: int

    @property
    def num_skipped(self) -> int:
        return self.num_hidden + self.num_other


def list_images(raw: str | Path) -> Listing:
    """Sort the files under a folder into images to try, refused (path, reason) and skipped.

    The sub-folders that hold images are the classes, files deeper down belong to the first level; without them the set
    is unconditional. Independent of the file system's order. Skipped: hidden files, files in hidden folders, and known
    companions of images (text, tables, metadata). Refused: links that leave the folder, links to folders, what is no
    regular file, and unknown suffixes.

    Raises:
        UserError: the folder is missing or holds no images, or images lie both beside and inside sub-folders.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise UserError(f"{raw} not found: put your images there, or set data.raw to the folder that holds them")
    root = raw.resolve()
    paths: list[str] = []
    refused: list[tuple[str, str]] = []
    num_hidden = num_other = 0
    for path in _walk(raw):
        name = PurePosixPath(path)
        if any(part.startswith(".") for part in name.parts):
            num_hidden += 1
        elif reason := _wrong_kind(raw / path, root):
            refused.append((path, reason))
        elif name.suffix.lower() in IMAGE_SUFFIXES:
            paths.append(path)
        elif name.suffix.lower() in OTHER_SUFFIXES or name.name.lower() in OTHER_NAMES:
            num_other += 1
        else:
            refused.append((path, f"{name.suffix or 'no suffix'}: not one of {' '.join(sorted(IMAGE_SUFFIXES))}"))
    if not paths:
        raise UserError(f"{raw}: no images ({' '.join(sorted(IMAGE_SUFFIXES))}); put some there, or set data.raw")
    flat = [path for path in paths if "/" not in path]
    if flat and len(flat) < len(paths):
        inside = next(path for path in paths if "/" in path)
        raise UserError(
            f"{raw}: images both beside sub-folders ({min(flat)}) and inside them ({inside}); "
            "move all into sub-folders, one a class, or all into one flat folder"
        )
    images = sorted((Found(path, None if flat else path.split("/")[0]) for path in paths), key=_place)
    classes = tuple(sorted({found.class_name for found in images if found.class_name is not None}))
    return Listing(images, classes, sorted(refused), num_hidden, num_other)


def _place(found: Found) -> tuple[str, str]:
    return found.class_name or "", found.path


def _walk(raw: Path) -> Iterator[str]:
    """Relative posix paths of all that is no folder; a link to a folder is one entry and is not followed."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; make the folder readable or move it away") from None

    for folder, folders, files in os.walk(raw, onerror=unreadable):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            yield Path(folder, name).relative_to(raw).as_posix()


def _wrong_kind(path: Path, root: Path) -> str | None:
    """Why a path is no regular file of the raw folder, judged without opening it; None if it is one."""
    try:
        if path.is_symlink():
            target = path.resolve(strict=True)
            if not target.is_relative_to(root):
                return "link that leaves the folder; copy the file instead"
            if target.is_dir():
                return "link to a folder; not followed"
        return None if stat.S_ISREG(path.stat().st_mode) else "not a regular file"
    except (OSError, RuntimeError):
        return "link to nothing"


def open_image(source: str | Path | bytes) -> Image.Image:
    """Read an image file, or the bytes of one, as mode `L` or `RGB`, upright.

    EXIF orientation is applied. Transparency of any kind is composited on white. Grey stays grey. 16-bit grey is
    divided by 257 and rounded (Pillow itself keeps the upper byte of 16-bit colour). CMYK and palettes become RGB,
    Adobe's inverted CMYK included. Of an animation or a multi-page file, the first frame. Colour profiles are ignored.

    Raises:
        Refused: empty, unreadable, of no known format, cut short, above Pillow's limit of pixels, or of pixels without
            an agreed range (floating point, integers beyond 16 bits, 12-bit TIFF).
        UserError: the disk or the machine failed.
    """
    with _opened(source) as image:
        image.load()
        _refuse_odd_tiff(image)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_l_or_rgb(image)


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """An image whose header alone has been read; what goes wrong inside becomes Refused."""
    try:
        if (len(source) if isinstance(source, bytes) else os.stat(source).st_size) == 0:
            raise Refused("empty file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on metadata; damage to pixels is raised
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file,
                Image.open(file, formats=FORMATS) as image,
            ):
                yield image
    except (Refused, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Refused("not a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refused(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # a decoder may raise anything on a damaged file; the reason is kept and counted
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise UserError(
                f"{'image' if isinstance(source, bytes) else source}: {error.strerror}; check the disk and run again"
            ) from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Refused(f"cannot be decoded: {reason or type(error).__name__}") from None


def _refuse_odd_tiff(image: Image.Image) -> None:
    """Pillow unpacks 12 bits unscaled, and does not invert 16-bit greys stored with white as 0."""
    tags = getattr(image, "tag_v2", None)
    if tags and image.mode.startswith("I") and (tags.get(258) == (12,) or tags.get(262) == 0):
        raise Refused("TIFF with 12-bit or white-is-zero 16-bit greys; save it as PNG")


def _to_l_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Refused("floating-point pixels have no agreed range; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
        return colour.getchannel("R") if mode == "L" else colour.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Refused("integers beyond 16 bits have no agreed range; save as 8 or 16 bits")
    greys = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        greys[values == transparent] = 255
    return Image.fromarray(greys)


def to_pixels(image: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Crop the largest centred square, then resize it by Pillow's bicubic filter (widened when shrinking, so it does
    not alias). An image of the right size is not resampled.

    Args:
        image: mode `L` or `RGB`, as from :func:`open_image`.
        image_size: px of the result's side.
        channels: 1 or 3. Colour becomes grey by ITU-R 601 luma; grey becomes three equal channels.

    Returns:
        uint8 `(image_size, image_size, channels)`.

    Example:
        >>> to_pixels(Image.new("L", (20, 10), 7), 8, 3).shape
        (8, 8, 3)
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:
        image = image.crop((left, top, left + side, top + side))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if side != image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.array(image).reshape(image_size, image_size, channels)


def is_grey(image: Image.Image) -> bool:
    """Whether an image of mode `L` or `RGB` has no colour: an RGB image counts if R = G = B in every pixel."""
    if image.mode == "L":
        return True
    pixels = np.asarray(image)
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())


def survey(raw: str | Path, images: Iterable[Found]) -> tuple[int, Literal[1, 3]]:
    """What `auto` stands for: image size and number of channels.

    The size is the largest of 8, 16, 32, 64 px that the median shorter side fills, at least 8, over all files with a
    readable header. The channels are 1 if every readable image is grey. Pixels are decoded only until a coloured image
    is found, and only where the header leaves it open.
    """
    sides: Counter[int] = Counter()
    channels: Literal[1, 3] = 1
    for found in images:
        path = Path(raw, found.path)
        try:
            with _opened(path) as image:
                sides[min(image.size)] += 1
                grey = image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF"
            if channels == 1 and not grey and not is_grey(open_image(path)):
                channels = 3
        except Refused:
            continue
    return next((size for size in AUTO_SIZES if size <= lower_median(sides)), AUTO_SIZES[-1]), channels


def lower_median(counts: Counter[int]) -> int:
    """The lower median of a histogram; 0 if it is empty."""
    seen, half = 0, (counts.total() + 1) // 2
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return 0
