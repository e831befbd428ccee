"""Every kind of file that a folder of images may hold: how to make it, and what becomes of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)


def _palette() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return image


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _oriented(path: Path) -> None:
    Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8)).save(path, exif=_exif(6))


def _animation(path: Path) -> None:
    frames = [Image.new("RGB", (2, 1), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png16(path: Path, colour_type: int, row: list[int], width: int, transparent: bytes = b"") -> None:
    """A PNG of 16 bits a channel, which Pillow does not write in colour."""
    head = struct.pack(">IIBBBBB", width, 1, 16, colour_type, 0, 0, 0)
    extra = _chunk(b"tRNS", transparent) if transparent else b""
    data = _chunk(b"IDAT", zlib.compress(b"\0" + np.array(row, ">u2").tobytes()))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + extra + data + _chunk(b"IEND", b""))


def _grey16(values: list[int], kind: str = "<u2") -> Image.Image:
    return Image.fromarray(np.array([values], kind))


def _two(mode: str, first: object, second: object) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putdata([first, second])
    return image


WHITE = [255, 255, 255]

# name, how to make it, mode expected, pixels expected
GOOD: list[tuple[str, Callable[[Path], None], str, object]] = [
    ("grey.png", lambda p: _two("L", 3, 4).save(p), "L", [[3, 4]]),
    ("colour.png", lambda p: _two("RGB", (1, 2, 3), (4, 5, 6)).save(p), "RGB", [[[1, 2, 3], [4, 5, 6]]]),
    ("UPPER.PNG", lambda p: _two("L", 3, 4).save(p), "L", [[3, 4]]),
    ("bits.png", lambda p: _two("1", 0, 1).save(p), "L", [[0, 255]]),
    ("bits.tif", lambda p: _two("1", 0, 1).save(p), "L", [[0, 255]]),
    (
        "lossless.webp",
        lambda p: _two("RGB", (1, 2, 3), (4, 5, 6)).save(p, lossless=True),
        "RGB",
        [[[1, 2, 3], [4, 5, 6]]],
    ),
    ("colour.bmp", lambda p: _two("RGB", (1, 2, 3), (4, 5, 6)).save(p), "RGB", [[[1, 2, 3], [4, 5, 6]]]),
    ("colour.ppm", lambda p: _two("RGB", (1, 2, 3), (4, 5, 6)).save(p), "RGB", [[[1, 2, 3], [4, 5, 6]]]),
    ("fifteen.pgm", lambda p: p.write_bytes(b"P5 2 1 15\n\x0f\x03"), "L", [[255, 51]]),
    ("orientation6.png", _oriented, "L", [[40, 10], [50, 20], [60, 30]]),
    ("palette.png", lambda p: _palette().save(p), "RGB", [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]),
    ("palette-hole.png", lambda p: _palette().save(p, transparency=1), "RGB", [[[255, 0, 0], WHITE, [0, 0, 255]]]),
    (
        "palette-alphas.png",
        lambda p: _palette().save(p, transparency=bytes([255, 0, 51])),
        "RGB",
        [[[255, 0, 0], WHITE, [204, 204, 255]]],
    ),
    ("hole.gif", lambda p: _palette().save(p, transparency=1), "RGB", [[[255, 0, 0], WHITE, [0, 0, 255]]]),
    ("animation.gif", _animation, "RGB", [[[255, 0, 0], [255, 0, 0]]]),
    ("animation.webp", _animation, "RGB", None),
    ("opaque-la.png", lambda p: _two("LA", (7, 255), (9, 255)).save(p), "L", [[7, 9]]),
    ("clear-la.png", lambda p: _two("LA", (7, 255), (9, 0)).save(p), "L", [[7, 255]]),
    ("grey-hole.png", lambda p: _two("L", 7, 9).save(p, transparency=9), "L", [[7, 255]]),
    (
        "rgb-hole.png",
        lambda p: _two("RGB", (1, 2, 3), (4, 5, 6)).save(p, transparency=(4, 5, 6)),
        "RGB",
        [[[1, 2, 3], WHITE]],
    ),
    (
        "rgba.png",
        lambda p: _two("RGBA", (1, 2, 3, 255), (0, 0, 255, 51)).save(p),
        "RGB",
        [[[1, 2, 3], [204, 204, 255]]],
    ),
    ("rgba.tif", lambda p: _two("RGBA", (1, 2, 3, 255), (0, 0, 255, 0)).save(p), "RGB", [[[1, 2, 3], WHITE]]),
    ("grey16.png", lambda p: _grey16([0, 257 * 77, 65535, 128, 129]).save(p), "L", [[0, 77, 255, 0, 1]]),
    ("grey16.tif", lambda p: _grey16([0, 257 * 77, 65535]).save(p), "L", [[0, 77, 255]]),
    ("grey16-bigendian.tif", lambda p: _grey16([0, 257 * 77, 65535], ">u2").save(p), "L", [[0, 77, 255]]),
    ("grey16.pgm", lambda p: p.write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 257 * 77, 65535)), "L", [[77, 255]]),
    ("grey1000.pgm", lambda p: p.write_bytes(b"P5 2 1 1000\n" + struct.pack(">HH", 500, 1000)), "L", [[128, 255]]),
    ("grey16-hole.png", lambda p: _png16(p, 0, [257, 514], 2, struct.pack(">H", 514)), "L", [[1, 255]]),
    ("colour16.png", lambda p: _png16(p, 2, [257, 514, 65535], 1), "RGB", [[[1, 2, 255]]]),
    ("int32.tif", lambda p: Image.fromarray(np.array([[0, 65535]], np.int32)).save(p), "L", [[0, 255]]),
    ("cmyk.jpg", lambda p: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(p), "RGB", [[[254, 0, 0]] * 16] * 16),
    ("cmyk.tif", lambda p: Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(p), "RGB", [[[255, 0, 0]]]),
    ("png-called.jpg", lambda p: _two("L", 3, 4).save(p, "PNG"), "L", [[3, 4]]),
]


def cut(image_format: str, share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        Image.fromarray(NOISE).save(path, image_format)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return make


def _flipped(path: Path) -> None:
    Image.fromarray(NOISE).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


def _twelve_bits(path: Path) -> None:
    Image.new("I;16", (2, 2), 7).save(path, tiffinfo={262: 0})


# name, how to make it, words of the reason
BAD: list[tuple[str, Callable[[Path], None], str]] = [
    ("zero.png", lambda p: p.touch(), "^empty file$"),
    ("text.jpg", lambda p: p.write_text("not a picture at all, " * 9), "^not a PNG, JPEG"),
    ("script.png", lambda p: p.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "^not a PNG, JPEG"),
    ("flipped.png", _flipped, "broken data stream|checksum"),
    ("cut.png", cut("PNG", 0.5), "truncated"),
    ("cut.jpg", cut("JPEG", 0.5), "truncated"),
    ("nearly.jpg", cut("JPEG", 0.99), "truncated"),
    ("cut.gif", cut("GIF", 0.5), "truncated"),
    ("cut.bmp", cut("BMP", 0.5), "truncated"),
    ("cut.tif", cut("TIFF", 0.5), "truncated"),
    ("cut.webp", cut("WEBP", 0.5), "decoder"),
    ("cut.ppm", cut("PPM", 0.5), "truncated"),
    ("head.jpg", lambda p: p.write_bytes(b"\xff\xd8\xff\xe0"), "."),
    ("float.tif", lambda p: Image.fromarray(np.ones((2, 2), np.float32)).save(p), "floating-point"),
    ("int32.tif", lambda p: Image.fromarray(np.array([[0, 70000]], np.int32)).save(p), "beyond 16 bits"),
    ("negative.tif", lambda p: Image.fromarray(np.array([[0, -1]], np.int32)).save(p), "beyond 16 bits"),
    ("white-is-zero.tif", _twelve_bits, "white-is-zero"),
    ("folder.png", lambda p: p.mkdir(), "."),
    ("absent.png", lambda p: None, "No such file"),
]


def fill(folder: Path, *names: str) -> None:
    """Small grey images, each with a value of its own."""
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), place).save(folder / name, "PNG")


def tree(*folders: Path) -> dict[str, bytes]:
    """The content of every file under some folders."""
    return {path.as_posix(): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
