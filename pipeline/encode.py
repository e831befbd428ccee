"""Stage: images -> latents, once, by the trained first stage. `python -m pipeline.encode`, or the same under torchrun.

What is stored of an image are the moments of its latent, so that training draws another latent in each epoch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline import paths
from pipeline.config import load_params
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.pixels import make_grid
from pipeline.data.store import ShardStore, read_meta
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.generate import generate_blocks, read_blocks
from pipeline.engine.latents import FirstStage, interleave, measure_scale
from pipeline.engine.reconstruction import score_reconstructions
from pipeline.engine.reference import Reference, halves, load_reference
from pipeline.engine.score import mean_distance
from pipeline.errors import UserError
from pipeline.first_stage import NOTE, WEIGHTS, load_trained
from pipeline.lineage import stage_key
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import locked_folder, save_json, sha256_file, whole_file
from pipeline.runtime.monitor import peak_memory_gib
from pipeline.runtime.process import restart_under_torchrun, run_stage
from pipeline.runtime.topology import Topology, start_topology

log = logging.getLogger(__name__)
BLOCK_IMAGES = 64  # images at once: no setting of the machine, as it reaches the last bits of what is stored
SHOWN_IMAGES, COLUMNS = 40, 10


def main() -> None:
    """Encode all images over all ranks, measure the scale, and score what comes back."""
    params, machine = load_params().encode, load_machine()
    if params is None:
        raise UserError("params.yaml has no section `encode`, so there are no latents: see recipes/latent")
    restart_under_torchrun("pipeline.encode", machine)
    index = load_index(paths.SHARDS)
    reference = load_reference(paths.REFERENCE, index)
    first_stage, spec = load_trained()
    check_images(index, spec)
    weights = sha256_file(paths.FIRST_STAGE / WEIGHTS)
    folder = machine.state / "encode" / stage_key("pipeline.encode", [], {"shards": index.sha256, "weights": weights})
    with start_topology(machine) as topology:
        first_stage.network.to(topology.device)
        with locked_folder(folder) if topology.is_main else nullcontext():
            blocks = encode(first_stage, index, folder, topology)
            if topology.is_main:
                scale = measure_scale(np.load(block, allow_pickle=False) for block in blocks)
                publish(index, blocks, spec, weights, scale, params.shard_images)
                show(first_stage, index, topology.device)
            scores = score(first_stage, index, reference, machine, topology)
            if topology.is_main:
                save_json(paths.ENCODE_METRICS, {"num_latents": index.num_images, "scale": scale, **scores})
                shutil.rmtree(folder)
                log.info("encode: done, %s latents, scale %.4f, PSNR %.1f dB, fd_reconstruction %.3f, peak memory "
                         "%.2f GiB a process", f"{index.num_images:,}", scale, scores["psnr_reconstruction"],
                         scores["fd_reconstruction"], peak_memory_gib())  # fmt: skip
            topology.barrier()


def check_images(index: ShardIndex, spec: dict[str, Any]) -> None:
    """Refuse images that the first stage was not made for."""
    expected, found = (spec["network"]["channels"], spec["image_size"]), (index.channels, index.image_size)
    if found != expected:
        raise UserError(
            f"{paths.FIRST_STAGE} encodes images of {expected[0]} channels and {expected[1]} px, but {paths.SHARDS} "
            f"has {found[0]} and {found[1]}: run `dvc repro autoencoder`"
        )


def encode(first_stage: FirstStage, index: ShardIndex, folder: Path, topology: Topology) -> list[Path]:
    """The moments of all images, in blocks dealt to the ranks: bit-equal for any number of them."""
    store = ShardStore(index)

    def moments(ids: Tensor) -> Tensor:
        return first_stage.encode(torch.from_numpy(store.read(ids.cpu().numpy())[0]).to(topology.device))

    return generate_blocks(moments, folder, index.num_images, BLOCK_IMAGES, topology, label="encode")


def publish(
    index: ShardIndex, blocks: list[Path], spec: dict[str, Any], weights: str, scale: float, shard_images: int
) -> None:
    """Pack the moments with the images' labels and all else that is known of them."""
    labels = index.labels.tolist()

    def samples() -> Iterator[Sample]:
        for moments, label, meta in zip(read_blocks(blocks), labels, read_meta(index), strict=True):
            yield Sample(moments.transpose(1, 2, 0), None if label < 0 else label, meta)

    network = spec["network"]
    write_shards(
        paths.LATENTS, samples(), image_size=index.image_size // network["factor"],
        channels=2 * network["latent_channels"], encoding="moments", classes=index.classes, shard_images=shard_images,
        notes={
            NOTE: {
                "first_stage": {
                    "network": network, "image_size": index.image_size, "scale": scale, "weights_sha256": weights,
                }
            }
        },
    )  # fmt: skip


def show(first_stage: FirstStage, index: ShardIndex, device: torch.device) -> None:
    """Images over their reconstructions, spread over the whole set."""
    ids = np.linspace(0, index.num_images - 1, min(SHOWN_IMAGES, index.num_images)).astype(np.int64)
    images = torch.from_numpy(ShardStore(index).read(ids)[0]).to(device)
    grid = make_grid(interleave(images, first_stage.reconstruct(images), COLUMNS), COLUMNS)
    with whole_file(paths.RECONSTRUCTIONS) as aside:
        Image.fromarray(grid).save(aside, format="PNG")


def score(
    first_stage: FirstStage,
    index: ShardIndex,
    reference: Reference,
    machine: Machine,
    topology: Topology,
) -> dict[str, Any]:
    """Frechet distances of the reconstructions of one half of `reference.floor_images` images, and their PSNR.

    `fd_reconstruction` is to the same images; `fd_reconstruction_like_for_like` to the other half, as samples are
    compared, so `fd_like_for_like` of samples can hardly be below it.
    """
    extractor, real = reference.load_extractor(topology.device), reference.moments
    ids, _ = halves(index.num_images, reference.floor_images)
    made, psnr = score_reconstructions(
        index, ids, first_stage.reconstruct, extractor, topology, batch_size=machine.sample_batch
    )
    return {
        "fd_reconstruction": mean_distance([made], [real["half_a"]]),
        "fd_reconstruction_like_for_like": mean_distance([made], [real["half_b"]]),
        "fd_floor": mean_distance([real["half_a"]], [real["half_b"]]),
        "psnr_reconstruction": psnr,
        "num_reconstructions": len(ids),
        "protocol": extractor.protocol,
    }


if __name__ == "__main__":
    run_stage(main)
