"""The index and the order at scale, each in a fresh process. The "peer" of a row with a target is the limit asked for.

`index_10m`: seconds to open an index of 10 million samples in 10,000 shards (a warm page cache; every shard's size is
checked); `index_10m_memory`: the memory that this process gains by opening it and using every row. `order_10m`: seconds
to know the images of one batch of 256, at random places of the first ten epochs of 10 million images in random order,
the slowest of 1,000, after the set-up; `order_10m_start`: from nothing to the first batch, against torch's
`DistributedSampler`, which draws the whole epoch.

`order_1b_4096_ranks` is a simulation: about one billion images in 100,000 shards, windowed order with 4,096 lanes,
batches of 8 images a rank. For each of 32 ranks at random the shards that hold any of its images of one epoch are
counted, at every 64th step and at the first and last 64. Their bytes are divided by the fair share, the bytes of all
shards over 4,096; the row is the largest of the 32. A rank that fetches whole shards, each once, moves that much;
shards that it shares with its neighbour on the same node are counted for both. The sizes of the shards vary by a tenth.
`order_1b_memory`: what the table of those shards and the order take in one process, times 24 for a node of 8 ranks with
2 loader processes each; the samples' table itself is mapped and shared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.report import ROOT, Row, run
from pipeline.data.index import SAMPLE_DTYPE, load_index, save_index
from pipeline.data.order import RandomOrder, WindowedOrder
from pipeline.data.shards import Shard, ShardTable

IMAGES, SHARDS = 10_000_000, 10_000
BATCH, DRAWS = 256, 1000
RANKS, SAMPLED_RANKS, RANK_BATCH, WINDOW = 4096, 32, 8, 16_384
HUGE_IMAGES, HUGE_SHARDS = 1_000_000_000, 100_000
NODE_PROCESSES = 24
ROUNDS = 5


def own_memory() -> int:
    """Bytes that belong to this process alone."""
    return int(psutil.Process().memory_full_info().uss)


def write_index(folder: Path) -> None:
    """An index of 10 million samples of 3 kB, and empty files for its tars."""
    rows = np.zeros(IMAGES, SAMPLE_DTYPE)
    rows["shard"] = np.repeat(np.arange(SHARDS), IMAGES // SHARDS)
    rows["label"] = np.arange(IMAGES) % 1000
    names = [f"{number:05d}.tar" for number in range(SHARDS)]
    for name in names:
        (folder / name).touch()
    shards = [Shard(name, IMAGES // SHARDS, 0, f"{number:064x}") for number, name in enumerate(names)]
    form = {"image_size": 32, "channels": 3, "encoding": "raw", "classes": tuple(map(str, range(1000)))}
    save_index(folder, **form, shards=shards, samples=rows)


def open_index(folder: str) -> dict[str, float]:
    """Seconds to open, and megabytes after every row was used once."""
    load_index(folder)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    index = load_index(folder)
    seconds = time.perf_counter() - start
    index.rows(np.arange(0, IMAGES, 4096))
    return {"seconds": seconds, "megabytes": (psutil.Process().memory_info().rss - before) / 1e6}


def draw_order(_: str) -> dict[str, float]:
    """Seconds to set up, and for a batch at a random place; from nothing to the first batch for torch's sampler."""
    from torch.utils.data import DistributedSampler

    start = time.perf_counter()
    order = RandomOrder(IMAGES, seed=0)
    order.images_at(np.arange(BATCH))
    setup = time.perf_counter() - start
    taken = []
    for place in np.random.default_rng(0).integers(10 * IMAGES, size=DRAWS):
        start = time.perf_counter()
        order.images_at(np.arange(place, place + BATCH))
        taken.append(time.perf_counter() - start)
    start = time.perf_counter()
    sampler = iter(DistributedSampler(range(IMAGES), num_replicas=1, rank=0))  # type: ignore[arg-type]
    [next(sampler) for _ in range(BATCH)]
    peer = time.perf_counter() - start
    return {"setup": setup, "slowest": max(taken), "median": statistics.median(taken), "peer": peer}


def simulate(_: str) -> dict[str, float]:
    """Shares of shards by rank, and memory of table and order."""
    random = np.random.default_rng(0)
    mean = HUGE_IMAGES // HUGE_SHARDS
    sizes = random.integers(int(0.9 * mean), int(1.1 * mean) + 1, HUGE_SHARDS)
    before = own_memory()
    table = ShardTable(Shard(f"{n:05d}.tar", int(s), 3000 * int(s), f"{n:064x}") for n, s in enumerate(sizes))
    batch = RANKS * RANK_BATCH
    order = WindowedOrder(table.num_images, 0, batch_size=batch, num_lanes=RANKS, window_images=WINDOW)
    order.images_at(np.arange(RANK_BATCH))
    order.images_at(np.arange(RANK_BATCH) + order.num_images)
    memory = own_memory() - before
    last = order.num_images // batch
    steps = np.unique(np.concatenate((np.arange(64), np.arange(0, last, 64), np.arange(last - 64, last))))
    ends, fair = np.cumsum(table.num_images), table.num_bytes.sum() / RANKS
    shares, counts = [], []
    for rank in random.choice(RANKS, SAMPLED_RANKS, replace=False):
        positions = steps[:, None] * batch + rank * RANK_BATCH + np.arange(RANK_BATCH)
        shards = np.unique(np.searchsorted(ends, order.images_at(positions.ravel()), side="right"))
        shares.append(float(table.num_bytes[shards].sum() / fair))
        counts.append(len(shards))
    return {
        "largest": max(shares), "mean": statistics.mean(shares), "smallest": min(shares), "shards": max(counts),
        "megabytes": memory / 1e6,
    }  # fmt: skip


PARTS = {"index": open_index, "order": draw_order, "simulation": simulate}


def run_part(name: str, folder: str = "") -> dict[str, float]:
    """One part in a fresh process."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.order", name, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure() -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder))
        opened = [run_part("index", folder) for _ in range(ROUNDS)]
    drawn = [run_part("order") for _ in range(ROUNDS)]
    simulated = run_part("simulation")

    def median(parts: list[dict[str, float]], name: str) -> float:
        return statistics.median(part[name] for part in parts)

    opens = [part["seconds"] for part in opened]
    node = simulated["megabytes"] * NODE_PROCESSES
    setup, slowest = median(drawn, "setup"), median(drawn, "slowest")
    return [
        Row("index_10m", statistics.median(opens), 0.1, "the limit", "s", 1.0,
            f"{min(opens):.3f} to {max(opens):.3f} s in {ROUNDS} processes"),
        Row("index_10m_memory", median(opened, "megabytes"), 400.0, "the limit", "MB", 1.0),
        Row("order_10m", slowest, 0.01, "the limit", "s", 1.0,
            f"the slowest of {DRAWS}, median {median(drawn, 'median') * 1e3:.2f} ms; set-up with the first batch "
            f"{setup * 1e3:.1f} ms of the 1 s allowed"),
        Row("order_10m_start", setup, median(drawn, "peer"), "torch's DistributedSampler", "s"),
        Row("order_1b_4096_ranks", simulated["largest"], 1.1, "the limit", "fair shares", 1.0,
            f"of {SAMPLED_RANKS} ranks: mean {simulated['mean']:.3f}, smallest {simulated['smallest']:.3f}; at most "
            f"{simulated['shards']:.0f} shards a rank"),
        Row("order_1b_memory", node, 1000.0, "the limit", "MB", 1.0,
            f"{simulated['megabytes']:.1f} MB in each of {NODE_PROCESSES} processes"),
    ]  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(PARTS[sys.argv[1]](sys.argv[2])))
    else:
        run(__file__, measure)
