"""The forward process in closed form, and its posterior."""

from __future__ import annotations

from torch import Tensor

from ddpm_core.schedules import NoiseSchedule, at


def q_sample(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Draw x_t given x0 by the reparameterisation x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise.

    **Source**: Ho et al. 2020, equation 4.

    Args:
        schedule: the tables, on the device of `x0`.
        x0: (b, ...) data in [-1, 1], any rank.
        t: (b,) int64 in [0, T); not checked, for that would wait for the device.
        noise: standard normal of the shape of `x0`. Randomness is the caller's.

    Returns:
        (b, ...) x_t.
    """
    return at(schedule.sqrt_alphas_cumprod, t, x0) * x0 + at(schedule.sqrt_one_minus_alphas_cumprod, t, x0) * noise


def q_posterior(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x0).

    **Source**: Ho et al. 2020, equations 6 and 7.

    Args:
        schedule: the tables, on the device of `x0`.
        x0, x_t: (b, ...).
        t: (b,) int64 in [0, T).

    Returns:
        mean (b, ...), variance and log-variance (b, 1, ...). At t = 0 the variance is 0, its logarithm that of t = 1.
    """
    mean = at(schedule.posterior_mean_coef1, t, x0) * x0 + at(schedule.posterior_mean_coef2, t, x0) * x_t
    log_variance = at(schedule.posterior_log_variance_clipped, t, x0)
    return mean, at(schedule.posterior_variance, t, x0), log_variance


def learned_log_variance(v: Tensor, log_beta: Tensor | float, log_beta_tilde: Tensor | float) -> Tensor:
    """Log-variance of a reverse step: between its two extremes in the logarithm, frac = (v + 1) / 2 of the way to beta.

    **Source**: Nichol and Dhariwal 2021, equation 15, with v scaled to [-1, 1] as in their code.

    Args:
        v: (b, c, ...) output of the network; not bounded, as the bound on the likelihood holds for any variance.
        log_beta, log_beta_tilde: numbers, or shaped to add to `v`: the tables `log_betas` and
            `log_beta_tilde_clipped` at t, or a sampler's own for a step that leaves some out.

    Returns:
        (b, c, ...).

    Example:
        >>> import torch
        >>> learned_log_variance(torch.tensor([-1.0, 0.0, 1.0]), -2.0, -4.0).tolist()
        [-4.0, -3.0, -2.0]
    """
    frac = (v + 1) / 2
    return frac * log_beta + (1 - frac) * log_beta_tilde
