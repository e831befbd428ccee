"""Payloads of every encoding: decoded pixels are Pillow's, originals are what the audit would have stored."""

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.data.audit import Refused, open_image, to_pixels
from pipeline.data.decode import decode_jpeg, decode_original, decode_png
from pipeline.data.index import SAMPLE_DTYPE, ShardIndex, load_index, save_index
from pipeline.data.shards import Shard
from pipeline.data.store import ShardStore
from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file

Shape = tuple[int, int, int]
PHOTO = Image.fromarray(load_sample_images().images[0])


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    memory = io.BytesIO()
    image.save(memory, form, **options)
    return memory.getvalue()


def decoded(decode: Callable[[bytearray, np.ndarray], None], payload: bytes, shape: Shape) -> np.ndarray:
    out = np.empty(shape, np.uint8)
    decode(bytearray(payload), out)
    return out


def photo(size: int, mode: str = "RGB") -> Image.Image:
    return PHOTO.resize((size, size), box=(100, 50, 400, 350)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [32, 37, 256])
@pytest.mark.parametrize("options", [{"quality": 50}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_jpeg_pixels_are_pillow_s(mode: str, size: int, options: dict[str, object]) -> None:
    payload = encode(photo(size, mode), **options)
    shape = (size, size, len(mode))
    expected = np.asarray(Image.open(io.BytesIO(payload))).reshape(shape)
    assert np.array_equal(decoded(decode_jpeg, payload, shape), expected)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(PHOTO.resize((50, 40)), exif=exif)


ORIGINALS = {
    "colour": encode(PHOTO),
    "grey": encode(PHOTO.convert("L")),
    "tall": encode(PHOTO.crop((0, 0, 100, 300)), quality=90),
    "turned": rotated(),
    "cmyk": encode(PHOTO.resize((60, 60)).convert("CMYK")),
    "png": encode(PHOTO.resize((70, 50)).convert("RGBA"), "PNG"),
    "webp": encode(PHOTO.resize((70, 50)), "WEBP"),
}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_original_becomes_what_the_audit_makes_of_it(name: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(ORIGINALS[name])
    expected = to_pixels(open_image(path), 24, channels)
    assert np.array_equal(decoded(decode_original, ORIGINALS[name], (24, 24, channels)), expected)


@pytest.mark.parametrize("payload", [b"", b"text", ORIGINALS["colour"][:2000], ORIGINALS["png"][:300], b"\xff\xd8\xff"])
@pytest.mark.parametrize("decode", [decode_png, decode_jpeg, decode_original])
def test_what_is_no_image_is_refused(decode: object, payload: bytes) -> None:
    with pytest.raises(Refused):
        decoded(decode, payload, (24, 24, 3))


def test_a_wrong_size_or_mode_is_refused() -> None:
    for decode, form in ((decode_jpeg, "JPEG"), (decode_png, "PNG")):
        for size in (24, 40):
            with pytest.raises(Refused):
                decoded(decode, encode(photo(size), form), (32, 32, 3))
    with pytest.raises(Refused):
        decoded(decode_png, encode(photo(32), "PNG"), (32, 32, 1))


def write(folder: Path, encoding: str, payloads: list[bytes], suffix: str) -> ShardIndex:
    """A set of one tar, by the standard library."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for key, payload in enumerate(payloads):
            info = tarfile.TarInfo(f"{key:08d}.{suffix}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    with tarfile.open(folder / "00000.tar") as tar:
        rows = [(m.offset_data, m.size, 0, i % 2, zlib.crc32(payloads[i])) for i, m in enumerate(tar)]
    path = folder / "00000.tar"
    shard = Shard(path.name, len(rows), path.stat().st_size, sha256_file(path))
    save_index(folder, image_size=32, channels=3, encoding=encoding, classes=("a", "b"), shards=[shard],
               samples=np.array(rows, SAMPLE_DTYPE))  # fmt: skip
    return load_index(folder)


def test_the_store_reads_jpegs_and_originals(tmp_path: Path) -> None:
    crops = [PHOTO.crop((x, x, x + 32, x + 32)) for x in range(0, 200, 20)]
    payloads = [encode(crop) for crop in crops]
    ids = np.array([9, 2, 3, 2, 0])
    images, labels = ShardStore(write(tmp_path / "jpeg", "jpeg", payloads, "jpg")).read(ids)
    expected = np.stack([np.asarray(Image.open(io.BytesIO(payloads[i]))) for i in ids]).transpose(0, 3, 1, 2)
    assert np.array_equal(images, expected)
    assert labels.tolist() == [1, 0, 1, 0, 0]
    originals = list(ORIGINALS.values())
    images, _ = ShardStore(write(tmp_path / "original", "original", originals, "jpg")).read(np.array([3, 0]))
    assert np.array_equal(images[0], to_pixels(open_image(ORIGINALS["turned"]), 32, 3).transpose(2, 0, 1))
    assert np.array_equal(images[1], to_pixels(open_image(ORIGINALS["colour"]), 32, 3).transpose(2, 0, 1))


def test_a_payload_that_is_no_image_is_named(tmp_path: Path) -> None:
    store = ShardStore(write(tmp_path / "s", "jpeg", [encode(photo(32)), b"text"], "jpg"))
    with pytest.raises(UserError, match=r"00000\.tar: sample 00000001 cannot be decoded"):
        store.read(np.array([0, 1]))


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    index = write(tmp_path / "s", "avif", [b"x"], "avif")
    with pytest.raises(UserError, match=r"encoding 'avif' is unknown; known: raw, png, jpeg, original"):
        ShardStore(index)
