"""A pass over images: the same for any number of ranks and images at once, from shards or a sampler, after a stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core.frechet import moments_of_features
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.collect import FeatureSet, collect_features, sampler_reader, shard_reader
from pipeline.errors import UserError
from pipeline.runtime.topology import Topology

NUM_IMAGES, SIZE, DIM = 53, 4, 3
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"))
PARTS = {"part_0": np.arange(10, 25)}
PIXELS = torch.randint(0, 256, (NUM_IMAGES, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


class Means:
    """An extractor of three means of each image; keeps the ids that were read."""

    name, dim = "means", DIM

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images.float().flatten(1)
        return torch.stack((pixels.mean(1), pixels[:, :8].mean(1), pixels[:, ::2].mean(1)), dim=1)


class Reader:
    """Images of memory, in words of `ImageReader`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.seen: list[int] = []
        self.stop_at = stop_at

    def __call__(self, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        if self.stop_at is not None and self.stop_at in ids:
            raise KeyboardInterrupt
        self.seen += ids.tolist()
        return PIXELS[torch.from_numpy(ids)], torch.from_numpy(ids % 5)


def collect(read: Any = None, topology: Any = ALONE, **changes: Any) -> FeatureSet:
    settings = {"batch_size": 4, "subsets": PARTS, "label": "test", **changes}
    return collect_features(read or Reader(), NUM_IMAGES, Means(), topology, **settings)


def rank_of(rank: int, world_size: int) -> Any:
    """A rank whose sums and rows are never joined with the others': what it leaves on the disk counts."""
    return SimpleNamespace(
        rank=rank, world_size=world_size, is_main=rank == 0, barrier=lambda: None, sum_=lambda values: values
    )


def run_ranks(folder: Path, world_size: int, **changes: Any) -> None:
    """Every rank's share; each then finds that it has not all images, as nothing joins them."""
    for rank in range(world_size):
        with pytest.raises(UserError, match="must be a folder shared"):
            collect(topology=rank_of(rank, world_size), folder=folder, **changes)


def assert_equal(one: FeatureSet, other: FeatureSet) -> None:
    for name in ("ids", "features", "labels", "vectors"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.moments.keys() == other.moments.keys()
    for name, moments in one.moments.items():
        assert moments.n == other.moments[name].n
        torch.testing.assert_close(moments.mean(), other.moments[name].mean(), rtol=1e-9, atol=0)
        torch.testing.assert_close(moments.covariance(), other.moments[name].covariance(), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def whole() -> FeatureSet:
    return collect()


def test_moments_are_those_of_all_features_and_of_subsets(whole: FeatureSet) -> None:
    features = Means()(PIXELS)
    for name, chosen in (("all", slice(None)), ("part_0", slice(10, 25))):
        expected = moments_of_features(features[chosen])
        torch.testing.assert_close(whole.moments[name].mean(), expected.mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(whole.moments[name].covariance(), expected.covariance(), rtol=1e-9, atol=0)
    assert torch.equal(whole.ids, torch.arange(NUM_IMAGES))
    assert torch.equal(whole.features, features)
    assert torch.equal(whole.labels, whole.ids % 5)
    assert torch.equal(whole.vectors, PIXELS.float().flatten(1) / 255)
    assert whole.num_images == NUM_IMAGES


@pytest.mark.parametrize("batch_size", [1, 7, 53, 100])
def test_images_at_once_change_the_last_bits_of_moments_alone(whole: FeatureSet, batch_size: int) -> None:
    assert_equal(collect(batch_size=batch_size), whole)


def test_rows_kept_are_spread_over_the_set(whole: FeatureSet) -> None:
    few = collect(keep=6)
    assert few.ids.tolist() == [0, 10, 20, 31, 41, 52]
    assert torch.equal(few.features, whole.features[few.ids])
    assert few.num_images == NUM_IMAGES


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_ranks_left_is_taken_over_by_another_number_of_them(
    whole: FeatureSet, tmp_path: Path, world_size: int
) -> None:
    run_ranks(tmp_path, world_size)
    assert len(list(tmp_path.iterdir())) == world_size
    read = Reader()
    assert_equal(collect(read, folder=tmp_path), whole)
    assert read.seen == []


def test_a_pass_that_was_stopped_twice_goes_on(
    whole: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.collect._SAVE_SECONDS", -1.0)
    for stop_at in (14, 30):
        with pytest.raises(KeyboardInterrupt):
            collect(Reader(stop_at=stop_at), folder=tmp_path)
    read = Reader()
    assert_equal(collect(read, folder=tmp_path), whole)
    assert read.seen == list(range(28, NUM_IMAGES))  # from the block of four that was not done


def test_a_damaged_share_is_made_again(whole: FeatureSet, tmp_path: Path) -> None:
    run_ranks(tmp_path, 2)
    (tmp_path / "rank-00001.safetensors").write_bytes(b"nothing")
    read = Reader()
    assert_equal(collect(read, folder=tmp_path), whole)
    assert read.seen == [i for i in range(NUM_IMAGES) if i // 4 % 2 == 1]


def test_a_sampler_and_the_shards_of_its_images_give_the_same(whole: FeatureSet, tmp_path: Path) -> None:
    images = [Sample(image.permute(1, 2, 0).numpy(), i % 5) for i, image in enumerate(PIXELS)]
    index = write_shards(
        tmp_path / "shards", images, image_size=SIZE, channels=1, encoding="raw",
        classes=tuple("abcde"), shard_images=20,
    )  # fmt: skip
    sampler = sampler_reader(lambda seeds: PIXELS[seeds], lambda seeds: seeds % 5, torch.device("cpu"))
    for read in (shard_reader(index), sampler):
        assert_equal(collect(read), whole)
    unlabelled = sampler_reader(lambda seeds: PIXELS[seeds], lambda seeds: None, torch.device("cpu"))
    assert set(collect(unlabelled).labels.tolist()) == {-1}


def test_features_that_are_not_finite_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Means, "__call__", lambda self, images: torch.full((len(images), DIM), torch.nan))
    with pytest.raises(UserError, match="images 0 to 3 are not finite"):
        collect()


def test_one_image_is_too_few() -> None:
    with pytest.raises(UserError, match="scores need at least 2"):
        collect_features(Reader(), 1, Means(), ALONE, batch_size=4, label="test")  # type: ignore[arg-type]
