"""Shards: the same bytes every time, readable by others, damage noticed."""

import io
import os
import pickle
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import index as index_module
from pipeline.data import store as store_module
from pipeline.data.index import SAMPLE_DTYPE, ShardIndex, check_alike, load_index, save_index, verify_samples
from pipeline.data.shards import Shard
from pipeline.data.store import ShardStore
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, save_json

NUM_IMAGES = 11
SIZE = 6


def _images(channels: int) -> np.ndarray:
    shape = (NUM_IMAGES, SIZE, SIZE, channels)
    return np.random.default_rng(channels).integers(0, 256, shape, dtype=np.uint8)


def _write(folder: Path, *, encoding: str = "raw", channels: int = 3, labelled: bool = True) -> ShardIndex:
    samples = (
        Sample(image, place % 2 if labelled else None, {"path": f"b/{place}.png", "class": "ü"})
        for place, image in enumerate(_images(channels))
    )
    return write_shards(
        folder,
        samples,
        image_size=SIZE,
        channels=channels,
        encoding=encoding,
        classes=("a", "ü") if labelled else (),
        shard_images=4,
    )


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, encoding: str, channels: int) -> None:
    index = _write(tmp_path / "s", encoding=encoding, channels=channels)
    assert (index.num_images, index.num_classes, len(index.shards)) == (NUM_IMAGES, 2, 3)
    assert [shard.num_images for shard in index.shards] == [4, 4, 3]
    ids = np.array([10, 0, 7, 7, 3])
    images, labels = ShardStore(index).read(ids)
    assert images.flags.c_contiguous
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(images, _images(channels)[ids].transpose(0, 3, 1, 2))
    assert labels.tolist() == [0, 0, 1, 1, 1]
    if encoding == "raw":
        assert len(set(index.samples["size"].tolist())) == 1


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _write(tmp_path / "one", encoding=encoding)
    monkeypatch.setattr("time.time", lambda: 1e9)
    old = os.umask(0o077)
    try:
        second = _write(tmp_path / "two", encoding=encoding)
    finally:
        os.umask(old)
    assert first == second
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar", "index.json", "samples.npy"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_stock_webdataset_reads_them(tmp_path: Path, encoding: str, labelled: bool) -> None:
    import webdataset

    index = _write(tmp_path, encoding=encoding, labelled=labelled)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        records = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [record["__key__"] for record in records] == [f"{place:08d}" for place in range(NUM_IMAGES)]
    for place, record in enumerate(records):
        assert np.array_equal(record["npy" if encoding == "raw" else "png"], _images(3)[place])
        assert record.get("cls") == (place % 2 if labelled else None)
        assert record["json"] == {"path": f"b/{place}.png", "class": "ü"}


def test_tar_reads_them(tmp_path: Path) -> None:
    index = _write(tmp_path / "s")
    out = tmp_path / "out"
    out.mkdir()
    for shard in index.shards:
        subprocess.run(["tar", "-xf", tmp_path / "s" / shard.name, "-C", out], check=True)
    listed = subprocess.run(["tar", "-tvf", tmp_path / "s" / "00000.tar"], check=True, capture_output=True, text=True)
    assert re.match(r"-rw-r--r-- 0/0 +\d+ 1970-01-01 \S+ 00000000\.cls\n", listed.stdout)
    for place, image in enumerate(_images(3)):
        assert np.array_equal(np.load(out / f"{place:08d}.npy"), image)
        assert (out / f"{place:08d}.cls").read_text() == str(place % 2)
    assert len(list(out.iterdir())) == 3 * NUM_IMAGES


def test_offsets_point_at_payloads(tmp_path: Path) -> None:
    index = _write(tmp_path, encoding="png")
    offset, size, shard, _, _ = index.samples[9].tolist()
    data = (tmp_path / index.shards[shard].name).read_bytes()[offset : offset + size]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), _images(3)[9])


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_every_flipped_payload_byte_is_noticed(tmp_path: Path, encoding: str) -> None:
    index = _write(tmp_path, encoding=encoding)
    offset, size, shard, _, _ = index.samples[5].tolist()
    path = tmp_path / index.shards[shard].name
    data = path.read_bytes()
    for place in range(offset, offset + size):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"00001\.tar: sample 00000005 is damaged .*dvc checkout"):
            ShardStore(load_index(tmp_path)).read(np.array([4, 5]))
    images, _ = ShardStore(index).read(np.array([4, 6]))
    assert np.array_equal(images[1], _images(3)[6].transpose(2, 0, 1))


def test_a_shard_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    for encoding in ("raw", "png"):
        index = _write(tmp_path / encoding, encoding=encoding)
        path = tmp_path / encoding / "00002.tar"
        os.truncate(path, int(index.samples[10]["offset"]) + 20)
        with pytest.raises(UserError, match=r"00002\.tar: sample 00000010 is damaged"):
            ShardStore(index).read(np.array([10]))
        path.unlink()
        with pytest.raises(UserError, match=r"00002\.tar: No such file"):
            ShardStore(index).read(np.array([10]))


def _change(key: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_json(folder / "index.json", {**load_json(folder / "index.json"), key: value})

    return change


def _flip_samples(folder: Path) -> None:
    data = bytearray((folder / "samples.npy").read_bytes())
    data[-1] ^= 1
    (folder / "samples.npy").write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("no folder", lambda f: f.rename(f.with_name("away")), r"index\.json not found.*dvc repro"),
    ("no json", lambda f: (f / "index.json").write_text("{"), r"index\.json: not an index"),
    ("a list", lambda f: (f / "index.json").write_text("[]"), r"index\.json: not an index"),
    ("other format", _change("format", "x"), "format x version 1, but this program reads ddpm-shards version 1"),
    ("newer version", _change("version", 2), "version 2, but .* version 1; rebuild"),
    ("no shards", _change("shards", None), r"index\.json: damaged"),
    ("outside", _change("shards", [{"name": "../a", "num_images": 1, "num_bytes": 1, "sha256": ""}]), "outside"),
    ("count", _change("num_images", 3), "do not add up"),
    ("other samples", _flip_samples, r"samples\.npy: differs from the sha256 in index\.json"),
    ("no samples", lambda f: (f / "samples.npy").unlink(), r"samples\.npy: missing"),
    ("no shard", lambda f: (f / "00001.tar").unlink(), r"00001\.tar: missing; .*dvc checkout"),
    ("cut shard", lambda f: os.truncate(f / "00001.tar", 512), r"00001\.tar: 512 bytes instead of"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_noticed_on_opening(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "shards"
    _write(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_index(folder)
    assert "\n" not in str(caught.value)


def test_the_index_hash_covers_pixels_and_labels(tmp_path: Path) -> None:
    def sha(pixel: int, label: int) -> str:
        samples = [Sample(np.full((SIZE, SIZE, 1), pixel, np.uint8), label)]
        form = {"image_size": SIZE, "channels": 1, "encoding": "raw", "classes": ("a", "b"), "shard_images": 4}
        return write_shards(tmp_path / f"{pixel}{label}", samples, **form).sha256  # type: ignore[arg-type]

    assert len({sha(0, 0), sha(1, 0), sha(0, 1)}) == 3


def test_a_store_survives_pickling_and_forking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    store = ShardStore(load_index("s"))
    expected, _ = store.read(np.arange(NUM_IMAGES))
    data = pickle.dumps(store)
    assert len(data) < 2000
    monkeypatch.chdir("/")
    copy = pickle.loads(data)
    assert np.array_equal(copy.read(np.arange(NUM_IMAGES))[0], expected)
    assert not copy.index.samples.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside other threads: the child only reads and leaves
        child = os.fork()
    if child == 0:
        same = np.array_equal(store.read(np.arange(NUM_IMAGES))[0], expected)
        store.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(store.read(np.arange(NUM_IMAGES))[0], expected)


def _open_tars() -> int:
    return sum(path.resolve().suffix == ".tar" for path in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_FILES", 2)
    store = ShardStore(_write(tmp_path))
    images, _ = store.read(np.array([0, 4, 8, 1, 5, 9, 10, 0]))
    assert np.array_equal(images, _images(3)[[0, 4, 8, 1, 5, 9, 10, 0]].transpose(0, 3, 1, 2))
    assert _open_tars() == 2
    del store
    assert _open_tars() == 0


def test_ids_out_of_range_and_no_ids(tmp_path: Path) -> None:
    store = ShardStore(_write(tmp_path))
    for wrong in (-1, NUM_IMAGES):
        with pytest.raises(IndexError, match=f"{NUM_IMAGES} images"):
            store.read(np.array([0, wrong]))
    images, labels = store.read(np.array([], np.int64))
    assert images.shape == (0, 3, SIZE, SIZE)
    assert labels.shape == (0,)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(np.zeros((SIZE, SIZE, 3), np.uint8), 0), "expected uint8"),
        (Sample(np.zeros((SIZE, SIZE, 1), np.float32), 0), "expected uint8"),  # type: ignore[arg-type]
        (Sample(np.zeros((SIZE, SIZE, 1), np.uint8), 2), "label 2 with 2 classes"),
        (Sample(np.zeros((SIZE, SIZE, 1), np.uint8), -1), "label -1"),
    ],
)
def test_wrong_samples_are_refused_and_nothing_is_left(tmp_path: Path, sample: Sample, message: str) -> None:
    form: dict[str, Any] = {"image_size": SIZE, "channels": 1, "encoding": "raw", "classes": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path / "s", [sample], **form, shard_images=4)
    with pytest.raises(UserError, match="no images to write"):
        write_shards(tmp_path / "s", [], **form, shard_images=4)
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_large_table_are_checked_before_their_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "BLOCK_ROWS", 4)
    index = _write(tmp_path)
    assert len(index.block_sha256) == 3
    path = tmp_path / "samples.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # crc32 of the last row, in the third block
    path.write_bytes(data)
    damaged = load_index(tmp_path)  # opening does not read it
    images, _ = ShardStore(damaged).read(np.array([0, 7]))
    assert np.array_equal(images, _images(3)[[0, 7]].transpose(0, 3, 1, 2))
    for read in (
        lambda: ShardStore(damaged).read(np.array([0, 8])),
        lambda: ShardStore(pickle.loads(pickle.dumps(damaged))).read(np.array([9])),
        lambda: damaged.labels,
    ):
        with pytest.raises(UserError, match=r"samples\.npy: the rows from 8 on differ from their sha256"):
            read()
    with pytest.raises(UserError, match=r"samples\.npy: differs from the sha256"):
        verify_samples(damaged)
    content = load_json(tmp_path / "index.json")
    save_json(tmp_path / "index.json", {**content, "block_sha256": content["block_sha256"][:2]})
    with pytest.raises(UserError, match="2 hashes of blocks for 11 images"):
        load_index(tmp_path)


def test_a_small_index_has_no_blocks_and_is_checked_at_opening(tmp_path: Path) -> None:
    index = _write(tmp_path)
    assert index.block_sha256 == ()
    verify_samples(index)
    assert "block_sha256" not in load_json(tmp_path / "index.json")
    assert index.labels.tolist() == [i % 2 for i in range(NUM_IMAGES)]


def test_sets_that_differ_are_not_mixed(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    _write(tmp_path / "b")
    _write(tmp_path / "grey", channels=1)
    _write(tmp_path / "bare", labelled=False)
    check_alike([load_index(tmp_path / "a"), load_index(tmp_path / "b")])
    for name, what in (("grey", r"channels \(3 and 1\)"), ("bare", r"classes \(2 and 0 classes")):
        with pytest.raises(UserError, match=f"a and .*{name} can't be mixed: they differ in {what}"):
            check_alike([load_index(tmp_path / "a"), load_index(tmp_path / name)])


def test_an_index_that_does_not_add_up_is_not_saved(tmp_path: Path) -> None:
    form: dict[str, Any] = {"image_size": SIZE, "channels": 1, "encoding": "raw", "classes": ()}
    shards = [Shard("00000.tar", 2, 10, "")]
    with pytest.raises(ValueError, match="3 samples, but the shards count 2"):
        save_index(tmp_path, **form, shards=shards, samples=np.zeros(3, SAMPLE_DTYPE))
    wrong = np.zeros(2, SAMPLE_DTYPE)
    wrong["shard"] = [1, 0]
    two = [Shard(f"0000{number}.tar", 1, 10, "") for number in range(2)]
    with pytest.raises(ValueError, match="in turn"):
        save_index(tmp_path, **form, shards=two, samples=wrong)
    with pytest.raises(ValueError, match="SAMPLE_DTYPE"):
        save_index(tmp_path, **form, shards=shards, samples=np.zeros(2))
