"""Precision, recall, density and coverage: cases one can count by hand, and what must not change them."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import NeighbourScores, neighbour_scores
from ddpm_core.neighbours import radii


def draw(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(real: Tensor, generated: Tensor, k: int) -> NeighbourScores:
    """With all distances at once."""
    across = (real[:, None] - generated[None]).norm(dim=2)
    radius = [(a[:, None] - a[None]).norm(dim=2).sort(1).values[:, k] for a in (real, generated)]  # column 0: itself
    inside = across < radius[0][:, None]
    return NeighbourScores(
        float(inside.any(0).double().mean()),
        float((across < radius[1][None]).any(1).double().mean()),
        float(inside.double().sum(0).mean()) / k,
        float(inside.any(1).double().mean()),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [2048, 7])
def test_it_is_its_definition_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, k: int, block: int) -> None:
    monkeypatch.setattr("ddpm_core.neighbours._BLOCK", block)
    real, generated = draw(60, 3), 1.6 * draw(45, 3, seed=1) + 0.6
    found = neighbour_scores(real, generated, k)
    assert found == pytest.approx(by_definition(real, generated, k), rel=1e-12)
    assert 0 < min(found) < 1


def test_a_set_against_itself_is_perfect_and_far_away_nothing_fits() -> None:
    real = draw(40, 4)
    found = neighbour_scores(real, real.clone(), 3)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert neighbour_scores(real, real + 100, 3) == NeighbourScores(0, 0, 0, 0)


def test_one_point_drawn_again_and_again_is_precise_and_covers_little() -> None:
    real = torch.arange(10.0)[:, None]
    found = neighbour_scores(real, torch.full((5, 1), 4.5), k=1)
    # Balls of radius 1 around 4 and 5 hold the point; its own balls have no radius.
    assert found == NeighbourScores(precision=1, recall=0, density=2, coverage=0.2)


def test_a_ball_is_open() -> None:
    real = torch.tensor([[0.0], [2.0], [4.0]])
    at_the_radius = neighbour_scores(real, torch.tensor([[6.0], [-2.0]]), k=1)
    assert (at_the_radius.precision, at_the_radius.coverage) == (0, 0)


def test_moving_turning_and_scaling_both_sets_changes_nothing() -> None:
    real, generated = draw(50, 3), draw(40, 3, seed=1)
    expected = neighbour_scores(real, generated)
    rotation, _ = torch.linalg.qr(draw(3, 3, seed=2))
    assert neighbour_scores(real @ rotation, generated @ rotation) == pytest.approx(expected)
    assert neighbour_scores(real * 1e-3 + 1e3, generated * 1e-3 + 1e3) == pytest.approx(expected)
    assert neighbour_scores(real.flip(0), generated.roll(3, 0)) == pytest.approx(expected)


def test_sides_swapped_swap_precision_and_recall() -> None:
    real, generated = draw(50, 3), 0.5 * draw(40, 3, seed=1)
    one, other = neighbour_scores(real, generated), neighbour_scores(generated, real)
    assert (one.precision, one.recall) == (other.recall, other.precision)


def test_radii_reach_to_the_kth_other_one() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [3.0]], dtype=torch.float64)
    assert radii(line, 1).tolist() == [1, 1, 0, 0]
    assert radii(line, 3).tolist() == [3, 2, 3, 3]


@pytest.mark.parametrize("k", [0, 4, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, expected from 1 to below the 4"):
        neighbour_scores(draw(6, 2), draw(4, 2), k)


def test_features_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="y holds features that are not finite"):
        neighbour_scores(draw(6, 2), draw(6, 2).fill_(math.inf), 2)
