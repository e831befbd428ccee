"""Kernel distance between two sets of features: unbiased for any number of them, where the Frechet distance is not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 2048


class KernelDistance(NamedTuple):
    """Mean over subsets, the deviation of one subset's value, and the standard error of the mean."""

    mean: float
    deviation: float
    standard_error: float


def kernel_distance(x: Tensor, y: Tensor, *, degree: int = 3) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel (a b / d + 1)^degree.

    It may come out below 0, as an unbiased estimate of 0 must.

    **Source**: Gretton et al. 2012, equation 3; the kernel of Binkowski et al. 2018 (KID), section 4.

    Args:
        x, y: (n, d) and (m, d) features, at least 2 each; computed in float64, in blocks.
        degree: of the polynomial.

    Raises:
        ValueError: other shapes, or fewer than 2 features.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> kernel_distance(x, x)  # within: 1; across: (1 + 1 + 1 + 8) / 4
        -3.5
    """
    check_features(x, y)
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x, degree) - float(_diagonal(x, degree).sum())) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, degree) - float(_diagonal(y, degree).sum())) / (m * (m - 1))
    return within_x + within_y - 2 * _kernel_sum(x, y, degree) / (n * m)


def kernel_inception_distance(x: Tensor, y: Tensor, subsets: Tensor, *, degree: int = 3) -> KernelDistance:
    """Mean of :func:`kernel_distance` over random subsets, with how sure it is.

    **Source**: Binkowski et al. 2018, section 4: 100 subsets of 1000. The standard error treats subsets as independent,
    which they are nearly while they are small parts of the sets.

    Args:
        x, y: (n, d) and (m, d).
        subsets: (s, 2, size) int64: for each subset the rows of `x` and of `y`; drawn by the caller.

    Raises:
        ValueError: as `kernel_distance`; or fewer than 2 subsets.
    """
    if subsets.ndim != 3 or subsets.shape[1] != 2 or len(subsets) < 2:
        raise ValueError(f"subsets has shape {tuple(subsets.shape)}, expected (at least 2, 2, size)")
    values = torch.tensor([kernel_distance(x[a], y[b], degree=degree) for a, b in subsets], dtype=torch.float64)
    deviation = float(values.std())
    return KernelDistance(float(values.mean()), deviation, deviation / len(values) ** 0.5)


def check_features(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless both are (at least 2, d) finite floats of one d."""
    for name, features in (("x", x), ("y", y)):
        if features.ndim != 2 or not features.is_floating_point() or features.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(features.shape)}, expected (n, d) floats of one d")
        if len(features) < 2:
            raise ValueError(f"{name} holds {len(features)} features, at least 2 are needed")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} holds features that are not finite")


def _kernel_sum(x: Tensor, y: Tensor, degree: int) -> float:
    total = 0.0
    for rows in torch.split(x, _BLOCK):
        for columns in torch.split(y, _BLOCK):
            total += float((rows @ columns.T / x.shape[1] + 1).pow_(degree).sum())
    return total


def _diagonal(x: Tensor, degree: int) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1).pow(degree)
