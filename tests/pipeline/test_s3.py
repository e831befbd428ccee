"""Shards over S3 (moto's server on loopback): read from there, and through a DVC remote without `dvc pull`."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.data.__main__ import main as run_command
from pipeline.data.cache import ShardCache
from pipeline.data.foreign import index_foreign
from pipeline.data.remote import Patience, RemoteError, open_remote, read_pieces, read_whole, size_of
from pipeline.data.sources import open_shards
from pipeline.data.store import ShardStore
from pipeline.data.tars import list_tars
from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file
from tests.pipeline.test_remote import write
from tests.projects import make_project, run
from tests.servers import s3_server

QUICK = Patience(tries=2, pause_seconds=0.01)


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with s3_server(monkeypatch, tmp_path) as address:
        yield address


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**9, QUICK)


def put(folder: Path, place: str) -> None:
    fsspec.filesystem("s3").put(f"{folder}/", f"{place}/", recursive=True)


def test_put_ranged_get_and_what_is_not_there(address: str) -> None:
    data = bytes(range(256)) * 100
    fsspec.filesystem("s3").pipe("bucket/a.bin", data)
    file = open_remote("s3://bucket/a.bin")
    assert size_of(file, QUICK) == len(data)
    assert read_whole(file, QUICK) == data
    pieces = list(read_pieces(file, len(data), QUICK, piece_bytes=1000))
    assert (len(pieces), b"".join(pieces)) == (26, data)
    with pytest.raises(RemoteError, match=r"^s3://bucket/none: not found$"):
        read_whole(open_remote("s3://bucket/none"), QUICK)
    with pytest.raises(RemoteError, match=r"^s3://nobucket/none: not found$"):
        read_whole(open_remote("s3://nobucket/none"), QUICK)
    with pytest.raises(RemoteError, match=r"^s3://bucket/a\.bin: "):
        list(read_pieces(file, len(data) + 5, QUICK, piece_bytes=10000))


def test_nobody_gives_credentials(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RemoteError, match=r"^s3://bucket/a: no credentials found; set them in the environment"):
        read_whole(open_remote("s3://bucket/a"), QUICK)


def test_a_set_is_read_and_verified_from_a_bucket(
    address: str, cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = write(tmp_path / "far")
    put(local.folder, "bucket/some/set")
    index, source = open_shards(tmp_path / "none", "s3://bucket/some/set", cache)
    assert index == local
    ids = np.random.default_rng(0).permutation(local.num_images)
    assert np.array_equal(ShardStore(index, source).read(ids)[0], ShardStore(local).read(ids)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELINE_CACHE", str(cache.folder))
    run_command(["verify", "s3://bucket/some/set"])
    assert "6 shards, 24 images: all as in the index" in capsys.readouterr().out
    fsspec.filesystem("s3").rm("bucket/some/set/00003.tar")
    with pytest.raises(SystemExit):
        run_command(["verify", "s3://bucket/some/set/"])
    assert "shard 00003.tar from s3://bucket/some/set/00003.tar: not found" in capsys.readouterr().out
    near = index_foreign(list_tars(str(local.folder)), "near", image_size=8, channels=1, class_key="cls", cache=cache)
    fsspec.filesystem("s3").put(str(local.folder / "00003.tar"), "bucket/some/set/00003.tar")
    far = index_foreign(
        list_tars("s3://bucket/some/set"), "out", image_size=8, channels=1, class_key="cls", cache=cache
    )
    assert np.array_equal(far[0].samples, near[0].samples)
    assert far[0].shards[5].url == "s3://bucket/some/set/00005.tar"


def dvc(folder: Path, *arguments: str, **extra: str) -> str:
    done = run(folder, "dvc", *arguments, DVC_NO_ANALYTICS="1", **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_dvc_push_and_pull_and_training_straight_from_the_remote(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path / "first", train__total_images=96)
    for command in (
        "git init -q", "git config user.email a@example.org", "git config user.name A", "dvc init -q",
        "dvc remote add -d store s3://bucket/dvc", f"dvc remote modify store endpointurl {address}",
    ):  # fmt: skip
        assert run(folder, *command.split()).returncode == 0, command
    (folder / ".gitignore").write_text("/images\n/.state/\n__pycache__/\n")
    dvc(folder, "repro", "train")
    assert "pushed" in dvc(folder, "push")
    weights = sha256_file(folder / "model/weights.safetensors")
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-qm", "first"], cwd=folder, check=True)

    # Another clone: the index is pulled, a few kilobytes; the tars are read from the remote by their hashes.
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", folder, clone], check=True)
    shutil.copytree(folder / "images", clone / "images")
    dvc(clone, "pull", "shards/index.json", "shards/samples.npy")
    assert sorted(path.name for path in (clone / "shards").iterdir()) == ["index.json", "samples.npy"]
    far = {"PIPELINE_SHARDS": "dvc://", "PIPELINE_CACHE": str(tmp_path / "cache"), "PIPELINE_STATE": "state"}
    said = dvc(clone, "repro", "--allow-missing", "train", **far)
    assert "Stage 'train' didn't change, skipping" in said
    dvc(clone, "repro", "--single-item", "--force", "--no-run-cache", "train", **far)
    assert sha256_file(clone / "model/weights.safetensors") == weights
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
    tars = {sha256_file(path) for path in (folder / "shards").glob("*.tar")}
    kept = {sha256_file(path) for path in (clone / ".dvc/cache").rglob("*") if path.is_file()}
    assert not tars & kept, "no second copy in DVC's cache"
    done = run(clone, "python", "-m", "pipeline.data", "verify", **far)
    assert (done.returncode, "3 shards, 120 images: all as in" in done.stdout) == (0, True), done.stderr

    # A changed parameter trains anew from the remote, and DVC counts the result as up to date.
    text = (clone / "params.yaml").read_text().replace("total_images: 96", "total_images: 64")
    (clone / "params.yaml").write_text(text)
    assert "Running stage 'train'" in dvc(clone, "repro", "--allow-missing", "train", **far)
    assert "Running" not in dvc(clone, "repro", "--allow-missing", "train", **far)

    # And all of it by `dvc pull`, as ever.
    third = tmp_path / "third"
    subprocess.run(["git", "clone", "-q", folder, third], check=True)
    dvc(third, "pull", "shards", "model")
    assert {sha256_file(path) for path in (third / "shards").glob("*.tar")} == tars
    assert sha256_file(third / "model/weights.safetensors") == weights

    # What is not there, or not right, is one line.
    fsspec.filesystem("s3").rm("bucket/dvc", recursive=True)
    far["PIPELINE_CACHE"] = str(tmp_path / "other")
    done = run(clone, "python", "-m", "pipeline.train", **far)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: dvc://shards/index.json: not found")
    done = run(third, "python", "-m", "pipeline.train", **{**far, "PIPELINE_SHARDS": "dvc://nowhere"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "dvc://nowhere/shards: " in done.stderr


def test_the_endpoint_is_away(address: str, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://bucket/set/index\.json: .*given up after 2 tries"):
        open_shards("none", "s3://bucket/set", cache)
