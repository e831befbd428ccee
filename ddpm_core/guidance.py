"""Denoisers that wrap a denoiser: a sampler sees no difference.

They nest. What depends on the diffusion step is decided by :func:`denoiser_at`, once for each step of a chain and on
the host, so that a sampler's loop neither waits for the device nor pays for guidance that is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ddpm_core.conditioning import Condition
from ddpm_core.samplers.grid import Step
from ddpm_core.schedules import NoiseSchedule, at
from ddpm_core.targets import unknown_parameterization

Denoiser = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (b, ...), t (b,) int64, condition or None) -> the network's output, of the shape of x_t."""

Null = int | Tensor | Mapping[str, int | Tensor]
"""What stands for "nothing": a label, one sample's (...) query, or one of these by name."""


class StepwiseDenoiser(Protocol):
    """A denoiser that differs from step to step."""

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition, /) -> Tensor: ...

    def at_step(self, step: Step) -> Denoiser:
        """What it is at one step of a chain, where every sample of a batch is at that step."""
        ...


def denoiser_at(denoiser: Denoiser, step: Step) -> Denoiser:
    """What a denoiser is at one step of a chain: itself, unless it is a :class:`StepwiseDenoiser`.

    Its class must have the method: a compiled module passes on the attributes of the module inside, which is not
    compiled. Asking the class is also forty times as fast as an `isinstance` with a protocol.
    """
    at_step = getattr(type(denoiser), "at_step", None)
    return denoiser if at_step is None else at_step(denoiser, step)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """null + scale * (conditional - null): 1 is purely conditional, 0 purely unconditional, above 1 sharpens.

    At 0 and 1 only the call that counts is made. eps, x0 and v are linear in each other given x_t, so guiding any of
    them guides all. A learned variance is not guided: its channels are those of the conditional call.

    **Source**: Ho and Salimans 2022, equation 6, whose w is our scale - 1.

    Args:
        denoiser: takes conditions and their null. One that adds context channels belongs inside, as this one takes
            the channels of x_t for those to guide.
        scale: the guidance scale.
        null: for labels the label of "no class"; for another query one sample's null of shape (...); for conditions
            by name a mapping of these. A name that is left out keeps its condition in both calls.
        batched: both calls as one of twice the batch; False for two, True for one, None for one except on a CPU,
            which gains nothing from the larger batch and loses time on its memory.

    Example:
        >>> guided = ClassifierFreeGuidance(lambda x_t, t, labels: labels[:, None].float(), 3.0, null=10)
        >>> guided(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([4]))
        tensor([[-8.]])
    """

    denoiser: Denoiser
    scale: float
    null: Null
    batched: bool | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided output; with `condition` None it is the unconditional one.

        Args:
            x_t: (b, c, ...).
            t: (b,) int64.
            condition: as the denoiser takes it, or None.

        Raises:
            TypeError: the null is a mapping where the condition is none, or the other way round, or it names an
                unknown condition.
        """
        if condition is None or self.scale == 1:
            return self.denoiser(x_t, t, condition)
        null = make_null(condition, self.null)
        if self.scale == 0:
            return self.denoiser(x_t, t, null)
        if self.batched or (self.batched is None and x_t.device.type != "cpu"):
            both = self.denoiser(torch.cat((x_t, x_t)), torch.cat((t, t)), _concatenate(condition, null))
            conditional, unconditional = both.chunk(2)
        else:
            conditional, unconditional = self.denoiser(x_t, t, condition), self.denoiser(x_t, t, null)
        return _extrapolate(unconditional, conditional, self.scale, x_t.shape[1])

    def at_step(self, step: Step) -> Denoiser:
        """The same around what the inner denoiser is at that step."""
        return replace(self, denoiser=denoiser_at(self.denoiser, step))


@dataclass(frozen=True)
class AutoGuidance:
    """guide + scale * (denoiser - guide): away from the errors that a worse version of the network makes, and makes
    more of. Unlike the null of classifier-free guidance it has the same condition, so variety is kept.

    **Source**: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", equation 3. A learned
    variance is the denoiser's.

    Args:
        denoiser: the network.
        guide: a smaller or less trained one, of the same parameterization and schedule.
        scale: 1 is the denoiser alone, at no extra cost; above 1 guides.
    """

    denoiser: Denoiser
    guide: Denoiser
    scale: float

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided output; shapes as in `Denoiser`."""
        output = self.denoiser(x_t, t, condition)
        if self.scale == 1:
            return output
        return _extrapolate(self.guide(x_t, t, condition), output, self.scale, x_t.shape[1])

    def at_step(self, step: Step) -> Denoiser:
        """The same around what both are at that step."""
        return replace(self, denoiser=denoiser_at(self.denoiser, step), guide=denoiser_at(self.guide, step))


@dataclass(frozen=True)
class IntervalGuidance:
    """A guided denoiser where the noise level lies in an interval, the plain one, at its cost, elsewhere.

    Guidance at high noise costs variety and at low noise does nothing, so half of the interval does better than all.

    **Source**: Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution
    quality", equation 6. The noise level is their sigma = sqrt((1 - abar) / abar), for any sampler and spacing.

    Args:
        guided: where low < sigma <= high.
        plain: elsewhere.
        schedule: says the noise level.
        interval: (low, high).

    Raises:
        ValueError: the interval is empty or below 0.
    """

    guided: Denoiser
    plain: Denoiser
    schedule: NoiseSchedule
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"interval is {self.interval}, expected two rising noise levels, at least 0")

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Sample by sample, both being computed: for a caller whose batch mixes steps. A chain pays for one."""
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t)
        sigma = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t) / signal
        inside = (self.interval[0] < sigma) & (sigma <= self.interval[1])
        return torch.where(inside, self.guided(x_t, t, condition), self.plain(x_t, t, condition))

    def at_step(self, step: Step) -> Denoiser:
        """Only the one that counts at that step."""
        sigma = step.sigma / step.signal if step.signal > 0 else math.inf
        return denoiser_at(self.guided if self.interval[0] < sigma <= self.interval[1] else self.plain, step)


@dataclass(frozen=True)
class ClassifierGuidance:
    """Moves what the network says along the gradient of log p(y | x_t), given by a classifier of noisy images.

    The deterministic samplers take eps - sqrt(1 - abar) s g (in x0 and v what that comes to). Ancestral sampling asks
    for :meth:`gradient` instead and shifts its mean by s * variance * g.

    **Source**: Dhariwal and Nichol 2021, algorithms 2 and 1.

    Args:
        denoiser: conditional or not; it is passed the labels, so one that takes none must ignore them.
        classifier: (x_t, t) -> (b, classes) logits, differentiable in x_t.
        scale: s; 1 is the posterior, 0 is off at no extra cost.
        schedule: the tables.
        parameterization: of the denoiser.

    Raises:
        ValueError: the parameterization is unknown.
    """

    denoiser: Denoiser
    classifier: Callable[[Tensor, Tensor], Tensor]
    scale: float
    schedule: NoiseSchedule
    parameterization: str

    def __post_init__(self) -> None:
        _eps_in(self.parameterization, torch.ones(1), torch.ones(1))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided output; with `condition` None the denoiser's own.

        At a step without signal (zero terminal SNR) nothing is guided: there x_t says nothing of y.

        Raises:
            TypeError: several conditions by name.
        """
        output, gradient = self.denoiser(x_t, t, condition), self.gradient(x_t, t, condition)
        if gradient is None:
            return output
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t)
        sigma = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
        weight = torch.where(signal > 0, _eps_in(self.parameterization, signal, sigma) * -sigma, 0.0)
        channels = x_t.shape[1]
        guided = output[:, :channels] + weight * gradient
        return guided if output.shape[1] == channels else torch.cat((guided, output[:, channels:]), dim=1)

    def gradient(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor | None:
        """s * grad log p(y | x_t), of the shape of x_t; None where nothing is to be guided.

        Samplers run without gradients, so they are switched on here, for the classifier alone.
        """
        if condition is None or self.scale == 0:
            return None
        if not isinstance(condition, Tensor):
            raise TypeError("classifier guidance takes labels, not several conditions by name")
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().requires_grad_()
            log_p = functional.log_softmax(self.classifier(x, t.clone()), dim=1)
            chosen = log_p.gather(1, condition.clone()[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, x)
        return gradient * self.scale

    def at_step(self, step: Step) -> Denoiser:
        """The same around what the inner denoiser is at that step."""
        return replace(self, denoiser=denoiser_at(self.denoiser, step))


def make_null(condition: Condition, null: Null) -> Condition:
    """Conditions of the same shape that say nothing.

    Args:
        condition: (b, ...), or several by name.
        null: of one sample, as in :class:`ClassifierFreeGuidance`.

    Raises:
        TypeError: one is a mapping and the other is not, or the null names an unknown condition.

    Example:
        >>> make_null({"class": torch.tensor([3, 1]), "size": torch.tensor([8, 8])}, {"class": 10})
        {'class': tensor([10, 10]), 'size': tensor([8, 8])}
    """
    if isinstance(condition, Tensor) and not isinstance(null, Mapping):
        return torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand_as(condition)
    if not isinstance(condition, Mapping) or not isinstance(null, Mapping) or not null.keys() <= condition.keys():
        asked = f"those of {sorted(condition)}" if isinstance(condition, Mapping) else "one condition without a name"
        given = f"of {sorted(null)}" if isinstance(null, Mapping) else "without a name"
        raise TypeError(f"the null of guidance is {given}, the denoiser is asked for {asked}")
    return {
        name: torch.as_tensor(null[name], dtype=value.dtype, device=value.device).expand_as(value)
        if name in null else value
        for name, value in condition.items()
    }  # fmt: skip


def _concatenate(one: Condition, other: Condition) -> Condition:
    """Both batches in one; two tensors, or two mappings of the same names."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {name: torch.cat((value, other[name])) for name, value in one.items()}
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return torch.cat((one, other))


def _extrapolate(weak: Tensor, strong: Tensor, scale: float, channels: int) -> Tensor:
    """weak + scale * (strong - weak) in the first `channels`; the others, a learned variance, are `strong`'s."""
    if strong.shape[1] == channels:
        return torch.lerp(weak, strong, scale)
    return torch.cat((torch.lerp(weak[:, :channels], strong[:, :channels], scale), strong[:, channels:]), dim=1)


def _eps_in(parameterization: str, signal: Tensor, sigma: Tensor) -> Tensor:
    """What one more eps makes of an output, x_t being given: 1 for eps, and x0 = (x_t - sigma eps) / signal."""
    match parameterization:
        case "eps":
            return torch.ones_like(sigma)
        case "x0":
            return -sigma / signal
        case "v":  # signal eps - sigma x0, and signal^2 + sigma^2 = 1
            return 1 / signal
    raise unknown_parameterization(parameterization)
