"""Inception score from sums that can be streamed and merged over ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """Mean and (biased) deviation over the parts of a set, as published."""

    mean: float
    deviation: float


class ClassSums:
    """Counts, class probabilities and negative entropies of images, summed by part of the set, in float64 on the CPU.

    The score is exp of the mean divergence of an image's classes from those of its part: the mean negative entropy of
    an image less that of the part's mean. Hence sums are enough.

    **Source**: Salimans et al. 2016, section 4.

    Args:
        classes: length of a logits vector.
        parts: disjoint parts of the set, 10 as published.

    Example:
        >>> sums = ClassSums(classes=4, parts=1)
        >>> sums.add(torch.eye(4) * 1e3, torch.zeros(4, dtype=torch.int64))  # each image sure, each of another class
        >>> sums.score()
        InceptionScore(mean=4.0, deviation=0.0)
    """

    def __init__(self, classes: int, parts: int = 10) -> None:
        self.sums = torch.zeros(parts, classes + 2, dtype=torch.float64)  # probabilities, negative entropy, count

    @torch.no_grad()
    def add(self, logits: Tensor, part: Tensor) -> None:
        """Take in (b, classes) logits of images of the parts (b,) int64.

        Raises:
            ValueError: another number of classes, or logits that are not finite.
        """
        if logits.ndim != 2 or logits.shape[1] != self.sums.shape[1] - 2:
            raise ValueError(f"logits have shape {tuple(logits.shape)}, expected (b, {self.sums.shape[1] - 2})")
        log_p = logits.detach().to("cpu", torch.float64).log_softmax(1)
        if not bool(log_p.isfinite().all()):
            raise ValueError("logits are not finite")
        p = log_p.exp()
        row = torch.cat((p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=torch.float64)), dim=1)
        self.sums.index_add_(0, part.cpu(), row)

    def merge(self, other: ClassSums) -> None:
        """Take in all that `other` has seen. Over ranks, `sums` may be summed as it is."""
        self.sums += other.sums

    def score(self) -> InceptionScore:
        """The score over the parts that hold images.

        Raises:
            ValueError: there are none.
        """
        sums = self.sums[self.sums[:, -1] > 0]
        if not len(sums):
            raise ValueError("the Inception score of 0 images is undefined")
        means = sums[:, :-1] / sums[:, -1:]
        values = (means[:, -1] - torch.xlogy(means[:, :-1], means[:, :-1]).sum(1)).exp()
        return InceptionScore(float(values.mean()), float(values.std(correction=0)))
