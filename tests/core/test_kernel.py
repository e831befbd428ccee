"""The kernel distance against its definition written out, and what an unbiased estimate must keep."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import kernel_distance, kernel_inception_distance
from ddpm_core.kernel import check_features


def draw(n: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x: Tensor, y: Tensor, degree: int) -> float:
    """Sum by sum in Python's floats, without the diagonal inside a set."""

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / len(a) + 1) ** degree

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("block", [2048, 3])
def test_it_is_its_definition_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, degree: int, block: int) -> None:
    monkeypatch.setattr("ddpm_core.kernel._BLOCK", block)
    x, y = draw(7, 4), 1.5 * draw(10, 4, seed=1) + 0.3
    assert kernel_distance(x, y, degree=degree) == pytest.approx(by_definition(x, y, degree), rel=1e-12)


def test_of_degree_one_it_is_the_distance_of_the_means_without_its_bias() -> None:
    x, y = draw(30, 5), draw(40, 5, seed=1) + 0.2
    bias = x.var(0).sum() / 30 + y.var(0).sum() / 40
    expected = ((x.mean(0) - y.mean(0)).square().sum() - bias) / 5
    assert kernel_distance(x, y, degree=1) == pytest.approx(float(expected), rel=1e-10)


def test_order_sides_and_rotations_change_nothing() -> None:
    x, y = draw(30, 5), draw(40, 5, seed=1) + 0.2
    expected = kernel_distance(x, y)
    rotation, _ = torch.linalg.qr(draw(5, 5, seed=2))
    assert kernel_distance(y, x) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x.flip(0), y.roll(7, 0)) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x @ rotation, y @ rotation) == pytest.approx(expected, rel=1e-10)


def test_its_mean_over_equal_sets_is_zero_at_any_number() -> None:
    values = [kernel_distance(draw(8, 3, seed=2 * i), draw(8, 3, seed=2 * i + 1)) for i in range(400)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert abs(mean) < 3.5 * deviation / math.sqrt(len(values))
    assert min(values) < 0 < max(values)


def test_float32_features_are_computed_in_float64() -> None:
    x, y = draw(20, 4).float() * 1e3, draw(20, 4, seed=1).float() * 1e3
    assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())


def test_subsets_give_mean_deviation_and_standard_error() -> None:
    x, y = draw(30, 4), draw(40, 4, seed=1) + 0.5
    generator = torch.Generator().manual_seed(0)
    subsets = torch.stack(
        [torch.stack([torch.randperm(n, generator=generator)[:10] for n in (30, 40)]) for _ in range(6)]
    )
    values = torch.tensor([kernel_distance(x[a], y[b]) for a, b in subsets], dtype=torch.float64)
    found = kernel_inception_distance(x, y, subsets)
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.deviation == pytest.approx(float(values.std()), rel=1e-12)
    assert found.standard_error == pytest.approx(float(values.std()) / math.sqrt(6), rel=1e-12)
    assert kernel_inception_distance(x, y, subsets, degree=1).mean != found.mean


def test_all_in_every_subset_leaves_no_deviation() -> None:
    x, y = draw(10, 4), draw(10, 4, seed=1)
    found = kernel_inception_distance(x, y, torch.arange(10).expand(3, 2, 10))
    assert found.mean == pytest.approx(kernel_distance(x, y), rel=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 2, 4), (3, 3, 4), (3, 8)])
def test_subsets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(at least 2, 2, size\)"):
        kernel_inception_distance(draw(9, 2), draw(9, 2), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3), torch.zeros(3, 2), r"x has shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 4), r"y has shape \(3, 4\), expected \(n, d\) floats of one d"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), "x has shape"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "x holds 1 features, at least 2"),
        (torch.zeros(3, 2), torch.zeros(3, 2).fill_(math.nan), "y holds features that are not finite"),
    ],
)
def test_other_features_are_refused(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_features(x, y)
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y)
