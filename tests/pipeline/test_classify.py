"""The loss and the scores of a classifier of noisy images."""

import numpy as np
import pytest
import torch

from ddpm_core import classifier_loss, q_sample, register_schedule
from pipeline.data.index import ShardIndex
from pipeline.data.order import SubsetOrder
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.classify import accuracy_by_quarter, split_held_out
from pipeline.runtime.topology import Topology

SCHEDULE = register_schedule(beta_schedule="cosine", timesteps=100)
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """40 images, black of class 0 and white of class 1, of 16 x 16 pixels: their mean shows through most noise."""
    samples = (Sample(np.full((16, 16, 1), 255 * (i % 2), dtype=np.uint8), i % 2, {}) for i in range(40))
    return write_shards(tmp_path_factory.mktemp("data") / "shards", samples, image_size=16, channels=1, encoding="raw",
                        classes=("black", "white"), shard_images=50)  # fmt: skip


class Brightness:
    """Says white where the mean is above 0, black elsewhere, and below step `since` the contrary. Keeps the steps."""

    def __init__(self, since: int = 0) -> None:
        self.since, self.steps = since, []

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.steps.append(t)
        sign = torch.where(t < self.since, -1.0, 1.0)
        return x_t.mean((1, 2, 3))[:, None] * sign[:, None] * torch.tensor([-1.0, 1.0])


def test_accuracy_is_counted_by_quarter_of_the_chain_however_it_is_cut(index: ShardIndex) -> None:
    ids = np.arange(40)
    results = []
    for batch_size in (40, 7):
        classifier = Brightness(since=25)
        results.append(accuracy_by_quarter(classifier, SCHEDULE, index, ids, ALONE, seed=0, batch_size=batch_size))
        t = torch.cat(classifier.steps)
        assert torch.bincount(t // 25).tolist() == [40] * 4
        assert int(t.max() - t.min()) == 99  # both ends of the chain are among them
    assert results[0] == results[1]
    scores = results[0]
    assert (scores["accuracy_q0"], scores["accuracy_q1"], scores["accuracy_q2"]) == (0.0, 1.0, 1.0)
    assert 0.5 < scores["accuracy_q3"] <= 1.0  # the last steps are noise
    assert scores["accuracy"] == pytest.approx((2.0 + scores["accuracy_q3"]) / 4)


def test_ranks_share_the_images(index: ShardIndex) -> None:
    class Rank(Topology):
        def sum_(self, values: torch.Tensor) -> torch.Tensor:
            return values

    ids, parts = np.arange(13), []
    for rank in range(3):
        topology = Rank(0, 1, 0, 1, torch.device("cpu"))
        topology.rank, topology.world_size = rank, 3
        parts.append(accuracy_by_quarter(Brightness(), SCHEDULE, index, ids, topology, seed=0, batch_size=4))
    whole = accuracy_by_quarter(Brightness(), SCHEDULE, index, ids, ALONE, seed=0, batch_size=4)
    for name, value in whole.items():
        assert sum(part[name] for part in parts) == pytest.approx(value), name


def test_held_out_images_are_never_trained_on() -> None:
    train, held_out = split_held_out(100, 0.25, seed=3)
    assert (len(train), len(held_out)) == (75, 25)
    assert sorted([*train, *held_out]) == list(range(100))
    assert not np.array_equal(split_held_out(100, 0.25, seed=4)[1], held_out)
    seen = SubsetOrder(train, seed=0).images_at(np.arange(150))
    assert sorted(seen) == sorted([*train, *train])
    assert len(split_held_out(5, 0.1, seed=0)[1]) == 0


def test_the_loss_is_the_cross_entropy_at_the_noised_image() -> None:
    x0, noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(1)
    x0, noise, t = x0[0][:, None], noise[0][:, None], torch.tensor([0, 50, 99])
    labels = torch.tensor([0, 1, 1])
    parts = classifier_loss(lambda x, t: x.flatten(1)[:, :2] * (1 + t[:, None]), SCHEDULE, x0, t, noise, labels)
    logits = q_sample(SCHEDULE, x0, t, noise).flatten(1)[:, :2] * (1 + t[:, None])
    expected = -torch.log(torch.exp(logits)[torch.arange(3), labels] / torch.exp(logits).sum(1))
    torch.testing.assert_close(parts.loss, expected)
    assert torch.equal(parts.loss_simple, parts.loss)
    assert not parts.loss_vlb.any()
