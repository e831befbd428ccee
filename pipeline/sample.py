"""Stage: draw images from the trained model. `python -m pipeline.sample`, or the same under torchrun."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline import paths
from pipeline.build.networks import build_network, build_schedule, place_network
from pipeline.build.sampling import build_sampler
from pipeline.config import load_params
from pipeline.data.index import ShardIndex
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.checkpoint import GUIDE_NAME, WEIGHTS_NAME, image_form, load_model_spec, load_weights
from pipeline.engine.film import draw_film
from pipeline.engine.generate import GRID_ROWS, ImageSampler, generate_blocks, read_blocks
from pipeline.first_stage import WEIGHTS_IN_MODEL, load_first_stage
from pipeline.guides import load_context_images, load_guides
from pipeline.lineage import stage_key
from pipeline.machine import load_machine
from pipeline.runtime.files import locked_folder, sha256_file, whole_file
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology
from pipeline.runtime.tracking import Tracker, open_tracker
from pipeline.sections import SampleParams

log = logging.getLogger(__name__)
SHARD_IMAGES = 10_000
FILM_SAMPLES, FILM_COLUMNS = 4, 12


def main() -> None:
    """Sample seeds 0..num_samples-1 over all ranks, going on where an earlier start was stopped."""
    params, machine = load_params().sample, load_machine()
    restart_under_torchrun("pipeline.sample", machine)
    spec = load_model_spec(paths.MODEL)
    images = load_context_images(spec)
    inputs = {name: sha256_file(path) for name, path in input_files(params).items()}
    key = stage_key("pipeline.sample", [params], inputs | ({} if images is None else {"shards": images.sha256}))
    folder = machine.state / "sample" / f"{key}-{machine.sample_batch}"
    with start_topology(machine) as topology:
        train_key, name = spec["lineage"]["train_key"], f"sample-{key[:6]}"
        speaks = topology.is_main and machine.tracking
        with (
            locked_folder(folder) if topology.is_main else nullcontext(),
            open_tracker(machine.state, train_key, run_name=name, tags={}, enabled=speaks) as tracker,
        ):
            started = time.monotonic()
            sampler = load_sampler(params, spec, topology, images, machine.channels_last)
            blocks = generate_blocks(sampler, folder, params.num_samples, machine.sample_batch, topology)
            if topology.is_main:
                publish(sampler, spec, params, blocks)
                publish_film(sampler, topology)
                report(tracker, params, spec, time.monotonic() - started)
                shutil.rmtree(folder)
            topology.barrier()


def input_files(params: SampleParams) -> dict[str, Path]:
    """The files that reach the samples, by name."""
    files = {"weights": paths.MODEL / WEIGHTS_NAME, "spec": paths.MODEL / "model.json"}
    others = {
        "guide": (params.autoguidance != 1, paths.MODEL / GUIDE_NAME),
        "classifier": (params.classifier_scale != 0, paths.CLASSIFIER / WEIGHTS_NAME),
        "classifier_spec": (params.classifier_scale != 0, paths.CLASSIFIER / "model.json"),
    }
    return files | {name: path for name, (asked, path) in others.items() if asked and path.is_file()}


def load_sampler(
    params: SampleParams,
    spec: dict[str, Any],
    topology: Topology,
    images: ShardIndex | None,
    channels_last: bool | None,
) -> ImageSampler:
    """The trained network on this rank's device, behind the sampler that params ask for."""
    network = build_network(spec)
    load_weights(paths.MODEL, network)
    place_network(network, topology.device, channels_last).eval().requires_grad_(False)
    guides = load_guides(params, spec, topology.device, model=paths.MODEL, classifier=paths.CLASSIFIER)
    first_stage = load_first_stage(spec, paths.MODEL / WEIGHTS_IN_MODEL, topology.device)
    schedule = build_schedule(spec).to(topology.device)
    return build_sampler(params, spec, network, schedule, images, first_stage, **guides)


def publish(sampler: ImageSampler, spec: dict[str, Any], params: SampleParams, blocks: list[Path]) -> None:
    """Pack the blocks into WebDataset shards, and draw a grid with one column a class."""
    seeds = torch.arange(params.num_samples)
    labels = sampler.labels(seeds)
    notes = None if sampler.contexts is None else sampler.contexts.notes(seeds)

    def samples() -> Iterator[Sample]:
        for seed, image in enumerate(read_blocks(blocks)):
            label = None if labels is None else int(labels[seed])
            note = {} if notes is None else notes[seed]
            yield Sample(image.transpose(1, 2, 0), label, {"seed": seed, "sample_seed": params.seed, **note})

    channels, image_size = image_form(spec)
    write_shards(
        paths.SAMPLES, samples(), image_size=image_size, channels=channels, encoding="raw",
        classes=tuple(spec["classes"]), shard_images=SHARD_IMAGES,
    )  # fmt: skip
    shown = [image for image, _ in zip(read_blocks(blocks), range(GRID_ROWS * sampler.columns), strict=False)]
    with whole_file(paths.SAMPLE_GRID) as aside:
        Image.fromarray(sampler.picture(np.stack(shown))).save(aside, format="PNG")


def publish_film(sampler: ImageSampler, topology: Topology) -> None:
    """Draw how the first samples came out of noise."""
    film = draw_film(sampler, torch.arange(FILM_SAMPLES, device=topology.device), FILM_COLUMNS)
    with whole_file(paths.DENOISING_FILM) as aside:
        Image.fromarray(film).save(aside, format="PNG")


def report(tracker: Tracker, params: SampleParams, spec: dict[str, Any], seconds: float) -> None:
    """What the model's run says of these samples; a later sampling of the same model replaces it."""
    step = int(spec["lineage"]["images_seen"])
    speed = params.num_samples / seconds
    tracker.set_tags({f"sample.{key}": str(value) for key, value in params.model_dump().items()})
    tracker.log_metrics({"sample/images_per_second": speed}, step, replace=True)
    tracker.log_artifact(paths.SAMPLE_GRID, "samples")
    tracker.log_artifact(paths.DENOISING_FILM, "samples")
    log.info("sample: done, %s images at %.1f images/s, peak memory %.2f GiB a process",
             f"{params.num_samples:,}", speed, peak_memory_gib())  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
