"""Denoising diffusion implicit models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.guidance import Denoiser
from ddpm_core.samplers.grid import denoise, make_grid
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    *,
    condition: Tensor | None = None,
    parameterization: str = "eps",
    num_steps: int | None = 50,
    spacing: str = "trailing",
    eta: float = 0.0,
    clip_denoised: bool = True,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """x_prev = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - s^2) eps + s z, with s = eta times the ancestral deviation.

    **Source**: Song et al. 2021, equations 12 and 16. eta = 0 is deterministic, eta = 1 ancestral sampling with
    variance beta_tilde. abar at the end of the chain is 1.

    Args:
        denoiser, schedule, x_noisy, condition, parameterization, num_steps, spacing, clip_denoised, callback: as in
            `sample_ddpm`.
        noise: as there; may be None when eta is 0.
        eta: in [0, 1].

    Returns:
        (b, ...) samples.

    Raises:
        ValueError: eta is above 0 and there is no noise.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta}, so the sampler needs `noise`")
    x = x_noisy
    for k, step in enumerate(make_grid(schedule, num_steps or schedule.num_timesteps, spacing), start=1):
        x0, eps = denoise(denoiser, step, x, condition, parameterization, clip_denoised)
        deviation = eta * step.prev_sigma / step.sigma * math.sqrt(step.beta)
        x = (step.prev_signal * x0).add_(eps, alpha=math.sqrt(max(0.0, step.prev_sigma**2 - deviation**2)))
        if noise is not None and deviation > 0:
            x.add_(noise(k), alpha=deviation)
        if callback is not None:
            callback(k, x, x0)
    return x
