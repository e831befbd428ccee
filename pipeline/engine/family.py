"""All scores that a pass over features gives: distances, fidelity and variety, and how sure each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core.frechet import Moments, frechet_distance, frechet_distance_of_features, moments_of_features
from ddpm_core.inception_score import ClassSums
from ddpm_core.kernel import kernel_inception_distance
from ddpm_core.neighbours import neighbour_scores
from pipeline.engine.collect import MOST_KEPT
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream, draw_permutation, draw_uniform


@dataclass(frozen=True)
class FamilySettings:
    """How much work to spend; every number is part of the scores' protocol.

    Attributes:
        kid_subsets, kid_size: subsets of KID and the features of each, at most half of a set.
        neighbours: k of precision, recall, density and coverage.
        bootstrap: resampled sets behind the interval of the Frechet distance; 0: no interval.
        confidence: of that interval.
        extrapolation: sizes between half and all of the samples that the line to infinity is laid through.
        splits: parts of the Inception score.
    """

    kid_subsets: int = 100
    kid_size: int = 1000
    neighbours: int = 5
    bootstrap: int = 0
    confidence: float = 0.95
    extrapolation: int = 0
    splits: int = 10


class Whole(NamedTuple):
    """The whole sets that kept features are of.

    Attributes:
        real, samples: moments of all images.
        published: `real` is from elsewhere, so that of its images no other set can be drawn.
    """

    real: Moments
    samples: Moments
    published: bool = False


def score_family(
    real: Tensor,
    samples: Tensor,
    real_labels: Tensor | None = None,
    sample_labels: Tensor | None = None,
    sample_logits: Tensor | None = None,
    settings: FamilySettings | None = None,
    whole: Whole | None = None,
) -> dict[str, float]:
    """Every score that both sides' kept features allow. All draws are fixed, so equal inputs give equal scores.

    Args:
        real: (n, d) features of real images, at most `MOST_KEPT` are looked at, and as many of the samples.
        samples: (m, d) features of samples.
        real_labels, sample_labels: (n,) and (m,) int64 classes, -1 for none; with both there are distances by class.
        sample_logits: (m, classes); with them there is an Inception score.
        settings: the default leaves out what needs many Frechet distances.
        whole: the sets behind `fd_low`, `fd_high` and `fd_infinity`; the features themselves if left out.

    Returns:
        flat: `kid`, `kid_error` (standard error), `precision`, `recall`, `density`, `coverage`; `inception_score`,
        `inception_score_deviation`; `fd_class_mean`, `fd_class_worst`, `fd_class_N`; `fd_low`, `fd_high`;
        `fd_infinity`. What the number of features does not allow is absent.

    Raises:
        UserError: a set has fewer than 2 features, features that are not finite, or the dims differ.
    """
    settings = settings or FamilySettings()
    for name, features in (("real", real), ("samples", samples)):
        if len(features) < 2:
            raise UserError(f"{name}: {len(features)} images, scores need at least 2: raise sample.num_samples")
        if features.shape[1:] != real.shape[1:]:
            raise UserError(f"{name}: features have {features.shape[1]} dims, those of real images {real.shape[1]}")
        if not bool(features.isfinite().all()):
            raise UserError(f"{name}: features are not finite: are the images, or the weights, damaged?")
    real, samples = real[:MOST_KEPT].double(), samples[:MOST_KEPT].double()
    scores = kernel_scores(real, samples, settings)
    k = settings.neighbours
    if k < min(len(real), len(samples)):
        scores |= neighbour_scores(real, samples, k)._asdict()
    if sample_logits is not None:
        scores |= inception_score(sample_logits[:MOST_KEPT], settings.splits)
    if real_labels is not None and sample_labels is not None:
        scores |= class_distances(real, samples, real_labels[:MOST_KEPT], sample_labels[:MOST_KEPT])
    if settings.bootstrap:
        scores |= bootstrap_interval(real, samples, settings.bootstrap, settings.confidence, whole)
    if settings.extrapolation:
        of_real = moments_of_features(real) if whole is None else whole.real
        scores |= extrapolate(of_real, samples, settings.extrapolation)
    return scores


def kernel_scores(real: Tensor, samples: Tensor, settings: FamilySettings) -> dict[str, float]:
    """KID over random subsets and its standard error; none where a subset would have fewer than 2 features."""
    size = min(settings.kid_size, len(real) // 2, len(samples) // 2)
    if size < 2:
        return {}
    subsets = torch.stack(
        [
            torch.stack([_order(len(f), 2 * i + side)[:size] for side, f in enumerate((real, samples))])
            for i in range(settings.kid_subsets)
        ]
    )
    found = kernel_inception_distance(real, samples, subsets)
    return {"kid": found.mean, "kid_error": found.standard_error}


def inception_score(logits: Tensor, splits: int = 10) -> dict[str, float]:
    """exp of the mean divergence of an image's classes from those of all, over disjoint parts of the set.

    Images are dealt to the parts in a fixed random order. Args: `logits` (n, classes); `splits` parts, at most n.
    """
    splits = min(splits, len(logits))
    part = torch.empty(len(logits), dtype=torch.int64)
    part[_order(len(logits), 0)] = torch.arange(len(logits)) * splits // len(logits)
    sums = ClassSums(logits.shape[1], splits)
    sums.add(logits, part)
    found = sums.score()
    return {"inception_score": found.mean, "inception_score_deviation": found.deviation}


def class_distances(real: Tensor, samples: Tensor, real_labels: Tensor, sample_labels: Tensor) -> dict[str, float]:
    """Frechet distance between the images of each class; classes with fewer than 2 on a side are left out."""
    distances = {}
    for label in sorted(set(real_labels.tolist()) & set(sample_labels.tolist()) - {-1}):
        x, y = real[real_labels == label], samples[sample_labels == label]
        if min(len(x), len(y)) >= 2:
            distances[f"fd_class_{label}"] = frechet_distance_of_features(x, y)
    if not distances:
        return {}
    values = list(distances.values())
    return {"fd_class_mean": sum(values) / len(values), "fd_class_worst": max(values), **distances}


def bootstrap_interval(
    real: Tensor, samples: Tensor, rounds: int, confidence: float, whole: Whole | None = None
) -> dict[str, float]:
    """Basic bootstrap interval of the Frechet distance, samples and real images both drawn anew.

    A resampled set repeats images, so its distance is larger by another bias of small sets; the basic interval,
    2 fd - quantile, takes that bias off, where percentiles alone would add it.

    **Source**: Davison and Hinkley 1997, equation 5.6.

    Args:
        real, samples: features.
        rounds: resampled sets.
        confidence: in (0, 1).
        whole: larger sets that the features are an even part of. Resampled sets are then as large as these, and the
            interval is that of their distance. Published real moments stay as they are.
    """
    sizes = (len(real), len(samples)) if whole is None else (whole.real.n, whole.samples.n)
    fixed = whole.real if whole is not None and whole.published else None
    own = frechet_distance_of_features(real, samples) if fixed is None else _to_fixed(fixed, samples, None)
    fd = own if whole is None else frechet_distance(whole.real, whole.samples)
    values = []
    for i in range(rounds):
        x, y = (_draw_counts(len(f), n, 2 * i + s) for s, (f, n) in enumerate(zip((real, samples), sizes, strict=True)))
        values.append(
            frechet_distance_of_features(real, samples, x_counts=x, y_counts=y)
            if fixed is None
            else _to_fixed(fixed, samples, y)
        )
    tails = torch.tensor([(1 + confidence) / 2, (1 - confidence) / 2], dtype=torch.float64)
    low, high = (fd + own - torch.quantile(torch.tensor(values, dtype=torch.float64), tails)).tolist()
    return {"fd_low": max(low, 0.0), "fd_high": high}


def _to_fixed(real: Moments, samples: Tensor, counts: Tensor | None) -> float:
    return frechet_distance(real, moments_of_features(samples, counts))


def extrapolate(real: Moments, samples: Tensor, sizes: int) -> dict[str, float]:
    """The Frechet distance that infinitely many samples would have: the value at 0 of a line through it over 1 / m.

    Only the number of samples goes to infinity; the real images stay as they are. Its own error may make it negative.

    **Source**: Chong and Forsyth 2020, section 4.
    """
    least = max(len(samples) // 2, 2)
    if sizes < 2 or least == len(samples):
        return {}
    counts = torch.linspace(least, len(samples), sizes).long()
    order = [_order(len(samples), 1000 + i) for i in range(sizes)]
    values = [_to_fixed(real, samples[o[:m]], None) for o, m in zip(order, counts.tolist(), strict=True)]
    inverse = torch.stack((torch.ones(sizes, dtype=torch.float64), 1 / counts.double()), dim=1)
    line = torch.linalg.lstsq(inverse, torch.tensor(values, dtype=torch.float64)[:, None]).solution
    return {"fd_infinity": float(line[0])}


def _order(size: int, draw: int) -> Tensor:
    return draw_permutation(0, Stream.SCORES, size, draw=draw)


def _draw_counts(kept: int, size: int, draw: int) -> Tensor:
    """(kept,) how often each of `kept` is drawn in `size` draws."""
    drawn = draw_uniform(0, Stream.SCORES, torch.arange(size), draw=draw).double()
    return torch.bincount((drawn * kept).long().clamp_max(kept - 1), minlength=kept)
