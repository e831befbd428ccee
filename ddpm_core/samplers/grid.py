"""Which of the T diffusion steps a sampler visits, and the numbers that belong to each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ddpm_core.schedules import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace", "quad")


def make_timesteps(num_timesteps: int, num_steps: int, spacing: str = "trailing") -> list[int]:
    """Exactly `num_steps` different steps below `num_timesteps`, from noisy to clean.

    `trailing` holds the last step T - 1, `leading` holds step 0, `linspace` both (Lin et al. 2023, table 2). `quad`
    holds both too and grows with the square, so most steps are clean (Song et al. 2021, appendix D.2); where squares
    lie closer than whole numbers, the whole numbers are taken. All in integer arithmetic, so no rounding repeats or
    loses a step.

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
        case "quad":
            if num_steps == 1:
                return [num_timesteps - 1]
            squares = [(num_timesteps - 1) * i**2 // (num_steps - 1) ** 2 for i in range(num_steps)]
            return [max(i, square) for i, square in reversed(list(enumerate(squares)))]
    raise ValueError(f"spacing {spacing!r} is unknown; known: {', '.join(SPACINGS)}")


class Step(NamedTuple):
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

    @property
    def log_snr_gain(self) -> float:
        """By how much the step raises log(signal / sigma), half of log snr; infinite at the end, and at the
        start of a chain with zero terminal SNR."""
        if self.prev_sigma == 0 or self.signal == 0:
            return math.inf
        return math.log(self.prev_signal / self.signal) + math.log(self.sigma / self.prev_sigma)

    @property
    def shrinkage(self) -> float:
        """By what factor the step multiplies sigma / signal; 0 where the gain is infinite."""
        return self.prev_sigma / self.prev_signal * self.signal / self.sigma


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
