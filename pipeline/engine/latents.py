"""Between pixels and the latents that a latent diffusion model works on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_core import KLAutoencoder, LatentScale, reparameterize
from pipeline.data.pixels import to_uint8, to_unit_range
from pipeline.runtime.rng import Stream, draw_normal


class FirstStage:
    """A frozen autoencoder and the scale that gives its latents a standard deviation of 1.

    Args:
        network: with its weights, on the device of use.
        scale: 1 / (standard deviation of the latents of the training set).
    """

    def __init__(self, network: KLAutoencoder, scale: float = 1.0) -> None:
        self.network = network.eval().requires_grad_(False)
        self.scale = scale

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(b, c, h, w) uint8 on the network's device -> (b, 2z, h / f, w / f) float32: means, then log-variances."""
        return torch.cat(self.network.encode(to_unit_range(images)), dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(b, z, h / f, w / f) scaled latents -> (b, c, h, w), about [-1, 1]."""
        return self.network.decode(latents / self.scale)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Pixels to the mean of their latent and back: uint8 -> uint8."""
        mean, _ = self.encode(images).chunk(2, dim=1)
        return to_uint8(self.decode(mean * self.scale))


def make_latents(moments: Tensor, places: Tensor, *, seed: int, scale: float) -> Tensor:
    """What the diffusion model trains on: a draw from the encoder's Gaussian, scaled, and another in each epoch.

    Args:
        moments: (b, 2z, h, w) as :meth:`FirstStage.encode` gives them.
        places: (b,) places in the global order, which key the draw.
        seed: of the training.
        scale: of the first stage.

    Returns:
        (b, z, h, w) of standard deviation about 1; nowhere clipped.
    """
    mean, log_variance = moments.contiguous().chunk(2, dim=1)
    noise = draw_normal(seed, Stream.LATENT, places, tuple(mean.shape[1:]))
    return reparameterize(mean, log_variance, noise).mul_(scale)


def measure_scale(moments: Iterable[NDArray[np.float32]]) -> float:
    """The scale over batches of moments (b, 2z, h, w); their order and size change no more than the last bits."""
    scale = LatentScale()
    for batch in moments:
        scale.add(*torch.from_numpy(batch).chunk(2, dim=1))
    return scale.value


def interleave(images: Tensor, reconstructions: Tensor, columns: int) -> NDArray[np.uint8]:
    """A row of images, the row of their reconstructions, and so on: (n, c, h, w) twice -> (2n, c, h, w)."""
    rows = zip(torch.split(images.cpu(), columns), torch.split(reconstructions.cpu(), columns), strict=True)
    return torch.cat([part for row in rows for part in row]).numpy()
