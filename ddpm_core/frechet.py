"""Frechet distance between two sets of features, from moments that can be streamed, merged and subtracted."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float64).eps


class Moments:
    """Count, sum and sum of outer products of a set of feature vectors, in float64 on the CPU.

    Plain sums rather than a running mean: they add, so that ranks are joined by one all-reduce, and a subset can be
    taken away. The price is cancellation in the covariance, a relative error of about 1e-16 (1 + mean^2 / variance):
    nothing for the features of a network, which are of order one; too much for vectors a million times as far from the
    origin as they are spread. The order of adding changes the last bits only.

    Args:
        dim: length of a feature vector; at least 1.

    Raises:
        ValueError: `dim` is below 1.

    Example:
        >>> moments = Moments(2)
        >>> moments.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
        >>> moments.mean().tolist(), moments.covariance().tolist()
        ([1.0, 1.0], [[2.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim is {dim}, expected at least 1")
        self.n = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return len(self.total)

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Take in a batch.

        Args:
            features: (b, dim) of any float dtype, on any device; b may be 0. Cast to float64 before any sum.

        Raises:
            ValueError: another shape or dtype, or a NaN or infinity in it; nothing is taken in then.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            given = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
            raise ValueError(f"features are {given}, expected floats of shape (b, {self.dim})")
        x = features.detach().to("cpu", torch.float64)
        broken = ~x.isfinite()
        if bool(broken.any()):
            row, column = broken.nonzero()[0].tolist()
            rows = int(broken.any(1).sum())
            value = float(x[row, column])
            raise ValueError(
                f"features are not finite in {rows} of {len(x)} rows, first {value} at row {row}, column {column}"
            )
        self.n += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def merge(self, other: Moments) -> None:
        """Take in all that `other` has seen. Raises ValueError where the dims differ."""
        self._check_dim(other)
        self.n += other.n
        self.total += other.total
        self.outer += other.outer

    def minus(self, subset: Moments) -> Moments:
        """The moments of what is left without `subset`, as a new object.

        Whether it is a subset can't be seen from the sums; :func:`frechet_distance` refuses a covariance that no set
        could have.

        Raises:
            ValueError: the dims differ, or the subset is larger than the set.
        """
        self._check_dim(subset)
        if subset.n > self.n:
            raise ValueError(f"a subset of {subset.n} can't be taken from a set of {self.n}")
        rest = Moments(self.dim)
        rest.n = self.n - subset.n
        rest.total = self.total - subset.total
        rest.outer = self.outer - subset.outer
        return rest

    def mean(self) -> Tensor:
        """(dim,) float64. Raises ValueError for an empty set."""
        if self.n < 1:
            raise ValueError("the mean of 0 features is undefined")
        return self.total / self.n

    def covariance(self) -> Tensor:
        """(dim, dim) float64, unbiased (divided by n - 1) and exactly symmetric; of rank n - 1 at most.

        Raises:
            ValueError: there are fewer than 2 features.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 features, there are {self.n}")
        mean = self.mean()
        covariance = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return (covariance + covariance.T) / 2

    def to_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the state: n () int64, sum (dim,) and sum of outer products (dim, dim) float64.

        Each may be summed over ranks on its own, then given to :meth:`from_tensors`.
        """
        return torch.tensor(self.n), self.total.clone(), self.outer.clone()

    @classmethod
    def from_tensors(cls, n: Tensor, total: Tensor, outer: Tensor) -> Self:
        """The inverse of :meth:`to_tensors`; the tensors are copied, from whatever device.

        Raises:
            ValueError: shapes or dtypes that no `to_tensors` gives, a negative count, or a NaN or infinity.
        """
        found = [(tuple(t.shape), t.dtype) for t in (n, total, outer)]
        dim = total.numel()
        if found != [((), torch.int64), ((dim,), torch.float64), ((dim, dim), torch.float64)]:
            raise ValueError(f"moments are {found}, expected int64 (), float64 (d,) and float64 (d, d)")
        if int(n) < 0 or not bool(total.isfinite().all() and outer.isfinite().all()):
            raise ValueError("moments are not finite or count fewer than 0")
        moments = cls(dim)
        moments.n = int(n)
        moments.total.copy_(total)
        moments.outer.copy_(outer)
        return moments

    def _check_dim(self, other: Moments) -> None:
        if other.dim != self.dim:
            raise ValueError(f"moments of dim {self.dim} and {other.dim} don't belong together")


@torch.no_grad()
def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians with the moments of two sets.

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^1/2). With S = L L^T the last trace is the sum of the singular values
    of L1^T L2. L is cut to the rank of S, so fewer features than dims cost no accuracy: the singular values carry
    rounding of 1e-16, where square roots of the eigenvalues of S1 S2 turn a zero into 1e-8. The estimate is biased
    upwards for small sets, so it is comparable only at equal n.

    **Source**: Dowson and Landau 1982, equation 4; Heusel et al. 2017, equation 6.

    Args:
        a, b: moments of one dim, of at least 2 features each.

    Returns:
        At least 0: a difference within rounding below 0 counts as 0.

    Raises:
        ValueError: the dims differ, a set has fewer than 2 features, or a covariance has a negative eigenvalue beyond
            rounding, which no set has: something was subtracted that was no subset.

    Example:
        >>> a, b = Moments(1), Moments(1)
        >>> a.add(torch.tensor([[-1.0], [0.0], [1.0]]))
        >>> b.add(torch.tensor([[1.0], [3.0], [5.0]]))
        >>> round(frechet_distance(a, b), 9)  # (3 - 0)^2 + (2 - 1)^2
        10.0
    """
    a._check_dim(b)
    factors = [_factor(moments) for moments in (a, b)]
    between = float((a.mean() - b.mean()).square().sum())
    within = sum(float(factor.square().sum()) for factor in factors)
    overlap = float(torch.linalg.svdvals(factors[0].T @ factors[1]).sum())
    return max(between + within - 2 * overlap, 0.0)  # in this order a NaN stays one


def _factor(moments: Moments) -> Tensor:
    """L (dim, rank) with L L^T = S: Cholesky's where S is clearly of full rank, which takes a tenth of the time of
    eigenvectors; otherwise by these, and eigenvalues within rounding of 0 are dropped."""
    covariance, mean_square = moments.covariance(), float(moments.mean().square().sum())
    # A covariance is the difference of two sums and inherits the rounding of the larger.
    unit = _EPSILON * (moments.dim + moments.n**0.5)
    if moments.n > moments.dim:
        lower, failed = torch.linalg.cholesky_ex(covariance)
        largest = float(covariance.trace())  # at least the largest eigenvalue
        if not failed and float(lower.diagonal().min()) ** 2 > 1e3 * (largest + mean_square) * unit:
            return lower  # type: ignore[no-any-return]
    values, vectors = torch.linalg.eigh(covariance)
    rounding = (float(values[-1]) + mean_square) * unit
    if float(values[0]) < -1e3 * rounding:
        raise ValueError(
            f"the covariance of {moments.n} features has the negative eigenvalue {float(values[0]):g}: "
            "was something subtracted that is no subset?"
        )
    kept = values > rounding
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


@torch.no_grad()
def frechet_distance_of_features(
    x: Tensor, y: Tensor, *, x_counts: Tensor | None = None, y_counts: Tensor | None = None
) -> float:
    """:func:`frechet_distance` of the moments of two sets, straight from their features.

    With centred features X and Y, tr((S1 S2)^1/2) is the sum of the singular values of X Y^T / sqrt((n - 1)(m - 1)):
    for fewer features than dims cheaper than any covariance, and the way to distances of small classes. Features that
    are in a set several times count as one row, times the root of their number.

    Args:
        x, y: (n, d) and (m, d) floats, at least 2 each; computed in float64.
        x_counts, y_counts: (n,) and (m,) int64, how many times each is in its set, as bootstrap draws them; once each
            if left out.

    Raises:
        ValueError: other shapes, fewer than 2 features, or features that are not finite.

    Example:
        >>> frechet_distance_of_features(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
        8.0
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"features have shapes {tuple(x.shape)}, {tuple(y.shape)}; expected (n, d), (m, d), n, m >= 2")
    sets = [_counted(x, x_counts), _counted(y, y_counts)]
    if min(len(features) for features, _ in sets) > x.shape[1]:
        return frechet_distance(*(moments_of_features(features, counts) for features, counts in sets))
    means, centred = [], []
    for features, counts in sets:
        features = features.double()
        if not bool(features.isfinite().all()):
            raise ValueError("features are not finite")
        n = len(features) if counts is None else int(counts.sum())
        mean = features.mean(0) if counts is None else (counts.double() @ features) / n
        rows = features - mean if counts is None else (features - mean) * counts.double().sqrt()[:, None]
        means.append(mean)
        centred.append(rows / (n - 1) ** 0.5)
    between = float((means[0] - means[1]).square().sum())
    overlap = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    within = [float(rows.square().sum()) for rows in centred]
    return max(between + within[0] + within[1] - 2 * overlap, 0.0)


@torch.no_grad()
def moments_of_features(features: Tensor, counts: Tensor | None = None) -> Moments:
    """The moments of (n, d) features, each of them `counts` (n,) times in the set, or once.

    Raises:
        ValueError: features that are not finite, or other shapes.

    Example:
        >>> moments_of_features(torch.tensor([[0.0], [3.0]]), torch.tensor([2, 1])).mean().item()
        1.0
    """
    moments = Moments(features.shape[1])
    if counts is None:
        moments.add(features)
        return moments
    x, times = features.double(), counts.double()[:, None]
    return Moments.from_tensors(counts.sum().to(torch.int64), (x * times).sum(0), x.T @ (x * times))


def _counted(features: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Features without those that are there no time."""
    if counts is None:
        return features, None
    if counts.shape != (len(features),) or int(counts.min()) < 0 or int(counts.sum()) < 2:
        raise ValueError(
            f"counts are {tuple(counts.shape)}, expected ({len(features)},), none below 0, at least 2 in all"
        )
    return features[counts > 0], counts[counts > 0]
