"""What a training is built of: order, optimizer, rate, steps, precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import ddpm_core
from ddpm_core import EMA
from pipeline.data.index import ShardIndex
from pipeline.data.loader import Batch, iterate_batches
from pipeline.data.mixing import BalancedOrder, MixedOrder, MixedWindowedOrder
from pipeline.data.order import Order, RandomOrder, WindowedOrder
from pipeline.data.store import ShardSource
from pipeline.engine.state import NUM_SUMS, TrainState
from pipeline.errors import UserError
from pipeline.machine import Machine
from pipeline.runtime.rng import Stream, draw_integer
from pipeline.runtime.topology import Topology
from pipeline.sections import OptimizerParams, Params, TrainParams


def build_order(params: Params, indexes: Sequence[ShardIndex]) -> Order:
    """The order in which training sees the images of the sets, which are those of order.mix where there is one.

    Raises:
        UserError: the sets can't be drawn from so.
    """
    config, seed = params.order, params.train.seed
    weights = [entry.weight for entry in config.mix] if config.mix else [1.0]
    if config.kind == "windowed":
        sizes = [index.shard_sizes for index in indexes]
        form = {"batch_size": params.train.batch_size, "num_lanes": config.lanes, "window_images": config.window_images}
        if len(indexes) == 1:
            return WindowedOrder(sizes[0], seed, **form)
        return MixedWindowedOrder(sizes, weights, seed, **form)

    def order_of(index: ShardIndex, own_seed: int) -> Order:
        return (
            BalancedOrder(index.labels, own_seed) if config.class_balanced else RandomOrder(index.num_images, own_seed)
        )

    if len(indexes) == 1:
        return order_of(indexes[0], seed)
    seeds = [draw_integer(seed, Stream.MIX, number) for number in range(len(indexes))]
    orders = [order_of(index, own_seed) for index, own_seed in zip(indexes, seeds, strict=True)]
    return MixedOrder(orders, [index.num_images for index in indexes], weights, seed)


def build_optimizer(params: OptimizerParams, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW in its fused form."""
    return torch.optim.AdamW(
        network.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )


def build_learning_rate(params: OptimizerParams) -> Callable[[int], float]:
    """Images seen -> learning rate: linear warm-up times the schedule."""

    def rate(images_seen: int) -> float:
        warmup = min(1.0, images_seen / params.warmup_images) if params.warmup_images else 1.0
        match params.learning_rate_schedule:
            case "constant":
                factor = 1.0
            case "cosine":
                factor = 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / params.total_images)))
        return params.learning_rate * warmup * factor

    return rate


def build_timestep_sampling(params: TrainParams) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Uniform numbers and places in the global order -> diffusion steps, the same for any number of ranks."""
    match params.timestep_sampling:
        case "uniform":
            return lambda u, places, num_timesteps: ddpm_core.uniform_timesteps(u, num_timesteps)
        case "stratified":
            size = params.batch_size
            return lambda u, places, num_timesteps: ddpm_core.stratified_timesteps(
                u, num_timesteps, places % size, size
            )


def build_precision(precision: str, device: torch.device, *, section: str = "train") -> torch.dtype:
    """The dtype of matrix work. `auto` is bfloat16 on CUDA devices that have it in hardware, else float32.

    Raises:
        UserError: bfloat16 is asked for on a CUDA device without it.
    """
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    match precision:
        case "auto":
            return torch.bfloat16 if has_bfloat16 else torch.float32
        case "bfloat16":
            if device.type == "cuda" and not has_bfloat16:
                raise UserError(
                    f"params.yaml: {section}.precision is bfloat16, which this GPU lacks: use auto or float32"
                )
            return torch.bfloat16
    return torch.float32


def check_batch_size(params: OptimizerParams, topology: Topology, *, section: str) -> None:
    """Every rank must get an image of each batch.

    Raises:
        UserError: the world is larger than the batch.
    """
    if params.batch_size < topology.world_size:
        raise UserError(
            f"params.yaml: {section}.batch_size is {params.batch_size}, less than {topology.world_size} ranks"
        )


def build_state(params: OptimizerParams, network: nn.Module, device: torch.device) -> TrainState:
    """A network at the start of its training, with its average and optimizer; it is on the device already."""
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
    return TrainState(network, EMA(network, params.ema_half_life_images), build_optimizer(params, network), sums=sums)


def count_steps(params: OptimizerParams) -> int:
    """Optimizer steps of the whole training; the last batch may go beyond `total_images`."""
    return -(-params.total_images // params.batch_size)


def build_batches(
    params: OptimizerParams,
    machine: Machine,
    topology: Topology,
    indexes: Sequence[ShardIndex],
    order: Order,
    *,
    images_seen: int,
    sources: Sequence[ShardSource] | None = None,
) -> Iterator[Batch]:
    """This rank's batches from where a training is to its last step."""
    on_gpu = topology.device.type == "cuda"
    return iterate_batches(
        indexes, order,
        batch_size=params.batch_size,
        steps=range(images_seen // params.batch_size, count_steps(params)),
        share=topology.slice_of(params.batch_size),
        workers=machine.workers if machine.workers is not None else 2 * on_gpu,
        pin_memory=on_gpu,
        sources=sources,
    )  # fmt: skip


def wants_compile(machine: Machine, device: torch.device) -> bool:
    """Whether to compile: as asked for, else on CUDA alone; on a CPU it costs minutes and gains nothing."""
    return machine.compile if machine.compile is not None else device.type == "cuda"
