"""Batches from real shards: the same for any number of workers, and from any step on."""

import numpy as np
import pytest
import torch

from pipeline.data.index import ShardIndex
from pipeline.data.loader import Batch, iterate_batches
from pipeline.data.order import Order
from pipeline.data.writer import Sample, write_shards


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """23 images whose pixels and label are their number, in shards of 5."""
    samples = (Sample(np.full((4, 4, 3), i, dtype=np.uint8), i % 3, {}) for i in range(23))
    return write_shards(tmp_path_factory.mktemp("data") / "shards", samples, image_size=4, channels=3, encoding="raw",
                        classes=("a", "b", "c"), shard_images=5)  # fmt: skip


def batches(index: ShardIndex, steps: range, share: slice = slice(0, 8), workers: int = 0) -> list[Batch]:
    return list(iterate_batches(index, Order(23, seed=1), batch_size=8, steps=steps, share=share, workers=workers))


def numbers(some: list[Batch]) -> list[int]:
    return torch.cat([batch.images[:, 0, 0, 0] for batch in some]).tolist()


def test_a_batch_is_what_the_order_says(index: ShardIndex) -> None:
    seen = batches(index, range(6))
    assert numbers(seen) == Order(23, seed=1).images(0, 48).tolist()
    assert torch.cat([b.positions for b in seen]).tolist() == list(range(48))
    assert torch.cat([b.labels for b in seen]).tolist() == [n % 3 for n in numbers(seen)]
    assert seen[0].images.shape == (8, 3, 4, 4)
    assert seen[0].images.dtype == torch.uint8


def test_a_later_start_and_other_shares_give_the_same_images(index: ShardIndex) -> None:
    whole = batches(index, range(6))
    assert numbers(batches(index, range(4, 6))) == numbers(whole[4:])
    parts = [batches(index, range(6), share) for share in (slice(0, 2), slice(2, 5), slice(5, 8))]
    assert [n for step in zip(*parts, strict=True) for n in numbers(list(step))] == numbers(whole)


@pytest.mark.slow
def test_workers_change_nothing(index: ShardIndex) -> None:
    assert numbers(batches(index, range(3, 9), workers=2)) == numbers(batches(index, range(3, 9)))
