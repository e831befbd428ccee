"""Payload bytes -> pixels, one function an encoding."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.audit import Refused, decode, to_pixels
from pipeline.data.index import Preparation, ShardIndex
from pipeline.data.npy import MAGIC, open_npy

Pixels = NDArray[np.uint8]
AS_AUDITED = Preparation()


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


def decode_original(payload: bytes, shape: tuple[int, int, int], preparation: Preparation = AS_AUDITED) -> Pixels:
    """Any image file, brought to its form as the index says: what the shard stage would have stored as `raw`.

    Arguments and errors as for :func:`decode_png`. A plain JPEG takes the fast decoder.
    """
    image = open_npy(payload) if payload.startswith(MAGIC) else decode(payload)
    return to_pixels(image, shape[0], shape[2], preparation.resize_filter, preparation.crop)


def _decode_jpeg(payload: bytes, channels: int) -> Pixels:
    try:
        return simplejpeg.decode_jpeg(payload, "GRAY" if channels == 1 else "RGB")  # type: ignore[no-any-return]
    except ValueError as error:
        raise Refused(f"cannot be decoded: {error}") from None


def make_decoder(index: ShardIndex) -> Callable[[bytes, tuple[int, int, int]], Pixels] | None:
    """The decoder of a set's payloads; None where they are arrays, which need none."""
    match index.encoding:
        case "png":
            return decode_png
        case "jpeg":
            return decode_jpeg
        case "original":
            return partial(decode_original, preparation=index.preparation)
    return None
