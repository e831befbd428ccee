"""Stage: feature statistics of the real images, for a data set and an extractor. `python -m pipeline.reference`."""

from __future__ import annotations

import logging

from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.sources import open_shards
from pipeline.engine.collect import collect_features, shard_reader
from pipeline.engine.features import load_extractor
from pipeline.engine.score import halves, save_moments
from pipeline.errors import UserError
from pipeline.machine import load_machine
from pipeline.runtime.files import save_json, whole_folder
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import start_topology

log = logging.getLogger(__name__)
MOST_FLOOR_IMAGES = 5000


def main() -> None:
    """One pass over all real images; keep the moments of all and of two disjoint halves."""
    params, machine = load_params().reference, load_machine()
    restart_under_torchrun("pipeline.reference", machine)
    index, source = open_shards(paths.SHARDS, machine.shards, ShardCache(machine.cache, machine.cache_bytes))
    half = min(index.num_images // 2, MOST_FLOOR_IMAGES) if params.floor_images == "auto" else params.floor_images
    if not 2 <= half <= index.num_images // 2:
        raise UserError(
            f"params.yaml: reference.floor_images asks for two disjoint sets of {half} images, at least 2 each; "
            f"there are {index.num_images} in all"
        )
    subsets = dict(zip(("half_a", "half_b"), halves(index.num_images, half), strict=True))
    with start_topology(machine) as topology:
        extractor = load_extractor(params.extractor, topology.device, inception_weights=params.inception_weights)
        collected = collect_features(
            shard_reader(index, source), index.num_images, extractor, topology, batch_size=machine.sample_batch,
            subsets=subsets, label="reference",
        )  # fmt: skip
        if not topology.is_main:
            return
    with whole_folder(paths.REFERENCE) as aside:
        for name, one in collected.moments.items():
            save_moments(aside / f"{name}.safetensors", one)
        description = {
            "extractor": extractor.name,
            "inception_weights": params.inception_weights,
            "protocol": extractor.protocol,
            "weights_sha256": extractor.weights_sha256,
            "shard_index_sha256": index.sha256,
            "num_reference": index.num_images,
            "floor_images": half,
        }
        save_json(aside / "reference.json", description)
    log.info("reference: done, %s images, %s, peak memory %.2f GiB a process",
             f"{index.num_images:,}", extractor.protocol, peak_memory_gib())  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
