"""An image file to pixels of one form, or refused with a reason. A file is never edited."""

from __future__ import annotations

import errno
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import UserError

# Only these decoders are tried, whatever the suffix: others may start programs (EPS runs Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The machine's trouble, not the file's: dropping an image for these would change the result from run to run.
MACHINE_ERRORS = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM))
MAX_FILE_BYTES = 2**30
RESIZE_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bicubic", "lanczos", "bilinear", "box")}
JPEG_MAGIC = b"\xff\xd8\xff"


class Refused(Exception):  # noqa: N818
    """Why a file is left out of the set."""


def read_file(path: str | Path) -> bytes:
    """The whole of a file that may be an image.

    Raises:
        Refused: empty, unreadable, or above :data:`MAX_FILE_BYTES`.
        UserError: the disk or the machine failed.
    """
    try:  # the usual case without Python's file objects, which would take as long as decoding a small image
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            data = os.read(descriptor, size + 1) if size <= MAX_FILE_BYTES else b""
        finally:
            os.close(descriptor)
        if data and len(data) == size:
            return data
    except OSError:
        pass
    with _refusing(path), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise Refused("empty file")
        if size > MAX_FILE_BYTES:
            raise Refused(f"more than {MAX_FILE_BYTES:,} bytes")
        return file.readall()


def open_image(source: str | Path | bytes) -> Image.Image:
    """Read an image file, by its path or its bytes, as mode `L` or `RGB`, upright.

    EXIF orientation is applied. Transparency of any kind is composited on white. Grey stays grey. 16-bit grey is
    divided by 257 and rounded (Pillow itself keeps the upper byte of 16-bit colour). CMYK and palettes become RGB,
    Adobe's inverted CMYK included. Of an animation or a multi-page file, the first frame. Colour profiles are ignored.

    Raises:
        Refused: empty, unreadable, of no known format, cut short, above Pillow's limit of pixels, or of pixels without
            an agreed range (floating point, integers beyond 16 bits, 12-bit TIFF).
        UserError: the disk or the machine failed.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    where = "image" if isinstance(source, bytes) else source
    with _header(io.BytesIO(data), where) as image:
        image.load()
        _refuse_odd_tiff(image)
        ImageOps.exif_transpose(image, in_place=True)
        return _to_l_or_rgb(image)


def decode(data: bytes) -> Image.Image | NDArray[np.uint8]:
    """The same as :func:`open_image`; a plain JPEG file comes as uint8 `(h, w, 1 | 3)`, four times as fast.

    Plain: grey or YCbCr, no orientation, nothing that libjpeg remarks on. Both ways are libjpeg-turbo with the same
    settings, and a test compares their pixels.
    """
    if data.startswith(JPEG_MAGIC) and b"Exif\0" not in data and b":Orientation" not in data:
        try:
            height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
            if colour in ("Gray", "YCbCr") and height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY" if colour == "Gray" else "RGB")
                return pixels
        except ValueError:
            pass  # the other way finds the reason, or none
    return open_image(data)


def read_header(path: str | Path) -> tuple[int, bool]:
    """What the header of an image file says: its shorter side, and whether its mode leaves no room for colour.

    Raises:
        Refused, UserError: as :func:`open_image`.
    """
    with _refusing(path), open(path, "rb") as file, _header(file, path) as image:
        return min(image.size), image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF"


@contextmanager
def _header(file: BinaryIO, where: str | Path) -> Iterator[Image.Image]:
    """An image whose header alone has been read; what goes wrong inside becomes Refused."""
    with _refusing(where), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata; damage to pixels is raised
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            yield image


@contextmanager
def _refusing(where: str | Path) -> Iterator[None]:
    """Whatever a file may do to us becomes Refused; what the machine does becomes a UserError that names the file."""
    try:
        yield
    except (Refused, UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Refused("not a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM image") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Refused(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:  # a decoder may raise anything on a damaged file; the reason is kept and counted
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise UserError(f"{where}: {error.strerror}; check the disk and run again") from None
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


def to_pixels(
    image: Image.Image | NDArray[np.uint8],
    image_size: int,
    channels: int,
    resize_filter: str = "bicubic",
    crop: str = "center",
) -> NDArray[np.uint8]:
    """Crop the largest centred square, then resize it by a filter of Pillow's (widened when shrinking, so it does not
    alias). An image of the right size is not resampled.

    Args:
        image: mode `L` or `RGB`, as from :func:`open_image`, or an array as from :func:`decode`.
        image_size: px of the result's side.
        channels: 1 or 3. Colour becomes grey by ITU-R 601 luma; grey becomes three equal channels.
        resize_filter: a key of :data:`RESIZE_FILTERS`.
        crop: `center`, or `none`: all of the image is squeezed into the square.

    Returns:
        uint8 `(image_size, image_size, channels)`.

    Example:
        >>> to_pixels(Image.new("L", (20, 10), 7), 8, 3).shape
        (8, 8, 3)
    """
    if isinstance(image, np.ndarray):
        if image.shape == (image_size, image_size, channels):
            return image
        image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    if crop == "center" and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), RESIZE_FILTERS[resize_filter])
    return np.array(image).reshape(image_size, image_size, channels)


def is_grey(image: Image.Image) -> bool:
    """Whether an image of mode `L` or `RGB` has no colour: an RGB image counts if R = G = B in every pixel."""
    if image.mode == "L":
        return True
    pixels = np.asarray(image)
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
