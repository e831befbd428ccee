"""Every score of a set of samples, from one pass over them: what the evaluate stage and sweeps both call."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core.frechet import Moments, frechet_distance
from pipeline.data.index import ShardIndex
from pipeline.engine.collect import FeatureSet
from pipeline.engine.family import FamilySettings, Whole, score_family
from pipeline.engine.features import Extractor
from pipeline.engine.neighbours import Neighbours, find_nearest
from pipeline.engine.reference import HALVES, Reference, halves
from pipeline.engine.score import Pixels, class_agreement, mean_distance, memorised, memorised_share
from pipeline.errors import UserError

SEPARATOR = " / "


@dataclass(frozen=True)
class ClassRow:
    """One class: images behind `fd` on each side, and the share of samples that a classifier takes for it."""

    label: int
    samples: int
    real: int
    fd: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Scores:
    """What :func:`score_samples` found.

    Attributes:
        numbers: flat, in the order in which they are to be shown; None where the images allow no such score.
        protocol: all that the numbers depend on besides the images, in parts; equal if and only if they compare.
        classes: one row a class that was asked for.
        neighbours: of the kept samples.
    """

    numbers: dict[str, float | int | None]
    protocol: str
    classes: list[ClassRow]
    neighbours: Neighbours


def sample_parts(num_samples: int, floor_images: int) -> dict[str, NDArray[np.int64]]:
    """Up to two disjoint sets of samples as large as a half of the reference: `subsets` of the pass over samples."""
    starts = [i * floor_images for i in range(2) if (i + 1) * floor_images <= num_samples]
    return {f"part_{i}": np.arange(start, start + floor_images) for i, start in enumerate(starts)}


def check_form(real: ShardIndex, samples: ShardIndex) -> None:
    """Refuse samples that are of another form than the real images.

    Raises:
        UserError: another size or number of channels.
    """
    expected, found = (real.image_size, real.channels), (samples.image_size, samples.channels)
    if found != expected:
        raise UserError(
            f"{samples.folder} holds images of {found[0]} px and {found[1]} channels, {real.folder} of {expected[0]} "
            f"px and {expected[1]}: scores need equal images; run `dvc repro` so that all are made of the same shards"
        )


def score_samples(
    reference: Reference, collected: FeatureSet, real: Pixels, extractor: Extractor, settings: FamilySettings
) -> Scores:
    """Every score that does not need the images again.

    Args:
        reference: the real side.
        collected: the samples; `subsets` of its pass were :func:`sample_parts`. On the main rank.
        real: pixels of real images, for classifiers and copies.
        extractor: of both sides.
        settings: how much work to spend.

    Returns:
        numbers `fd_NAME` (all samples to all real images, or to published moments), `fd_low`, `fd_high` and
        `fd_infinity` of the same; `fd_floor`, `fd_like_for_like`, `fd_ratio`; `class_accuracy`, `cas`,
        `memorised_share`, each beside its value for real images; `fd_class_mean`, `fd_class_worst`, and what
        :func:`score_family` says; `num_samples`, `num_reference`, `floor_images`.

    Raises:
        UserError: fewer than 2 samples, features that are not finite or of another dimension.
    """
    if collected.moments["all"].dim != reference.of_all.dim:
        raise UserError(
            f"the reference is of {reference.of_all.dim} features, the samples of {collected.moments['all'].dim}: run "
            "`dvc repro reference`"
        )
    samples = Pixels(collected.ids.numpy(), collected.vectors.numpy(), collected.labels.numpy())
    if samples.vectors.shape[1] != real.vectors.shape[1]:
        raise UserError("samples and real images are of other sizes or channels: make all of them of the same shards")
    parts = [moments for name, moments in sorted(collected.moments.items()) if name.startswith("part_")]
    agreement, copies = class_agreement(real, samples), memorised(samples.vectors, real.vectors)
    one, other = halves(len(real.vectors), len(real.vectors) // 2)
    whole = Whole(reference.of_all, collected.moments["all"], published=reference.published is not None)
    family = score_family(
        reference.features, collected.features, reference.labels, collected.labels, collected.logits, settings, whole
    )
    numbers = {
        **distances(extractor.name, reference, collected.moments["all"], parts),
        "class_accuracy": agreement.class_accuracy,
        "class_accuracy_real": agreement.class_accuracy_real,
        "memorised_share": int(copies.sum()) / len(copies),
        "memorised_share_real": memorised_share(real.vectors[one], real.vectors[other]),
        "cas": agreement.cas,
        "cas_real": agreement.class_accuracy_real,
        **{name: value for name, value in family.items() if not re.fullmatch(r"fd_class_\d+", name)},
        "num_samples": collected.num_images,
        "num_reference": reference.moments["all"].n,
        "floor_images": reference.floor_images,
    }
    rows = [
        ClassRow(
            label,
            int((collected.labels == label).sum()),
            int((reference.labels == label).sum()),
            family.get(f"fd_class_{label}"),
            agreement.by_class.get(label),
        )
        for label in np.unique(samples.labels[samples.labels >= 0]).tolist()
    ]
    neighbours = Neighbours(
        samples.ids,
        find_nearest(collected.vectors, torch.from_numpy(real.vectors), real.ids),
        find_nearest(collected.features, reference.features, reference.ids.numpy()),
        copies,
    )
    return Scores(numbers, describe(reference, collected, real, extractor, settings), rows, neighbours)


def distances(
    extractor: str, reference: Reference, generated: Moments, parts: list[Moments]
) -> dict[str, float | int | None]:
    """Frechet distances: of everything; between two halves of the real set; of as many samples against each half.

    The last two have the same number of images on both sides, so their ratio says how far from real the samples are,
    free of the bias that a small number brings. None where there are fewer samples than images in a half.
    """
    real_halves = [reference.moments[name] for name in HALVES]
    floor = mean_distance(real_halves[:1], real_halves[1:])
    like = mean_distance(parts, real_halves) if parts else None
    return {
        f"fd_{extractor}": frechet_distance(generated, reference.of_all),
        "fd_floor": floor,
        "fd_like_for_like": like,
        "fd_ratio": None if like is None or floor == 0 else like / floor,
    }


def describe(
    reference: Reference, collected: FeatureSet, real: Pixels, extractor: Extractor, settings: FamilySettings
) -> str:
    """The protocol: parts joined by ` / `, each of which says one thing that scores depend on."""
    kept = (len(collected.features), len(reference.features))
    subset = min(settings.kid_size, kept[0] // 2, kept[1] // 2)
    given = reference.description["statistics"]
    parts = [
        extractor.protocol,
        f"{collected.num_images} samples, {reference.moments['all'].n} real",
        f"pixels of {len(real.vectors)}",
        f"real images {reference.description['shard_index_sha256'][:8]}",
        "statistics of the real images" if given is None else f"statistics {given['sha256'][:8]}",
        f"features of {kept[0]} samples, {kept[1]} real kept",
        f"k {settings.neighbours}",
        f"KID of {settings.kid_subsets} subsets of {subset}",
        f"bootstrap {settings.bootstrap} at {settings.confidence:.0%}",
        f"extrapolation {settings.extrapolation}",
    ]
    if collected.logits is not None:
        parts.append(f"inception score of {settings.splits} parts")
    return SEPARATOR.join(parts)
