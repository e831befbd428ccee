"""Worlds with a known answer: data whose exact denoiser can be written down."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_core import NoiseSchedule
from ddpm_core.samplers.grid import Step
from ddpm_core.schedules import at


class World:
    """A network made of the exact E[x0 | x_t] that a subclass gives as `x0(x_t, t)`."""

    schedule: NoiseSchedule

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def denoiser(self, parameterization: str):
        """The exact network for a parameterization."""

        def predict(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            x0 = self.x0(x_t, t)
            signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
            sigma = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double()
            eps = (x_t - signal * x0) / sigma
            return {"x0": x0, "eps": eps, "v": signal * eps - sigma * x0}[parameterization]

        return predict


class GaussianWorld(World):
    """Data x0 ~ N(mean, deviation^2) in each dimension, and the best possible prediction for it.

    E[x0 | x_t] is linear in x_t, so a sampler that is right gives back the mean and the deviation. That may be a
    tensor that broadcasts to x_t.
    """

    def __init__(self, schedule: NoiseSchedule, mean: float = 0.3, deviation: float | Tensor = 0.2) -> None:
        self.schedule, self.mean, self.deviation = schedule, mean, deviation

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]."""
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
        noise_variance = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double() ** 2
        gain = signal * self.deviation**2 / (signal**2 * self.deviation**2 + noise_variance)
        return self.mean + gain * (x_t - signal * self.mean)

    def learned(self, parameterization: str, steps: list[Step]):
        """The exact network that gives also the variance: v for which x_prev given x_t has its exact variance at each
        of the visited `steps`. Both means are linear, so this is the reverse step itself, however far it goes."""
        denoiser, variance = self.denoiser(parameterization), torch.as_tensor(self.deviation, dtype=torch.float64) ** 2
        rows = {}
        for step in steps:
            of_x0 = step.prev_signal * step.beta / step.sigma**2
            beta_tilde = step.prev_sigma**2 / step.sigma**2 * step.beta
            posterior = variance * step.sigma**2 / (variance * step.signal**2 + step.sigma**2)  # Var(x0 | x_t)
            low, high = math.log(max(beta_tilde, 1e-30)), math.log(step.beta)  # the last step draws nothing
            rows[step.t] = 2 * ((beta_tilde + of_x0**2 * posterior).log() - low) / (high - low) - 1

        def predict(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            mean = denoiser(x_t, t, condition)
            return torch.cat((mean, rows[int(t[0])].expand_as(mean)), dim=1)  # a sampler's steps are the batch's

        return predict

    def flow(self, z: Tensor, signal: float, sigma: float) -> Tensor:
        """Where the probability flow that ends at mean + deviation z stands when x_t = signal x0 + sigma eps."""
        return signal * self.mean + (signal**2 * self.deviation**2 + sigma**2) ** 0.5 * z


class MixtureWorld(World):
    """Data from two Gaussians of one deviation, `weight` the share of the first; each dimension for itself."""

    def __init__(
        self, schedule: NoiseSchedule, means: tuple[float, float] = (-0.6, 0.5), deviation: float = 0.1,
        weight: float = 0.3,
    ) -> None:  # fmt: skip
        self.schedule, self.means, self.deviation, self.weight = schedule, means, deviation, weight

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]: the mean of each component given x_t, by the probability that x_t comes from it."""
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
        noise_variance = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double() ** 2
        variance = signal**2 * self.deviation**2 + noise_variance
        gain = signal * self.deviation**2 / variance
        first, second = (m + gain * (x_t - signal * m) for m in self.means)
        log_first, log_second = (-((x_t - signal * m) ** 2) / (2 * variance) for m in self.means)
        odds = torch.sigmoid(log_first - log_second + math.log(self.weight / (1 - self.weight)))
        return odds * first + (1 - odds) * second

    def classifier(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(x_t, y) for each component y, of (b, 1) x_t: the exact logits of p(y | x_t)."""
        signal = at(self.schedule.sqrt_alphas_cumprod, t, x_t).double()
        sigma = at(self.schedule.sqrt_one_minus_alphas_cumprod, t, x_t).double()
        variance = signal**2 * self.deviation**2 + sigma**2
        shares = torch.tensor([self.weight, 1 - self.weight], dtype=torch.float64).log()
        return shares - (x_t - signal * torch.tensor(self.means, dtype=torch.float64)) ** 2 / (2 * variance)

    def component(self, y: int) -> GaussianWorld:
        """The data of one component."""
        return GaussianWorld(self.schedule, self.means[y], self.deviation)

    def moments(self) -> list[float]:
        """E[x0], E[x0^2], E[x0^3], E[x0^4]."""
        d = self.deviation
        rows = [(m, m**2 + d**2, m**3 + 3 * m * d**2, m**4 + 6 * m**2 * d**2 + 3 * d**4) for m in self.means]
        return [self.weight * a + (1 - self.weight) * b for a, b in zip(*rows, strict=True)]


def noise_source(shape: tuple[int, ...], seed: int = 0):
    """`noise(k)`: the k-th draw, float64, the same each time."""
    return lambda k: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * seed + k))
