"""What the network predicts: eps, x0 or v, and each from any other."""

from __future__ import annotations

from torch import Tensor

from ddpm_core.schedules import NoiseSchedule, at

PARAMETERIZATIONS = ("eps", "x0", "v")


def to_target(schedule: NoiseSchedule, parameterization: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a network with this parameterization should output for a given x0 and noise.

    `v` is sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022, section 4).

    Args:
        schedule: the tables.
        parameterization: one of `PARAMETERIZATIONS`.
        x0, noise: (b, ...).
        t: (b,) int64 in [0, T).

    Returns:
        (b, ...).

    Raises:
        ValueError: the parameterization is unknown, or it is eps and the schedule has zero terminal SNR.
    """
    refuse_eps_without_signal(schedule, parameterization)
    match parameterization:
        case "eps":
            return noise
        case "x0":
            return x0
        case "v":
            signal = at(schedule.sqrt_alphas_cumprod, t, x0)
            return signal * noise - at(schedule.sqrt_one_minus_alphas_cumprod, t, x0) * x0
    raise unknown_parameterization(parameterization)


def predict_start_from_noise(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps, the inverse of `q_sample`. Shapes as there; not clipped; refused
    as in :func:`to_target`."""
    refuse_eps_without_signal(schedule, "eps")
    start = at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return start - at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * noise


def predict_noise_from_start(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """eps = (x_t - sqrt(abar) x0) / sqrt(1 - abar). Shapes as in `q_sample`; also re-derives eps from a clipped x0."""
    residue = x_t - at(schedule.sqrt_alphas_cumprod, t, x_t) * x0
    return residue / at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)


def x0_from_output(
    parameterization: str, output: Tensor, x_t: Tensor, signal: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """The x0 that a network's output stands for, where x_t = signal x0 + sigma eps.

    Args:
        parameterization: one of `PARAMETERIZATIONS`.
        output, x_t: (b, ...).
        signal, sigma: sqrt(abar) and sqrt(1 - abar), numbers or shaped to multiply x_t.

    Returns:
        (b, ...), not clipped.

    Raises:
        ValueError: the parameterization is unknown.
    """
    match parameterization:
        case "eps":
            return (x_t - sigma * output) / signal
        case "x0":
            return output
        case "v":
            return signal * x_t - sigma * output
    raise unknown_parameterization(parameterization)


def to_x0(schedule: NoiseSchedule, parameterization: str, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """:func:`x0_from_output` with the tables' entries at (b,) steps `t`; refused as in :func:`to_target`."""
    refuse_eps_without_signal(schedule, parameterization)
    signal = at(schedule.sqrt_alphas_cumprod, t, x_t)
    return x0_from_output(parameterization, output, x_t, signal, at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t))


def refuse_eps_without_signal(schedule: NoiseSchedule, parameterization: str) -> None:
    """Raise for eps on a schedule with zero terminal SNR: there x_t is the noise itself, and x0 can't be told from it.

    Raises:
        ValueError: the two are combined.
    """
    if parameterization == "eps" and schedule.zero_terminal_snr:
        raise ValueError("parameterization 'eps' can't be used with zero terminal SNR: use 'v' or 'x0'")


def split_output(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the output of a network that also learns the variance.

    Args:
        output: (b, 2c, ...).
        x_t: (b, c, ...), the network's input.

    Returns:
        what the parameterization says and the variance's `v` for :func:`ddpm_core.noising.learned_log_variance`, each
        (b, c, ...).

    Raises:
        ValueError: the output has another shape.
    """
    expected = (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
    if output.shape != expected:
        raise ValueError(f"output has shape {tuple(output.shape)}, expected {expected} for a learned variance")
    prediction, v = output.chunk(2, dim=1)
    return prediction, v


def unknown_parameterization(parameterization: str) -> ValueError:
    """The error that names the known ones."""
    known = ", ".join(PARAMETERIZATIONS)
    return ValueError(f"parameterization {parameterization!r} is unknown; known: {known}")
