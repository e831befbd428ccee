"""Steps to train on: each as often as it should be, from given uniform numbers."""

import pytest
import torch

from ddpm_core.timesteps import HISTORY, LossAwareTimesteps, stratified_timesteps, uniform_timesteps

GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # all of [0, 1), evenly
LARGEST = 1 - 2.0**-53


@pytest.mark.parametrize("num_timesteps", [1, 7, 1000, 4000])
def test_uniform_steps_are_equally_often_and_inside(num_timesteps: int) -> None:
    counts = torch.bincount(uniform_timesteps(GRID, num_timesteps), minlength=num_timesteps)
    assert len(counts) == num_timesteps
    assert int(counts.max() - counts.min()) <= 1
    assert uniform_timesteps(torch.tensor([0.0, LARGEST], dtype=torch.float64), num_timesteps).tolist() == [
        0,
        num_timesteps - 1,
    ]


@pytest.mark.parametrize(("num_timesteps", "batch_size"), [(1000, 8), (10, 3), (7, 64)])
def test_strata_cover_the_range_once_and_on_average_evenly(num_timesteps: int, batch_size: int) -> None:
    places = torch.arange(batch_size)
    total = torch.zeros(num_timesteps, dtype=torch.float64)
    for place in places:
        t = stratified_timesteps(GRID, num_timesteps, place.expand(len(GRID)), batch_size)
        edges = place * num_timesteps / batch_size, (place + 1) * num_timesteps / batch_size
        assert int(t.min()) == int(edges[0])
        assert int(t.max()) < edges[1]
        total += torch.bincount(t, minlength=num_timesteps)
    torch.testing.assert_close(total / total.sum(), torch.full_like(total, 1 / num_timesteps), rtol=1e-3, atol=1e-4)
    last = torch.tensor([LARGEST], dtype=torch.float64)
    assert int(stratified_timesteps(last, num_timesteps, places[-1:], batch_size)) == num_timesteps - 1


def test_a_part_of_the_batch_gets_its_own_strata() -> None:
    u, places = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(12)
    whole = stratified_timesteps(u, 100, places, 12)
    assert torch.equal(stratified_timesteps(u[5:9], 100, places[5:9], 12), whole[5:9])


def filled(losses: torch.Tensor) -> LossAwareTimesteps:
    sampler = LossAwareTimesteps(len(losses))
    for _ in range(HISTORY):
        sampler.update(torch.arange(len(losses)), losses)
    return sampler


def test_a_step_is_drawn_by_the_root_mean_square_of_its_losses() -> None:
    sampler = filled(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sampler.update(torch.tensor([0] * 5), torch.full((5,), 7.0))  # five of 1 and five of 7: root of 25
    size = torch.tensor([5.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected = 0.999 * size / 14 + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities(), expected)
    t, _ = sampler.timesteps(GRID)
    torch.testing.assert_close(torch.bincount(t) / len(GRID), expected.float(), atol=2e-5, rtol=0)


def test_the_weights_undo_the_bias() -> None:
    """Over all u the mean of weight times any function of t is its mean over uniform t."""
    sampler = filled(torch.tensor([0.0, 0.1, 5.0, 2.0, 1.0]))
    value = torch.tensor([3.0, -1.0, 10.0, 0.5, 7.0], dtype=torch.float64)
    t, weight = sampler.timesteps((torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000)
    assert float((weight * value[t]).mean()) == pytest.approx(float(value.mean()), rel=1e-3)
    assert float(sampler.probabilities()[0]) == pytest.approx(0.001 / 5)  # no step is lost
    assert int(sampler.timesteps(torch.tensor([LARGEST], dtype=torch.float64))[0]) == 4


def test_before_all_steps_are_known_and_without_any_loss_it_is_uniform() -> None:
    assert LossAwareTimesteps(2).timesteps(torch.tensor([0.0, 0.5], dtype=torch.float64))[0].tolist() == [0, 1]
    sampler = LossAwareTimesteps(3)
    for losses in (torch.tensor([9.0] * HISTORY), torch.tensor([1.0] * (HISTORY - 1))):
        sampler.update(torch.full((len(losses),), int(losses[0] < 5)), losses)
    sampler.update(torch.full((HISTORY,), 2), torch.ones(HISTORY))
    assert sampler.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    sampler.update(torch.tensor([1]), torch.ones(1))
    assert float(sampler.probabilities()[0]) > 0.7
    assert filled(torch.zeros(3)).probabilities().tolist() == pytest.approx([1 / 3] * 3)


def test_one_batch_is_as_good_as_many_and_only_the_last_losses_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    t, losses = torch.randint(0, 3, (100,), generator=generator), torch.rand(100, generator=generator)
    once, apart = LossAwareTimesteps(3), LossAwareTimesteps(3)
    once.update(t, losses)
    for start in (0, 1, 8, 50, 97):
        stop = {0: 1, 1: 8, 8: 50, 50: 97, 97: 100}[start]
        apart.update(t[start:stop], losses[start:stop])
    for name, mine in once.state_dict().items():
        assert torch.equal(mine, apart.state_dict()[name])
    kept = losses[t == 1][-HISTORY:].double().sort().values
    assert torch.equal(once.history[1].sort().values, kept)


def test_the_state_comes_back_and_a_wrong_one_is_refused() -> None:
    sampler, other = filled(torch.tensor([1.0, 2.0])), LossAwareTimesteps(2)
    state = sampler.state_dict()
    other.load_state_dict(state)
    sampler.update(torch.tensor([0]), torch.tensor([5.0]))
    assert not torch.equal(sampler.history, state["history"])  # the state is a copy
    other.update(torch.tensor([0]), torch.tensor([5.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    with pytest.raises(ValueError, match="2 timesteps, expected 3"):
        LossAwareTimesteps(3).load_state_dict(state)
    with pytest.raises(ValueError, match="at least 1"):
        LossAwareTimesteps(0)
    with pytest.raises(ValueError, match="alike"):
        sampler.update(torch.tensor([0, 1]), torch.tensor([1.0]))
