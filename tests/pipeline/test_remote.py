"""Shards from a server that fails in every way it can: fetched once, checked, tried again, named when it is over."""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.loader import iterate_batches
from pipeline.data.order import RandomOrder
from pipeline.data.remote import (
    DvcFolder,
    Patience,
    RemoteError,
    UrlFolder,
    is_url,
    join,
    open_remote,
    read_pieces,
    read_whole,
    redact,
    size_of,
)
from pipeline.data.sources import CachedSource, open_shards
from pipeline.data.store import ShardStore
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.lineage import ROOT
from pipeline.machine import load_machine
from tests.servers import HANG_SECONDS, FolderServer

QUICK = Patience(tries=3, seconds=5.0, pause_seconds=0.01)
PLENTY = 10**9


def write(folder: Path, num_images: int = 24, shard_images: int = 4) -> ShardIndex:
    images = np.random.default_rng(0).integers(0, 256, (num_images, 8, 8, 1), dtype=np.uint8)
    samples = (Sample(image, place % 3) for place, image in enumerate(images))
    return write_shards(
        folder, samples, image_size=8, channels=1, encoding="raw", classes=("a", "b", "c"), shard_images=shard_images
    )


@pytest.fixture
def local(tmp_path: Path) -> ShardIndex:
    return write(tmp_path / "far")


@pytest.fixture
def server(local: ShardIndex) -> Iterator[FolderServer]:
    with FolderServer(local.folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", PLENTY, QUICK)


def fetch(server: FolderServer, cache: ShardCache, local: ShardIndex, number: int = 0) -> Path:
    source = CachedSource(local.shards, UrlFolder(server.url), cache)
    return source.local_path(local.shards[number])


def leftovers(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix not in {".tar", ".lock"})


def test_every_image_comes_over_http_as_from_the_disk(
    local: ShardIndex, server: FolderServer, cache: ShardCache, tmp_path: Path
) -> None:
    index, source = open_shards(tmp_path / "none", server.url, cache)
    assert index == local
    ids = np.random.default_rng(1).permutation(local.num_images)
    for _ in range(2):
        images, labels = ShardStore(index, source).read(ids)
        expected, expected_labels = ShardStore(local).read(ids)
        assert np.array_equal(images, expected)
        assert np.array_equal(labels, expected_labels)
    assert {server.gets[shard.name] for shard in local.shards} == {1}
    open_shards(tmp_path / "none", server.url, cache)
    assert (server.gets["index.json"], server.gets["samples.npy"]) == (2, 1)


@pytest.mark.parametrize("trouble", ["500", "503", "429", "hang", "cut", "flip"])
def test_what_passes_is_tried_again(
    trouble: str, local: ShardIndex, server: FolderServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    patience = Patience(tries=3, seconds=0.5 if trouble == "hang" else 5.0, pause_seconds=0.01)
    server.trouble["00001.tar"] = [trouble, "fine"]
    cache = ShardCache(tmp_path / "cache", PLENTY, patience)
    path = fetch(server, cache, local, 1)
    assert path.read_bytes() == (local.folder / "00001.tar").read_bytes()
    assert server.gets["00001.tar"] == 2
    assert "00001.tar" in caplog.text  # a person who wonders why it is slow finds the reason
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    ("trouble", "gets", "reason"),
    [
        ("401", 1, r"no access \(401\); check the credentials"),
        ("403", 1, r"no access \(403\); check the credentials"),
        ("404", 1, "not found"),
        ("410", 1, r"the server failed \(410\)"),
        ("500", 3, r"the server failed \(500\); given up after 3 tries"),
        ("hang", 3, "no answer in time; given up after 3 tries"),
        ("cut", 3, "the body was cut short; given up after 3 tries"),
        ("flip", 2, "its sha256 differs from the index"),
    ],
)
def test_what_stays_wrong_is_one_line_that_names_shard_and_url(
    trouble: str, gets: int, reason: str, local: ShardIndex, server: FolderServer, tmp_path: Path
) -> None:
    server.trouble["00002.tar"] = [trouble]
    patience = Patience(tries=3, seconds=0.3 if trouble == "hang" else 5.0, pause_seconds=0.01)
    cache = ShardCache(tmp_path / "cache", PLENTY, patience)
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^shard 00002\.tar from {server.url}/00002\.tar: {reason}") as caught:
        fetch(server, cache, local, 2)
    assert time.monotonic() - start < HANG_SECONDS
    assert "\n" not in str(caught.value)
    assert server.gets["00002.tar"] == gets
    assert leftovers(cache) == []
    assert not cache.has(local.shards[2])


def test_nobody_listens(local: ShardIndex, cache: ShardCache) -> None:
    source = CachedSource(local.shards, UrlFolder("http://127.0.0.1:9"), cache)
    with pytest.raises(UserError, match=r"^shard 00000\.tar from http://127\.0\.0\.1:9/00000\.tar: .*3 tries"):
        source.local_path(local.shards[0])


def test_pieces_are_ranged_and_a_failure_costs_one_of_them(local: ShardIndex, server: FolderServer) -> None:
    data = (local.folder / "00000.tar").read_bytes()
    file = open_remote(f"{server.url}/00000.tar")
    assert size_of(file, QUICK) == len(data)
    server.trouble["00000.tar"] = ["fine", "fine", "500", "cut", "fine"]
    pieces = list(read_pieces(file, len(data), QUICK, piece_bytes=1000))
    assert b"".join(pieces) == data
    assert {len(piece) for piece in pieces[:-1]} == {1000}
    assert server.gets["00000.tar"] == len(pieces) + 2
    assert server.sent["00000.tar"] == len(data) + 500  # half of the piece that was cut
    server.trouble["00000.tar"] = ["whole"]
    assert list(read_pieces(file, len(data), QUICK, piece_bytes=1000)) == [data]
    server.trouble["00000.tar"] = ["fine", "whole"]
    assert b"".join(read_pieces(file, len(data), QUICK, piece_bytes=1000)) == data
    (local.folder / "00000.tar").write_bytes(data[:1500])
    server.trouble.clear()
    with pytest.raises(RemoteError, match="cut short"):
        list(read_pieces(file, len(data), QUICK, piece_bytes=1000))


def test_pauses_double_with_jitter_up_to_a_limit() -> None:
    patience = Patience(pause_seconds=1.0, longest_pause_seconds=8.0)
    for failures, middle in enumerate([1, 2, 4, 8, 8], start=1):
        pauses = {patience.pause(failures) for _ in range(50)}
        assert middle * 0.5 <= min(pauses) < max(pauses) < middle * 1.5


FETCH = """
import sys
from pathlib import Path
from pipeline.data.cache import ShardCache
from pipeline.data.index import load_index
from pipeline.data.remote import UrlFolder
from pipeline.data.sources import CachedSource
far, url, cache = sys.argv[1:]
index = load_index(far)
source = CachedSource(index.shards, UrlFolder(url), ShardCache(cache, 10**9))
for shard in index.shards:
    assert source.local_path(shard).read_bytes() == (Path(far) / shard.name).read_bytes()
"""


def test_processes_of_a_node_fetch_each_shard_once(local: ShardIndex, server: FolderServer, tmp_path: Path) -> None:
    server.pause_seconds = 0.2
    command = [sys.executable, "-c", FETCH, str(local.folder), server.url, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {server.gets[shard.name] for shard in local.shards} == {1}


def test_a_killed_fetch_leaves_nothing_in_the_way(local: ShardIndex, server: FolderServer, cache: ShardCache) -> None:
    server.trouble["00000.tar"] = ["hang", "fine"]
    command = [sys.executable, "-c", FETCH, str(local.folder), server.url, str(cache.folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    while not server.gets["00000.tar"]:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert [Path(name).suffix for name in leftovers(cache)] == [".part"]
    assert fetch(server, cache, local).read_bytes() == (local.folder / "00000.tar").read_bytes()
    assert leftovers(cache) == []


def test_what_was_used_longest_ago_goes_first_but_never_what_is_about_to_be_opened(
    local: ShardIndex, server: FolderServer, tmp_path: Path
) -> None:
    room = 2 * max(shard.num_bytes for shard in local.shards)
    cache = ShardCache(tmp_path / "cache", room, QUICK)
    source, other = (CachedSource(local.shards, UrlFolder(server.url), cache) for _ in range(2))
    here = lambda: [number for number, shard in enumerate(local.shards) if cache.has(shard)]  # noqa: E731
    for number in (0, 1):
        source.local_path(local.shards[number])
        time.sleep(0.01)
    source.local_path(local.shards[0])
    source.release()
    time.sleep(0.01)
    other.local_path(local.shards[2])
    assert here() == [0, 2]  # 1 was fetched after 0, but used before it
    source.local_path(local.shards[0])
    time.sleep(0.01)
    other.local_path(local.shards[2])
    other.local_path(local.shards[3])
    assert here() == [0, 3]  # 0 is older than 2, but `source` may be about to open it
    source.release()
    other.local_path(local.shards[4])
    assert here() == [3, 4]
    used = sum(path.stat().st_size for path in cache.folder.glob("*.tar"))
    assert used <= room
    assert [path.name for path in cache.folder.glob("*.lock")] == ["room.lock"]


def test_a_shard_that_is_open_can_still_be_read_when_it_is_gone(
    local: ShardIndex, server: FolderServer, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", max(shard.num_bytes for shard in local.shards), QUICK)
    store = ShardStore(local, CachedSource(local.shards, UrlFolder(server.url), cache))
    ids = np.arange(local.num_images)
    for _ in range(2):
        assert np.array_equal(store.read(ids)[0], ShardStore(local).read(ids)[0])
    assert len(list(cache.folder.glob("*.tar"))) == 1
    assert {server.gets[shard.name] for shard in local.shards} == {1}


def test_a_cache_that_is_too_small_and_a_disk_that_is_full(
    local: ShardIndex, server: FolderServer, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"shard 00000\.tar has [\d,]+ bytes, more than the cache.*PIPELINE_CACHE_GB"):
        fetch(server, ShardCache(tmp_path / "cache", 1000), local)
    code = f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n{FETCH}"  # noqa: E501
    command = [sys.executable, "-c", code, str(local.folder), server.url, str(tmp_path / "small")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "UserError" in done.stderr.splitlines()[-1]
    assert "File too large while fetching shard 00000.tar; free some space" in done.stderr.splitlines()[-1]


def test_prefetch_fetches_ahead_and_leaves_failures_to_the_reader(
    local: ShardIndex, server: FolderServer, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * 4 * max(shard.num_bytes for shard in local.shards), QUICK)
    source = CachedSource(local.shards, UrlFolder(server.url), cache)
    server.trouble["00001.tar"] = ["403"]
    source.prefetch([3, 1, 0, 3, 2, 5, 4])
    deadline = time.monotonic() + 20
    while any(thread.name == "prefetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [n for n, shard in enumerate(local.shards) if cache.has(shard)] == [0, 3]  # half of the cache, no more
    assert {server.gets[f"{n:05d}.tar"] for n in (0, 1, 3)} == {1}
    with pytest.raises(UserError, match=r"shard 00001\.tar .* no access"):
        source.local_path(local.shards[1])
    source.local_path(local.shards[3])
    assert server.gets["00003.tar"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_same_from_afar(
    workers: int, local: ShardIndex, server: FolderServer, cache: ShardCache, tmp_path: Path
) -> None:
    index, source = open_shards(tmp_path / "none", server.url, cache)
    plan = {"batch_size": 5, "steps": range(2, 9), "share": slice(1, 4)}
    near = iterate_batches([local], RandomOrder(24, seed=3), **plan)
    far = iterate_batches([index], RandomOrder(24, seed=3), **plan, workers=workers, sources=[source])
    for a, b in zip(near, far, strict=True):  # one by one: a worker's batch is valid for as long as the next
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert {server.gets[shard.name] for shard in local.shards} == {1}


def test_a_failure_in_a_worker_is_one_line(local: ShardIndex, server: FolderServer, cache: ShardCache) -> None:
    server.trouble = {shard.name: ["403"] for shard in local.shards}
    source = CachedSource(local.shards, UrlFolder(server.url), cache)
    batches = iterate_batches(
        [local], RandomOrder(24, seed=0), batch_size=4, steps=range(3), share=slice(0, 4), workers=1, sources=[source]
    )
    with pytest.raises(UserError, match=r"^shard 0000\d\.tar from http.*no access \(403\)[^\n]*$"):
        list(batches)


def test_a_damaged_index_is_refused(local: ShardIndex, server: FolderServer, cache: ShardCache, tmp_path: Path) -> None:
    server.trouble["samples.npy"] = ["flip"]
    with pytest.raises(RemoteError, match=rf"^{server.url}/samples\.npy: (differs from the sha256|cannot be read)"):
        open_shards(tmp_path / "none", server.url, cache)
    server.trouble = {"index.json": ["flip"]}
    with pytest.raises(UserError, match=r"not an index of shards"):
        open_shards(tmp_path / "none", server.url, cache)
    server.trouble.clear()
    assert open_shards(tmp_path / "none", server.url, cache)[0] == local


def test_another_set_than_that_of_the_folder_is_refused(
    server: FolderServer, cache: ShardCache, local: ShardIndex, tmp_path: Path
) -> None:
    ours = write(tmp_path / "shards", num_images=8)
    for location in (server.url, str(local.folder)):
        with pytest.raises(UserError, match=r"^PIPELINE_SHARDS=\S+ is not the set of .*shards/index\.json"):
            open_shards(ours.folder, location, cache)
    assert open_shards(local.folder, server.url, cache)[0] == local
    for file in ours.folder.glob("*.tar"):
        file.unlink()
    with pytest.raises(UserError, match="missing"):
        open_shards(ours.folder, "", cache)


def test_a_password_in_a_url_is_never_shown(
    local: ShardIndex, server: FolderServer, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    place = server.url.replace("://", "://someone:hunter2%2F@") + "?sig=tok3n"
    for name, trouble in (("index.json", "403"), ("00000.tar", "500"), ("00001.tar", "404"), ("00002.tar", "cut")):
        server.trouble = {name: [trouble]}
        with pytest.raises(UserError) as caught:
            ShardStore(*open_shards(tmp_path / "none", place, cache)).read(np.arange(12))
        caplog.records.append(logging.makeLogRecord({"msg": repr(caught.value)}))
    write(tmp_path / "shards", num_images=8)
    server.trouble = {}
    with pytest.raises(UserError) as caught:
        open_shards(tmp_path / "shards", place, cache)
    said = caplog.text + str(caught.value) + "".join(capfd.readouterr())
    said += "".join(record.getMessage() for record in caplog.records)
    assert "00001.tar" in said
    assert not [secret for secret in ("someone", "hunter2", "tok3n", "sig=") if secret in said]
    assert "Basic " in server.headers["index.json"][0]  # it did reach the server
    assert not [path for path in cache.folder.rglob("*") if path.is_file() and b"tok3n" in path.read_bytes()]


def test_urls() -> None:
    assert [is_url(place) for place in ("s3://b/k", "dvc://", "file:///a", "shards", "/a/b", "a:b", "c:\\d")] == [
        True, True, True, False, False, False, False,
    ]  # fmt: skip
    assert join("s3://bucket/a/", "b.tar") == "s3://bucket/a/b.tar"
    assert redact("x 'http://u:p@ss@h/a?b=c' y s3://k:s@bucket/a, done?") == "x 'http://h/a' y s3://bucket/a, done?"


def test_unknown_protocols_and_absent_libraries() -> None:
    with pytest.raises(RemoteError, match=r"^nope://x/y: Protocol not known: nope"):
        open_remote("nope://x/y")
    with pytest.raises(RemoteError, match=r"^gs://b/k: .*gcsfs"):
        open_remote("gs://b/k")


def test_file_urls_go_through_the_cache_and_paths_do_not(local: ShardIndex, cache: ShardCache, tmp_path: Path) -> None:
    for location, kept in ((str(local.folder), 0), (f"file://{local.folder}", len(local.shards))):
        index, source = open_shards(tmp_path / "none", location, cache)
        ids = np.arange(local.num_images)
        assert np.array_equal(ShardStore(index, source).read(ids)[0], ShardStore(local).read(ids)[0])
        assert len(list(cache.folder.glob("*.tar"))) == kept


def test_a_pickled_source_carries_no_lock_and_no_thread(
    local: ShardIndex, server: FolderServer, cache: ShardCache
) -> None:
    source = CachedSource(local.shards, UrlFolder(server.url), cache)
    source.local_path(local.shards[0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.local_path(local.shards[0]) == source.local_path(local.shards[0])


def test_no_dvc_repository_and_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RemoteError, match=r"^dvc://shards: "):
        DvcFolder("shards")


def test_the_cache_is_for_this_user_alone(local: ShardIndex, server: FolderServer, cache: ShardCache) -> None:
    fetch(server, cache, local)
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_settings(tmp_path: Path) -> None:
    machine = load_machine({"XDG_CACHE_HOME": str(tmp_path)})
    assert (machine.shards, machine.cache, machine.cache_bytes) == ("", tmp_path / "ddpm-pipeline", 100 * 10**9)
    machine = load_machine({"PIPELINE_SHARDS": "s3://b", "PIPELINE_CACHE": "/c", "PIPELINE_CACHE_GB": "7"})
    assert (machine.shards, machine.cache, machine.cache_bytes) == ("s3://b", Path("/c"), 7 * 10**9)
    with pytest.raises(UserError, match="PIPELINE_CACHE_GB"):
        load_machine({"PIPELINE_CACHE_GB": "0"})


def test_whole_files_are_read_whole(local: ShardIndex, server: FolderServer) -> None:
    server.trouble["index.json"] = ["500", "cut", "fine"]
    assert read_whole(open_remote(f"{server.url}/index.json"), QUICK) == (local.folder / "index.json").read_bytes()
    assert load_index(local.folder) == local
    assert os.environ.get("PIPELINE_SHARDS") is None
