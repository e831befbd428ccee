"""Which of the T diffusion steps a sampler visits, and the numbers that belong to each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_core.guidance import Denoiser
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.targets import x0_from_output

SPACINGS = ("trailing", "leading", "linspace")


def make_timesteps(num_timesteps: int, num_steps: int, spacing: str = "trailing") -> list[int]:
    """Exactly `num_steps` different steps below `num_timesteps`, from noisy to clean.

    `trailing` holds the last step T - 1, `leading` holds step 0, `linspace` both (Lin et al. 2023, table 2). All in
    integer arithmetic, so no rounding repeats or loses a step.

    Args:
        num_timesteps: T of the schedule.
        num_steps: S in [1, T].
        spacing: one of `SPACINGS`.

    Raises:
        ValueError: S is outside [1, T], or the spacing is unknown.

    Example:
        >>> make_timesteps(1000, 4), make_timesteps(1000, 4, "leading"), make_timesteps(1000, 4, "linspace")
        ([999, 749, 499, 249], [750, 500, 250, 0], [999, 666, 333, 0])
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps is {num_steps}, expected a number from 1 to the {num_timesteps} of the schedule")
    match spacing:
        case "trailing":
            return [num_timesteps - 1 - i * num_timesteps // num_steps for i in range(num_steps)]
        case "leading":
            return [i * num_timesteps // num_steps for i in reversed(range(num_steps))]
        case "linspace":
            gaps = max(1, num_steps - 1)
            return [(num_timesteps - 1) * (gaps - i) // gaps for i in range(num_steps)]
    raise ValueError(f"spacing {spacing!r} is unknown; known: {', '.join(SPACINGS)}")


@dataclass(frozen=True)
class Step:
    """One step of a sampler: from diffusion step `t` to the one before it in the grid, the data itself at the end.

    x_t = signal * x0 + sigma * eps; `prev_signal`, `prev_sigma` likewise where the step leads (1 and 0 at the end);
    `beta` = 1 - abar_t / abar_prev is the noise between the two.
    """

    t: int
    signal: float
    sigma: float
    prev_signal: float
    prev_sigma: float
    beta: float


def make_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "trailing") -> list[Step]:
    """The steps in the order in which a sampler takes them; arguments as in :func:`make_timesteps`.

    Derived from the betas through logarithms in float64, exact at both ends of the chain where 1 - abar or abar vanish.
    """
    log_abar = torch.log1p(-schedule.betas.detach().cpu().double()).cumsum(0)
    timesteps = make_timesteps(schedule.num_timesteps, num_steps, spacing)
    here = log_abar[timesteps]
    prev = torch.cat((here[1:], torch.zeros(1, dtype=torch.float64)))
    columns = (
        (here / 2).exp(),
        (-here.expm1()).sqrt(),
        (prev / 2).exp(),
        (-prev.expm1()).sqrt(),
        -(here - prev).expm1(),
    )
    return [Step(t, *row) for t, row in zip(timesteps, torch.stack(columns, dim=1).tolist(), strict=True)]


def denoise(
    denoiser: Denoiser, step: Step, x_t: Tensor, condition: Tensor | None, parameterization: str, clip_denoised: bool
) -> tuple[Tensor, Tensor]:
    """One call of the network, as (x0, eps) that agree with each other and with x_t also after clipping.

    Args:
        denoiser: the network, or a guided one.
        step: where in the grid.
        x_t: (b, ...).
        condition: passed on.
        parameterization: what the network predicts.
        clip_denoised: clip x0 to [-1, 1]: right for pixels, wrong for latents.

    Returns:
        x0 and eps, each (b, ...).
    """
    t = torch.full((len(x_t),), step.t, device=x_t.device, dtype=torch.int64)
    x0 = x0_from_output(parameterization, denoiser(x_t, t, condition).to(x_t.dtype), x_t, step.signal, step.sigma)
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
    return x0, (x_t - step.signal * x0) / step.sigma
