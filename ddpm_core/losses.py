"""The training loss: one value per image, then simple and VLB weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ddpm_core.guidance import Denoiser
from ddpm_core.noising import q_sample
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.targets import to_target

_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "l1": functional.l1_loss,
    "l2": functional.mse_loss,
    "huber": functional.huber_loss,
}
LOSS_TYPES = tuple(_ELEMENTWISE)


@dataclass(frozen=True)
class DiffusionLoss:
    """A loss and its parts, each (b,)."""

    loss: Tensor
    loss_simple: Tensor
    loss_vlb: Tensor


def get_loss(prediction: Tensor, target: Tensor, loss_type: str = "l2") -> Tensor:
    """Mean over every axis but the first.

    Args:
        prediction, target: (b, ...) of one shape, any rank of at least 2.
        loss_type: one of `LOSS_TYPES`.

    Returns:
        (b,).

    Raises:
        ValueError: the shapes differ (broadcasting would hide it), or the loss type is unknown.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    if loss_type not in _ELEMENTWISE:
        raise ValueError(f"loss_type {loss_type!r} is unknown; known: {', '.join(LOSS_TYPES)}")
    return _ELEMENTWISE[loss_type](prediction, target, reduction="none").flatten(1).mean(1)


def weighted_loss(
    schedule: NoiseSchedule,
    parameterization: str,
    per_image: Tensor,
    t: Tensor,
    *,
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
) -> DiffusionLoss:
    """l_simple_weight * loss + original_elbo_weight * lvlb_t * loss.

    The VLB part is exact in nats per dimension and step for `l2` (Ho et al. 2020, equation 12, for eps); summed over t
    and multiplied by the number of dimensions it is the bound without its first and last terms.

    Args:
        schedule: the tables.
        parameterization: `eps`, `x0` or `v`.
        per_image: (b,) from :func:`get_loss`.
        t: (b,) int64 in [0, T).
        l_simple_weight, original_elbo_weight: weights of the two parts.
    """
    weights: Tensor = getattr(schedule, f"lvlb_weights_{parameterization}")
    loss_vlb = weights[t] * per_image
    return DiffusionLoss(l_simple_weight * per_image + original_elbo_weight * loss_vlb, per_image, loss_vlb)


def p_losses(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Tensor | None = None,
    *,
    parameterization: str = "eps",
    loss_type: str = "l2",
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
) -> DiffusionLoss:
    """Noise the data, ask the network, compare: the whole training loss of a batch.

    **Source**: Ho et al. 2020, algorithm 1 (simple) and equation 12 (VLB).

    Args:
        denoiser: the network under training.
        schedule: the tables, on the device of `x0`.
        x0: (b, ...) data in [-1, 1].
        t: (b,) int64 in [0, T).
        noise: standard normal of the shape of `x0`.
        condition: passed to the network: (b,) labels, null label included where it was dropped.
        parameterization: what the network predicts, one of `PARAMETERIZATIONS`.
        loss_type: one of `LOSS_TYPES`.
        l_simple_weight, original_elbo_weight: weights of the two parts.

    Returns:
        the loss and its parts, each (b,) float32.
    """
    prediction = denoiser(q_sample(schedule, x0, t, noise), t, condition).float()
    per_image = get_loss(prediction, to_target(schedule, parameterization, x0, noise, t), loss_type)
    return weighted_loss(
        schedule,
        parameterization,
        per_image,
        t,
        l_simple_weight=l_simple_weight,
        original_elbo_weight=original_elbo_weight,
    )
