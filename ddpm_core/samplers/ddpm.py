"""Ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.guidance import Denoiser
from ddpm_core.samplers.grid import Step, denoise, make_grid
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor],
    *,
    condition: Tensor | None = None,
    parameterization: str = "eps",
    num_steps: int | None = None,
    spacing: str = "trailing",
    clip_denoised: bool = True,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk the reverse chain, drawing each x_{t-1} from its posterior given the predicted x0.

    **Source**: Ho et al. 2020, algorithm 2; with fewer steps than T, the posterior of the shorter chain that visits
    only those (Nichol and Dhariwal 2021, section 4). Variance as the schedule's `v_posterior` says.

    Args:
        denoiser: the network, or a guided one.
        schedule: the schedule it was trained with.
        x_noisy: (b, ...) standard normal.
        noise: `noise(k)` gives the k-th draw, k = 1, 2, ...: standard normal of the shape of `x_noisy`.
        condition: passed to the denoiser.
        parameterization: what the network predicts.
        num_steps: S in [1, T]; None is all T.
        spacing: of the steps, as in `make_timesteps`.
        clip_denoised: clip the predicted x0 to [-1, 1].
        callback: called after each step with its place k = 1..S, the new x and the predicted x0.

    Returns:
        (b, ...) samples.
    """
    x = x_noisy
    for k, step in enumerate(make_grid(schedule, num_steps or schedule.num_timesteps, spacing), start=1):
        x0, _ = denoise(denoiser, step, x, condition, parameterization, clip_denoised)
        x, deviation = _posterior_mean(step, x0, x), _deviation(step, schedule.v_posterior)
        if step.prev_sigma > 0:  # the last step adds no noise
            x = x.add(noise(k), alpha=deviation)
        if callback is not None:
            callback(k, x, x0)
    return x


def _posterior_mean(step: Step, x0: Tensor, x_t: Tensor) -> Tensor:
    variance_t, variance_prev = step.sigma**2, step.prev_sigma**2
    return (step.prev_signal * step.beta / variance_t) * x0 + (
        math.sqrt(1 - step.beta) * variance_prev / variance_t
    ) * x_t


def _deviation(step: Step, v_posterior: float) -> float:
    beta_tilde = step.prev_sigma**2 / step.sigma**2 * step.beta
    return math.sqrt((1 - v_posterior) * beta_tilde + v_posterior * step.beta)
