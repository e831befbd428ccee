"""Stage: score the samples against the real images. `python -m pipeline.evaluate`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.sources import open_shards
from pipeline.engine.collect import FeatureSet, collect_features, shard_reader
from pipeline.engine.evaluation import Scores, check_form, sample_parts, score_samples
from pipeline.engine.family import FamilySettings
from pipeline.engine.features import Extractor
from pipeline.engine.neighbours import draw_neighbours, table_rows
from pipeline.engine.reference import Reference, load_reference, save_moments
from pipeline.engine.score import context_psnr, load_reconstruction_scores, read_vectors
from pipeline.engine.tables import Row, make_csv
from pipeline.lineage import provenance, stage_key
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import load_json, locked_folder, save_json, sha256_json, whole_folder
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import open_tracker

log = logging.getLogger(__name__)
CLASS_COLUMNS = ("label", "class", "samples", "real", "fd", "accuracy")
COLLECT = "pipeline.engine.collect"  # the code that a kept pass depends on


def main() -> None:
    """Features of all samples in one pass, then every score; written as metrics and to the model's run."""
    params, machine = load_params().evaluate, load_machine()
    restart_under_torchrun("pipeline.evaluate", machine)
    real, source = open_shards(paths.SHARDS, machine.shards, ShardCache(machine.cache, machine.cache_bytes))
    samples = load_index(paths.SAMPLES)
    check_form(real, samples)
    reference = load_reference(paths.REFERENCE, real)
    model = load_json(paths.MODEL / "model.json")
    with start_topology(machine) as topology:
        extractor = reference.load_extractor(topology.device)
        collected = collect(samples, reference, extractor, machine, topology)
        if not topology.is_main:
            return
    pixels = read_vectors(real, params.real_images, source)
    settings = FamilySettings(**params.model_dump(exclude={"real_images"}))
    found = score_samples(reference, collected, pixels, extractor, settings)
    more: dict[str, Any] = context_psnr(real, samples, source) if "context" in model else {}
    if "first_stage" in model:
        more |= load_reconstruction_scores(paths.ENCODE_METRICS, extractor.protocol)
    scores = {**found.numbers, **more}
    protocol = {"protocol": found.protocol, "protocol_sha256": sha256_json(found.protocol)}
    lineage = model["lineage"]
    origin = {"model": lineage, "evaluation": provenance(), "reference": reference.description}
    with whole_folder(paths.EVALUATION) as aside:
        save_json(aside / "scores.json", {"scores": scores, **protocol, **origin})
        write_tables(aside, found, list(real.classes))
        save_moments(aside / "all.safetensors", collected.moments["all"])
        picture = draw_neighbours(found.neighbours, shard_reader(samples), shard_reader(real, source))
        picture.save(aside / "neighbours.png")
    save_json(paths.EVALUATE_METRICS, {**scores, **protocol, "train_key": lineage["train_key"]})
    report(machine, lineage, scores, protocol, extractor.name)
    shown = ", ".join(f"{k} {_short(v)}" for k, v in scores.items())
    log.info("evaluate: %s; peak memory %.2f GiB a process", shown, peak_memory_gib())


def collect(
    samples: ShardIndex, reference: Reference, extractor: Extractor, machine: Machine, topology: Topology
) -> FeatureSet:
    """The pass over the samples; one that was stopped goes on."""
    half = reference.floor_images
    inputs = {"images": samples.sha256, "half": str(half), "extractor": extractor.protocol,
              "weights": extractor.weights_sha256}  # fmt: skip
    folder = machine.state / "evaluate" / f"{stage_key(COLLECT, [], inputs)}-{machine.sample_batch}"
    with locked_folder(folder) if topology.is_main else nullcontext():
        return collect_features(
            shard_reader(samples), samples.num_images, extractor, topology, batch_size=machine.sample_batch,
            subsets=sample_parts(samples.num_images, half), label="evaluate", folder=folder,
        )  # fmt: skip


def write_tables(folder: Path, found: Scores, names: list[str]) -> None:
    """classes.csv and neighbours.csv."""
    classes: list[Row] = [
        {"label": row.label, "class": names[row.label] if row.label < len(names) else "", **asdict(row)}
        for row in found.classes
    ]
    (folder / "classes.csv").write_text(make_csv(classes, CLASS_COLUMNS), encoding="utf-8")
    (folder / "neighbours.csv").write_text(make_csv(table_rows(found.neighbours)), encoding="utf-8")


def report(
    machine: Machine, lineage: dict[str, Any], scores: dict[str, Any], protocol: dict[str, str], extractor: str
) -> None:
    """Scores, and what they were measured with, in the model's run; the model in the registry."""
    # Under names of their own: the run's git_commit is that of the training, and this may be a later one.
    tags = {f"eval.{name}": value for name, value in provenance().items()}
    with open_tracker(
        machine.state, lineage["train_key"], run_name="evaluate", tags=tags, enabled=machine.tracking
    ) as tracker:
        tracker.set_tags({f"eval.{name}": str(scores[name]) for name in ("num_reference", "floor_images")})
        tracker.set_tags({f"eval.{name}": value for name, value in protocol.items()})
        numbers = {f"eval/{k}": v for k, v in scores.items() if isinstance(v, float) or k == "num_samples"}
        tracker.log_metrics(numbers, int(lineage["images_seen"]), replace=True)
        tracker.log_artifact(paths.EVALUATE_METRICS, "metrics")
        tracker.log_artifact(paths.EVALUATION / "neighbours.png", "samples")
        name = f"fd_{extractor}"
        tracker.register_model(paths.MODEL, score_name=name, score=scores[name], protocol=protocol["protocol"])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    run_stage(main)
