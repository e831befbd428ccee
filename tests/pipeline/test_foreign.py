"""Tars made by others: used as they are, and nothing in them is lost without a word."""

import csv
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.__main__ import main as run_command
from pipeline.data.audit import Refused
from pipeline.data.cache import ShardCache
from pipeline.data.foreign import index_foreign
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.loader import iterate_batches
from pipeline.data.npy import open_npy
from pipeline.data.order import RandomOrder
from pipeline.data.remote import Patience
from pipeline.data.sources import open_shards
from pipeline.data.store import ShardStore
from pipeline.data.tars import list_tars, looks_foreign, name_shards
from pipeline.data.writer import encode_npy
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from tests.projects import make_project, run, stage
from tests.servers import FolderServer

Files = list[tuple[str, bytes]]


def pixels(seed: int, size: int = 12, channels: int = 3) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, channels), dtype=np.uint8)
    image = Image.fromarray(small if channels == 3 else small[:, :, 0]).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def encode(seed: int, kind: str = "png", **form: int) -> bytes:
    if kind == "npy":
        return encode_npy(pixels(seed, **form))
    memory = io.BytesIO()
    Image.fromarray(pixels(seed, **form)).save(memory, {"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper()))
    return memory.getvalue()


def sample(number: int, kind: str = "png", label: int | None = 0) -> Files:
    files = [(f"{number:06d}.{kind}", encode(number, kind))]
    return files + ([(f"{number:06d}.cls", str(label).encode())] if label is not None else [])


def write_tar(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9, Patience(tries=2, pause_seconds=0.01))


def index(source: Path | str, cache: ShardCache, tmp_path: Path, **form: Any) -> tuple[ShardIndex, dict[str, str]]:
    form = {"image_size": 8, "channels": 3, "class_key": "cls", **form}
    made, parts = index_foreign(list_tars(str(source)), tmp_path / "out", cache=cache, **form)
    refused = [row for part in parts for row in part.refused]
    assert made.num_images == sum(len(part.accepted) for part in parts)
    assert len(refused) == len({name for name, _ in refused})
    return made, dict(refused)


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp", "npy"])
def test_every_kind_of_image_is_read_as_it_is(kind: str, cache: ShardCache, tmp_path: Path) -> None:
    for number in range(2):
        files = [file for place in range(3) for file in sample(3 * number + place, kind, place)]
        write_tar(tmp_path / f"far/{number:05d}.tar", files)
    made, refused = index(tmp_path / "far", cache, tmp_path, image_size=12)
    assert refused == {}
    assert (made.num_images, made.encoding, made.classes) == (6, "original", ("0", "1", "2"))
    assert [shard.num_images for shard in made.shards] == [3, 3]
    assert sorted(path.name for path in made.folder.iterdir()) == ["index.json", "samples.npy"]
    again, source = open_shards(made.folder, "", cache)
    images, labels = ShardStore(again, source).read(np.array([4, 0, 5]))
    assert labels.tolist() == [1, 0, 2]
    for number, image in zip([4, 0, 5], images, strict=True):
        expected = pixels(number)
        if kind != "npy":
            with Image.open(io.BytesIO(encode(number, kind))) as stored:
                expected = np.asarray(stored.convert("RGB"))
        assert np.array_equal(image.transpose(1, 2, 0), expected)


def test_two_processes_make_the_same_index(cache: ShardCache, tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"far/{number}.tar", [*sample(2 * number), *sample(2 * number + 1, label=None)])
    first, refused = index(tmp_path / "far", cache, tmp_path, image_size="auto", channels="auto")
    second, same = index(tmp_path / "far", cache, tmp_path, image_size="auto", channels="auto", processes=2)
    assert (first.sha256, refused) == (second.sha256, same)
    assert (first.image_size, first.channels, len(refused)) == (8, 3, 3)


def test_classes_come_from_cls_or_from_a_key(cache: ShardCache, tmp_path: Path) -> None:
    metas = [{"label": "dog"}, {"label": "cat"}, {"label": 7}, {"label": None}, {"label": True}, {}, [], {"label": [1]}]
    files = [
        file
        for number, meta in enumerate(metas)
        for file in ((f"{number}.jpg", encode(number, "jpg")), (f"{number}.json", json.dumps(meta).encode()))
    ]
    write_tar(tmp_path / "far/a.tar", [*files, ("8.jpg", encode(8, "jpg")), ("9.jpg", encode(9)), ("9.json", b"{")])
    made, refused = index(tmp_path / "far", cache, tmp_path, class_key="label")
    assert (made.classes, made.samples["label"].tolist()) == (("7", "cat", "dog"), [2, 1, 0])
    assert set(refused) == {f"a.tar/{number}" for number in range(3, 10)}
    assert refused["a.tar/8"] == "no json, so no class"
    made, refused = index(tmp_path / "far", cache, tmp_path)
    assert (made.classes, made.num_images, refused) == ((), 10, {})
    write_tar(tmp_path / "more/a.tar", [*sample(0, label=5), *sample(1, label=2), *sample(2, label=None)])
    made, refused = index(tmp_path / "more", cache, tmp_path)
    assert (made.classes, made.samples["label"].tolist()) == (tuple("012345"), [5, 2])  # numbers stay what they are
    assert refused == {"a.tar/000002.png": "no class, while other samples have one"}
    write_tar(tmp_path / "odd/a.tar", [*sample(0), *sample(1, label=10**8), ("2.png", encode(2)), ("2.cls", b"\xff")])
    _, refused = index(tmp_path / "odd", cache, tmp_path)
    assert refused["a.tar/000001"] == "class 100000000 is not in [0, 1,000,000)"
    assert refused["a.tar/2"] == "2.cls holds no text"


NOT_PLAIN: dict[str, tuple[Files, str]] = {
    "no image": ([("a.cls", b"0"), ("a.txt", b"words")], "no image beside cls, txt"),
    "two images": ([("a.v0.png", encode(0)), ("a.v1.png", encode(1))], r"2 images under one key \(a\.v0\.png, a\."),
    "same name twice": ([("a.png", encode(0)), ("a.png", encode(1))], "two files for png under one key"),
    "suffixes equal but for case": ([("a.png", encode(0)), ("a.PNG", encode(1))], "two files for png under one key"),
    "begins with a dot": ([(".a.png", encode(0))], "begins with a dot"),
    "absolute": ([("/etc/a.png", encode(0))], "its name leaves the folder"),
    "dots": ([("x/../../a.png", encode(0))], "its name leaves the folder"),
    "empty": ([("a.png", b"")], "empty file"),
    "text": ([("a.jpg", b"words, no picture")], "not a PNG, JPEG"),
    "cut": ([("a.png", encode(0)[:60])], "cannot be decoded"),
    "pickle": ([("a.npy", encode_npy(np.zeros((2, 2, 3), np.uint8)).replace(b"|u1", b"|O "))], "."),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_sample_that_cannot_be_used_is_refused_with_a_reason(name: str, cache: ShardCache, tmp_path: Path) -> None:
    files, reason = NOT_PLAIN[name]
    write_tar(tmp_path / "far/a.tar", [*sample(0, label=None), *files, *sample(1, label=None)])
    made, refused = index(tmp_path / "far", cache, tmp_path)
    assert (made.num_images, len(refused)) == (2, 1)
    assert re.search(reason, *refused.values())


def test_links_and_devices_are_refused_and_folders_and_metadata_are_no_samples(
    cache: ShardCache, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l.png", tarfile.SYMTYPE), ("f.png", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, data in [
            ("__meta__/x.json", b"{}"),
            ("README", b"words"),
            ("./d.e/x.y/" + "n" * 200 + ".png", encode(0)),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    made, refused = index(tmp_path / "a.tar", cache, tmp_path)
    assert made.num_images == 1  # long names and folders with dots are fine
    assert refused == {"a.tar/l": "l.png is no regular file", "a.tar/f": "f.png is no regular file"}


def test_samples_that_were_torn_apart_are_refused(cache: ShardCache, tmp_path: Path) -> None:
    (image, label), (other, other_label) = sample(0), sample(1)
    write_tar(tmp_path / "far/0.tar", [*sample(5), *sample(6), image, other, label, other_label])
    write_tar(tmp_path / "far/1.tar", [*sample(7), ("000008.png", encode(8))])
    write_tar(tmp_path / "far/2.tar", [("000008.cls", b"0"), *sample(7)])  # a key may come back in another tar
    made, refused = index(tmp_path / "far", cache, tmp_path)
    assert made.num_images == 4
    assert refused["0.tar/000000"].startswith("its key was there before")
    assert refused["0.tar/000000.png"] == refused["1.tar/000008.png"] == "no class, while other samples have one"
    assert refused["2.tar/000008"] == "no image beside cls"
    assert len(refused) == 6


def test_a_bomb_is_refused(cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    bombs = [(f"{kind}.{kind}", encode(0, kind)) for kind in ("png", "jpg", "webp", "npy")]
    write_tar(tmp_path / "a.tar", [("ok.png", encode(1, size=9)), *bombs])
    made, refused = index(tmp_path / "a.tar", cache, tmp_path)
    assert made.num_images == 1
    assert set(refused.values()) == {"more than 100 pixels"}
    assert len(refused) == 4


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (4000000, 2, 3), }", r"holds 12 bytes of pixels"),
        ("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2, 3), }", "by rows"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 3), }", "float32 of shape"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 4), }", "is not uint8"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 2, 3), }", "."),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2, 3), }", "object of shape"),
        ("__import__('os').system('false')", "cannot be decoded"),
        ("{", "cannot be decoded"),
    ],
)
def test_an_array_that_is_no_picture_is_refused_without_trust_in_its_header(header: str, reason: str) -> None:
    text = header.encode().ljust(117) + b"\n"
    payload = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(12)
    with pytest.raises(Refused, match=reason):
        open_npy(payload)
    with pytest.raises(Refused):
        open_npy(payload[:9])
    with pytest.raises(Refused, match="version"):
        open_npy(b"\x93NUMPY\x09" + payload[7:])


def _whole(path: Path) -> tuple[bytes, list[tarfile.TarInfo]]:
    with tarfile.open(path) as tar:
        return path.read_bytes(), list(tar)


def cut_between(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return data[: members[4].offset]


def cut_inside(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return data[: members[4].offset_data + 20]


def cut_in_header(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return data[: members[4].offset + 100]


def break_header(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    place = members[4].offset + 5
    return data[:place] + b"?" + data[place + 1 :]


def wipe_header(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    place = members[4].offset
    return data[:place] + bytes(1024) + data[place + 1024 :]


def two_in_one(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return data + data


def compressed(data: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_between, r"cut short after '000001\.cls': it has no end-of-archive marker"),
        (cut_inside, r"damaged after '0000\d\d\.\w+' \(unexpected end of data\)|cut short after '000002\.png'"),
        (cut_in_header, r"cut short after '000001\.cls'"),
        (break_header, r"damaged header at byte [\d,]+, after '000001\.cls'"),
        (wipe_header, r"more data behind its end at byte [\d,]+, after '000001\.cls'"),
        (two_in_one, r"more data behind its end at byte"),
        (compressed, r"damaged after its start"),
    ],
)
def test_damage_that_stock_readers_pass_over_is_one_line(
    damage: Callable[[bytes, list[tarfile.TarInfo]], bytes], reason: str, cache: ShardCache, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "far/b.tar", [file for number in range(4) for file in sample(number)])
    write_tar(tmp_path / "far/a.tar", sample(9))
    path.write_bytes(damage(*_whole(path)))
    with pytest.raises(UserError, match=rf"^{path}: ({reason})") as caught:
        index(tmp_path / "far", cache, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_byte_that_flips_after_indexing_is_noticed(cache: ShardCache, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [file for number in range(4) for file in sample(number)])
    made, _ = index(path, cache, tmp_path)
    data = bytearray(path.read_bytes())
    data[int(made.samples["offset"][2]) + 30] ^= 1
    path.write_bytes(data)
    made, source = open_shards(made.folder, "", cache)
    with pytest.raises(UserError, match=r"a\.tar: sample 00000002 is damaged"):
        ShardStore(made, source).read(np.arange(4))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar: No such file"):
        ShardStore(made, source).read(np.arange(4))


def test_what_a_source_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "c"):
        write_tar(tmp_path / f"far/{name}.tar", [])
    (tmp_path / "images").mkdir()
    (tmp_path / "list.txt").write_text("# two parts\nfar/b.tar\ns3://bucket/{00..02}.tar  # of the second\n\n")
    assert list_tars("far") == ["far/a.tar", "far/b.tar", "far/c.tar"]
    assert list_tars("far/{c,a}.tar") == ["far/c.tar", "far/a.tar"]
    assert list_tars("list.txt") == ["far/b.tar", *(f"s3://bucket/{n:02d}.tar" for n in range(3))]
    assert list_tars(f"file://{tmp_path}/far") == [f"file://{tmp_path}/far/{name}.tar" for name in "abc"]
    assert [looks_foreign(raw) for raw in ("far", "list.txt", "s3://b/a.tar", "images", "nowhere")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert name_shards(["x/a.tar", "https://h/b.tar?v=1"]) == ["a.tar", "b.tar"]
    assert name_shards(["x/a.tar", "y/a.tar"]) == ["00000-a.tar", "00001-a.tar"]
    with pytest.raises(UserError, match=r"images: no \.tar files"):
        list_tars("images")
    with pytest.raises(UserError, match=r"far/a\.tar is named twice"):
        list_tars("far/{a,a}.tar")
    with pytest.raises(UserError, match=r"^https://host/a\.tar: the URL holds a password") as caught:
        list_tars("https://me:hunter2@host/a.tar")
    assert "hunter2" not in str(caught.value)


def test_tars_behind_urls_are_fetched_once_for_indexing_and_training(cache: ShardCache, tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"far/{number}.tar", [*sample(2 * number), *sample(2 * number + 1)])
    near, _ = index(tmp_path / "far", cache, tmp_path)
    images = ShardStore(*open_shards(near.folder, "", cache)).read(np.arange(4))[0]
    with FolderServer(tmp_path / "far") as server:
        made, refused = index(f"{server.url}/{{0..1}}.tar", cache, tmp_path, image_size="auto")
        assert refused == {}
        assert [shard.url for shard in made.shards] == [f"{server.url}/0.tar", f"{server.url}/1.tar"]
        made, source = open_shards(made.folder, "", cache)
        batches = iterate_batches(
            [made], RandomOrder(4, 0), batch_size=2, steps=range(2), share=slice(0, 2), sources=[source]
        )
        for step, batch in enumerate(batches):
            assert np.array_equal(batch.images, images[RandomOrder(4, 0).images_at(np.arange(2 * step, 2 * step + 2))])
        assert (server.gets["0.tar"], server.gets["1.tar"]) == (1, 1)
        server.trouble = {"1.tar": ["404"]}
        with pytest.raises(UserError, match=r"/1\.tar: not found"):
            index(f"{server.url}/{{0..1}}.tar", cache, tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "far/a.tar", [*sample(0), *sample(1), ("x.png", b"?")])
    run_command(["index", "far", "out", "--image-size", "16", "--channels", "1"])
    assert "2 images in 1 tars, 1 classes, read as 16 px with 1 channels; 1 refused" in capsys.readouterr().out
    with open("out.refused.csv") as table:
        assert list(csv.reader(table)) == [
            ["path", "reason"],
            ["a.tar/x", "not a PNG, JPEG, WebP, BMP, GIF, TIFF or PPM image"],
        ]
    assert load_index("out").shards[0].url == "far/a.tar"
    write_tar(tmp_path / "bad/a.tar", [("x.png", b"?")])
    with pytest.raises(UserError, match=r"no usable image: a\.tar/x \(not a PNG"):
        run_command(["index", "bad", "bad-out"])
    assert not os.path.exists("bad-out")


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
def test_the_pipeline_trains_on_tars_of_others(listed: bool, tmp_path: Path) -> None:
    """The stage shard indexes them; training from there is bit-equal to that on the same images in shards of ours."""
    folder = make_project(tmp_path / "a", train__total_images=64, data__raw="list.txt" if listed else "tars")
    files = []
    for number, path in enumerate(sorted((folder / "images").rglob("*.png"))):
        files.append([(f"{number:05d}.png", path.read_bytes()), (f"{number:05d}.cls", path.parent.name.encode())])
    for part in range(3):
        write_tar(folder / f"tars/{part}.tar", [file for group in files[part * 40 : part * 40 + 40] for file in group])
    (folder / "list.txt").write_text("tars/{0..2}.tar\n")
    stage(folder, "shard")
    report = load_json(folder / "metrics/shard.json")
    assert (report["num_images"], report["num_classes"], report["num_refused"], report["num_shards"]) == (120, 3, 0, 3)
    stage(folder, "train")
    ours = make_project(tmp_path / "b", train__total_images=64)
    stage(ours, "shard")
    stage(ours, "train")
    assert report["channel_mean"] == load_json(ours / "metrics/shard.json")["channel_mean"]
    assert (folder / "model/weights.safetensors").read_bytes() == (ours / "model/weights.safetensors").read_bytes()
    done = run(folder, "python", "-m", "pipeline.data", "verify")
    assert (done.returncode, done.stdout.splitlines()[-1][:40]) == (0, "3 shards, 120 images: all as in the index"[:40])
