"""Images in .npy files: uint8 `(h, w)`, `(h, w, 1)` or `(h, w, 3)`, and nothing else that the format could hold."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.data.audit import Refused, open_image

MAGIC = b"\x93NUMPY"


def open_original(payload: bytes) -> Image.Image:
    """The bytes of an image file of any kind, .npy included, as an image of mode `L` or `RGB`.

    Raises:
        Refused: as :func:`pipeline.data.audit.open_image` and :func:`open_npy`.
    """
    return open_npy(payload) if payload.startswith(MAGIC) else open_image(payload)


def open_npy(payload: bytes) -> Image.Image:
    """Pixels as an image of mode `L` or `RGB`. No object is unpickled, and no memory is taken that the header alone
    asks for.

    Raises:
        Refused: not uint8, of another shape, larger than Pillow's limit of pixels, or not as long as its header says.

    Example:
        >>> from pipeline.data.writer import encode_npy
        >>> open_npy(encode_npy(np.zeros((4, 6, 3), np.uint8))).size
        (6, 4)
    """
    file = io.BytesIO(payload)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(file)
    except KeyError:
        raise Refused("not of .npy version 1 or 2") from None
    except Exception as error:  # the header is text that numpy evaluates as a literal
        raise Refused(f"cannot be decoded: {' '.join(str(error).split())[:100]}") from None
    if dtype != np.uint8 or by_columns or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or 0 in shape:
        raise Refused(f"{dtype} of shape {shape} is not uint8 (h, w), (h, w, 1) or (h, w, 3) by rows")
    if shape[0] * shape[1] > (Image.MAX_IMAGE_PIXELS or 0):
        raise Refused(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels")
    pixels = np.frombuffer(payload, np.uint8, offset=file.tell())
    if len(pixels) != np.prod(shape, dtype=np.int64):
        raise Refused(f"holds {len(pixels):,} bytes of pixels, its header says {shape}")
    return Image.fromarray(pixels.reshape(shape[:2] if shape[2:] == (1,) else shape))
