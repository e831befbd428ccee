"""One optimizer step of the autoencoder, and of the discriminator where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpm_core import FirstStageLoss, KLAutoencoder, adaptive_weight, hinge_loss
from pipeline.data.loader import Batch
from pipeline.data.pixels import to_unit_range
from pipeline.engine.state import TrainState
from pipeline.engine.step import OptimizerPlan, OptimizerStep
from pipeline.runtime.rng import Stream, draw_normal, draw_uniform
from pipeline.runtime.topology import Topology

# Means over images, and the norm over steps; kl is in nats an image. The adversary's are 0 before it begins.
LOGGED = ("loss", "reconstruction", "kl", "perceptual", "adversarial", "discriminator", "adaptive_weight", "grad_norm")


@dataclass
class Adversary:
    """The discriminator and its optimizer."""

    network: nn.Module
    optimizer: torch.optim.Optimizer


@dataclass
class AutoencoderState(TrainState):
    """All that training an autoencoder changes; `network` is a KLAutoencoder.

    Args:
        adversary: None without an adversarial term.
        sums: (len(LOGGED),) sums since the last row of `history`.
    """

    columns: ClassVar[tuple[str, ...]] = ("images", *LOGGED, "learning_rate")
    norm_place: ClassVar[int] = LOGGED.index("grad_norm")

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(LOGGED), dtype=torch.float64))
    adversary: Adversary | None = None

    def means(self, sums: Sequence[float], images: float, steps: float) -> dict[str, float]:
        """A row of the loss curve without its ends, from the sums over ranks since the last one."""
        return {
            name: total / (steps if name == "grad_norm" else images) for name, total in zip(LOGGED, sums, strict=True)
        }

    def tensors(self) -> dict[str, Any]:
        """As of a diffusion model, and the adversary's."""
        content = super().tensors()
        if self.adversary is not None:
            content["discriminator"] = self.adversary.network.state_dict()
            content["discriminator_optimizer"] = self.adversary.optimizer.state_dict()
        return content

    def load(
        self, tensors: dict[str, Any], average: dict[str, Tensor], images_seen: int, history: list[dict[str, float]]
    ) -> None:
        """Take over what :meth:`tensors` gave."""
        super().load(tensors, average, images_seen, history)
        if self.adversary is not None:
            self.adversary.network.load_state_dict(tensors["discriminator"])
            self.adversary.optimizer.load_state_dict(tensors["discriminator_optimizer"])


@dataclass(frozen=True, kw_only=True)
class AutoencoderPlan(OptimizerPlan):
    """What one step of the autoencoder does besides.

    Args:
        horizontal_flip: mirror half of the images.
        loss: `loss(reconstruction, target, mean, log_variance)`.
        adversarial_weight: of the adversary's part, times the adaptive weight.
        adversarial_start_images: images seen before the adversary begins, with learning too.
    """

    section: str = "autoencoder"
    horizontal_flip: bool
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], FirstStageLoss]
    adversarial_weight: float = 0.0
    adversarial_start_images: int = 0


class AutoencoderStep(OptimizerStep):
    """A step of the autoencoder. Noise and flips are keyed by each image's place in the global order.

    The adaptive weight is that of a micro-batch, so with an adversary the result depends on how a batch is cut.
    """

    plan: AutoencoderPlan
    state: AutoencoderState

    def __init__(self, plan: AutoencoderPlan, state: AutoencoderState, topology: Topology) -> None:
        super().__init__(plan, state, topology)
        assert isinstance(state.network, KLAutoencoder)
        self.network = state.network
        self.critic = topology.wrap(state.adversary.network) if state.adversary else None

    @property
    def _contested(self) -> bool:
        return self.critic is not None and self.state.images_seen >= self.plan.adversarial_start_images

    def __call__(self, batch: Batch) -> None:
        """A step of the autoencoder against the adversary as it is, and one of the adversary on the same images."""
        adversary, contested = self.state.adversary, self._contested
        rate = self.plan.learning_rate(self.state.images_seen)
        super().__call__(batch)
        if adversary is not None and contested:
            for group in adversary.optimizer.param_groups:
                group["lr"] = rate
            torch.nn.utils.clip_grad_norm_(adversary.network.parameters(), self.plan.max_grad_norm)
            adversary.optimizer.step()
            adversary.optimizer.zero_grad(set_to_none=True)

    def _local_gradients(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(super()._local_gradients())
        if self.critic is not None:
            stack.enter_context(self.topology.no_sync(self.critic))
        return stack

    def _backward(self, batch: Batch, part: slice) -> None:
        plan, device = self.plan, self.topology.device
        images, places = (v[part].to(device, non_blocking=True) for v in (batch.images, batch.positions))
        x, noise = self._draw(to_unit_range(images), places)
        # DDP averages over ranks: this makes the gradient that of the mean over the global batch.
        share = self.topology.world_size / plan.batch_size
        with self._autocast():
            reconstruction, *moments = (output.float() for output in self.compiled(x, noise))
        parts = plan.loss(reconstruction, x, *moments)
        loss, sums = parts.loss.sum(), [parts.loss, parts.reconstruction, parts.kl, parts.perceptual]
        if self._contested:
            against, weight = self._against_critic(reconstruction, loss / len(x))
            loss = loss + plan.adversarial_weight * weight * against.sum()
            sums += [against, self._teach_critic(x, reconstruction.detach(), share), weight.expand(len(x))]
        (loss * share).backward()  # type: ignore[no-untyped-call]
        self.state.sums[: len(sums)] += torch.stack([value.detach().double().sum() for value in sums])

    def _against_critic(self, reconstruction: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) how far from real the critic finds the reconstructions, and the weight of that beside `loss`."""
        assert self.state.adversary is not None
        critic = self.state.adversary.network
        critic.requires_grad_(False)  # no gradients for it here, and the bare network: nothing for ranks to share
        with self._autocast():
            against = -critic(reconstruction).float().flatten(1).mean(1)
        critic.requires_grad_(True)
        return against, adaptive_weight(loss, against.mean(), self.network.last_layer)

    def _teach_critic(self, real: Tensor, fake: Tensor, share: float) -> Tensor:
        """Add the critic's gradients; (b,) its loss."""
        assert self.critic is not None
        with self._autocast():
            of_real, of_fake = self.critic(torch.cat((real, fake))).float().chunk(2)
        loss = hinge_loss(of_real, of_fake)
        (loss.sum() * share).backward()  # type: ignore[no-untyped-call]
        return loss

    def _autocast(self) -> torch.autocast:
        dtype = self.plan.dtype
        return torch.autocast(self.topology.device.type, dtype, enabled=dtype != torch.float32)

    def _draw(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        plan = self.plan
        if plan.horizontal_flip:
            mirror = draw_uniform(plan.seed, Stream.FLIP, places) < 0.5
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        height, width = (size // self.network.factor for size in x.shape[-2:])
        return x, draw_normal(plan.seed, Stream.POSTERIOR, places, (self.network.latent_channels, height, width))
