"""Heun's method of second order on the probability flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.samplers.chain import Chain, move
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_heun(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    *,
    condition: Condition = None,
    parameterization: str = "eps",
    learned_variance: bool = False,
    num_steps: int | None = 18,
    spacing: str = "trailing",
    clip_denoised: bool = True,
    dynamic_threshold: float | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Heun's method for dy/ds = (y - x0(y, s)) / s in y = x / sqrt(abar), s = sqrt((1 - abar) / abar).

    An Euler step to s', then the mean of the slopes at both ends. Written out, it is Euler's step, which is DDIM's,
    with x0 replaced by (1 - w) x0 + w x0', where x0' is predicted at the end of that step and w = s / (2 s'). 2 S - 1
    network calls for S steps: the last one, to s = 0, is Euler's, so it gives x0. Error of order two.

    A step that more than halves s has w > 1: it extrapolates, by a factor of hundreds where a schedule begins in almost
    pure noise (cosine: s falls from 20,000 to 16 in the first of 25 steps). There w is 1. Small steps are untouched.

    **Source**: Karras et al. 2022 (EDM), algorithm 1 with their sigma(t) = t; the network is only asked at whole t.

    Args:
        denoiser, schedule, x_noisy, condition, parameterization, num_steps, spacing, clip_denoised, dynamic_threshold,
            callback: as in `sample_ddpm`; the callback's x0 is the one predicted where the step begins.
        learned_variance: the network's output has 2c channels, the second half of which is not used.
        noise: not used; there so that all samplers are called alike.

    Returns:
        (b, ...) samples.

    Raises:
        ValueError: as `sample_ddpm`.
    """
    chain = Chain(
        denoiser, schedule, x_noisy, condition=condition, parameterization=parameterization,
        learned_variance=learned_variance, num_steps=num_steps, spacing=spacing, clip_denoised=clip_denoised,
        dynamic_threshold=dynamic_threshold,
    )  # fmt: skip
    x = x_noisy
    for k, step in enumerate(chain.steps, start=1):
        x0 = middle = chain.predict_x0(k, x)
        if step.prev_sigma > 0:
            ahead = chain.predict_x0(k + 1, move(step, x0, x, step.prev_sigma))
            middle = torch.lerp(x0, ahead, 0.5 / step.shrinkage if step.shrinkage > 0.5 else 1.0)
        x = move(step, middle, x, step.prev_sigma)
        if callback is not None:
            callback(k, x, x0)
    return x
