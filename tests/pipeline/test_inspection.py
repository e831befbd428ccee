"""The commands to look at a set and to check it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.__main__ import main as run_command
from pipeline.data.index import ShardIndex
from pipeline.data.order import RandomOrder
from pipeline.data.store import ShardStore
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.lineage import ROOT
from tests.servers import FolderServer


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardIndex:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    return write_shards(
        tmp_path / "shards",
        (Sample(image, place % 3) for place, image in enumerate(images)),
        image_size=8, channels=3, encoding="raw", classes=("ape", "bee", "cat"), shard_images=8,
    )  # fmt: skip


def verify(place: str = "") -> int:
    try:
        run_command(["verify", *([place] if place else [])])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("far", [False, True])
def test_show_draws_the_range_of_the_order_that_training_sees(
    far: bool, shards: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderServer(tmp_path / "shards") as server:
        place = [server.url] if far else []
        run_command(["show", *place, "--epoch", "2", "--start", "28", "--count", "4", "--seed", "5", "--out", "a.png"])
    ids = RandomOrder(30, 5).images_at(np.arange(88, 92))
    images, labels = ShardStore(shards).read(ids)
    with Image.open("a.png") as picture:
        sheet = np.asarray(picture)
    for place, image in enumerate(images):  # two by two, each pixel 4 by 4, 2 px between
        top, left = 2 + place // 2 * 34, 2 + place % 2 * 34
        assert np.array_equal(sheet[top : top + 32 : 4, left : left + 32 : 4], image.transpose(1, 2, 0))
    said = capsys.readouterr().out
    assert f"ids      {' '.join(map(str, ids))}\n" in said
    assert f"mean {images[:, 0].mean():.3f}, std {images[:, 0].std():.3f}" in said
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert f"{shards.classes[label]} ({count})" in said
    for number in set(shards.samples["shard"][ids].tolist()):
        assert f"{number:05d}.tar (" in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--count", "0"], "--count is 0"), (["--start", "30"], "--start is 30, but an epoch has 30 images")],
)
def test_show_says_what_is_out_of_range(shards: ShardIndex, arguments: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run_command(["show", "--seed", "0", *arguments])


@pytest.mark.parametrize("far", [False, True])
def test_verify_names_every_damaged_shard(
    far: bool, shards: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FolderServer(tmp_path / "shards") as server:
        place = server.url if far else ""
        assert verify(place) == 0
        assert capsys.readouterr().out == f"4 shards, 30 images: all as in the index {shards.sha256[:16]}\n"
        for name, row in (("00000.tar", 3), ("00001.tar", None), ("00002.tar", 20)):
            path = tmp_path / "shards" / name
            data = bytearray(path.read_bytes())
            data[600 if row is None else int(shards.samples["offset"][row]) + 150] ^= 1  # of a class, and of pixels
            path.write_bytes(data if name != "00002.tar" else data[: int(shards.samples["offset"][20])])
        (tmp_path / "shards/00003.tar").unlink()
        assert verify(place) == 1
    said = capsys.readouterr().out.splitlines()
    first = int(shards.samples["offset"][3])
    assert (
        said[0]
        == f"shard 00000.tar: its sha256 differs from the index; 1 of 8 images damaged, the first at byte {first:,}"
    )
    assert said[1] == "shard 00001.tar: its sha256 differs from the index"
    assert said[2].startswith("shard 00002.tar")
    assert ("shorter" in said[2] or "cut short" in said[2]) if far else said[2].endswith("; 4 of 8 images damaged")
    assert said[3].startswith("shard 00003.tar")
    assert ("not found" if far else "No such file") in said[3]
    assert said[4] == "4 shards, 30 images: 4 damaged"
    assert not list((tmp_path / "cache").glob("*.tar")), "what is checked is where it lies, not the cache"


def test_verify_reads_records_that_straddle_pieces(
    shards: ShardIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (7, 511, 512, 700):
        monkeypatch.setattr("pipeline.data.inspection.PIECE_BYTES", size)
        assert verify() == 0
    path = shards.folder / "00001.tar"
    data = bytearray(path.read_bytes())
    for row in range(8, 16):
        data[int(shards.samples["offset"][row] + shards.samples["size"][row]) - 1] ^= 1
    path.write_bytes(data)
    assert verify() == 1
    assert "8 of 8 images damaged" in capsys.readouterr().out


def test_as_a_program_it_ends_like_a_stage(shards: ShardIndex, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.data", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = run("verify", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere/index.json not found")
    done = run("show", str(shards.folder), "--count", "many")
    assert (done.returncode, "'many' is no whole number" in done.stderr) == (2, True)
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("show", "verify", "index"))
