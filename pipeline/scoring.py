"""One candidate scored straight from its sampler, by all ranks, nothing stored."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline import paths
from pipeline.data.index import ShardIndex
from pipeline.data.store import ShardSource
from pipeline.engine.candidates import Candidate
from pipeline.engine.checkpoint import image_form
from pipeline.engine.collect import FeatureSet, ImageReader, collect_features, sampler_reader
from pipeline.engine.evaluation import sample_parts, score_samples
from pipeline.engine.family import FamilySettings
from pipeline.engine.features import Extractor
from pipeline.engine.reference import Reference
from pipeline.engine.score import Pixels, read_vectors
from pipeline.engine.sweeps import GridPoint
from pipeline.errors import Stopped, UserError
from pipeline.lineage import stage_key
from pipeline.loading import LoadedCandidate, weight_hashes
from pipeline.machine import Machine
from pipeline.runtime.files import sha256_file
from pipeline.runtime.process import StopRequest
from pipeline.runtime.topology import Topology
from pipeline.sections import EvaluateParams


@dataclass(frozen=True)
class Target:
    """What samples are compared with, the same for every point.

    Args:
        reference: of the real images.
        real, source: the images themselves.
        evaluate: that section of params.yaml: the same scores with the same protocol as the stage evaluate's.
    """

    reference: Reference
    real: ShardIndex
    source: ShardSource
    evaluate: EvaluateParams

    @property
    def headline(self) -> str:
        """The score that a sweep is about."""
        return f"fd_{self.reference.description['extractor']}"

    @cached_property
    def pixels(self) -> Pixels:
        """Of real images, for classifiers and copies; read when first needed."""
        return read_vectors(self.real, self.evaluate.real_images, self.source)


def check_images(candidates: Iterable[Candidate], real: ShardIndex) -> None:
    """Raises UserError: a candidate draws images of another form than the real ones."""
    for one in candidates:
        channels, size = image_form(one.spec)
        if (channels, size) != (real.channels, real.image_size):
            raise UserError(
                f"CKPT: {one.name} draws images of {size} px with {channels} channels, but {paths.REFERENCE} is of "
                f"{real.image_size} px with {real.channels}: use a params.yaml and shards like those it was trained on"
            )


def point_key(point: GridPoint, target: Target) -> str:
    """Of all that determines its scores: weights, settings, what they are measured against, and this code."""
    inputs = weight_hashes(point.candidate, point.ema, point.sample)
    inputs |= {"reference": sha256_file(paths.REFERENCE / "reference.json"), "real": target.real.sha256}
    return stage_key("pipeline.sweep", [point.sample, target.evaluate], inputs)


class Scorer:
    """Scores a point with all ranks: each draws its share of the samples and keeps their features' moments.

    Args:
        target: what samples are compared with.
        machine, topology: who computes.
        stop: asked before each batch.
    """

    def __init__(self, target: Target, machine: Machine, topology: Topology, stop: StopRequest) -> None:
        self.target, self.machine, self.topology, self.stop = target, machine, topology, stop
        self._extractor: Extractor | None = None
        self._loaded: LoadedCandidate | None = None

    @property
    def extractor(self) -> Extractor:
        """Loaded when it is first needed: not where every point is kept."""
        if self._extractor is None:
            self._extractor = self.target.reference.load_extractor(self.topology.device)
        return self._extractor

    def load(self, point: GridPoint) -> LoadedCandidate:
        """The weights of a point; those of the one before are kept for it."""
        if self._loaded is None or (self._loaded.candidate, self._loaded.ema) != (point.candidate, point.ema):
            self._loaded = None  # before the next one takes its memory
            device, channels_last = self.topology.device, self.machine.channels_last
            self._loaded = LoadedCandidate(point.candidate, point.ema, point.sample, device, channels_last)
        return self._loaded

    def __call__(self, point: GridPoint, folder: Path, label: str) -> dict[str, Any]:
        """Scores, protocol and cost, complete on the main rank.

        Args:
            point: what to score.
            folder: where ranks keep what they have of it, for a start after a stop.
            label: of the progress bar.
        """
        num_samples, topology, extractor = point.sample.num_samples, self.topology, self.extractor
        parts = sample_parts(num_samples, self.target.reference.floor_images)
        with self.load(point).sampler(point.sample) as sampler:
            read = self._stoppable(sampler_reader(sampler, sampler.labels, topology.device))
            started = time.monotonic()
            found = collect_features(
                read, num_samples, extractor, topology, batch_size=self.machine.sample_batch, subsets=parts,
                label=label, folder=folder,
            )  # fmt: skip
            seconds, drawn = time.monotonic() - started, sampler.drawn
            calls = sampler.calls_per_image()
        if not topology.is_main:
            return {}
        return {
            "network_calls": calls,
            "images_per_second": drawn * topology.world_size / seconds if drawn else None,
            **self._score(found, extractor),
        }

    def _stoppable(self, read: ImageReader) -> ImageReader:
        def checked(ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            if self.stop.requested:
                raise Stopped("finished points are kept; run the same command to go on")
            return read(ids)

        return checked

    def _score(self, found: FeatureSet, extractor: Extractor) -> dict[str, Any]:
        settings = FamilySettings(**self.target.evaluate.model_dump(exclude={"real_images"}))
        scores = score_samples(self.target.reference, found, self.target.pixels, extractor, settings)
        counts = ("num_samples", "num_reference", "floor_images")  # said by the settings and the protocol
        numbers = {name: value for name, value in scores.numbers.items() if name not in counts}
        return {"scores": numbers, "protocol": scores.protocol}
