"""Ancestral sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.noising import learned_log_variance
from ddpm_core.samplers.chain import Chain
from ddpm_core.samplers.grid import Step
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_ddpm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor],
    *,
    condition: Condition = None,
    parameterization: str = "eps",
    learned_variance: bool = False,
    num_steps: int | None = None,
    spacing: str = "trailing",
    clip_denoised: bool = True,
    dynamic_threshold: float | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk the reverse chain, drawing each x_{t-1} from its posterior given the predicted x0.

    **Source**: Ho et al. 2020, algorithm 2; with fewer steps than T, the posterior of the shorter chain that visits
    only those (Nichol and Dhariwal 2021, section 4). Variance as the schedule's `v_posterior` says, or as the network
    does, between the bounds of that shorter chain (the same, equation 15). Classifier guidance shifts the mean by
    scale * variance * grad log p(y | x_t) (Dhariwal and Nichol 2021, algorithm 1), after clipping.

    Args:
        denoiser: the network, or a guided one.
        schedule: the schedule it was trained with.
        x_noisy: (b, ...) standard normal.
        noise: `noise(k)` gives the k-th draw, k = 1, 2, ...: standard normal of the shape of `x_noisy`.
        condition: passed to the denoiser.
        parameterization: what the network predicts.
        learned_variance: the network's output has 2c channels: what the parameterization says, then the variance's v.
        num_steps: S in [1, T]; None is all T.
        spacing: of the steps, as in `make_timesteps`.
        clip_denoised: clip the predicted x0 to [-1, 1]: right for pixels, wrong for latents.
        dynamic_threshold: instead of clipping, a share p in (0, 1] for dynamic thresholding: each sample's x0 is
            clipped at the p-quantile of its size, where that is above 1, and divided by it.
        callback: called after each step with its place k = 1..S, the new x and the predicted x0. Both are the
            callback's to keep, not to change: no later step writes to them.

    Returns:
        (b, ...) samples.

    Raises:
        ValueError: num_steps, spacing, parameterization or dynamic_threshold is out of range, or the output's shape is
            not that of `x_noisy`, its channels doubled with a learned variance.
    """
    chain = Chain(
        denoiser, schedule, x_noisy, condition=condition, parameterization=parameterization,
        learned_variance=learned_variance, num_steps=num_steps, spacing=spacing, clip_denoised=clip_denoised,
        dynamic_threshold=dynamic_threshold, mean_shift=True,
    )  # fmt: skip
    x = x_noisy
    for k, step in enumerate(chain.steps, start=1):
        (x0, v), gradient = chain.predict(k, x), chain.gradient(k, x)
        of_x0, of_x = _mean_weights(step)
        x = torch.mul(x0, of_x0, out=x0 if callback is None else None).add_(x, alpha=of_x)
        if gradient is not None:
            x.add_(gradient * _drawn_variance(step, v, schedule.v_posterior))
        if step.prev_sigma > 0:  # the last step adds no noise
            if v is None:
                x.add_(noise(k), alpha=math.sqrt(_variance(step, schedule.v_posterior)))
            else:
                x.addcmul_(noise(k), _learned_deviation(step, v))
        if callback is not None:
            callback(k, x, x0)
    return x


def _mean_weights(step: Step) -> tuple[float, float]:
    """Weights of x0 and x_t in the mean of the posterior."""
    variance_t, variance_prev = step.sigma**2, step.prev_sigma**2
    return step.prev_signal * step.beta / variance_t, math.sqrt(1 - step.beta) * variance_prev / variance_t


def _variance(step: Step, v_posterior: float) -> float:
    """beta_tilde of the visited chain at 0, its beta at 1."""
    beta_tilde = step.prev_sigma**2 / step.sigma**2 * step.beta
    return (1 - v_posterior) * beta_tilde + v_posterior * step.beta


def _drawn_variance(step: Step, v: Tensor | None, v_posterior: float) -> Tensor | float:
    """Of the step's noise: fixed, or what the network says; at the end of the chain its lower bound, 0, then holds."""
    if v is None:
        return _variance(step, v_posterior)
    return _learned_deviation(step, v).square() if step.prev_sigma > 0 else 0.0


def _learned_deviation(step: Step, v: Tensor) -> Tensor:
    log_beta, log_beta_tilde = math.log(_variance(step, 1.0)), math.log(_variance(step, 0.0))
    return learned_log_variance(v, log_beta, log_beta_tilde).mul_(0.5).exp_()
