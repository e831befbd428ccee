"""DPM-Solver++, second order, multistep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import Denoiser
from ddpm_core.samplers.chain import Chain, move
from ddpm_core.schedules import NoiseSchedule


@torch.no_grad()
def sample_dpm_solver(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_noisy: Tensor,
    noise: Callable[[int], Tensor] | None = None,
    *,
    condition: Condition = None,
    parameterization: str = "eps",
    learned_variance: bool = False,
    num_steps: int | None = 25,
    spacing: str = "trailing",
    clip_denoised: bool = True,
    dynamic_threshold: float | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """DPM-Solver++(2M): the step of DDIM with x0 carried on to the middle of the step in log-snr, from its last change.

    D = x0 + h / (2 h_last) (x0 - x0_last), x_prev = sigma_prev / sigma x_t - signal_prev (e^-h - 1) D, where h is the
    gain in log(signal / sigma). One network call a step, error of order two. The first step has no last x0, and the
    last one, to a log-snr that is infinite, no middle: these are DDIM's, the last one gives x0. The method's own time
    is log-snr: with spacing `logsnr` all gains h are alike, up to whole steps.

    **Source**: Lu et al. 2022 (DPM-Solver++), algorithm 2; their alpha and sigma are our signal and sigma.

    Args:
        denoiser, schedule, x_noisy, condition, parameterization, num_steps, spacing, clip_denoised, dynamic_threshold,
            callback: as in `sample_ddpm`; the callback's x0 is the network's, not D.
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
    x, last_gain = x_noisy, 0.0
    last_x0: Tensor | None = None
    for k, step in enumerate(chain.steps, start=1):
        x0, gain = chain.predict_x0(k, x), step.log_snr_gain
        middle = x0
        if last_x0 is not None and step.prev_sigma > 0:
            middle = torch.lerp(x0, last_x0, -gain / (2 * last_gain))
        x = move(step, middle, x, step.prev_sigma)
        last_x0, last_gain = x0, gain
        if callback is not None:
            callback(k, x, x0)
    return x
