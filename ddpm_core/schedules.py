"""Noise schedules: every table of the forward process, derived in float64 and kept in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
_MAX_BETA = 0.999


def make_betas(
    beta_schedule: str,
    timesteps: int,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    sigmoid_start: float = -3.0,
    sigmoid_end: float = 3.0,
    sigmoid_tau: float = 1.0,
) -> Tensor:
    """Variances added at each diffusion step.

    `linear` is Ho et al. 2020: linear in beta, end points scaled by 1000 / timesteps so that the chain ends at the same
    noise for any length. `scaled_linear` is Rombach et al. 2022: linear in sqrt(beta), scaled likewise. `cosine` is
    Nichol and Dhariwal 2021, equation 17. `sigmoid` is Jabri et al. 2022, algorithm 1: abar falls from 1 to 0 along a
    sigmoid ramp. The last two give abar, and beta = 1 - abar / abar_prev is clipped at 0.999.

    Args:
        beta_schedule: one of `BETA_SCHEDULES`.
        timesteps: T, at least 2.
        linear_start, linear_end: first and last beta at T = 1000.
        cosine_s: offset of the cosine that keeps the first betas from vanishing.
        sigmoid_start, sigmoid_end: the part of the sigmoid that is used; start below end.
        sigmoid_tau: above 0; the sigmoid's argument is divided by it.

    Returns:
        (T,) float64 in (0, 1).

    Raises:
        ValueError: the name is unknown, the sigmoid's numbers are out of range, or a beta falls outside (0, 1).

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
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=_MAX_BETA)
        case "sigmoid":
            if not (sigmoid_start < sigmoid_end and sigmoid_tau > 0):
                raise ValueError(
                    f"sigmoid_start, sigmoid_end, sigmoid_tau are {sigmoid_start}, {sigmoid_end}, {sigmoid_tau}, "
                    "expected start below end and tau above 0"
                )
            ramp = torch.linspace(sigmoid_start, sigmoid_end, timesteps + 1, dtype=torch.float64)
            height = torch.sigmoid(ramp / sigmoid_tau)
            abar = (height[-1] - height) / (height[-1] - height[0])
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=_MAX_BETA)
        case _:
            raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; known: {', '.join(BETA_SCHEDULES)}")
    return _checked(betas, last_may_be_one=False)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose chain ends in pure noise: sqrt(abar) is shifted to end in 0, and scaled to keep its first entry.

    A network trained on it must not predict eps: at the last step x_t holds nothing of x0.

    **Source**: Lin et al. 2023, algorithm 1.

    Args:
        betas: (T,) in (0, 1); the last may be 1.

    Returns:
        (T,) float64; the last is exactly 1.

    Raises:
        ValueError: betas of another shape or out of range.

    Example:
        >>> rescale_zero_terminal_snr(torch.tensor([0.1, 0.2, 0.3]))[[0, -1]]
        tensor([0.1000, 1.0000], dtype=torch.float64)
    """
    signal = (1 - _checked(betas, last_may_be_one=True)).cumprod(0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return 1 - torch.cat((signal[:1], signal[1:] / signal[:-1])) ** 2


def _checked(betas: Tensor, *, last_may_be_one: bool) -> Tensor:
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"betas have shape {tuple(betas.shape)}, expected (T,) with T of at least 2")
    below_one = betas[:-1] if last_may_be_one else betas
    if not bool((betas > 0).all() and (betas <= 1).all() and (below_one < 1).all()):
        bounds = f"{float(betas.min()):g} to {float(betas.max()):g}"
        raise ValueError(f"betas must lie in (0, 1){', the last in (0, 1]' * last_may_be_one}, found {bounds}")
    return betas.double()


class NoiseSchedule(nn.Module):
    """The tables of a discrete diffusion of T steps, as non-persistent buffers of shape (T,).

    Symbols: alpha = 1 - beta, abar = running product of alpha, abar_prev = abar shifted with 1 in front,
    snr = abar / (1 - abar). The tables are float32 whatever the module is cast to (bfloat16 keeps 870 of 1000 values of
    abar apart), and stay out of the state dict, so that an old checkpoint can't override a new schedule.

    Zero terminal SNR (a last beta of 1) leaves infinities only where eps is divided by abar: in `sqrt_recip_*`,
    `sqrt_recipm1_*` and `lvlb_weights_eps`; and `log_snr` ends in -infinity. What v and x0 need stays finite.

    Args:
        betas: (T,) in (0, 1), the last in (0, 1]; all tables are derived from these in float64.
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
    log_snr: Tensor
    log_betas: Tensor
    log_beta_tilde_clipped: Tensor
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
        betas = _checked(betas, last_may_be_one=True)
        self.v_posterior = v_posterior
        self.zero_terminal_snr = bool(betas[-1] == 1)
        for name, table in make_tables(betas, v_posterior).items():
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
    log_beta_tilde = torch.cat((beta_tilde[1:2], beta_tilde[1:])).log()
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
        "log_snr": abar.log() - torch.log1p(-abar),
        "log_betas": betas.log(),
        "log_beta_tilde_clipped": log_beta_tilde,
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
    zero_terminal_snr: bool = False,
    **shape: Any,
) -> NoiseSchedule:
    """A schedule from given betas, or from a name as in :func:`make_betas` (which lists what `shape` may hold); either
    is passed through :func:`rescale_zero_terminal_snr` where that is asked for."""
    betas = make_betas(beta_schedule, timesteps, **shape) if given_betas is None else given_betas
    if zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    return NoiseSchedule(betas, v_posterior=v_posterior)


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a (T,) table at (b,) integer steps, shaped to multiply a (b, ...) tensor."""
    return table[t].reshape(-1, *(1,) * (like.ndim - 1))
