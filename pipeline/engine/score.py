"""How samples compare with real images: distances between feature moments, a classifier, nearest neighbours."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_core.frechet import Moments, frechet_distance
from pipeline.data.index import ShardIndex
from pipeline.data.store import ShardSource, ShardStore, read_meta
from pipeline.engine.collect import spread, to_vectors
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from pipeline.runtime.rng import Stream, draw_permutation

_CHUNK = 512


def load_reconstruction_scores(path: Path, protocol: str) -> dict[str, float]:
    """What the encode stage says of the first stage, to stand beside the scores of its samples.

    Raises:
        UserError: it is missing, or was measured with another extractor.
    """
    try:
        content = load_json(path)
        if content["protocol"] != protocol:
            raise UserError(f"{path} was measured as `{content['protocol']}`: run `dvc repro encode` again")
        names = ("fd_reconstruction", "fd_reconstruction_like_for_like", "psnr_reconstruction")
        return {name: float(content[name]) for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no readable scores of reconstructions ({error}); run `dvc repro encode`") from None


def mean_distance(first: list[Moments], second: list[Moments]) -> float:
    """Mean Frechet distance over all pairs of one from each list."""
    return float(np.mean([frechet_distance(a, b) for a, b in product(first, second)]))


class Pixels(NamedTuple):
    """Images as vectors, as :func:`to_vectors` gives them.

    Attributes:
        ids: (n,) int64 numbers in their set.
        vectors: (n, d) float32.
        labels: (n,) int64, -1 where there is none.
    """

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]


def read_vectors(index: ShardIndex, most: int, source: ShardSource | None = None) -> Pixels:
    """Pixels of at most `most` images, evenly spread over the set."""
    ids = spread(index.num_images, most)
    store, parts, labels = ShardStore(index, source), [], []
    for start in range(0, len(ids), _CHUNK):
        images, classes = store.read(ids[start : start + _CHUNK])
        parts.append(to_vectors(torch.from_numpy(images)).numpy())
        labels.append(classes)
    return Pixels(ids, np.concatenate(parts), np.concatenate(labels))


class Agreement(NamedTuple):
    """How well a support vector classifier and the labels agree; None where what it learns from is of one class.

    Attributes:
        class_accuracy: share of samples that one trained on real images takes for what was asked for.
        class_accuracy_real: the same of a held-out fifth of the real images, for one trained on the others.
        cas: share of that fifth that one trained on samples gets right, the classification accuracy score: it falls
            where samples lack variety, which `class_accuracy` does not see.
        by_class: `class_accuracy` of each label that was asked for.

    **Source**: Ravuri and Vinyals 2019 for `cas`.
    """

    class_accuracy: float | None
    class_accuracy_real: float | None
    cas: float | None
    by_class: dict[int, float]


def class_agreement(real: Pixels, samples: Pixels) -> Agreement:
    """Train on one side, test on the other, and beside it on real images alone."""
    order = draw_permutation(0, Stream.HALVES, len(real.vectors), draw=1).numpy()
    held_out, rest = np.split(order, [len(order) // 5])
    images, labels = real.vectors, real.labels
    right = _right(images[order], labels[order], samples.vectors, samples.labels)
    asked = [] if right is None else np.unique(samples.labels).tolist()
    return Agreement(
        class_accuracy=_share(right),
        class_accuracy_real=_share(_right(images[rest], labels[rest], images[held_out], labels[held_out])),
        cas=_share(_right(samples.vectors, samples.labels, images[held_out], labels[held_out])),
        by_class={} if right is None else {label: float(right[samples.labels == label].mean()) for label in asked},
    )


def _right(
    known: NDArray[np.float32], labels: NDArray[np.int64], images: NDArray[np.float32], truth: NDArray[np.int64]
) -> NDArray[np.bool_] | None:
    """Of which images a classifier trained on `known` finds the label."""
    from sklearn.svm import SVC  # slow to import

    if len(np.unique(labels)) < 2 or not len(images):
        return None
    found = SVC(C=10.0, gamma="scale").fit(known, labels).predict(images)
    return np.asarray(found == truth, dtype=np.bool_)


def _share(right: NDArray[np.bool_] | None) -> float | None:
    return None if right is None else int(right.sum()) / len(right)


def context_psnr(real: ShardIndex, samples: ShardIndex, source: ShardSource | None = None) -> dict[str, float | None]:
    """How near samples with a context are to the images that their contexts were made of, over the predicted pixels.

    10 log10(255^2 / mean squared error), the mean over all pixels of all samples, so that a single perfect one does not
    make it infinite. A sampler draws one of many possible images: the best mean would score higher and look blurred.

    Returns:
        `context_psnr` in dB; and `context_psnr_other`, the same against the image of the next sample, what a model
        gets that ignores its context. None where nothing differs.

    Raises:
        UserError: the samples don't say of which images they are.
    """
    notes = read_meta(samples)
    if len(notes) != samples.num_images or not all(0 <= note.get("image", -1) < real.num_images for note in notes):
        raise UserError(f"{samples.folder} does not say which images its contexts are of: run `dvc repro sample`")
    ids = np.array([note["image"] for note in notes])
    made, truth = ShardStore(samples), ShardStore(real, source)
    errors, pixels = np.zeros(2), 0
    for start in range(0, len(ids), _CHUNK):
        places = np.arange(start, min(start + _CHUNK, len(ids)))
        images = made.read(places)[0].astype(np.float64)
        inside = np.ones((len(places), 1, *images.shape[2:]), dtype=bool)
        for place, note in enumerate(notes[start : start + _CHUNK]):
            if "hole" in note:
                top, left, height, width = note["hole"]
                inside[place] = False
                inside[place, 0, top : top + height, left : left + width] = True
        pixels += int(inside.sum()) * images.shape[1]
        for which, shift in enumerate((0, 1)):
            target = truth.read(ids[(places + shift) % len(ids)])[0]
            errors[which] += (np.square(images - target) * inside).sum()
    same, other = (10 * math.log10(255**2 * pixels / error) if error else None for error in errors.tolist())
    return {"context_psnr": same, "context_psnr_other": other}


def memorised(candidates: NDArray[np.float32], real: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which candidates are nearer to their nearest real image than that image is to any other, different real image.

    Real images that occur twice count once: otherwise a copy of one could not be nearer than its twin.
    """
    pool = torch.from_numpy(np.unique(real, axis=0))
    spacing = torch.cat([_nearest(part, pool, first=i * _CHUNK)[0] for i, part in enumerate(torch.split(pool, _CHUNK))])
    closer = []
    for part in torch.split(torch.from_numpy(candidates), _CHUNK):
        distance, neighbour = _nearest(part, pool)
        closer.append((distance < spacing[neighbour]).numpy())
    return np.concatenate(closer)


def memorised_share(candidates: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    """Share of candidates that are :func:`memorised`."""
    return int(memorised(candidates, real).sum()) / len(candidates)


def _nearest(part: Tensor, pool: Tensor, *, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Distance and place of the nearest in `pool`; `first`: `part` is pool[first:...], and no image is its own
    neighbour."""
    distances = torch.cdist(part, pool, compute_mode="donot_use_mm_for_euclid_dist")
    if first is not None:
        distances[torch.arange(len(part)), torch.arange(first, first + len(part))] = torch.inf
    found = distances.min(dim=1)
    return found.values, found.indices
