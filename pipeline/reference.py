"""Stage: feature statistics of the real images, for a data set and an extractor. `python -m pipeline.reference`."""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from typing import Any

from ddpm_core.frechet import Moments
from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.sources import open_shards
from pipeline.engine.collect import collect_features, shard_reader
from pipeline.engine.features import load_extractor
from pipeline.engine.reference import HALVES, halves, save_reference
from pipeline.engine.statistics import parse_statistics
from pipeline.errors import UserError
from pipeline.lineage import stage_key
from pipeline.machine import load_machine
from pipeline.runtime.download import read_source
from pipeline.runtime.files import locked_folder, whole_folder
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import start_topology

log = logging.getLogger(__name__)
MOST_FLOOR_IMAGES = 5000
COLLECT = "pipeline.engine.collect"  # the code that a kept pass depends on


def main() -> None:
    """One pass over all real images, kept by content; moments of all and of two disjoint halves, and some features."""
    params, machine = load_params().reference, load_machine()
    restart_under_torchrun("pipeline.reference", machine)
    index, source = open_shards(paths.SHARDS, machine.shards, ShardCache(machine.cache, machine.cache_bytes))
    half = min(index.num_images // 2, MOST_FLOOR_IMAGES) if params.floor_images == "auto" else params.floor_images
    if not 2 <= half <= index.num_images // 2:
        raise UserError(
            f"params.yaml: reference.floor_images asks for two disjoint sets of {half} images, at least 2 each; "
            f"there are {index.num_images} in all"
        )
    subsets = dict(zip(HALVES, halves(index.num_images, half), strict=True))
    with start_topology(machine) as topology:
        extractor = load_extractor(params.extractor, topology.device, inception_weights=params.inception_weights)
        published, statistics = load_published(params.statistics, extractor.dim)
        inputs = {"images": index.sha256, "half": str(half), "extractor": extractor.protocol,
                  "weights": extractor.weights_sha256}  # fmt: skip
        folder = machine.state / "reference" / f"{stage_key(COLLECT, [], inputs)}-{machine.sample_batch}"
        with locked_folder(folder) if topology.is_main else nullcontext():
            collected = collect_features(
                shard_reader(index, source), index.num_images, extractor, topology, batch_size=machine.sample_batch,
                subsets=subsets, label="reference", folder=folder,
            )  # fmt: skip
        if not topology.is_main:
            return
    description = {
        "extractor": extractor.name,
        "inception_weights": params.inception_weights,
        "protocol": extractor.protocol,
        "weights_sha256": extractor.weights_sha256,
        "shard_index_sha256": index.sha256,
        "statistics": statistics,
        "num_reference": index.num_images,
        "floor_images": half,
    }
    with whole_folder(paths.REFERENCE) as aside:
        save_reference(aside, collected, description, published)
    log.info("reference: done, %s images, %s, peak memory %.2f GiB a process",
             f"{index.num_images:,}", extractor.protocol, peak_memory_gib())  # fmt: skip


def load_published(source: str | None, dim: int) -> tuple[Moments | None, dict[str, Any] | None]:
    """Statistics that others published, and what reference.json says of them.

    Raises:
        UserError: they can't be read, or are of another extractor.
    """
    if source is None:
        return None, None
    content = read_source(source, key="reference.statistics", name="an .npz of mu and sigma")
    moments = parse_statistics(content, f"reference.statistics: {source}", dim)
    return moments, {"source": source, "sha256": hashlib.sha256(content).hexdigest(), "num_images": moments.n}


if __name__ == "__main__":
    run_stage(main)
