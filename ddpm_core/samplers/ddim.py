"""Denoising diffusion implicit models: sampling, its inversion, and the path between two noises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.samplers.chain import Chain, move
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    *,
    condition: Condition = None,
    parameterization: str = "eps",
    learned_variance: bool = False,
    num_steps: int | None = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    clip_denoised: bool = True,
    dynamic_threshold: float | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_prev = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - s^2) eps + s z, with s = eta times the ancestral deviation.

    **Source**: Song et al. 2021, equations 12 and 16. eta = 0 is deterministic, eta = 1 ancestral sampling with
    variance beta_tilde. abar at the end of the chain is 1. eps is re-derived from x_t and the clipped x0.

    Args:
        denoiser, schedule, x_noisy, condition, parameterization, num_steps, spacing, clip_denoised, dynamic_threshold,
            callback: as in `sample_ddpm`.
        learned_variance: the network's output has 2c channels, the second half of which is not used.
        noise: as there; may be None when eta is 0.
        eta: in [0, 1].

    Returns:
        (b, ...) samples.

    Raises:
        ValueError: eta is above 0 and there is no noise; and as `sample_ddpm`.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta}, so the sampler needs `noise`")
    chain = Chain(
        denoiser, schedule, x_noisy, condition=condition, parameterization=parameterization,
        learned_variance=learned_variance, num_steps=num_steps, spacing=spacing, clip_denoised=clip_denoised,
        dynamic_threshold=dynamic_threshold,
    )  # fmt: skip
    x = x_noisy
    for k, step in enumerate(chain.steps, start=1):
        x0 = chain.predict_x0(k, x)
        deviation = eta * step.prev_sigma / step.sigma * math.sqrt(step.beta)
        eps_weight = math.sqrt(max(0.0, step.prev_sigma**2 - deviation**2))
        x = move(step, x0, x, eps_weight, out=x0 if callback is None else None)  # the callback may keep x0
        if noise is not None and deviation > 0:
            x.add_(noise(k), alpha=deviation)
        if callback is not None:
            callback(k, x, x0)
    return x


@torch.no_grad()
def invert_ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    *,
    condition: Condition = None,
    parameterization: str = "eps",
    learned_variance: bool = False,
    num_steps: int | None = 50,
    spacing: str = "trailing",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The noise from which `sample_ddim` with eta = 0 and the same arguments makes this data, approximately.

    The same chain from clean to noisy: x_next = signal_next x0_hat + sigma_next eps, both as the network sees them
    where the step begins; the data itself has no step, so there the cleanest of the chain stands in. It inverts the
    flow, not each step of the sampler: both are of order one, so the error of a round trip falls as steps grow.

    **Source**: Song et al. 2021, equation 14 and section 5.4. Nothing is clipped: a clipped step has no inverse.

    Args:
        denoiser, schedule, condition, parameterization, learned_variance, num_steps, spacing: as in `sample_ddim`.
        x0: (b, ...) data.
        callback: called after each step with its place k = 1..S, the new x and the predicted x0.

    Returns:
        (b, ...) x at the noisiest step of the chain.

    Raises:
        ValueError: num_steps, spacing or parameterization is out of range.
    """
    chain = Chain(
        denoiser, schedule, x0, condition=condition, parameterization=parameterization,
        learned_variance=learned_variance, num_steps=num_steps, spacing=spacing,
    )  # fmt: skip
    x, num_steps, here = x0, len(chain.steps), chain.steps[-1]
    for k, step in enumerate(reversed(chain.steps), start=1):
        predicted = chain.predict_x0(num_steps if k == 1 else num_steps + 2 - k, x)
        eps = (x - here.signal * predicted).div_(here.sigma)
        predicted = (x - step.prev_sigma * eps).div_(step.prev_signal)  # of the data itself at the first step
        x, here = (step.signal * predicted).add_(eps, alpha=step.sigma), step
        if callback is not None:
            callback(k, x, predicted)
    return x


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation of two noises: along the arc between them, since a straight line runs through the middle
    of the sphere, where no Gaussian noise of many dimensions lies.

    sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b, the angle taken sample by sample over all other
    axes; the straight line where a and b are parallel.

    **Source**: Song et al. 2021, appendix D.5, equation 67.

    Args:
        a, b: (b, ...) of one shape; opposite ones have no arc and are not checked for.
        weight: 0 gives a, 1 gives b; a number or (b,).

    Returns:
        (b, ...); of the norm of a and b where theirs are equal.
    """
    column = (-1, *(1,) * (a.ndim - 1))
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand(len(a))
    left, right = a.flatten(1), b.flatten(1)
    left, right = left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2((left - right).norm(dim=1), (left + right).norm(dim=1))  # exact where acos is not
    sine, flat = angle.sin(), angle < 1e-6
    of_a = torch.where(flat, 1 - w, ((1 - w) * angle).sin() / sine)
    of_b = torch.where(flat, w, (w * angle).sin() / sine)
    return of_a.reshape(column) * a + of_b.reshape(column) * b
