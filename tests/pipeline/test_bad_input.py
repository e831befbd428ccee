"""What a folder, its names and the disk may do to the stage `shard`: nothing lost, nothing silent, one line at most."""

import csv
import errno
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.data import examine
from pipeline.data.audit import MAX_FILE_BYTES
from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from pipeline.shard import main
from tests.image_files import cut, fill, tree

NAMES = [
    "a.b.c/x.y.z.png",
    "a b/ x  y .png",
    "a b/x.png",
    "Case/Name.png",
    "Case/name.png",
    "case/Name.png",
    "case/NAME.PNG",
    "ü\u732b/\U0001f408.png",
    "ü\u732b/cafe\u0301.png",
    "ü\u732b/caf\u00e9.png",
    "quote\"',;/new\nline\t.png",
    "n/" + "n" * 150 + "/" + "n" * 144 + ".png",
    "-rf/--help.png",
]


def _metas() -> list[dict[str, str]]:
    import webdataset

    urls = [str(paths.SHARDS / shard.name) for shard in load_index(paths.SHARDS).shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        return [json.loads(record["json"]) for record in webdataset.WebDataset(urls, shardshuffle=False)]


def test_every_name_comes_through_whole(workspace: Path) -> None:
    fill(workspace / "images", *NAMES)
    main()
    metas = _metas()
    assert len(max(NAMES, key=len)) == 301
    assert sorted(meta["path"] for meta in metas) == sorted(NAMES)
    assert all(meta["class"] == meta["path"].split("/")[0] for meta in metas)
    index = load_index(paths.SHARDS)
    assert index.num_classes == len({name.split("/")[0] for name in NAMES}) == 8
    images, labels = ShardStore(index).read(np.arange(index.num_images))
    for number, meta in enumerate(metas):
        assert (images[number] == NAMES.index(meta["path"])).all()
        assert index.classes[labels[number]] == meta["class"]
    with open(paths.CLASSES, encoding="utf-8", newline="") as file:
        assert sorted(row["name"] for row in csv.DictReader(file)) == sorted(index.classes)


def test_a_class_with_one_image_is_a_class(workspace: Path) -> None:
    fill(workspace / "images", "many/1.png", "many/2.png", "one/1.png")
    main()
    assert load_index(paths.SHARDS).samples["label"].tolist() == [0, 0, 1]
    report = load_json(paths.SHARD_REPORT)
    assert (report["class_images_min"], report["class_images_max"], report["num_empty_classes"]) == (1, 2, 0)
    assert paths.CLASSES.read_text() == "label,name,images,held_out,refused\n0,many,2,0,0\n1,one,1,0,0\n"


def test_one_image_is_a_set(workspace: Path) -> None:
    fill(workspace / "images", "1.png")
    main()
    assert load_index(paths.SHARDS).num_images == 1


def test_a_class_that_is_all_held_out_is_named(
    workspace: Path, set_shard: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        path = workspace / "images" / f"{'single' if number == 39 else 'many'}/{number}.png"
        path.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(number % 30 if number < 39 else 99)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    for share in np.linspace(0.1, 0.9, 9).tolist():  # until chance has held it out
        set_shard(held_out_share=share)
        main()
        held_out, index = load_index(paths.HELD_OUT), load_index(paths.SHARDS)
        if 1 not in index.samples["label"]:
            break
        assert "warning" not in capsys.readouterr().err
    assert held_out.num_images + index.num_images == 40
    assert held_out.classes == index.classes == ("many", "single")
    stores = [ShardStore(side).read(np.arange(side.num_images))[0] for side in (held_out, index)]
    pictures = [{image.tobytes() for image in images} for images in stores]
    assert not pictures[0] & pictures[1]
    assert len(pictures[0] | pictures[1]) == 31
    assert "class 'single' has no image to train on: all of it is held out" in capsys.readouterr().err
    rows = f"0,many,{index.num_images},{held_out.num_images - 1},0\n1,single,0,1,0\n"
    assert paths.CLASSES.read_text() == "label,name,images,held_out,refused\n" + rows
    before = tree(paths.SHARDS)
    set_shard(held_out_share=0.9999999)
    with pytest.raises(UserError, match=r"held_out_share = .* leaves none of the 40 images"):
        main()
    assert tree(paths.SHARDS) == before
    set_shard(held_out_share=0.0)
    main()
    assert not paths.HELD_OUT.exists()
    assert load_index(paths.SHARDS).num_images == 40


def test_a_file_beyond_any_image_is_refused_unread(workspace: Path) -> None:
    fill(workspace / "images", "1.png", "2.png")
    with open(workspace / "images" / "huge.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse
    main()
    assert paths.REFUSED.read_text() == 'path,reason\nhuge.png,"more than 1,073,741,824 bytes"\n'


def test_a_file_that_goes_away_after_the_listing_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(workspace / "images", "1.png", "2.png", "gone.png")
    keys = examine.read_file

    def read(path: str) -> bytes:
        if path.endswith("gone.png"):
            Path(path).unlink(missing_ok=True)
        return keys(path)

    monkeypatch.setattr(examine, "read_file", read)
    main()
    assert paths.REFUSED.read_text() == "path,reason\ngone.png,cannot be decoded: No such file or directory\n"
    assert load_index(paths.SHARDS).num_images == 2


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path_factory.mktemp("small")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _noise(folder: Path, num: int) -> None:
    for number in range(num):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / f"{number}.png")


@pytest.mark.parametrize("full", ["state", "shards"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    workspace: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    _noise(workspace / "images", 90)  # of 4 KiB: they fit neither once nor twice
    if full == "state":
        monkeypatch.setenv("PIPELINE_STATE", str(small_disk / "state"))
        message = r"results/\w+\.bin can't be written \(No space left on device\); make room and run again"
    else:
        (small_disk / "project").mkdir()
        shutil.copy("params.yaml", small_disk / "project")
        (small_disk / "project/images").symlink_to(workspace / "images")
        monkeypatch.setenv("PIPELINE_STATE", str(workspace / "state"))
        monkeypatch.chdir(small_disk / "project")
        message = r"^shards can't be written \(No space left on device\); make room and run again"
    with pytest.raises(UserError, match=message) as caught:
        main()
    assert "\n" not in str(caught.value)
    assert not list(Path.cwd().glob("*shards*"))
    assert not list(Path.cwd().rglob("*.part"))
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("PIPELINE_STATE", str(workspace / "state"))
    main()
    assert load_index(paths.SHARDS).num_images == 90


@pytest.mark.parametrize("what", ["numpy.savez", "pipeline.data.ustar.UstarWriter._write"], ids=["results", "tars"])
def test_a_full_disk_keeps_the_shards_of_before(workspace: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    _noise(workspace / "images", 9)
    main()
    before = tree(paths.SHARDS)
    _noise(workspace / "images", 12)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(what, fail)
    with pytest.raises(UserError, match="No space left on device"):
        main()
    assert tree(paths.SHARDS) == before
    assert not list(workspace.rglob("*.part"))


def test_only_what_claims_to_be_an_image_is_missed(workspace: Path) -> None:
    fill(workspace / "images", "a/1.png", "a/2.png")
    cut("JPEG", 0.5)(workspace / "images/a/cut.jpg")
    (workspace / "images/a/text.jpg").write_text("hello")
    (workspace / "images/a/zero.webp").touch()
    with pytest.raises(UserError, match="3 of 5 files refused"):
        main()
    rows = list(csv.reader(paths.REFUSED.read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == ["a/cut.jpg", "a/text.jpg", "a/zero.webp"]
    assert "truncated" in rows[1][1]
    assert rows[2][1].startswith("not a PNG, JPEG")
    assert rows[3][1] == "empty file"
