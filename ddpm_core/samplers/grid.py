"""Which of the T diffusion steps a sampler visits, and the numbers that belong to each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_core.schedules import NoiseSchedule

SPACINGS = ("trailing", "leading", "linspace", "quad", "logsnr")


def make_timesteps(
    num_timesteps: int, num_steps: int, spacing: str = "trailing", *, log_snr: Tensor | None = None
) -> list[int]:
    """Exactly `num_steps` different steps below `num_timesteps`, from noisy to clean.

    `trailing` holds the last step T - 1, `leading` holds step 0, `linspace` both (Lin et al. 2023, table 2). `quad`
    holds both too and grows with the square, so most steps are clean (Song et al. 2021, appendix D.2); where squares
    lie closer than whole numbers, the whole numbers are taken. These are integer arithmetic, so no rounding repeats or
    loses a step. `logsnr` holds both ends and is even in log-snr, the time in which the solvers work (Lu et al. 2022,
    DPM-Solver): most of its steps lie at both ends. Where log-snr plunges at the end, as with cosine, half of a few
    steps see almost pure noise; zero terminal SNR spreads them.

    Args:
        num_timesteps: T of the schedule.
        num_steps: S in [1, T].
        spacing: one of `SPACINGS`.
        log_snr: (T,) falling float64, for `logsnr` alone; the last may be -infinity.

    Raises:
        ValueError: S is outside [1, T], the spacing is unknown, or it is `logsnr` and there is no log_snr.

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
        case "logsnr":
            if log_snr is None:
                raise ValueError("spacing 'logsnr' needs the schedule's log_snr")
            return _even_in_log_snr(log_snr, num_steps)
    raise ValueError(f"spacing {spacing!r} is unknown; known: {', '.join(SPACINGS)}")


def _even_in_log_snr(log_snr: Tensor, num_steps: int) -> list[int]:
    """The step nearest to each of `num_steps` values from the last log-snr up to the first. Where they lie closer than
    steps, the next free ones are taken: t_i - i, the number of steps left out so far, must never fall nor exceed T - S.
    """
    num_timesteps = len(log_snr)
    if num_steps == 1:
        return [num_timesteps - 1]
    last = log_snr[-2] if log_snr[-1].isinf() else log_snr[-1]  # in pure noise there is nothing to be even in
    wanted = torch.linspace(float(log_snr[0]), float(last), num_steps, dtype=torch.float64)
    middles = (log_snr[:-1] + log_snr[1:]) / 2
    nearest = torch.searchsorted(-middles, -wanted)
    nearest[-1] = num_timesteps - 1
    places = torch.arange(num_steps)
    left_out = (nearest - places).clamp(0, num_timesteps - num_steps).cummax(0).values
    return [int(t) for t in (left_out + places).flip(0)]


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
    log_snr = log_abar - (-log_abar.expm1()).log()
    timesteps = make_timesteps(schedule.num_timesteps, num_steps, spacing, log_snr=log_snr)
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
