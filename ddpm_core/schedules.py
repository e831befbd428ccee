"""Noise schedules: every table of the forward process, derived in float64 and kept in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine")


def make_betas(
    beta_schedule: str,
    timesteps: int,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> Tensor:
    """Variances added at each diffusion step.

    `linear` is Ho et al. 2020: linear in beta, end points scaled by 1000 / timesteps so that the chain ends at the same
    noise for any length. `scaled_linear` is Rombach et al. 2022: linear in sqrt(beta), scaled likewise. `cosine` is
    Nichol and Dhariwal 2021, equation 17, with beta clipped at 0.999.

    Args:
        beta_schedule: one of `BETA_SCHEDULES`.
        timesteps: T, at least 2.
        linear_start, linear_end: first and last beta at T = 1000.
        cosine_s: offset of the cosine that keeps the first betas from vanishing.

    Returns:
        (T,) float64 in (0, 1).

    Raises:
        ValueError: the name is unknown, or a beta falls outside (0, 1).

    Example:
        >>> make_betas("linear", 1000)[[0, -1]].tolist()
        [0.0001, 0.02]
    """
    scale = 1000 / timesteps
    start, end = scale * linear_start, scale * linear_end
    match beta_schedule:
        case "linear":
            betas = torch.linspace(start, end, timesteps, dtype=torch.float64)
        case "scaled_linear":
            betas = torch.linspace(math.sqrt(start), math.sqrt(end), timesteps, dtype=torch.float64) ** 2
        case "cosine":
            u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            abar = torch.cos((u + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        case _:
            raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; known: {', '.join(BETA_SCHEDULES)}")
    return _checked(betas)


def _checked(betas: Tensor) -> Tensor:
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected (T,) with T of at least 2")
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(f"betas must lie in (0, 1), found {float(betas.min()):g} to {float(betas.max()):g}")
    return betas.double()


class NoiseSchedule(nn.Module):
    """The tables of a discrete diffusion of T steps, as non-persistent buffers of shape (T,).

    Symbols: alpha = 1 - beta, abar = running product of alpha, abar_prev = abar shifted with 1 in front,
    snr = abar / (1 - abar). The tables are float32 whatever the module is cast to (bfloat16 keeps 870 of 1000 values of
    abar apart), and stay out of the state dict, so that an old checkpoint can't override a new schedule.

    Args:
        betas: (T,) in (0, 1); all tables are derived from these in float64.
        v_posterior: in [0, 1]; posterior variance is (1 - v) beta_tilde + v beta.

    Raises:
        ValueError: betas of another shape or outside (0, 1), or v_posterior outside [0, 1].
    """

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    snr: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    lvlb_weights_eps: Tensor
    lvlb_weights_x0: Tensor
    lvlb_weights_v: Tensor

    def __init__(self, betas: Tensor, *, v_posterior: float = 0.0) -> None:
        super().__init__()
        if not 0 <= v_posterior <= 1:
            raise ValueError(f"v_posterior is {v_posterior}, expected a number in [0, 1]")
        self.v_posterior = v_posterior
        for name, table in make_tables(_checked(betas), v_posterior).items():
            self.register_buffer(name, table.float(), persistent=False)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)  # type: ignore[no-any-return, no-untyped-call]


def make_tables(betas: Tensor, v_posterior: float) -> dict[str, Tensor]:
    """Every table of :class:`NoiseSchedule` in float64, from (T,) float64 betas."""
    alphas = 1 - betas
    abar = alphas.cumprod(0)
    abar_prev = torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1]))
    snr = abar / (1 - abar)
    beta_tilde = (1 - abar_prev) / (1 - abar) * betas
    variance = (1 - v_posterior) * beta_tilde + v_posterior * betas
    # beta_tilde is 0 at t = 0: entry 1 stands in for the logarithm there.
    log_variance = torch.cat((variance[1:2], variance[1:])).log()
    # KL between posteriors of equal variance is 1/2 (snr_prev - snr) |x0 - x0_hat|^2; snr_prev is infinite at
    # t = 0, where entry 1 stands in again.
    weight_x0 = torch.empty_like(snr)
    weight_x0[1:] = 0.5 * (snr[:-1] - snr[1:])
    weight_eps, weight_v = weight_x0 / snr, weight_x0 * (1 - abar)
    for weight in (weight_x0, weight_eps, weight_v):
        weight[0] = weight[1]
    return {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": abar_prev,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "snr": snr,
        "posterior_mean_coef1": abar_prev.sqrt() * betas / (1 - abar),
        "posterior_mean_coef2": alphas.sqrt() * (1 - abar_prev) / (1 - abar),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": log_variance,
        "lvlb_weights_eps": weight_eps,
        "lvlb_weights_x0": weight_x0,
        "lvlb_weights_v": weight_v,
    }


def register_schedule(
    given_betas: Tensor | None = None,
    beta_schedule: str = "linear",
    timesteps: int = 1000,
    *,
    v_posterior: float = 0.0,
    **shape: Any,
) -> NoiseSchedule:
    """A schedule from given betas, or from a name as in :func:`make_betas` (which lists what `shape` may hold)."""
    betas = make_betas(beta_schedule, timesteps, **shape) if given_betas is None else given_betas
    return NoiseSchedule(betas, v_posterior=v_posterior)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a (T,) table at (b,) integer steps, shaped to multiply a (b, ...) tensor."""
    return table[t].reshape(-1, *(1,) * (like.ndim - 1))
