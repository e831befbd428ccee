"""The network as a sampler sees it: x_t at one of the visited steps -> x0, whatever it was trained to predict."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core.conditioning import Condition
from ddpm_core.guidance import ClassifierGuidance, Denoiser, denoiser_at
from ddpm_core.samplers.grid import Step, make_grid
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.targets import refuse_eps_without_signal, split_output, x0_from_output


class Chain:
    """The steps of one run and the network behind them. All numbers and `t` are made here, before the first step.

    Every method moves by x0 and x_t alone: eps is what is left of x_t, so it agrees with x0 also after clipping.

    Args:
        denoiser, schedule, condition, parameterization, learned_variance, num_steps, spacing, clip_denoised,
            dynamic_threshold: as in `sample_ddpm`.
        x_noisy: (b, ...); its device, dtype and length are those of the run.
        mean_shift: leave the outermost classifier guidance to the caller, who adds `gradient` to its mean.

    Raises:
        ValueError: num_steps, spacing, parameterization or dynamic_threshold is out of range, or eps is to be predicted
            on a schedule with zero terminal SNR.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        x_noisy: Tensor,
        *,
        condition: Condition = None,
        parameterization: str = "eps",
        learned_variance: bool = False,
        num_steps: int | None = None,
        spacing: str = "trailing",
        clip_denoised: bool = False,
        dynamic_threshold: float | None = None,
        mean_shift: bool = False,
    ) -> None:
        refuse_eps_without_signal(schedule, parameterization)
        if dynamic_threshold is not None and not 0 < dynamic_threshold <= 1:
            raise ValueError(f"dynamic_threshold is {dynamic_threshold}, expected a share in (0, 1] or None")
        self.steps = make_grid(schedule, schedule.num_timesteps if num_steps is None else num_steps, spacing)
        self._condition = condition
        self._denoisers = [denoiser_at(denoiser, step) for step in self.steps]
        self._classifiers: list[ClassifierGuidance | None] = [None] * len(self.steps)
        for place, stepwise in enumerate(self._denoisers):
            if mean_shift and isinstance(stepwise, ClassifierGuidance):
                self._classifiers[place], self._denoisers[place] = stepwise, stepwise.denoiser
        self._learned_variance, self._clip, self._threshold = learned_variance, clip_denoised, dynamic_threshold
        self._weights = _make_weights(parameterization, self.steps)
        t = torch.tensor([step.t for step in self.steps], device=x_noisy.device)
        self._t = t[:, None].expand(-1, len(x_noisy)).unbind()

    def predict_x0(self, k: int, x_t: Tensor) -> Tensor:
        """One call of the network at the k-th step, k = 1..S: (b, ...) -> x0 of that shape, in memory of its own."""
        return self.predict(k, x_t)[0]

    def predict(self, k: int, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`predict_x0`, and what the network says of the variance: v as `learned_log_variance` takes it, or None.

        Raises:
            ValueError: the output has another shape than promised.
        """
        output, v = self._denoisers[k - 1](x_t, self._t[k - 1], self._condition).to(x_t.dtype), None
        if self._learned_variance:
            output, v = split_output(output, x_t)
        elif output.shape != x_t.shape:
            raise ValueError(
                f"output has shape {tuple(output.shape)}, expected {tuple(x_t.shape)}; a network with a learned "
                "variance needs learned_variance=True"
            )
        of_output, of_x = self._weights[k - 1]
        x0 = output * of_output
        if of_x != 0:
            x0.add_(x_t, alpha=of_x)
        if self._threshold is not None:
            threshold_(x0, self._threshold)
        elif self._clip:
            x0.clamp_(-1, 1)
        return x0, v

    def gradient(self, k: int, x_t: Tensor) -> Tensor | None:
        """What `mean_shift` leaves to the caller at the k-th step: s * grad log p(y | x_t), or None."""
        classifier = self._classifiers[k - 1]
        return None if classifier is None else classifier.gradient(x_t, self._t[k - 1], self._condition)


def move(step: Step, x0: Tensor, x_t: Tensor, eps_weight: float, *, out: Tensor | None = None) -> Tensor:
    """prev_signal * x0 + eps_weight * eps, where eps = (x_t - signal * x0) / sigma.

    With `eps_weight` = prev_sigma this is the deterministic step of DDIM, and at the end of the chain x0 itself.

    Args:
        step: from where to where.
        x0, x_t: (b, ...).
        eps_weight: in [0, prev_sigma].
        out: written to and returned; may be x0. None for a new tensor.

    Returns:
        (b, ...).
    """
    of_eps = eps_weight / step.sigma
    return torch.mul(x0, step.prev_signal - of_eps * step.signal, out=out).add_(x_t, alpha=of_eps)


def threshold_(x0: Tensor, share: float) -> Tensor:
    """Dynamic thresholding, in place: clip each sample to [-s, s] and divide by s, a quantile of its |x0|, at least 1.

    Pixels that guidance drove out of [-1, 1] come back without all of them sticking at the ends.

    **Source**: Saharia et al. 2022 (Imagen), section 2.3.

    Args:
        x0: (b, ...); overwritten.
        share: p in (0, 1]: the quantile, interpolated linearly between neighbours.

    Returns:
        x0.

    Example:
        >>> threshold_(torch.tensor([[0.0, -1.0, 2.0, 4.0, -8.0]]), 0.75)
        tensor([[ 0.0000, -0.2500,  0.5000,  1.0000, -1.0000]])
    """
    sizes = x0.flatten(1).abs()
    place = share * (sizes.shape[1] - 1)
    below, rest = int(place), place - int(place)
    # kthvalue, as torch.quantile sorts everything, knows no half precision and refuses large tensors
    limit = sizes.kthvalue(below + 1, dim=1).values
    if rest > 0:
        limit = torch.lerp(limit, sizes.kthvalue(below + 2, dim=1).values, rest)
    limit = limit.clamp_(min=1).reshape(-1, *(1,) * (x0.ndim - 1))
    return torch.minimum(torch.maximum(x0, -limit, out=x0), limit, out=x0).div_(limit)


def _make_weights(parameterization: str, steps: list[Step]) -> list[list[float]]:
    """[weight of the output, weight of x_t] in x0, a pair a step: what the linear `x0_from_output` makes of units."""
    output, x_t = torch.eye(2, dtype=torch.float64)
    signal, sigma = torch.tensor([(step.signal, step.sigma) for step in steps], dtype=torch.float64).T[..., None]
    weights = x0_from_output(parameterization, output, x_t, signal, sigma)
    rows: list[list[float]] = weights.expand(len(steps), 2).tolist()
    return rows
