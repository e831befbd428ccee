"""Stage: score the samples against the real images. `python -m pipeline.evaluate`."""

from __future__ import annotations

import logging

import numpy as np

from ddpm_core.frechet import Moments
from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.sources import open_shards
from pipeline.data.store import ShardSource
from pipeline.engine.collect import collect_features, shard_reader
from pipeline.engine.features import load_extractor
from pipeline.engine.score import (
    class_accuracy,
    context_psnr,
    halves,
    load_reconstruction_scores,
    load_reference,
    mean_distance,
    memorised_share,
    read_vectors,
    save_moments,
)
from pipeline.errors import UserError
from pipeline.lineage import provenance
from pipeline.machine import load_machine
from pipeline.runtime.files import load_json, save_json, whole_folder
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import start_topology
from pipeline.runtime.tracking import open_tracker

log = logging.getLogger(__name__)


def main() -> None:
    """Features of all samples in one pass, then every score; written as metrics and to the model's run."""
    params, machine = load_params().evaluate, load_machine()
    restart_under_torchrun("pipeline.evaluate", machine)
    real, source = open_shards(paths.SHARDS, machine.shards, ShardCache(machine.cache, machine.cache_bytes))
    samples = load_index(paths.SAMPLES)
    reference, moments = load_reference(paths.REFERENCE, real)
    size = reference["floor_images"]
    parts = {f"part_{i}": np.arange(i * size, (i + 1) * size) for i in range(2) if (i + 1) * size <= samples.num_images}
    model = load_json(paths.MODEL / "model.json")
    with start_topology(machine) as topology:
        extractor = load_extractor(
            reference["extractor"], topology.device, inception_weights=reference["inception_weights"]
        )
        if extractor.protocol != reference["protocol"]:
            raise UserError(f"{paths.REFERENCE} was made as `{reference['protocol']}`: run `dvc repro reference` again")
        generated = collect_features(
            shard_reader(samples), samples.num_images, extractor, topology, batch_size=machine.sample_batch,
            subsets=parts, label="evaluate",
        ).moments  # fmt: skip
        if not topology.is_main:
            return
    scores = {
        **distances(reference["extractor"], moments, generated, list(parts)),
        **pixel_scores(real, samples, params.real_images, source),
        **(context_psnr(real, samples, source) if "context" in model else {}),
        "num_samples": samples.num_images,
        "num_reference": real.num_images,
        "floor_images": size,
        "protocol": f"{extractor.protocol} / {samples.num_images} samples, {real.num_images} real, "
        f"pixels of {min(params.real_images, real.num_images)}",
    }
    with whole_folder(paths.EVALUATION) as aside:
        save_moments(aside / "all.safetensors", generated["all"])
    lineage = model["lineage"]
    if "first_stage" in model:
        scores |= load_reconstruction_scores(paths.ENCODE_METRICS, extractor.protocol)
    save_json(paths.EVALUATE_METRICS, {**scores, "train_key": lineage["train_key"]})
    # Under names of their own: the run's git_commit is that of the training, and this may be a later one.
    tags = {f"eval.{name}": value for name, value in provenance().items()}
    with open_tracker(
        machine.state, lineage["train_key"], run_name="evaluate", tags=tags, enabled=machine.tracking
    ) as tracker:
        tracker.set_tags({f"eval.{name}": str(scores[name]) for name in ("protocol", "num_reference", "floor_images")})
        numbers = {f"eval/{k}": v for k, v in scores.items() if isinstance(v, float) or k == "num_samples"}
        tracker.log_metrics(numbers, int(lineage["images_seen"]), replace=True)
        tracker.log_artifact(paths.EVALUATE_METRICS, "metrics")
        name = f"fd_{reference['extractor']}"
        tracker.register_model(paths.MODEL, score_name=name, score=scores[name], protocol=scores["protocol"])
    shown = ", ".join(f"{k} {_short(v)}" for k, v in scores.items() if not isinstance(v, str))
    log.info("evaluate: %s; peak memory %.2f GiB a process", shown, peak_memory_gib())


def distances(
    extractor: str, real: dict[str, Moments], generated: dict[str, Moments], parts: list[str]
) -> dict[str, float | None]:
    """Frechet distances: of everything; between two halves of the real set; of as many samples against each half.

    The last two have the same number of images on both sides, so their ratio says how far from real the samples are,
    free of the bias that a small number brings. None where there are fewer samples than images in a half.
    """
    floor = mean_distance([real["half_a"]], [real["half_b"]])
    like = mean_distance([generated[p] for p in parts], [real["half_a"], real["half_b"]]) if parts else None
    if like is None:
        log.warning(
            "warning: fd_ratio needs %d samples, as many as reference.floor_images: raise sample.num_samples",
            real["half_a"].n,
        )
    return {
        f"fd_{extractor}": mean_distance([generated["all"]], [real["all"]]),
        "fd_floor": floor,
        "fd_like_for_like": like,
        "fd_ratio": None if like is None or floor == 0 else like / floor,
    }


def pixel_scores(
    real: ShardIndex, samples: ShardIndex, most: int, source: ShardSource | None = None
) -> dict[str, float | None]:
    """Agreement with the asked class, and how many samples are near copies; each beside its value for real images."""
    pixels, labels = read_vectors(real, most, source)
    generated, asked = read_vectors(samples, samples.num_images)
    accuracy = class_accuracy(pixels, labels, generated, asked)
    one, other = halves(len(pixels), len(pixels) // 2)
    return {
        "class_accuracy": accuracy[0],
        "class_accuracy_real": accuracy[1],
        "memorised_share": memorised_share(generated, pixels),
        "memorised_share_real": memorised_share(pixels[one], pixels[other]),
    }


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    run_stage(main)
