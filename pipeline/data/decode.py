"""Payload bytes -> pixels, one function an encoding."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.audit import Refused, to_pixels
from pipeline.data.npy import open_original

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112  # the EXIF tag


def decode_png(payload: bytes, shape: tuple[int, int, int]) -> Pixels:
    """A PNG file of the stored size.

    Args:
        payload: the file.
        shape: `(h, w, 1 | 3)`.

    Returns:
        uint8 of that shape.

    Raises:
        Refused: it is no PNG of that shape.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
            return np.asarray(image).reshape(shape)
    except (OSError, ValueError, SyntaxError) as error:
        raise Refused(f"cannot be decoded: {error}") from None


def decode_jpeg(payload: bytes, shape: tuple[int, int, int]) -> Pixels:
    """A JPEG file of the stored size, by libjpeg-turbo with the accurate transform and smooth chroma: the pixels are
    Pillow's, bit for bit where both have the same libjpeg-turbo. Arguments and errors as for :func:`decode_png`.
    """
    pixels = _decode_jpeg(payload, shape[2])
    if pixels.shape != shape:
        raise Refused(f"is {pixels.shape} instead of {shape}")
    return pixels


def decode_original(payload: bytes, shape: tuple[int, int, int]) -> Pixels:
    """Any image file, brought to its form by the audit's rules: what the shard stage would have stored as `raw`.

    Arguments and errors as for :func:`decode_png`. A plain JPEG takes the fast decoder.
    """
    image = _open_plain_jpeg(payload) or open_original(payload)
    return to_pixels(image, shape[0], shape[2])


def _open_plain_jpeg(payload: bytes) -> Image.Image | None:
    """A grey or colour JPEG that is upright already; None for anything else."""
    if not payload.startswith(b"\xff\xd8"):
        return None
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG",)) as header:
            mode, turned = header.mode, header.getexif().get(ORIENTATION, 1) != 1
            if mode not in ("L", "RGB") or turned or header.width * header.height > (Image.MAX_IMAGE_PIXELS or 0):
                return None
        pixels = _decode_jpeg(payload, len(mode))
        return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)
    except Exception:  # whatever it is, the audit's reader has the last word, and the words
        return None


def _decode_jpeg(payload: bytes, channels: int) -> Pixels:
    try:
        return simplejpeg.decode_jpeg(payload, "GRAY" if channels == 1 else "RGB")  # type: ignore[no-any-return]
    except ValueError as error:
        raise Refused(f"cannot be decoded: {error}") from None


DECODERS: dict[str, Callable[[bytes, tuple[int, int, int]], Pixels]] = {
    "png": decode_png,
    "jpeg": decode_jpeg,
    "original": decode_original,
}
