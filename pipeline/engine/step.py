"""One optimizer step: draws, loss, gradients, average."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core import Condition, DiffusionLoss, NoiseSchedule, drop_labels, uniform_timesteps
from pipeline.data.loader import Batch
from pipeline.data.pixels import pixels_to_x0
from pipeline.engine.context import ContextMaker, to_condition, training_context
from pipeline.engine.state import QUARTILES, TrainState
from pipeline.runtime.rng import Stream, draw_integer, draw_normal, draw_uniform
from pipeline.runtime.topology import Topology


def sample_uniformly(u: Tensor, places: Tensor, num_timesteps: int) -> Tensor:
    """Every diffusion step equally often, whatever the place."""
    return uniform_timesteps(u, num_timesteps)


@dataclass(frozen=True, kw_only=True)
class OptimizerPlan:
    """What every kind of training needs to know of a step, decided before the first.

    Args:
        seed: of every draw.
        batch_size: images over all ranks.
        micro_batch: images a forward pass on one rank, at most.
        max_grad_norm: gradients are scaled down to this norm.
        dtype: of matrix work.
        learning_rate: images seen -> rate.
        compile: compile the network.
        guide_images: images seen after which a copy of the average is kept; None for none.
        section: of params.yaml, in messages and names of curves.
    """

    seed: int
    batch_size: int
    micro_batch: int
    max_grad_norm: float
    dtype: torch.dtype
    learning_rate: Callable[[int], float]
    compile: bool = False
    guide_images: int | None = None
    section: str = "train"


@dataclass(frozen=True, kw_only=True)
class StepPlan(OptimizerPlan):
    """What one step of the diffusion model does besides.

    Args:
        null_label: the label of "no class"; None for a model without classes.
        label_dropout: share of labels replaced by it.
        horizontal_flip: mirror half of the images.
        loss: `loss(denoiser, schedule, x0, t, noise, condition)`.
        timesteps: `timesteps(u, places, T)` -> (b,) int64 diffusion steps, from (b,) numbers in [0, 1) and the images'
            places in the global order.
        to_x0: `to_x0(stored, places)` -> (b, ...) data, from what the loader gives and the places.
        context: what makes the clean channels beside the image; None for a model without.
    """

    null_label: int | None
    label_dropout: float
    horizontal_flip: bool
    loss: Callable[..., DiffusionLoss]
    timesteps: Callable[[Tensor, Tensor, int], Tensor] = sample_uniformly
    to_x0: Callable[[Tensor, Tensor], Tensor] = pixels_to_x0
    context: ContextMaker | None = None


class OptimizerStep:
    """Trains `state` by one batch a call; a subclass says what the loss is. Never waits for the device."""

    plan: OptimizerPlan
    state: TrainState

    def __init__(self, plan: OptimizerPlan, state: TrainState, topology: Topology) -> None:
        self.plan = plan
        self.state = state
        self.topology = topology
        self.wrapped = topology.wrap(state.network)
        self.compiled = torch.compile(self.wrapped) if plan.compile else self.wrapped

    def __call__(self, batch: Batch) -> None:
        """Draw, add up gradients over micro-batches, clip, update the weights and their average."""
        plan, state = self.plan, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = plan.learning_rate(state.images_seen)
        starts = range(0, len(batch.images), plan.micro_batch)
        for start in starts:
            with nullcontext() if start == starts[-1] else self._local_gradients():
                self._backward(batch, slice(start, start + plan.micro_batch))
        norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), plan.max_grad_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update(state.network, plan.batch_size)
        # Equal on every rank: each adds its share, so that the sum over ranks counts the norm once.
        state.sums[state.norm_place] += norm.detach() / self.topology.world_size
        state.images_seen += plan.batch_size
        if plan.guide_images is not None and state.guide is None and state.images_seen >= plan.guide_images:
            state.guide = {name: value.clone() for name, value in state.ema.network.state_dict().items()}

    def _local_gradients(self) -> AbstractContextManager[object]:
        """All but the last micro-batch: gradients stay on this rank."""
        return self.topology.no_sync(self.wrapped)

    def _backward(self, batch: Batch, part: slice) -> None:
        """Add the gradients of a part of this rank's batch, and to the sums behind the loss curve."""
        raise NotImplementedError


class TrainStep(OptimizerStep):
    """A step of the diffusion model."""

    plan: StepPlan

    def __init__(self, plan: StepPlan, state: TrainState, schedule: NoiseSchedule, topology: Topology) -> None:
        super().__init__(plan, state, topology)
        self.schedule = schedule
        self._has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in state.network.modules())

    def _backward(self, batch: Batch, part: slice) -> None:
        plan, device = self.plan, self.topology.device
        positions = batch.positions[part]
        if (
            self._has_dropout
        ):  # torch's dropout can't be keyed by position; keyed by micro-batch it still resumes exactly
            torch.manual_seed(draw_integer(plan.seed, Stream.DROPOUT, int(positions[0])))
        x0, labels, places = (
            v.to(device, non_blocking=True) for v in (batch.images[part], batch.labels[part], positions)
        )
        x0, t, noise, condition = self._draw(plan.to_x0(x0, places), labels, places)
        with torch.autocast(device.type, plan.dtype, enabled=plan.dtype != torch.float32):
            parts = plan.loss(self.compiled, self.schedule, x0, t, noise, condition)
        # DDP averages over ranks: this makes the gradient that of the mean over the global batch.
        (parts.loss.sum() * (self.topology.world_size / plan.batch_size)).backward()  # type: ignore[no-untyped-call]
        sums = torch.stack((parts.loss.sum(), parts.loss_simple.sum(), parts.loss_vlb.sum()))
        self.state.sums[:3] += sums.detach()
        self.state.sums[4:] += sum_quarters(parts.loss.detach(), t, self.schedule.num_timesteps)

    def _draw(self, x0: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """Everything random about a batch, keyed by each image's place in the global order."""
        plan = self.plan
        u = draw_uniform(plan.seed, Stream.TIMESTEP, places)
        t = plan.timesteps(u, places, self.schedule.num_timesteps)
        noise = draw_normal(plan.seed, Stream.NOISE, places, tuple(x0.shape[1:]))
        if plan.horizontal_flip:
            mirror = draw_uniform(plan.seed, Stream.FLIP, places) < 0.5
            x0 = torch.where(mirror[:, None, None, None], x0.flip(-1), x0)
        context = None if plan.context is None else training_context(plan.context, x0, plan.seed, places)
        if plan.null_label is None:
            return x0, t, noise, to_condition(None, context)
        drop = draw_uniform(plan.seed, Stream.LABEL_DROPOUT, places) < plan.label_dropout
        return x0, t, noise, to_condition(drop_labels(labels, drop, plan.null_label), context)


def sum_quarters(loss: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Sums of the loss over the images in each quarter of the chain, then their numbers.

    By comparison and sum, not by scattering, whose order of adding would change from run to run on a GPU.

    Args:
        loss: (b,).
        t: (b,) int64 in [0, T).
        num_timesteps: T.

    Returns:
        (8,) float64.

    Example:
        >>> sum_quarters(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 99, 50]), 100).tolist()
        [1.0, 0.0, 4.0, 2.0, 1.0, 0.0, 1.0, 1.0]
    """
    count = len(QUARTILES)
    inside = (t * count // num_timesteps)[:, None] == torch.arange(count, device=t.device)
    total = torch.where(inside, loss[:, None].double(), 0.0).sum(0)
    return torch.cat((total, inside.sum(0).double()))
