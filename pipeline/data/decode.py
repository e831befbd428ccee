"""Payload bytes -> pixels, one function an encoding."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.audit import Refused, open_image, to_pixels

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112  # the EXIF tag


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


def decode_original(payload: bytearray, out: Pixels) -> None:
    """Any image file, brought to its form by the audit's rules: what the shard stage would have stored as `raw`.

    Arguments and errors as for :func:`decode_png`. A plain JPEG takes the fast decoder.
    """
    image = _open_plain_jpeg(payload) or open_image(bytes(payload))
    out[:] = to_pixels(image, out.shape[0], out.shape[2])


def _open_plain_jpeg(payload: bytearray) -> Image.Image | None:
    """A grey or colour JPEG that is upright already; None for anything else."""
    if not payload.startswith(b"\xff\xd8"):
        return None
    try:
        with Image.open(io.BytesIO(payload), formats=("JPEG",)) as header:
            mode, turned = header.mode, header.getexif().get(ORIENTATION, 1) != 1
            if mode not in ("L", "RGB") or turned or header.width * header.height > (Image.MAX_IMAGE_PIXELS or 0):
                return None
        pixels = simplejpeg.decode_jpeg(payload, "GRAY" if mode == "L" else "RGB")
        return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels)
    except Exception:  # whatever it is, the audit's reader has the last word, and the words
        return None


DECODERS: dict[str, Callable[[bytearray, Pixels], None]] = {
    "png": decode_png,
    "jpeg": decode_jpeg,
    "original": decode_original,
}
