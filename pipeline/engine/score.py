"""How samples compare with real images: distances between feature moments, a classifier, nearest neighbours."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core.frechet import Moments, frechet_distance
from pipeline.data.index import ShardIndex
from pipeline.data.store import ShardSource, ShardStore, read_meta
from pipeline.engine.collect import spread, to_vectors
from pipeline.errors import UserError
from pipeline.runtime.files import load_json
from pipeline.runtime.rng import Stream, draw_permutation

_CHUNK = 512


def halves(num_images: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint random sets of `size` images, the same each time."""
    order = draw_permutation(0, Stream.HALVES, num_images).numpy()
    return order[:size], order[size : 2 * size]


def save_moments(path: Path, moments: Moments) -> None:
    """Write moments as safetensors `n`, `total`, `outer`."""
    n, total, outer = moments.to_tensors()
    save_file({"n": n, "total": total, "outer": outer}, path)


def load_moments(path: Path) -> Moments:
    """Read what :func:`save_moments` wrote."""
    tensors = load_file(path)
    return Moments.from_tensors(tensors["n"], tensors["total"], tensors["outer"])


def load_reference(folder: Path, real: ShardIndex) -> tuple[dict[str, Any], dict[str, Moments]]:
    """The reference's description and moments.

    Raises:
        UserError: it is missing or was made from other images.
    """
    try:
        reference: dict[str, Any] = load_json(folder / "reference.json")
        moments = {name: load_moments(folder / f"{name}.safetensors") for name in ("all", "half_a", "half_b")}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no readable reference ({error}); run `dvc repro reference`") from None
    if reference["shard_index_sha256"] != real.sha256:
        raise UserError(f"{folder} belongs to other shards than {real.folder}: run `dvc repro reference`")
    return reference, moments


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


def read_vectors(
    index: ShardIndex, most: int, source: ShardSource | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels of at most `most` images, evenly spread over the set, as :func:`to_vectors` gives them.

    Returns:
        (n, d) float32 and (n,) labels, -1 where there is none.
    """
    ids = spread(index.num_images, most)
    store, parts, labels = ShardStore(index, source), [], []
    for start in range(0, len(ids), _CHUNK):
        images, classes = store.read(ids[start : start + _CHUNK])
        parts.append(to_vectors(torch.from_numpy(images)).numpy())
        labels.append(classes)
    return np.concatenate(parts), np.concatenate(labels)


def class_accuracy(
    real: NDArray[np.float32], labels: NDArray[np.int64], samples: NDArray[np.float32], asked: NDArray[np.int64]
) -> tuple[float | None, float | None]:
    """How often a support vector classifier trained on real images agrees with the label that was asked for.

    Returns:
        the share of samples; and of a held-out fifth of the real images, for a classifier trained on the rest. None
        where the images to train on are of one class.
    """
    from sklearn.svm import SVC  # slow to import

    def agreement(known: NDArray[np.int64], images: NDArray[np.float32], truth: NDArray[np.int64]) -> float | None:
        if len(np.unique(labels[known])) < 2 or not len(images):
            return None
        return float(SVC(C=10.0, gamma="scale").fit(real[known], labels[known]).score(images, truth))

    order = draw_permutation(0, Stream.HALVES, len(real), draw=1).numpy()
    held_out, rest = np.split(order, [len(real) // 5])
    return agreement(order, samples, asked), agreement(rest, real[held_out], labels[held_out])


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


def memorised_share(candidates: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    """Share of candidates nearer to their nearest real image than that image is to any other, different real image.

    Real images that occur twice count once: otherwise a copy of one could not be nearer than its twin.
    """
    pool = torch.from_numpy(np.unique(real, axis=0))
    spacing = torch.cat([_nearest(part, pool, first=i * _CHUNK)[0] for i, part in enumerate(torch.split(pool, _CHUNK))])
    closer = 0
    for part in torch.split(torch.from_numpy(candidates), _CHUNK):
        distance, neighbour = _nearest(part, pool)
        closer += int((distance < spacing[neighbour]).sum())
    return closer / len(candidates)


def _nearest(part: Tensor, pool: Tensor, *, first: int | None = None) -> tuple[Tensor, Tensor]:
    """Distance and place of the nearest in `pool`; `first`: `part` is pool[first:...], and no image is its own
    neighbour."""
    distances = torch.cdist(part, pool, compute_mode="donot_use_mm_for_euclid_dist")
    if first is not None:
        distances[torch.arange(len(part)), torch.arange(first, first + len(part))] = torch.inf
    found = distances.min(dim=1)
    return found.values, found.indices
