"""A training step's draws and what it adds up for the loss curve."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from ddpm_core import EMA, p_losses, register_schedule, uniform_timesteps
from pipeline.build.training import build_timestep_sampling
from pipeline.config import load_params
from pipeline.data.loader import Batch
from pipeline.data.pixels import to_unit_range
from pipeline.engine.loop import _log_row
from pipeline.engine.state import COLUMNS, QUARTILES, TrainState
from pipeline.engine.step import StepPlan, TrainStep, sum_quarters
from pipeline.lineage import ROOT
from pipeline.runtime.rng import Stream, draw_uniform
from pipeline.runtime.topology import Topology

BATCH = 16


class Shift(nn.Module):
    """A network of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, x_t, t, labels):
        self.seen.append(t)
        return x_t + self.shift


def make_step(*, num_timesteps: int = 100, micro_batch: int = BATCH, **changes) -> tuple[TrainStep, Shift]:
    network = Shift()
    state = TrainState(network, EMA(network, 10), torch.optim.AdamW(network.parameters(), lr=0.0))
    plan = StepPlan(seed=0, batch_size=BATCH, micro_batch=micro_batch, max_grad_norm=1.0, dtype=torch.float32,
                    learning_rate=lambda images: 0.0,
                    **{"loss": p_losses, "null_label": None, "label_dropout": 0.0, "horizontal_flip": False,
                       **changes})  # fmt: skip
    schedule = register_schedule(beta_schedule="cosine", timesteps=num_timesteps)
    return TrainStep(plan, state, schedule, Topology(0, 1, 0, 1, torch.device("cpu"))), network


def batch_at(step: int) -> Batch:
    images = torch.randint(0, 256, (BATCH, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return Batch(images, torch.full((BATCH,), -1), torch.arange(step * BATCH, (step + 1) * BATCH))


def sampling(name: str):
    params = load_params(ROOT / "params.yaml").train
    return build_timestep_sampling(params.model_copy(update={"timestep_sampling": name, "batch_size": BATCH}))


def test_unless_asked_steps_are_uniform_and_keyed_by_place() -> None:
    step, network = make_step()
    step(batch_at(3))
    places = torch.arange(3 * BATCH, 4 * BATCH)
    expected = uniform_timesteps(draw_uniform(0, Stream.TIMESTEP, places), 100)
    assert torch.equal(network.seen[0], expected)
    u = draw_uniform(0, Stream.TIMESTEP, places)
    assert torch.equal(sampling("uniform")(u, places, 100), expected)


def test_stratified_steps_cover_each_batch_however_it_is_cut() -> None:
    draws = []
    for micro_batch in (BATCH, 5):
        step, network = make_step(num_timesteps=160, micro_batch=micro_batch, timesteps=sampling("stratified"))
        step(batch_at(2))
        draws.append(torch.cat(network.seen))
    t = draws[0]
    assert torch.equal(draws[1], t)
    assert (t // 10).tolist() == list(range(BATCH))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_train_on_the_numbers_of_one(world: int) -> None:
    """Timesteps, noise, flips and dropped labels of the whole batch, however it is cut."""
    step, _ = make_step()
    step.plan = replace(step.plan, null_label=7, label_dropout=0.4, horizontal_flip=True)
    batch = batch_at(5)
    labels = torch.arange(BATCH) % 7

    def draw(part: slice) -> tuple[torch.Tensor, ...]:
        return step._draw(to_unit_range(batch.images[part]), labels[part], batch.positions[part])

    whole = draw(slice(0, BATCH))
    ranks = [draw(slice(rank * BATCH // world, (rank + 1) * BATCH // world)) for rank in range(world)]
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([rank[number] for rank in ranks]), expected)
    x0, t, _, condition = whole
    flipped = (x0 != to_unit_range(batch.images)).flatten(1).any(1)
    assert 0 < flipped.sum() < BATCH
    assert 0 < (condition == 7).sum() < BATCH
    assert len(set(t.tolist())) > 4


@pytest.mark.parametrize("micro_batch", [BATCH, 5])
def test_the_loss_by_quarter_is_the_mean_over_its_images(micro_batch: int) -> None:
    kept: list[torch.Tensor] = []

    def loss(*args, **named):
        parts = p_losses(*args, **named)
        kept.append(parts.loss.detach())
        return parts

    step, network = make_step(micro_batch=micro_batch, loss=partial(loss, min_snr_gamma=5.0))
    step(batch_at(0))
    step(batch_at(1))
    row = _log_row(step.state, step, step.topology)
    quarter, losses = torch.cat(network.seen) // 25, torch.cat(kept).double()
    assert tuple(row) == COLUMNS
    for q, name in enumerate(QUARTILES):
        assert row[name] == pytest.approx(float(losses[quarter == q].mean()), rel=1e-6)
    assert row["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert row["loss"] != row["loss_simple"]
    assert not step.state.sums.any()


def test_the_guide_is_the_average_when_its_images_are_reached_and_stays_as_it_was() -> None:
    step, _ = make_step(guide_images=BATCH + 1)
    averages, guides = [], []
    for place in range(3):
        step.state.ema.network.shift.fill_(1.0 + place)
        step(batch_at(place))
        averages.append(step.state.ema.network.shift.clone())
        guides.append(None if step.state.guide is None else step.state.guide["shift"].clone())
    assert guides[0] is None
    assert torch.equal(guides[1], averages[1])
    assert torch.equal(guides[2], averages[1])
    assert not torch.equal(averages[2], averages[1])


def test_a_quarter_without_images_is_left_out_of_the_row() -> None:
    step, _ = make_step(timesteps=lambda u, places, num_timesteps: torch.full_like(places, 60))
    step(batch_at(0))
    row = _log_row(step.state, step, step.topology)
    assert [name for name in COLUMNS if name not in row] == ["loss_q0", "loss_q1", "loss_q3"]
    assert row["loss_q2"] == pytest.approx(row["loss"])


def test_an_infinite_loss_stays_in_its_quarter() -> None:
    """Multiplied by a mask of zeros it would turn the other quarters into NaN."""
    sums = sum_quarters(torch.tensor([1.0, float("inf")]), torch.tensor([0, 3]), 4)
    assert sums.tolist() == [1.0, 0.0, 0.0, float("inf"), 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("num_timesteps", [2, 5, 1000])
def test_every_step_falls_in_one_quarter(num_timesteps: int) -> None:
    counts = sum_quarters(torch.ones(num_timesteps), torch.arange(num_timesteps), num_timesteps)[4:]
    assert int(counts.sum()) == num_timesteps
    assert float(counts.max() - counts.min()) <= 1
