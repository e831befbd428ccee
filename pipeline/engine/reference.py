"""What samples are compared with: moments and features of the real images, as the reference stage keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_core.frechet import Moments
from pipeline.data.index import ShardIndex
from pipeline.engine.collect import FeatureSet
from pipeline.engine.features import Extractor, load_extractor
from pipeline.engine.statistics import write_statistics
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, save_json
from pipeline.runtime.rng import Stream, draw_permutation

HALVES = ("half_a", "half_b")
_KEPT, _PUBLISHED = "kept.safetensors", "published"


@dataclass(frozen=True)
class Reference:
    """The real side of every score.

    Attributes:
        description: reference.json.
        moments: `all`, and of two disjoint halves `half_a` and `half_b`.
        ids: (k,) int64, sorted, of the real images whose features are kept.
        features: (k, dim) float32.
        labels: (k,) int64, -1 for none.
        published: moments made by others, which the distance of all samples is to instead of `all`.
    """

    description: dict[str, Any]
    moments: dict[str, Moments]
    ids: Tensor
    features: Tensor
    labels: Tensor
    published: Moments | None

    @property
    def floor_images(self) -> int:
        """Images in each half."""
        return self.moments["half_a"].n

    @property
    def of_all(self) -> Moments:
        """What all samples are compared with."""
        return self.moments["all"] if self.published is None else self.published

    def load_extractor(self, device: torch.device) -> Extractor:
        """The feature network that the reference was made with.

        Raises:
            UserError: what is installed now is another.
        """
        asked = self.description
        extractor = load_extractor(asked["extractor"], device, inception_weights=asked["inception_weights"])
        if extractor.protocol != asked["protocol"]:
            raise UserError(f"the reference was made as `{asked['protocol']}`: run `dvc repro reference` again")
        return extractor


def halves(num_images: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint random sets of `size` images, the same each time."""
    order = draw_permutation(0, Stream.HALVES, num_images).numpy()
    return order[:size], order[size : 2 * size]


def save_reference(folder: Path, collected: FeatureSet, description: dict[str, Any], published: Moments | None) -> None:
    """Write a reference's files into a folder: one safetensors for each set of moments, the kept features,
    reference.json, and statistics.npz with `mu` and `sigma` for other programs."""
    for name, moments in collected.moments.items():
        save_moments(folder / f"{name}.safetensors", moments)
    if published is not None:
        save_moments(folder / f"{_PUBLISHED}.safetensors", published)
    kept = {"ids": collected.ids, "features": collected.features, "labels": collected.labels}
    save_file(kept, folder / _KEPT)
    write_statistics(folder / "statistics.npz", collected.moments["all"])
    save_json(folder / "reference.json", description)


def load_reference(folder: Path, real: ShardIndex) -> Reference:
    """Read what :func:`save_reference` wrote.

    Raises:
        UserError: it is missing or was made from other images.
    """
    try:
        description: dict[str, Any] = load_json(folder / "reference.json")
        moments = {name: load_moments(folder / f"{name}.safetensors") for name in ("all", *HALVES)}
        published = load_moments(folder / f"{_PUBLISHED}.safetensors") if description["statistics"] else None
        kept = load_file(folder / _KEPT)
        reference = Reference(description, moments, **kept, published=published)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable reference ({error}); run `dvc repro reference`") from None
    if description["shard_index_sha256"] != real.sha256:
        raise UserError(f"{folder} belongs to other shards than {real.folder}: run `dvc repro reference`")
    return reference


def save_moments(path: Path, moments: Moments) -> None:
    """Write moments as safetensors `n`, `total`, `outer`."""
    n, total, outer = moments.to_tensors()
    save_file({"n": n, "total": total, "outer": outer}, path)


def load_moments(path: Path) -> Moments:
    """Read what :func:`save_moments` wrote."""
    tensors = load_file(path)
    return Moments.from_tensors(tensors["n"], tensors["total"], tensors["outer"])
