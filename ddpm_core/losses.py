"""The training loss: one value per image, then simple and VLB weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core.conditioning import Condition
from ddpm_core.dictionaries import take_auxiliary_loss
from ddpm_core.guidance import Denoiser
from ddpm_core.likelihood import model_log_variance, vlb_term
from ddpm_core.noising import q_sample
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.targets import (
    refuse_eps_without_signal,
    split_output,
    to_target,
    to_x0,
    unknown_parameterization,
)

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


def min_snr_weights(schedule: NoiseSchedule, parameterization: str, t: Tensor, gamma: float) -> Tensor:
    """Weights that keep nearly clean steps from outvoting the others: min(snr, gamma), as a factor of an x0 loss.

    **Source**: Hang et al. 2023, section 3.4. An error in eps is an error in x0 divided by snr (squared), one in v by
    snr + 1, so the factor is min(snr, gamma) / snr for `eps` and min(snr, gamma) / (snr + 1) for `v`.

    Args:
        schedule: the tables.
        parameterization: one of `PARAMETERIZATIONS`.
        t: (b,) int64 in [0, T).
        gamma: above 0; 5 in the paper.

    Returns:
        (b,) float32; for `x0` and `v` it vanishes with snr, so a step with zero terminal SNR is not trained at all.

    Raises:
        ValueError: gamma is not positive, the parameterization is unknown, or eps with zero terminal SNR.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr_gamma is {gamma}, expected a number above 0")
    refuse_eps_without_signal(schedule, parameterization)
    snr = schedule.snr[t]
    clipped = snr.clamp(max=gamma)
    match parameterization:
        case "eps":
            return clipped / snr
        case "x0":
            return clipped
        case "v":
            return clipped / (snr + 1)
    raise unknown_parameterization(parameterization)


def weighted_loss(
    schedule: NoiseSchedule,
    parameterization: str,
    per_image: Tensor,
    t: Tensor,
    *,
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    min_snr_gamma: float | None = None,
) -> DiffusionLoss:
    """l_simple_weight * w_t * loss + original_elbo_weight * lvlb_t * loss; `loss_simple` is the loss without weight.

    The VLB part is exact in nats per dimension and step for `l2` (Ho et al. 2020, equation 12, for eps); summed over t
    and multiplied by the number of dimensions it is the bound without its first and last terms.

    Args:
        schedule: the tables.
        parameterization: `eps`, `x0` or `v`.
        per_image: (b,) from :func:`get_loss`.
        t: (b,) int64 in [0, T).
        l_simple_weight, original_elbo_weight: weights of the two parts.
        min_snr_gamma: w_t is that of :func:`min_snr_weights`; None for 1.

    Raises:
        ValueError: as :func:`min_snr_weights` does.
    """
    weights: Tensor = getattr(schedule, f"lvlb_weights_{parameterization}")
    loss_vlb = weights[t] * per_image
    simple = per_image
    if min_snr_gamma is not None:
        simple = min_snr_weights(schedule, parameterization, t, min_snr_gamma) * per_image
    return DiffusionLoss(l_simple_weight * simple + original_elbo_weight * loss_vlb, per_image, loss_vlb)


def p_losses(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    condition: Condition = None,
    *,
    parameterization: str = "eps",
    loss_type: str = "l2",
    l_simple_weight: float = 1.0,
    original_elbo_weight: float = 0.0,
    min_snr_gamma: float | None = None,
    learned_variance: bool = False,
) -> DiffusionLoss:
    """Noise the data, ask the network, compare: the whole training loss of a batch.

    With `learned_variance` the loss is the hybrid one: the simple part plus T / 1000 times the exact term of the bound
    in nats per dimension, `loss_vlb`, which teaches the variance alone (its mean is detached). The authors' code counts
    that term in bits, so its weight is 1.44 times ours.

    An auxiliary loss that the network's modules leave (`QuantizedEmbedding` does) is added to `loss`, image by image,
    so that micro-batches and DDP treat it as they do the rest; for that the denoiser must be a module, which a wrapper
    by DDP or torch.compile is.

    **Source**: Ho et al. 2020, algorithm 1 (simple) and equation 12 (VLB); Nichol and Dhariwal 2021, equation 16.

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
        min_snr_gamma: as in :func:`weighted_loss`.
        learned_variance: the network's output has 2c channels, as :func:`split_output` takes them.

    Returns:
        the loss and its parts, each (b,) float32.

    Raises:
        ValueError: an argument that the functions above refuse, or `original_elbo_weight`, which is of a fixed
            variance, together with a learned one.
    """
    x_t = q_sample(schedule, x0, t, noise)
    prediction = denoiser(x_t, t, condition).float()
    auxiliary = take_auxiliary_loss(denoiser) if isinstance(denoiser, nn.Module) else None
    if learned_variance:
        if original_elbo_weight != 0:
            raise ValueError(f"original_elbo_weight is {original_elbo_weight}, expected 0 with a learned variance")
        prediction, v = split_output(prediction, x_t)
    per_image = get_loss(prediction, to_target(schedule, parameterization, x0, noise, t), loss_type)
    parts = weighted_loss(
        schedule,
        parameterization,
        per_image,
        t,
        l_simple_weight=l_simple_weight,
        original_elbo_weight=original_elbo_weight,
        min_snr_gamma=min_snr_gamma,
    )
    if auxiliary is not None:
        parts = replace(parts, loss=parts.loss + auxiliary)
    if not learned_variance:
        return parts
    x0_predicted = to_x0(schedule, parameterization, prediction.detach(), x_t, t)
    loss_vlb = vlb_term(schedule, x0, x0_predicted, model_log_variance(schedule, v, t), t)
    return DiffusionLoss(parts.loss + schedule.num_timesteps / 1000 * loss_vlb, parts.loss_simple, loss_vlb)


def classifier_loss(
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    labels: Tensor,
) -> DiffusionLoss:
    """Cross-entropy of a classifier that sees x_t and t: what trains the one of classifier guidance.

    **Source**: Dhariwal and Nichol 2021, section 4: the noise is that of the diffusion model's training.

    Args:
        classifier: (x_t, t) -> (b, classes) logits.
        schedule: the diffusion model's.
        x0, noise: (b, ...).
        t: (b,) int64 in [0, T).
        labels: (b,) int64.

    Returns:
        the loss in nats, which is its own `loss_simple`; `loss_vlb` is 0.
    """
    logits = classifier(q_sample(schedule, x0, t, noise), t)
    loss = functional.cross_entropy(logits.float(), labels, reduction="none")
    return DiffusionLoss(loss, loss, torch.zeros_like(loss))
