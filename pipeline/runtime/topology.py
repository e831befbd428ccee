"""Ranks, devices and what they say to each other. The only importer of torch.distributed; a world of one is the same
class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import UserError
from pipeline.machine import Machine

_TIMEOUT = timedelta(minutes=10)
_LONG_WAIT = timedelta(days=1)


class Topology:
    """One process's place in the world. Made by :func:`start_topology`.

    Args:
        rank, world_size: of all processes, over all nodes.
        local_rank, local_world_size: on this node.
        device: where this process computes.
    """

    def __init__(
        self, rank: int, world_size: int, local_rank: int, local_world_size: int, device: torch.device
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank, self.local_world_size = local_rank, local_world_size
        self.device = device
        self._stop_group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size > 1 else None
        self._wait_group = dist.new_group(backend="gloo", timeout=_LONG_WAIT) if world_size > 1 else None
        self._pending_stop: tuple[dist.Work | None, Tensor] | None = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that speaks and writes."""
        return self.rank == 0

    def slice_of(self, count: int) -> slice:
        """This rank's contiguous share of `count` items; shares differ by at most one, and together are all of them."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, with gradients averaged over ranks by DDP where there are several."""
        if self.world_size == 1:
            return network
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            network, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )

    def no_sync(self, network: nn.Module) -> AbstractContextManager[None]:
        """Keep gradients local inside this context: all but the last micro-batch of a step."""
        return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks on the main one, in the order of ranks; the others get their own back.

        Args:
            rows: (n, ...) on the CPU; n may differ between ranks, and a rank without any need not know the rest of the
                shape.
        """
        if self.world_size == 1:
            return rows
        flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
        shapes = torch.zeros(self.world_size, 2, dtype=torch.int64)
        shapes[self.rank] = torch.tensor(flat.shape)
        dist.all_reduce(shapes)
        most, width = shapes.amax(0).tolist()
        padded = flat.new_zeros((most, width))
        padded[: len(flat), : flat.shape[1]] = flat
        parts = [torch.empty_like(padded) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(padded, parts)
        if parts is None:
            return rows
        joined = torch.cat([part[:count] for part, count in zip(parts, shapes[:, 0].tolist(), strict=True)])
        return joined.view(-1, *rows.shape[1:]) if len(rows) else joined

    def from_main(self, value: int) -> int:
        """The main rank's integer, on every rank."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(box, src=0)
        return int(box)

    def barrier(self) -> None:
        """Wait for every rank, however long its work takes."""
        if self._wait_group is not None:
            dist.barrier(group=self._wait_group)

    def agree_to_stop(self, wish: bool) -> bool:
        """True on every rank at the same call, one call after any rank first wished it.

        One call behind, so that no rank waits for another inside a step. Runs on CPU memory: no device sync.
        """
        flag = torch.tensor([int(wish)])
        if self._stop_group is None:
            return wish
        previous = self._pending_stop
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._stop_group, async_op=True)
        self._pending_stop = (work, flag)
        if previous is None:
            return False
        if previous[0] is not None:
            previous[0].wait()
        return bool(previous[1])


@contextmanager
def start_topology(machine: Machine) -> Iterator[Topology]:
    """Join the world that torchrun's environment describes (or be alone), and leave it at the end.

    Raises:
        UserError: a CUDA device is asked for and absent, or there are more processes on this node than GPUs.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    use_cuda = machine.device == "cuda" or (machine.device == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this node has {torch.cuda.device_count()} CUDA devices, local rank {local_rank} needs one of its own: "
            "start fewer processes (--nproc-per-node) or set PIPELINE_DEVICE=cpu"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # torchrun sets OMP_NUM_THREADS=1 for several processes; share the cores out instead.
    torch.set_num_threads(machine.threads or max(1, cores // local_world))
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=_TIMEOUT)
    try:
        yield Topology(rank, world_size, local_rank, local_world, device)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
