"""Denoising diffusion restoration models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.restoration.operators import LinearOperator
from ddpm_core.samplers.chain import Chain
from ddpm_core.samplers.grid import Step
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def restore_ddrm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    operator: LinearOperator,
    y: Tensor,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor],
    *,
    noise_sigma: float = 0.0,
    condition: Condition = None,
    parameterization: str = "eps",
    num_steps: int | None = 50,
    spacing: str = "quad",
    eta: float = 0.85,
    eta_b: float = 1.0,
    clip_denoised: bool = True,
    dynamic_threshold: float | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images that explain an observation y = H x + noise_sigma z, by a denoiser that knows nothing of H.

    The chain runs in the spectrum of H. A coordinate of singular value s is known up to noise_sigma / s. While the
    chain is noisier than that, the coordinate is the observed one with noise added to the level of the chain; below it,
    the predicted x0 with the direction from it to the observed one as its noise; with s = 0 it is sampled as in DDIM.
    So each x_t has the noise that the denoiser was trained for. Each step asks the denoiser for E[x0 | x_t], which
    knows of y only what x_t holds: an approximation of the posterior given y, not a draw from it. What is certain: with
    noise_sigma = 0 and eta_b = 1 the result obeys H x = y.

    Noise is removed no further than to that of the chain's cleanest step, so the grid should end at the data: `quad`
    does, and `trailing` doesn't. With the exact denoiser of Gaussian data, cosine and the default settings, the squared
    error of denoising is 1.2 to 1.8 times the least possible (a draw from the posterior has 2) for noise of 0.1 to 2.5
    deviations of the data; a value missing beside one of correlation 0.9 follows it by 0.74.

    **Source**: Kawar et al. 2022 (DDRM), sections 3.2 (equations 4 and 5) and 3.3. Theirs is written for x_t = x0 +
    sigma_t eps; here both sides are multiplied by signal, so that all is finite also where signal is 0.

    Args:
        denoiser, schedule, condition, parameterization, num_steps, spacing, clip_denoised, dynamic_threshold, callback:
            as in `sample_ddpm`.
        operator: H, on the device of `y`.
        y: (b, *operator.observed_shape), in the scale of the data.
        x_noisy: (b, *operator.shape) standard normal; in the spectrum, where it is as white as outside.
        noise: `noise(k)` gives the k-th draw, k = 1, 2, ...: standard normal of the shape of `x_noisy`.
        noise_sigma: standard deviation of the noise in y, in the scale of the data; 0 for none.
        eta: in [0, 1]: how much of the noise is fresh at each step, where y says less than the chain or nothing.
        eta_b: in [0, 1]: how much of y, against the predicted x0, where it says more.

    Returns:
        (b, *operator.shape); where y is without noise not clipped, as it obeys y.

    Raises:
        ValueError: noise_sigma, eta or eta_b is out of range, y is of another shape, and as `sample_ddpm`.
    """
    if noise_sigma < 0 or not 0 <= eta <= 1 or not 0 <= eta_b <= 1:
        raise ValueError(
            f"noise_sigma, eta, eta_b are {noise_sigma}, {eta}, {eta_b}, expected at least 0 and the others in [0, 1]"
        )
    chain = Chain(
        denoiser, schedule, x_noisy, condition=condition, parameterization=parameterization, num_steps=num_steps,
        spacing=spacing, clip_denoised=clip_denoised, dynamic_threshold=dynamic_threshold,
    )  # fmt: skip
    s, observed = operator.singular_values, operator.observation_to_spectrum(y)
    of_y, deviation = (w.to(x_noisy.dtype) for w in _first_weights(chain.steps[0], s, noise_sigma))
    x = of_y * observed + deviation * x_noisy
    for k, step in enumerate(chain.steps, start=1):
        x0 = chain.predict_x0(k, operator.from_spectrum(x))
        weights = _Weights(*(w.to(x.dtype) for w in _step_weights(step, s, noise_sigma, eta, eta_b)))
        x = weights.x0 * operator.to_spectrum(x0) + weights.y * observed + weights.x * x
        if step.prev_sigma > 0:  # the last step adds no noise
            x += weights.noise * noise(k)
        if callback is not None:
            callback(k, operator.from_spectrum(x), x0)
    return operator.from_spectrum(x)


class _Weights(NamedTuple):
    """What the next x is made of, coordinate by coordinate; `y` is of U^T y, not yet divided by s."""

    x0: Tensor
    y: Tensor
    x: Tensor
    noise: Tensor


def _first_weights(step: Step, s: Tensor, noise_sigma: float) -> tuple[Tensor, Tensor]:
    """Weight of U^T y and deviation of the noise, where the chain begins."""
    known = (s > 0) & (s * step.sigma >= step.signal * noise_sigma)
    of_y = torch.where(known, step.signal / s, 0)
    return of_y, (step.sigma**2 - (of_y * noise_sigma) ** 2).clamp(min=0).sqrt()


def _step_weights(step: Step, s: Tensor, noise_sigma: float, eta: float, eta_b: float) -> _Weights:
    """Of a step to (prev_signal, prev_sigma): sampled, or known better than the chain's next level of noise, or less
    well. The next level in the paper's scale is prev_sigma / prev_signal, and noise_sigma / s that of y."""
    signal, sigma = step.prev_signal, step.prev_sigma
    kept, fresh = math.sqrt(1 - eta**2) * sigma, eta * sigma
    unseen, better = s == 0, (s > 0) & (s * sigma >= signal * noise_sigma)
    of_better = torch.where(better, signal * eta_b / s, 0)
    # Less well: only with noise, so noise_sigma is above 0 wherever this is used.
    towards = kept * s / noise_sigma if noise_sigma > 0 else torch.zeros_like(s)
    return _Weights(
        x0=torch.where(
            unseen,
            signal - kept * step.signal / step.sigma,
            torch.where(better, signal * (1 - eta_b), signal - towards),
        ),
        y=torch.where(unseen | better, of_better, towards / s),
        x=torch.where(unseen, kept / step.sigma, torch.zeros_like(s)),
        noise=torch.where(better, (sigma**2 - (of_better * noise_sigma) ** 2).clamp(min=0).sqrt(), fresh),
    )
