"""Every kind of file that a folder of images may hold, and what becomes of it."""

import csv
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.data.audit import Refused, is_grey, open_image, to_pixels
from pipeline.data.listing import list_images
from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from pipeline.shard import main

PARAMS = Path(__file__).parents[2] / "params.yaml"
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


@pytest.mark.parametrize(("name", "make", "mode", "pixels"), GOOD, ids=[case[0] for case in GOOD])
def test_an_image_is_opened_as_grey_or_rgb(
    tmp_path: Path, name: str, make: Callable[[Path], None], mode: str, pixels: object
) -> None:
    make(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == mode
    if pixels is not None:
        found, expected = np.asarray(image).astype(int), np.asarray(pixels)
        assert found.shape == expected.shape
        # JPEG alone is lossy.
        assert np.abs(found - expected).max() <= (2 if name.startswith("cmyk.j") else 0)


def _cut(image_format: str, share: float) -> Callable[[Path], None]:
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
    ("cut.png", _cut("PNG", 0.5), "truncated"),
    ("cut.jpg", _cut("JPEG", 0.5), "truncated"),
    ("nearly.jpg", _cut("JPEG", 0.99), "truncated"),
    ("cut.gif", _cut("GIF", 0.5), "truncated"),
    ("cut.bmp", _cut("BMP", 0.5), "truncated"),
    ("cut.tif", _cut("TIFF", 0.5), "truncated"),
    ("cut.webp", _cut("WEBP", 0.5), "decoder"),
    ("cut.ppm", _cut("PPM", 0.5), "truncated"),
    ("head.jpg", lambda p: p.write_bytes(b"\xff\xd8\xff\xe0"), "."),
    ("float.tif", lambda p: Image.fromarray(np.ones((2, 2), np.float32)).save(p), "floating-point"),
    ("int32.tif", lambda p: Image.fromarray(np.array([[0, 70000]], np.int32)).save(p), "beyond 16 bits"),
    ("negative.tif", lambda p: Image.fromarray(np.array([[0, -1]], np.int32)).save(p), "beyond 16 bits"),
    ("white-is-zero.tif", _twelve_bits, "white-is-zero"),
    ("folder.png", lambda p: p.mkdir(), "."),
    ("absent.png", lambda p: None, "No such file"),
]


@pytest.mark.parametrize(("name", "make", "reason"), BAD, ids=[case[0] for case in BAD])
def test_a_broken_file_is_refused_with_a_reason_that_repeats(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / name)
    reasons = []
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            open_image(tmp_path / name)
        reasons.append(str(caught.value))
    assert re.search(reason, reasons[0])
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


@pytest.mark.parametrize("limit", [2000, 1000], ids=["Pillow warns", "Pillow raises"])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    Image.new("L", (48, 48)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Refused, match=f"^more than {limit:,} pixels$"):
            open_image(tmp_path / "bomb.png")


def test_a_failing_disk_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"a\.png: Input/output error"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 41), (33, 50), (5, 9), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_square_of_the_size_asked_for(size: tuple[int, int], channels: int) -> None:
    for mode in ("L", "RGB"):
        pixels = to_pixels(Image.new(mode, size, "white"), 16, channels)
        assert pixels.shape == (16, 16, channels)
        assert pixels.dtype == np.uint8
        assert (pixels == 255).all()


def test_the_right_size_is_not_resampled_and_the_crop_is_central() -> None:
    assert np.array_equal(to_pixels(Image.fromarray(NOISE), 48, 3), NOISE)
    wide = np.concatenate([np.zeros((48, 10, 3), np.uint8), NOISE, np.zeros((48, 11, 3), np.uint8)], axis=1)
    assert np.array_equal(to_pixels(Image.fromarray(wide), 48, 3), NOISE)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert np.array_equal(to_pixels(Image.fromarray(tall), 48, 3), NOISE.transpose(1, 0, 2))


def test_shrinking_does_not_alias() -> None:
    """Single-pixel stripes shrink to their mean; a filter of fixed width would keep black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_pixels(Image.fromarray(stripes), 8, 1).astype(int) - 127.5).max() < 8


def test_colour_to_one_channel_is_luma_and_equal_channels_are_kept() -> None:
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_pixels(Image.fromarray(greys).convert("RGB"), 16, 1)[..., 0], greys)
    assert np.array_equal(to_pixels(Image.fromarray(greys), 16, 3), np.stack([greys] * 3, axis=-1))
    lumas = [to_pixels(Image.new("RGB", (4, 4), name), 4, 1)[0, 0, 0] for name in ("#ff0000", "#00ff00", "#0000ff")]
    assert lumas == [76, 150, 29]  # round(255 * (0.299, 0.587, 0.114))


def test_auto_sees_size_and_colour(tmp_path: Path) -> None:
    def found(sizes: list[int], colour: bool) -> tuple[int, int]:
        folder = tmp_path / f"{sizes}{colour}"
        folder.mkdir()
        for place, size in enumerate(sizes):
            image = Image.new("RGB" if place % 2 else "L", (size, size + 9), 90 * 0x010101)
            if colour and place == len(sizes) - 1:
                image = Image.new("RGB", image.size, "red")
            image.save(folder / f"{place}.png")
        # A broken colour image decides nothing.
        _cut("PNG", 0.5)(folder / "broken.png")
        (folder / "empty.png").touch()
        return survey(folder, list_images(folder).images)

    assert found([7, 7, 7, 7], False) == (8, 1)
    assert found([31, 32, 33, 90, 90], False) == (32, 1)
    assert found([31, 31, 33, 33, 90, 90], True) == (32, 3)
    assert found([500, 500, 500], False) == (64, 1)


def test_grey_in_an_rgb_file_is_grey() -> None:
    assert is_grey(Image.new("RGB", (4, 4), (9, 9, 9)))
    assert not is_grey(Image.new("RGB", (4, 4), (9, 9, 10)))
    assert not is_grey(Image.new("RGB", (4, 4), (8, 9, 9)))


# ---- listing


def _fill(folder: Path, *names: str) -> None:
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), place).save(folder / name, "PNG")


def test_classes_are_first_level_folders_in_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(
        tmp_path,
        "b/2.png",
        "b/10.png",
        "b/deep/er/1.png",
        "a b/x.y.z.png",
        "ü/\u732b.png",
        "a/1.JPEG",
        f"a/{'n' * 240}.png",
    )
    listing = list_images(tmp_path)
    assert listing.classes == ("a", "a b", "b", "ü")
    assert [found.class_name for found in listing.images] == ["a", "a", "a b", "b", "b", "b", "ü"]
    assert [found.path for found in listing.images[3:6]] == ["b/10.png", "b/2.png", "b/deep/er/1.png"]
    walk = os.walk

    def backwards(*args: object, **kwargs: object) -> object:
        for folder, folders, files in walk(*args, **kwargs):  # type: ignore[call-overload]
            folders.sort(reverse=True)
            yield folder, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert list_images(tmp_path) == listing


def test_links_hidden_files_and_strangers(tmp_path: Path) -> None:
    raw, outside = tmp_path / "raw", tmp_path / "outside"
    _fill(outside, "secret.png")
    _fill(raw, "a/1.png", "a/.hidden.png", ".git/2.png", "a/._1.png")
    for name in ("a/captions.txt", "README", "Thumbs.db", "a/LICENSE.md"):
        (raw / name).touch()
    (raw / "a/photo.heic").touch()
    (raw / "a/no-suffix").touch()
    (raw / "a/out.png").symlink_to(outside / "secret.png")
    (raw / "a/in.png").symlink_to(raw / "a/1.png")
    (raw / "a/broken.png").symlink_to(raw / "nowhere.png")
    (raw / "a/loop.png").symlink_to(raw / "a/loop.png")
    (raw / "b").symlink_to(outside)
    (raw / "a/again").symlink_to(raw / "a")
    os.mkfifo(raw / "a/pipe.png")
    listing = list_images(raw)
    assert [found.path for found in listing.images] == ["a/1.png", "a/in.png"]
    assert {path: reason.split(";")[0].split(":")[0] for path, reason in listing.refused} == {
        "a/photo.heic": ".heic",
        "a/no-suffix": "no suffix",
        "a/out.png": "link that leaves the folder",
        "a/broken.png": "link to nothing",
        "a/loop.png": "link to nothing",
        "a/again": "link to a folder",
        "a/pipe.png": "not a regular file",
        "b": "link that leaves the folder",
    }
    assert (listing.num_hidden, listing.num_other) == (3, 4)
    assert listing.classes == ("a",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "not found: put your images there, or set data.raw"),
        ([], "no images"),
        (["a/notes.txt"], "no images"),
        (["b.png", "a.png", "a/1.png"], r"beside sub-folders \(a.png\) and inside them \(a/1.png\)"),
    ],
)
def test_a_folder_without_a_plain_meaning_is_an_error(tmp_path: Path, names: list[str] | None, message: str) -> None:
    raw = tmp_path / "raw"
    if names is not None:
        raw.mkdir()
        _fill(raw, *names)
    with pytest.raises(UserError, match=message):
        list_images(raw)


# ---- the stage


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder whose params.yaml points at `images`."""
    text = re.sub(r"(?m)^  raw: \S+", "  raw: images", PARAMS.read_text())
    text = re.sub(r"max_broken_share: \S+", "max_broken_share: 0.5", text)
    (tmp_path / "params.yaml").write_text(re.sub(r"shard_images: \S+", "shard_images: 4", text))
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_counts_add_up_and_a_second_run_gives_the_same_bytes(workspace: Path) -> None:
    images = workspace / "images"
    for place, (name, make, _, _) in enumerate(GOOD):
        folder = images / f"class {place % 3}"
        folder.mkdir(exist_ok=True)
        make(folder / name)
    for name, make, _ in BAD:
        make(images / "class 1" / f"bad {name}")
    (images / "empty class").mkdir()
    (images / "empty class" / "zero.png").touch()
    (images / "class 0" / "captions.txt").touch()
    (images / "class 0" / "photo.heic").touch()
    (images / "class 0" / ".hidden.png").touch()
    (images / "class 0" / os.fsdecode(b"not-utf8-\xff,\n.png")).write_bytes(
        (images / "class 0" / "grey.png").read_bytes()
    )
    (images / "class 0" / os.fsdecode(b"zero-\xff,\n.png")).touch()
    num_files = sum(path.is_file() for path in images.rglob("*"))
    main()
    first = {**_tree(workspace / "shards"), **_tree(workspace / "metrics")}
    report = load_json(paths.SHARD_REPORT)
    assert report["num_images"] + report["num_refused"] + report["num_skipped"] == num_files
    assert report["num_images"] == len(GOOD) + 1
    assert report["num_skipped"] == sum(report["skipped"].values()) == 2
    assert report["num_duplicates"] >= 1
    assert (report["num_classes"], report["num_empty_classes"], report["class_images_min"]) == (4, 1, 0)
    rows = list(csv.reader(io.StringIO(paths.REFUSED.read_text(encoding="utf-8"), newline="")))
    assert rows[0] == ["path", "reason"]
    assert rows[1:] == sorted(rows[1:])
    assert len(rows) == 1 + report["num_refused"]
    main()
    assert {**_tree(workspace / "shards"), **_tree(workspace / "metrics")} == first


def test_statistics_are_of_the_stored_pixels(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    for name in ("x/1.png", "y/2.png", "y/3.png"):
        (workspace / "images" / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(workspace / "images" / name)
    main()
    index = load_index(paths.SHARDS)
    assert (index.image_size, index.channels, index.encoding, index.classes) == (16, 3, "raw", ("x", "y"))
    pixels, labels = ShardStore(index).read(np.arange(3))
    assert labels.tolist() == [0, 1, 1]
    report = load_json(paths.SHARD_REPORT)
    assert list(report["channel_mean"].values()) == pytest.approx(pixels.mean(axis=(0, 2, 3)).tolist(), rel=1e-12)
    assert list(report["channel_std"].values()) == pytest.approx(pixels.std(axis=(0, 2, 3)).tolist(), rel=1e-9)
    assert paths.REFUSED.read_text() == "path,reason\n"
    assert "3 images of 16 px" in capsys.readouterr().out


def test_a_flat_folder_has_no_labels(workspace: Path) -> None:
    _fill(workspace / "images", *(f"{place}.png" for place in range(6)))
    main()
    index = load_index(paths.SHARDS)
    assert index.classes == ()
    assert (index.samples["label"] == -1).all()
    assert [shard.num_images for shard in index.shards] == [4, 2]
    assert load_json(paths.SHARD_REPORT)["class_images_max"] == 0


def test_too_many_broken_files_fail_and_leave_the_list_but_no_shards(workspace: Path) -> None:
    _fill(workspace / "images", "1.png", "2.png")
    for name in "abc":
        (workspace / "images" / f"{name}.png").touch()
    with pytest.raises(UserError, match=r"3 of 5 files refused.*a\.png \(empty file\).*c\.png.*metrics/refused\.csv"):
        main()
    assert paths.REFUSED.read_text() == "path,reason\na.png,empty file\nb.png,empty file\nc.png,empty file\n"
    assert not paths.SHARDS.exists()
    assert not paths.SHARD_REPORT.exists()
    (workspace / "images" / "c.png").unlink()
    main()  # two of four is exactly the limit
    assert load_index(paths.SHARDS).num_images == 2


def test_nothing_readable_is_an_error_whatever_the_limit(workspace: Path) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("max_broken_share: 0.5", "max_broken_share: 1.0"))
    (workspace / "images" / "a.png").touch()
    with pytest.raises(UserError, match="1 of 1 files refused"):
        main()
