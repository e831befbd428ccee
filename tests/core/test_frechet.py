"""Moments as sets, and the Frechet distance against closed forms and scipy's square root."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from ddpm_core.frechet import Moments, frechet_distance, frechet_distance_of_features, moments_of_features


def draw_features(n: int, dim: int, seed: int = 0) -> Tensor:
    """Correlated, off-centre features of full rank where n > dim."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix + 0.3 * (1 + seed)


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments(batches[0].shape[1])
    for batch in batches:
        moments.add(batch)
    return moments


def with_moments(mean: Tensor, covariance: Tensor, n: int = 100) -> Moments:
    """A set's sums made from the mean and covariance that it shall have."""
    outer = (n - 1) * covariance + n * torch.outer(mean, mean)
    return Moments.from_tensors(torch.tensor(n), n * mean, outer)


def assert_equal_moments(a: Moments, b: Moments, rtol: float = 1e-13) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.total, b.total, rtol=rtol, atol=rtol * a.n)
    torch.testing.assert_close(a.outer, b.outer, rtol=rtol, atol=rtol * a.n)


def test_mean_and_covariance_are_those_of_all_features_whatever_the_batches() -> None:
    features = draw_features(50, 4)
    expected = torch.cov(features.T)
    for sizes in ([50], [1, 49], [0, 17, 17, 16]):
        moments = moments_of(*features.split(sizes))
        torch.testing.assert_close(moments.mean(), features.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.covariance(), expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(moments.covariance(), moments.covariance().T)


def test_merging_and_taking_away_equal_seeing_all_at_once() -> None:
    features = draw_features(60, 5)
    whole, first, last = moments_of(features), moments_of(features[:20]), moments_of(features[20:])
    first_copy = Moments.from_tensors(*first.to_tensors())
    first.merge(last)
    assert_equal_moments(first, whole)
    assert_equal_moments(whole.minus(first_copy), last)
    assert_equal_moments(whole, moments_of(features))  # unchanged by minus


def test_the_order_changes_nothing_where_sums_are_exact() -> None:
    features = torch.randint(-1000, 1000, (200, 6), generator=torch.Generator().manual_seed(0)).double()
    forward, backward = moments_of(*features.split(7)), moments_of(*features.flip(0).split(31))
    assert torch.equal(forward.total, backward.total)
    assert torch.equal(forward.outer, backward.outer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float64_whatever_the_features(dtype: torch.dtype) -> None:
    features = torch.full((3000, 1), 1.0, dtype=dtype)  # bfloat16 can't count past 256, float16 not past 2048
    moments = moments_of(features)
    assert moments.total.tolist() == [3000.0]
    assert moments.outer.tolist() == [[3000.0]]


def test_a_far_mean_costs_digits_as_the_docstring_says() -> None:
    features = draw_features(1000, 3) + 1000.0
    torch.testing.assert_close(moments_of(features).covariance(), torch.cov(features.T), rtol=1e-8, atol=1e-8)


def test_tensors_are_copies_that_can_be_summed_over_ranks() -> None:
    features = draw_features(30, 3)
    ranks = [moments_of(part) for part in features.split(7)]
    summed = [sum(parts[1:], parts[0].clone()) for parts in zip(*(rank.to_tensors() for rank in ranks), strict=True)]
    assert_equal_moments(Moments.from_tensors(*summed), moments_of(features))
    n, total, outer = ranks[0].to_tensors()
    total.zero_()
    outer.zero_()
    assert n.dtype == torch.int64
    assert bool(ranks[0].total.any())
    assert bool(ranks[0].outer.any())


def test_features_that_are_no_numbers_are_refused_and_leave_the_sums_alone() -> None:
    moments = moments_of(draw_features(5, 3))
    for value in (math.nan, math.inf, -math.inf):
        features = draw_features(4, 3)
        features[2, 1] = value
        with pytest.raises(ValueError, match=f"not finite in 1 of 4 rows, first {value} at row 2, column 1"):
            moments.add(features)
    assert_equal_moments(moments, moments_of(draw_features(5, 3)), rtol=0)


@pytest.mark.parametrize(
    ("features", "given"),
    [
        (torch.zeros(2, 4), r"float32 \(2, 4\)"),
        (torch.zeros(3), r"float32 \(3,\)"),
        (torch.zeros(2, 3, dtype=torch.uint8), r"uint8 \(2, 3\)"),
    ],
)
def test_features_of_another_shape_or_kind_are_refused(features: Tensor, given: str) -> None:
    with pytest.raises(ValueError, match=rf"features are {given}, expected floats of shape \(b, 3\)"):
        Moments(3).add(features)


def test_sets_too_small_or_of_different_dims_are_refused() -> None:
    with pytest.raises(ValueError, match="dim is 0"):
        Moments(0)
    with pytest.raises(ValueError, match="mean of 0"):
        Moments(2).mean()
    one, two = moments_of(torch.ones(1, 2)), moments_of(draw_features(2, 2))
    with pytest.raises(ValueError, match="at least 2 features, there are 1"):
        one.covariance()
    for pair in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="at least 2 features, there are 1"):
            frechet_distance(*pair)
    for call in (two.merge, two.minus, lambda other: frechet_distance(two, other)):
        with pytest.raises(ValueError, match="dim 2 and 3"):
            call(Moments(3))
    with pytest.raises(ValueError, match="subset of 2 can't be taken from a set of 1"):
        one.minus(two)


def test_a_damaged_state_is_refused() -> None:
    n, total, outer = moments_of(draw_features(5, 3)).to_tensors()
    for state in ((n.int(), total, outer), (n, total.float(), outer), (n, total, outer[:2]), (n[None], total, outer)):
        with pytest.raises(ValueError, match="expected int64"):
            Moments.from_tensors(*state)
    for state in ((-n, total, outer), (n, total * math.nan, outer), (n, total, outer * math.inf)):
        with pytest.raises(ValueError, match="not finite or count"):
            Moments.from_tensors(*state)


def test_commuting_gaussians_have_a_closed_form() -> None:
    basis, _ = torch.linalg.qr(draw_features(6, 6))
    variances = (
        torch.tensor([1e-6, 1e-2, 0.5, 1.0, 4.0, 90.0]).double(),
        torch.tensor([2, 3, 1e-10, 1, 7, 0.1]).double(),
    )
    means = torch.arange(6.0).double(), torch.full((6,), 0.5).double()
    a, b = (with_moments(m, basis @ torch.diag(v) @ basis.T) for m, v in zip(means, variances, strict=True))
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)


def test_full_rank_sets_agree_with_scipys_square_root() -> None:
    x, y = draw_features(400, 40, seed=0), 1.3 * draw_features(300, 40, seed=1)
    s1, s2 = torch.cov(x.T), torch.cov(y.T)
    root = sqrtm((s1 @ s2).numpy()).real
    expected = float((x.mean(0) - y.mean(0)).square().sum() + s1.trace() + s2.trace()) - 2 * float(root.trace())
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments_of(y), moments_of(x)) == pytest.approx(expected, rel=1e-9)


def test_fewer_features_than_dims_cost_no_accuracy() -> None:
    x, y = draw_features(30, 100, seed=0), draw_features(50, 100, seed=1)
    a, b = (features - features.mean(0) for features in (x, y))
    # tr (S1 S2)^1/2 is the sum of the singular values of A B^T: 30 x 50, so no covariance enters.
    overlap = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(29 * 49)
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 29 + b.square().sum() / 49 - 2 * overlap
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("n", [5, 20, 200])
def test_a_set_is_at_distance_0_from_itself_in_any_order(n: int) -> None:
    features = draw_features(n, 20)
    distance = frechet_distance(moments_of(features), moments_of(*features.flip(0).split(3)))
    assert 0 <= distance < 1e-11


def test_constant_and_orthogonal_sets_have_no_overlap() -> None:
    constant = moments_of(torch.full((5, 3), 0.1))
    line = moments_of(torch.tensor([[0.0, 0, 0], [2, 0, 0]]))
    other = moments_of(torch.tensor([[0.0, 0, 0], [0, 2, 0]]))
    assert frechet_distance(line, other) == pytest.approx(2 + 2 + 2, rel=1e-12)
    assert frechet_distance(line, constant) == pytest.approx(2 + 0.9**2 + 2 * 0.1**2, rel=1e-6)
    assert frechet_distance(constant, constant) == 0.0


def test_a_shift_adds_its_square_and_a_rotation_of_both_nothing() -> None:
    x, y = draw_features(80, 8, seed=0), draw_features(90, 8, seed=1)
    rotation, _ = torch.linalg.qr(draw_features(8, 8, seed=2))
    distance = frechet_distance(moments_of(x), moments_of(y))
    assert frechet_distance(moments_of(x @ rotation), moments_of(y @ rotation)) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(moments_of(x), moments_of(x + 0.5)) == pytest.approx(8 * 0.25, rel=1e-10)


def test_taking_away_what_was_never_there_is_noticed() -> None:
    features = draw_features(50, 4)
    impossible = moments_of(features).minus(moments_of(5 * features[:20] + 3))
    with pytest.raises(ValueError, match="no subset"):
        frechet_distance(impossible, moments_of(features))


@pytest.mark.parametrize(("n", "m"), [(300, 400), (30, 400), (400, 30), (20, 25)])
def test_from_features_it_is_that_of_their_moments(n: int, m: int) -> None:
    x, y = draw_features(n, 40, seed=0), 1.3 * draw_features(m, 40, seed=1)
    expected = frechet_distance(moments_of(x), moments_of(y))
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance_of_features(y, x) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance_of_features(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def test_other_features_have_no_distance() -> None:
    good = draw_features(5, 3)
    for bad in (good[:1], good[0], draw_features(5, 4)):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=r"expected \(n, d\), \(m, d\), n, m >= 2"):
                frechet_distance_of_features(*pair)
    for n in (2, 5):
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance_of_features(good[:n], torch.full((n, 3), math.nan))


def test_full_rank_in_name_only_takes_the_careful_way() -> None:
    """A feature that is always 0, one that is twice another, and one that hardly moves: n > dim, and yet singular."""
    x, y = draw_features(200, 10, seed=0), draw_features(300, 10, seed=1)
    for features in (x, y):
        features[:, 0] = 0
        features[:, 1] = 2 * features[:, 2]
        features[:, 3] = 1 + 1e-9 * features[:, 3]
    lean = [torch.cat((f[:, 2:3] * math.sqrt(5), f[:, 4:]), 1) for f in (x, y)]  # the same set in fewer dims
    expected = frechet_distance(*(moments_of(f) for f in lean)) + float((x[:, 3].mean() - y[:, 3].mean()) ** 2)
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-10)


def test_cholesky_and_eigenvectors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = moments_of(draw_features(500, 60, seed=0)), moments_of(1.1 * draw_features(400, 60, seed=1))
    quick = frechet_distance(*moments)
    calls = []
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: calls.append(a) or (a, torch.tensor(1)))
    assert frechet_distance(*moments) == pytest.approx(quick, rel=1e-12)
    assert len(calls) == 2


@pytest.mark.parametrize(("n", "m"), [(40, 50), (9, 50), (9, 7)])  # both above, one below, both below the dims
def test_counts_are_repeated_features(n: int, m: int) -> None:
    x, y = draw_features(n, 12), draw_features(m, 12, seed=1)
    generator = torch.Generator().manual_seed(2)
    times = [torch.randint(0, 3, (size,), generator=generator) for size in (n, m)]
    repeated = [f.repeat_interleave(t, dim=0) for f, t in zip((x, y), times, strict=True)]
    expected = frechet_distance_of_features(*repeated)
    assert frechet_distance_of_features(x, y, x_counts=times[0], y_counts=times[1]) == pytest.approx(expected, rel=1e-9)
    assert_equal_moments(moments_of_features(x, times[0]), moments_of(repeated[0]), rtol=1e-12)


@pytest.mark.parametrize(
    "counts", [torch.ones(4, dtype=torch.int64), torch.tensor([1, 0, 0]), torch.tensor([3, -1, 1])]
)
def test_counts_of_no_set_are_refused(counts: Tensor) -> None:
    x = draw_features(3, 2)
    with pytest.raises(ValueError, match="counts are"):
        frechet_distance_of_features(x, x, x_counts=counts)
