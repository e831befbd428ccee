"""The variational bound on the likelihood, term by term, and bits per dimension from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.noising import learned_log_variance, q_sample
from ddpm_core.schedules import NoiseSchedule, at
from ddpm_core.targets import split_output, to_x0

_HALF_BIN = 0.5 / 127.5
_OPEN_END = 0.999  # data beyond this lie in the first or last bin, whose other end is open


@dataclass(frozen=True)
class BitsPerDim:
    """The bound on -log2 p(x0), per dimension.

    Args:
        total: (b,) the sum of the others.
        prior: (b,) KL between q(x_T | x0) and the standard normal.
        terms: (T, b) for each step t: the KL of the reverse step for t > 0, the likelihood of the pixels for t = 0.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor


def discretised_gaussian_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the mass that a Gaussian has in the bin of each value.

    Bins of 1 / 127.5 about the 256 grey levels, the first open below and the last above. Computed from log Phi, so
    right also where the mass itself underflows: a floor such as 1e-12 would hide all beyond 28 nats.

    **Source**: Ho et al. 2020, equation 13.

    Args:
        x0: (b, ...) grey levels in [-1, 1]. Whether they lie on the grid is not checked: other values get a bin about
            themselves.
        mean, log_variance: of the Gaussian, of a shape that broadcasts to that of `x0`.

    Returns:
        (b, ...) in nats, of the dtype of the arguments.

    Example:
        >>> black, log_variance = torch.tensor([-1.0]), torch.tensor([-9.0])
        >>> discretised_gaussian_log_likelihood(black, black, log_variance).exp()  # half, and half a bin's mass more
        tensor([0.6380])
    """
    inverse_deviation = torch.exp(-0.5 * log_variance)
    upper = (x0 - mean + _HALF_BIN) * inverse_deviation
    lower = (x0 - mean - _HALF_BIN) * inverse_deviation
    # A bin above the mean is mirrored below it: there log Phi is large and a difference of logarithms keeps its digits.
    mirrored = x0 > mean
    far = torch.special.log_ndtr(torch.where(mirrored, -upper, lower))
    near = torch.special.log_ndtr(torch.where(mirrored, -lower, upper))
    inside = near + torch.log(-torch.expm1(far - near))
    first, last = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    return torch.where(x0 < -_OPEN_END, first, torch.where(x0 > _OPEN_END, last, inside))


def prior_kl(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL between q(x_T | x0) and the standard normal: what is lost because the chain does not end in pure noise.

    Args:
        schedule: the tables, on the device of `x0`.
        x0: (b, ...).

    Returns:
        (b,) nats per dimension; 0 with zero terminal SNR.
    """
    abar = schedule.alphas_cumprod[-1]
    return 0.5 * (abar * x0.square().flatten(1).mean(1) - abar - torch.log1p(-abar))


def vlb_term(schedule: NoiseSchedule, x0: Tensor, x0_predicted: Tensor, log_variance: Tensor, t: Tensor) -> Tensor:
    """One term of the bound: KL between the posterior of the forward process and the model's reverse step.

    Both means are linear in x_t with the same coefficient, so only the error of x0 counts. At t = 0 the term is the
    negative log-likelihood of the grey levels, with mean x0_predicted.

    **Source**: Ho et al. 2020, equations 5 and 13; the variance of the posterior is beta_tilde whatever the model's is.

    Args:
        schedule: the tables.
        x0, x0_predicted: (b, ...).
        log_variance: of the model's step, of a shape that broadcasts to that of `x0`.
        t: (b,) int64 in [0, T).

    Returns:
        (b,) nats per dimension.
    """
    error = at(schedule.posterior_mean_coef1, t, x0) * (x0 - x0_predicted)
    excess = at(schedule.log_beta_tilde_clipped, t, x0) - log_variance
    kl = 0.5 * (torch.expm1(excess) - excess + error.square() * torch.exp(-log_variance))
    nll = -discretised_gaussian_log_likelihood(x0, x0_predicted, log_variance)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))


@torch.no_grad()
def bits_per_dim(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    noise: Callable[[int], Tensor],
    condition: Condition = None,
    *,
    parameterization: str = "eps",
    learned_variance: bool = False,
    clip_denoised: bool = True,
) -> BitsPerDim:
    """Upper bound on the bits that the model needs for a dimension of each image, all T terms.

    **Source**: Ho et al. 2020, equations 5 and 13; Nichol and Dhariwal 2021, section 3.1 for the learned variance.

    Args:
        denoiser: the network; called T times with the whole batch.
        schedule: the tables, on the device of `x0`. Its `v_posterior` gives the variance unless that is learned.
        x0: (b, c, ...) of grey levels in [-1, 1]: multiples of 1 / 127.5 from -1.
        noise: `noise(t)` gives the draw for step t = 0..T-1: standard normal of the shape of `x0`. Each term is an
            unbiased estimate over it.
        condition: passed to the denoiser.
        parameterization: what the network predicts.
        learned_variance: the network's output has 2c channels, the second half for `learned_log_variance`.
        clip_denoised: clip the predicted x0 to [-1, 1].

    Returns:
        the bound and its parts, in bits.

    Raises:
        ValueError: the parameterization is unknown, or eps with zero terminal SNR, or the output's shape is wrong.
    """
    per_bit = 1 / math.log(2)
    terms = x0.new_empty(schedule.num_timesteps, len(x0))
    for step in range(schedule.num_timesteps):
        t = torch.full((len(x0),), step, device=x0.device, dtype=torch.int64)
        x_t = q_sample(schedule, x0, t, noise(step))
        output = denoiser(x_t, t, condition).to(x_t.dtype)
        log_variance = at(schedule.posterior_log_variance_clipped, t, x0)
        if learned_variance:
            output, v = split_output(output, x_t)
            log_variance = model_log_variance(schedule, v, t)
        x0_predicted = to_x0(schedule, parameterization, output, x_t, t)
        if clip_denoised:
            x0_predicted = x0_predicted.clamp(-1, 1)
        terms[step] = per_bit * vlb_term(schedule, x0, x0_predicted, log_variance, t)
    prior = per_bit * prior_kl(schedule, x0)
    return BitsPerDim(prior + terms.sum(0), prior, terms)


def model_log_variance(schedule: NoiseSchedule, v: Tensor, t: Tensor) -> Tensor:
    """:func:`ddpm_core.noising.learned_log_variance` with the tables' entries at (b,) steps `t`."""
    return learned_log_variance(v, at(schedule.log_betas, t, v), at(schedule.log_beta_tilde_clipped, t, v))
