"""Worlds with a known answer: data whose exact denoiser can be written down."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core import NoiseSchedule
from ddpm_core.schedules import at


class GaussianWorld:
    """Data x0 ~ N(mean, deviation^2) in each dimension, and the best possible prediction for it.

    E[x0 | x_t] is linear in x_t, so a sampler that is right gives back the mean and the deviation.
    """

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.3, deviation: float = 0.2) -> None:
        self.schedule, self.mean, self.deviation = schedule, mean, deviation

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
        noise_variance = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double() ** 2
        gain = signal * self.deviation**2 / (signal**2 * self.deviation**2 + noise_variance)
        return self.mean + gain * (x_t - signal * self.mean)

    def denoiser(self, parameterization: str):
        """The exact network for a parameterization."""

        def predict(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            x0 = self.x0(x_t, t)
            signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
            sigma = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double()
            eps = (x_t - signal * x0) / sigma
            return {"x0": x0, "eps": eps, "v": signal * eps - sigma * x0}[parameterization]

        return predict


def noise_source(shape: tuple[int, ...], seed: int = 0):
    """`noise(k)`: the k-th draw, float64, the same each time."""
    return lambda k: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + k))
