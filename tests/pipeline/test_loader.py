"""Batches from real shards: the same for any number of ranks and workers, changed at any step."""

import hashlib
import pickle
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.data import store as store_module
from pipeline.data.index import ShardIndex
from pipeline.data.loader import Batch, _Steps, iterate_batches
from pipeline.data.mixing import BalancedOrder, MixedOrder, MixedWindowedOrder
from pipeline.data.order import Order, RandomOrder, WindowedOrder
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.lineage import ROOT
from tests.projects import run

BATCH = 24
WINDOWS = {"batch_size": BATCH, "num_lanes": 5, "window_images": 7}


def write(folder: Path, first: int, count: int) -> ShardIndex:
    """Images whose pixels are their number and whose label is its rest by 3, in shards of 5."""
    samples = (Sample(np.full((4, 4, 3), i, dtype=np.uint8), i % 3, {}) for i in range(first, first + count))
    return write_shards(folder, samples, image_size=4, channels=3, encoding="raw", classes=("a", "b", "c"),
                        shard_images=5)  # fmt: skip


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardIndex, ShardIndex]:
    folder = tmp_path_factory.mktemp("data")
    return write(folder / "one", 0, 53), write(folder / "two", 100, 31)


@pytest.fixture(scope="module")
def index(indexes: tuple[ShardIndex, ShardIndex]) -> ShardIndex:
    return indexes[0]


def batches(index: ShardIndex, steps: range, share: slice = slice(0, 8), workers: int = 0) -> list[Batch]:
    form = {"batch_size": 8, "steps": steps, "share": share, "workers": workers}
    return list(iterate_batches([index], RandomOrder(53, seed=1), **form))


def numbers(some: list[Batch]) -> list[int]:
    return torch.cat([batch.images[:, 0, 0, 0] for batch in some]).tolist()


def test_a_batch_is_what_the_order_says(index: ShardIndex) -> None:
    seen = batches(index, range(9))
    assert numbers(seen) == RandomOrder(53, seed=1).images_at(np.arange(72)).tolist()
    assert torch.cat([b.positions for b in seen]).tolist() == list(range(72))
    assert torch.cat([b.labels for b in seen]).tolist() == [n % 3 for n in numbers(seen)]
    assert seen[0].images.shape == (8, 3, 4, 4)
    assert seen[0].images.dtype == torch.uint8
    assert seen[0].images.is_contiguous(memory_format=torch.channels_last)


def test_a_later_start_and_other_shares_give_the_same_images(index: ShardIndex) -> None:
    whole = batches(index, range(6))
    assert numbers(batches(index, range(4, 6))) == numbers(whole[4:])
    parts = [batches(index, range(6), share) for share in (slice(0, 2), slice(2, 5), slice(5, 8))]
    assert [n for step in zip(*parts, strict=True) for n in numbers(list(step))] == numbers(whole)


def kept(batch: Batch) -> Batch:
    """A copy: a worker writes over a batch after the next but one."""
    return Batch(batch.images.clone(), batch.labels.clone(), batch.positions.clone())


@pytest.mark.slow
def test_workers_change_nothing_and_leave_the_batch_in_use_alone(index: ShardIndex) -> None:
    form = {"batch_size": 8, "steps": range(3, 23), "share": slice(0, 8)}
    seen, before = [], None
    for batch in iterate_batches([index], RandomOrder(53, seed=1), **form, workers=2):
        copies = [(one, kept(one)) for one in (before, batch) if one is not None]
        time.sleep(0.05)  # the workers go as far ahead as they are let
        for one, copy in copies:
            assert torch.equal(one.images, copy.images)
        seen.append(copies[-1][1])
        before = batch
    assert batch.images.is_shared()
    assert numbers(seen) == numbers(batches(index, range(3, 23)))


def test_too_little_shared_memory_is_told_before_it_kills(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2000))
    with pytest.raises(UserError, match=r"need 0 MiB of shared memory, but /dev/shm has 0 free.*PIPELINE_WORKERS"):
        batches(index, range(2), workers=2)


def test_mixed_sets_are_read_as_one(indexes: tuple[ShardIndex, ShardIndex]) -> None:
    order = MixedOrder([RandomOrder(53, 1), RandomOrder(31, 2)], [53, 31], [1.0, 1.0], seed=0)
    seen = list(iterate_batches(indexes, order, batch_size=8, steps=range(10), share=slice(0, 8)))
    ids = order.images_at(np.arange(80))
    assert numbers(seen) == [i if i < 53 else 100 + i - 53 for i in ids.tolist()]
    assert torch.cat([b.labels for b in seen]).tolist() == [n % 3 for n in numbers(seen)]


def order_of(kind: str, indexes: Sequence[ShardIndex]) -> tuple[Sequence[ShardIndex], Order]:
    sizes = [index.shard_sizes for index in indexes]
    match kind:
        case "random":
            return indexes[:1], RandomOrder(53, 1)
        case "bijection":
            return indexes[:1], RandomOrder(53, 1)  # with the table's limit at 10
        case "windowed":
            return indexes[:1], WindowedOrder(sizes[0], 1, **WINDOWS)
        case "balanced":
            return indexes[:1], BalancedOrder(indexes[0].labels, 1)
        case "mixed":
            return indexes, MixedOrder([RandomOrder(53, 1), RandomOrder(31, 2)], [53, 31], [2.0, 1.0], 1)
        case _:
            return indexes, MixedWindowedOrder(sizes, [2.0, 1.0], 1, **WINDOWS)


def read(data: _Steps, step: int) -> Batch:
    return data.read(step, torch.empty(data.num_bytes, dtype=torch.uint8))


def digest(batches: Iterable[Batch]) -> str:
    """One hash of images, labels and positions in the order they come."""
    total = hashlib.sha256()
    parts = [(batch.images.numpy(), batch.labels.numpy(), batch.positions.numpy()) for batch in batches]
    for column in zip(*parts, strict=True):
        total.update(np.concatenate(column).tobytes())
    return total.hexdigest()


KINDS = ("random", "bijection", "windowed", "balanced", "mixed", "mixed windowed")
STEPS, CHANGES = 7, (0, 2, 3, 5)  # an epoch is 2.2 steps: each change is in mid-epoch


def parts_of(world: int) -> list[slice]:
    return [slice(rank * BATCH // world, (rank + 1) * BATCH // world) for rank in range(world)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_world_and_workers_and_three_changes_give_one_global_order(
    kind: str, indexes: tuple[ShardIndex, ShardIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worlds 1 to 12 and 0 to 3 workers a rank. A worker is a pickled copy that gets its turn's steps, as in torch's
    loader; real processes are below."""
    if kind == "bijection":
        monkeypatch.setattr("pipeline.data.order.TABLE_IMAGES", 10)
    sets, order = order_of(kind, indexes)
    whole = _Steps(sets, order, BATCH, slice(0, BATCH))
    expected = digest(read(whole, step) for step in range(STEPS))
    found = set()
    for world in range(1, 13):
        for workers in range(4):
            seen: list[Batch] = []
            for place, start in enumerate(CHANGES):
                ranks = parts_of((world + 5 * place - 1) % 12 + 1)
                copies = [pickle.dumps(_Steps(sets, order, BATCH, share)) for share in ranks]
                processes = [[pickle.loads(copy) for _ in range(workers or 1)] for copy in copies]
                for step in range(start, (*CHANGES, STEPS)[place + 1]):
                    seen += [read(own[step % len(own)], step) for own in processes]
            found.add(digest(seen))
    assert found == {expected}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's advice on few cores
@pytest.mark.parametrize("workers", [1, 3])
def test_real_workers_and_three_changes_of_world_give_the_same_order(
    workers: int, indexes: tuple[ShardIndex, ShardIndex]
) -> None:
    sets, order = order_of("mixed windowed", indexes)
    whole = _Steps(sets, order, BATCH, slice(0, BATCH))
    expected = digest(read(whole, step) for step in range(STEPS))
    seen = []
    for place, (start, world) in enumerate(zip(CHANGES, (2, 1, 2, 1), strict=True)):
        steps = range(start, (*CHANGES, STEPS)[place + 1])
        ranks = [iterate_batches(sets, order, batch_size=BATCH, steps=steps, share=share, workers=workers)
                 for share in parts_of(world)]  # fmt: skip
        seen += [kept(batch) for batches in zip(*ranks, strict=True) for batch in batches]
    assert digest(seen) == expected


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    index = write(tmp_path / "s", 0, 10)
    path = tmp_path / "s" / "00001.tar"
    data = bytearray(path.read_bytes())
    data[int(index.samples[7]["offset"]) + 130] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tar: sample 00000007 is damaged"):
        list(iterate_batches([index], RandomOrder(10, 0), batch_size=5, steps=range(2), share=slice(0, 5)))


def test_neighbours_are_read_by_one_call(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = store_module.os.preadv
    monkeypatch.setattr(store_module.os, "preadv", lambda *given: calls.append(len(given[1])) or real(*given))
    images, _ = store_module.ShardStore(index).read(np.array([3, 0, 2, 1, 4, 9, 7]))
    assert images[:, 0, 0, 0].tolist() == [3, 0, 2, 1, 4, 9, 7]
    assert calls == [
        14,
        5,
    ]  # five headers, their pixels, the gaps between; the second tar: two and the gap


def test_a_read_that_stops_early_is_gone_on_with(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store_module.os.preadv
    monkeypatch.setattr(store_module.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:100]], at))
    images, _ = store_module.ShardStore(index).read(np.array([3, 0, 3, 1]))
    assert images[:, 0, 0, 0].tolist() == [3, 0, 3, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_moments_come_as_the_floats_they_are(tmp_path: Path, workers: int) -> None:
    moments = np.random.default_rng(0).normal(size=(6, 4, 4, 2)).astype(np.float32)
    samples = [Sample(one, number) for number, one in enumerate(moments)]
    form = {"image_size": 4, "channels": 2, "encoding": "moments", "classes": tuple("abcdef"), "shard_images": 4}
    index = write_shards(tmp_path / "latents", samples, **form)
    (batch,) = iterate_batches(
        [index], RandomOrder(6, 0), batch_size=6, steps=range(1), share=slice(0, 6), workers=workers
    )
    assert batch.images.dtype == torch.float32
    assert np.array_equal(batch.images.numpy(), moments.transpose(0, 3, 1, 2)[batch.labels.numpy()])


def test_a_process_that_ends_in_the_midst_of_its_batches_ends(tmp_path: Path) -> None:
    """The workers outlive SIGTERM, by which multiprocessing would end them: they must be told before."""
    image = np.zeros((4, 4, 1), np.uint8)
    form = {"image_size": 4, "channels": 1, "encoding": "raw", "classes": (), "shard_images": 4}
    write_shards(tmp_path / "shards", [Sample(image)] * 4, **form)
    program = (
        "import sys\n"
        "from pipeline.data.index import load_index\n"
        "from pipeline.data.loader import iterate_batches\n"
        "from pipeline.data.order import RandomOrder\n"
        "if __name__ == '__main__':\n"
        "    batches = iterate_batches([load_index(sys.argv[1])], RandomOrder(4, 0), batch_size=2, steps=range(99),\n"
        "                              share=slice(0, 2), workers=2)\n"
        "    next(batches)\n"
        "    sys.exit(3)\n"
    )
    (tmp_path / "program.py").write_text(program)
    done = run(ROOT, "python", str(tmp_path / "program.py"), str(tmp_path / "shards"), timeout=60, PYTHONPATH=str(ROOT))
    assert done.returncode == 3, done.stderr


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("encoding", ["raw", "moments"])
def test_batches_of_any_type_and_odd_size_lie_where_they_should(tmp_path: Path, workers: int, encoding: str) -> None:
    """5 images of 3 x 3 px are no multiple of eight bytes, at which the numbers of the next batch must begin."""
    dtype = np.float32 if encoding == "moments" else np.uint8
    images = np.random.default_rng(0).uniform(0, 255, (20, 3, 3, 1)).astype(dtype)
    index = write_shards(tmp_path / "s", [Sample(image) for image in images], image_size=3, channels=1,
                         encoding=encoding, classes=(), shard_images=7)  # fmt: skip
    order = RandomOrder(20, seed=0)
    form = {"batch_size": 5, "steps": range(6), "share": slice(0, 5), "workers": workers}
    for step, batch in enumerate(iterate_batches([index], order, **form)):
        ids = order.images_at(np.arange(5 * step, 5 * step + 5))
        assert batch.images.numpy().dtype == dtype
        assert np.array_equal(batch.images.numpy(), images[ids].transpose(0, 3, 1, 2))
        assert batch.positions.tolist() == list(range(5 * step, 5 * step + 5))
