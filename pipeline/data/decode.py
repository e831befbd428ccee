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


def decode_png(payload: bytearray, out: Pixels) -> None:
    """A PNG file of the stored size.

    Args:
        payload: the file.
        out: `(h, w, 1 | 3)`, contiguous; filled.

    Raises:
        Refused: it is no PNG of that shape.
    """
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as image:
            out[:] = np.asarray(image).reshape(out.shape)
    except (OSError, ValueError, SyntaxError) as error:
        raise Refused(f"cannot be decoded: {error}") from None


def decode_jpeg(payload: bytearray, out: Pixels) -> None:
    """A JPEG file of the stored size, by libjpeg-turbo with the accurate transform and smooth chroma: the pixels are
    Pillow's, bit for bit where both have the same libjpeg-turbo. Arguments and errors as for :func:`decode_png`.
    """
    try:
        found = simplejpeg.decode_jpeg(payload, "GRAY" if out.shape[2] == 1 else "RGB", buffer=out)
    except ValueError as error:
        raise Refused(f"cannot be decoded: {error}") from None
    if found.shape != out.shape:
        raise Refused(f"is {found.shape} instead of {out.shape}")


def decode_original(payload: bytearray, out: Pixels, preparation: Preparation = AS_AUDITED) -> None:
    """Any image file, brought to its form as the index says: what the shard stage would have stored as `raw`.

    Arguments and errors as for :func:`decode_png`. A plain JPEG takes the fast decoder.
    """
    whole = bytes(payload)
    image = open_npy(whole) if whole.startswith(MAGIC) else decode(whole)
    out[:] = to_pixels(image, out.shape[0], out.shape[2], preparation.resize_filter, preparation.crop)


def make_decoder(index: ShardIndex) -> Callable[[bytearray, Pixels], None] | None:
    """The decoder of a set's payloads; None where they are arrays, which need none."""
    match index.encoding:
        case "png":
            return decode_png
        case "jpeg":
            return decode_jpeg
        case "original":
            return partial(decode_original, preparation=index.preparation)
    return None
