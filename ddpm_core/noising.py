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
