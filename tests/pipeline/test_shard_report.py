"""The stage `shard` in one process: what it reports, and what it refuses."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.data.contact import choose_examples
from pipeline.data.index import load_index
from pipeline.data.listing import Found
from pipeline.data.store import ShardStore
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from pipeline.shard import main
from pipeline.train import log_audit
from tests.image_files import BAD, GOOD, cut, fill, tree


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
    folders = [workspace / name for name in ("shards", "metrics", "plots")]
    first = tree(*folders)
    report = load_json(paths.SHARD_REPORT)
    assert report["num_images"] + report["num_refused"] + report["num_skipped"] == num_files
    assert report["num_images"] == len(GOOD) + 1
    assert report["num_skipped"] == sum(report["skipped"].values()) == 2
    assert report["num_duplicates"] >= 1
    assert report["largest_duplicate_group"] >= 2
    assert Path("metrics/duplicates.csv").read_text().startswith("group,kind,path\n1,")
    assert (report["num_classes"], report["num_empty_classes"], report["class_images_min"]) == (4, 1, 0)
    rows = list(csv.reader(io.StringIO(paths.REFUSED.read_text(encoding="utf-8"), newline="")))
    assert rows[0] == ["path", "reason"]
    assert rows[1:] == sorted(rows[1:])
    assert len(rows) == 1 + report["num_refused"]
    main()
    assert tree(*folders) == first


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
    fill(workspace / "images", *(f"{place}.png" for place in range(6)))
    main()
    index = load_index(paths.SHARDS)
    assert index.classes == ()
    assert (index.samples["label"] == -1).all()
    assert [shard.num_images for shard in index.shards] == [4, 2]
    assert load_json(paths.SHARD_REPORT)["class_images_max"] == 0


def test_too_many_broken_files_fail_and_leave_the_list_but_no_shards(workspace: Path) -> None:
    fill(workspace / "images", "1.png", "2.png")
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


def test_nothing_readable_is_an_error_whatever_the_limit(workspace: Path, set_shard: Callable[..., None]) -> None:
    set_shard(max_broken_share=1.0)
    (workspace / "images" / "a.png").touch()
    with pytest.raises(UserError, match="1 of 1 files refused"):
        main()


@pytest.mark.parametrize(
    ("sizes", "colour", "expected"),
    [
        ([7, 7, 7, 7], False, (8, 1)),
        ([31, 32, 33, 90, 90], False, (32, 1)),
        ([31, 31, 33, 33, 90, 90], True, (32, 3)),
        ([500, 500, 500], False, (64, 1)),
    ],
)
def test_auto_sees_size_and_colour(workspace: Path, sizes: list[int], colour: bool, expected: tuple[int, int]) -> None:
    folder = workspace / "images"
    for place, size in enumerate(sizes):
        image = Image.new("RGB" if place % 2 else "L", (size, size + 9), 90 * 0x010101)
        if colour and place == len(sizes) - 1:
            image = Image.new("RGB", image.size, "red")
        image.save(folder / f"{place}.png")
    # A broken colour image decides nothing.
    cut("PNG", 0.5)(folder / "broken.png")
    (folder / "empty.png").touch()
    main()
    index = load_index(paths.SHARDS)
    assert (index.image_size, index.channels) == expected


def test_duplicates_are_counted_listed_and_kept_together(workspace: Path, set_shard: Callable[..., None]) -> None:
    images = workspace / "images"
    rng = np.random.default_rng(0)
    for number in range(30):
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)
        picture.save(images / f"{number:02d}.png")
        if number % 3 == 0:
            picture.save(images / f"{number:02d} again.bmp")
        if number % 5 == 0:
            picture.save(images / f"{number:02d} near.jpg", quality=80)
    set_shard(image_size=64, channels=3, held_out_share=0.5)
    main()
    report = load_json(paths.SHARD_REPORT)
    assert (report["num_duplicates"], report["num_near_duplicates"], report["largest_duplicate_group"]) == (10, 6, 3)
    rows = list(csv.DictReader(paths.DUPLICATES.read_text().splitlines()))
    groups: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["path"][:2])
        assert row["kind"] == ("near" if "near" in row["path"] or int(row["path"][:2]) % 3 else "exact")
    assert len(rows) == 10 * 2 + 6 * 2 - 2
    assert all(len(names) == 1 for names in groups.values())
    sides: dict[str, set[str]] = {}
    for folder in (paths.SHARDS, paths.HELD_OUT):
        for shard in load_index(folder).shards:
            with tarfile.open(folder / shard.name) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        file = tar.extractfile(member)
                        assert file is not None
                        sides.setdefault(json.load(file)["path"][:2], set()).add(folder.name)
    assert len(sides) == 30
    assert all(len(side) == 1 for side in sides.values())
    assert {side for names in sides.values() for side in names} == {"shards", "held_out"}
    assert report["num_images"] + report["num_held_out"] == 46
    set_shard(near_duplicate_bits=None)
    main()
    assert load_json(paths.SHARD_REPORT)["num_near_duplicates"] == 0


def test_sizes_are_of_the_files_and_the_sheet_shows_each_class(workspace: Path) -> None:
    for number, size in enumerate([(10, 20), (30, 8), (50, 90)]):
        folder = workspace / "images" / f"class {number}"
        folder.mkdir()
        Image.new("RGB", size, ("red", "lime", "blue")[number]).save(folder / "1.png")
    main()
    report = load_json(paths.SHARD_REPORT)
    assert report["file_px"]["width"] == {"min": 10, "median": 30, "max": 50}
    assert report["file_px"]["height"] == {"min": 8, "median": 20, "max": 90}
    with Image.open(paths.CONTACT_SHEET) as sheet:
        colours = {colour for count, colour in sheet.getcolors(2**24) if count >= 64 * 64}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours


def test_examples_are_spread_over_classes_and_images() -> None:
    many = [Found(f"{name:02d}/{number:03d}.png", f"{name:02d}") for name in range(40) for number in range(25)]
    examples = choose_examples(many)
    assert [title for title, _ in examples][:3] == ["00: 25", "02: 25", "04: 25"]
    assert [len(places) for _, places in examples] == [10] * 20
    assert examples[1][1] == [50 + number for number in (0, 2, 5, 7, 10, 12, 15, 17, 20, 22)]
    assert choose_examples([Found("1.png", None)]) == [("all: 1", [0])]


def test_the_training_run_carries_the_audit(workspace: Path) -> None:
    fill(workspace / "images", "a/1.png", "b/2.png")
    log: dict[str, object] = {}

    class Recorder:
        def log_artifact(self, path: Path, folder: str) -> None:
            log[f"{folder}/{path.name}"] = path.read_bytes()

        def log_metrics(self, values: dict[str, float], step: int) -> None:
            log.update(values)

    log_audit(Recorder())  # type: ignore[arg-type]
    assert log == {}
    main()
    log_audit(Recorder())  # type: ignore[arg-type]
    assert {name for name in log if "." in name} == {
        f"data/{name}" for name in ("shard.json", "refused.csv", "duplicates.csv", "classes.csv", "contact.png")
    }
    assert log["data/num_images"] == 2.0
    assert log["data/channel_mean/grey"] == 0.5
