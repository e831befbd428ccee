"""What trains an autoencoder for latent diffusion, and the scale of its latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ddpm_core.losses import get_loss

Features = Callable[[Tensor], Sequence[Tensor]]
"""(b, c, h, w) in [-1, 1] -> feature maps (b, c_l, h_l, w_l), one a layer, differentiable."""

_MOST_ADAPTIVE = 1e4
_LEAST_GRADIENT = 1e-6


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """mean + exp(log_variance / 2) * noise: a draw from the encoder's Gaussian, differentiable in its moments.

    **Source**: Kingma and Welling 2014, section 2.4.

    Args:
        mean, log_variance, noise: of one shape.

    Returns:
        the latent, of that shape.
    """
    return torch.addcmul(mean, (0.5 * log_variance).exp(), noise)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, summed over all axes but the first.

    **Source**: Kingma and Welling 2014, appendix B.

    Args:
        mean, log_variance: (b, ...).

    Returns:
        (b,), 0 or above.

    Example:
        >>> kl_to_standard_normal(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(2, 2)).tolist()
        [0.0, 2.5]
    """
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).flatten(1).sum(1)


def perceptual_distance(features: Features, first: Tensor, second: Tensor) -> Tensor:
    """Distance of two images in the feature maps of a network: 0 for equal ones.

    Each map is scaled to length 1 over its channels in every place; squared differences are summed over channels,
    averaged over places and added over layers. **Source**: Zhang et al. 2018 (LPIPS), equation 1, with all weights 1.

    Args:
        features: image -> feature maps.
        first, second: (b, c, h, w) in [-1, 1].

    Returns:
        (b,) in [0, 4 * layers].
    """
    total = torch.zeros(len(first), device=first.device)
    for one, other in zip(features(first), features(second), strict=True):
        difference = functional.normalize(one.float(), dim=1) - functional.normalize(other.float(), dim=1)
        total = total + difference.square().sum(1).flatten(1).mean(1)
    return total


@dataclass(frozen=True)
class FirstStageLoss:
    """A loss and its parts, each (b,): `kl` is in nats an image."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    perceptual: Tensor


def first_stage_loss(
    reconstruction: Tensor,
    target: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    loss_type: str = "l1",
    kl_weight: float = 1e-6,
    features: Features | None = None,
    perceptual_weight: float = 0.0,
) -> FirstStageLoss:
    """reconstruction + perceptual_weight * perceptual + kl_weight * KL / (numbers in an image).

    The KL is divided as the reconstruction is, which is a mean, so `kl_weight` means what it does in the source, where
    both are sums; there it is 1e-6.

    **Source**: Rombach et al. 2022, appendix G, equation 25 without its adversarial term, which
    :func:`adaptive_weight` weighs.

    Args:
        reconstruction, target: (b, c, h, w) images.
        mean, log_variance: (b, z, h', w') of the latent.
        loss_type: one of `LOSS_TYPES`.
        kl_weight: 0 or above.
        features: for the perceptual part; None for none.
        perceptual_weight: of that part.

    Returns:
        the loss and its parts, each (b,).

    Raises:
        ValueError: shapes or loss type, as `get_loss`; or a perceptual weight without features.
    """
    if perceptual_weight and features is None:
        raise ValueError(f"perceptual_weight is {perceptual_weight}, but there are no features")
    pixels = get_loss(reconstruction, target, loss_type)
    kl = kl_to_standard_normal(mean, log_variance)
    perceptual = torch.zeros_like(pixels)
    if features is not None:
        perceptual = perceptual_distance(features, reconstruction, target)
    loss = pixels + perceptual_weight * perceptual + kl_weight / math.prod(target.shape[1:]) * kl
    return FirstStageLoss(loss, pixels, kl, perceptual)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: (mean relu(1 - real) + mean relu(1 + fake)) / 2.

    **Source**: Lim and Ye 2017, section 3; halved as in Esser et al. 2021.

    Args:
        real, fake: (b, ...) the discriminator's numbers for images and for their reconstructions.

    Returns:
        (b,), 0 or above.
    """
    return 0.5 * (functional.relu(1 - real) + functional.relu(1 + fake)).flatten(1).mean(1)


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, both by the last layer's weight.

    With it the discriminator pulls as hard as the pixels do, however large its numbers are. The graph is kept.

    **Source**: Esser et al. 2021 (VQGAN), equation 7: delta 1e-6, at most 1e4 as in the authors' code.

    Args:
        reconstruction_loss, adversarial_loss: numbers that depend on `last_layer`.
        last_layer: a weight.

    Returns:
        () without gradient.
    """
    by_pixels, by_adversary = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    )
    weight: Tensor = by_pixels / (by_adversary + _LEAST_GRADIENT)
    return weight.clamp(max=_MOST_ADAPTIVE).detach()


class LatentScale:
    """1 / (standard deviation of the latents), measured over any number of batches in float64.

    The deviation is that of drawn latents, over all images, channels and places: by the law of total variance
    E[mean^2 + variance] - E[mean]^2, so no draw is needed. **Source**: Rombach et al. 2022, appendix G, who measure it
    on one batch of draws.

    Example:
        >>> scale = LatentScale()
        >>> scale.add(torch.tensor([[3.0], [-3.0]]), torch.tensor([[7.0], [7.0]]).log())
        >>> round(scale.value, 6)
        0.25
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = 0.0

    def add(self, mean: Tensor, log_variance: Tensor) -> None:
        """Take in a batch of moments (b, ...)."""
        mean = mean.double()
        self.count += mean.numel()
        self.total += float(mean.sum())
        self.squares += float((mean.square() + log_variance.double().exp()).sum())

    @property
    def value(self) -> float:
        """The scale.

        Raises:
            ValueError: nothing was added, or all latents are one and the same number.
        """
        variance = self.squares / self.count - (self.total / self.count) ** 2 if self.count else 0.0
        if not variance > 0:
            raise ValueError(f"latents of {self.count} numbers have variance {variance}: there is no scale")
        return 1 / math.sqrt(variance)
