"""The first stage of latent diffusion: images to small latents and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ddpm_core.first_stage import reparameterize
from ddpm_core.nn.attention import SelfAttention
from ddpm_core.nn.blocks import Downsample, ResidualBlock, Upsample, make_norm

FACTORS = (2, 4, 8)
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class KLAutoencoder(nn.Module):
    """A variational autoencoder whose latents are feature maps, f times smaller than the image in height and width.

    Both halves are residual blocks at log2(f) + 1 resolutions, with self-attention at the smallest. The encoder gives
    mean and log-variance of a Gaussian in each place of the latent.

    **Source**: Rombach et al. 2022, section 3.1 and appendix G (KL-reg.), without the two 1 x 1 convolutions around the
    latent, which the neighbouring 3 x 3 ones contain.

    Args:
        channels: of the image.
        latent_channels: z, of the latent.
        factor: f, one of `FACTORS`.
        base_channels: channels at full resolution; a multiple of 8.
        channel_multipliers: one a resolution, full resolution first: log2(f) + 1 many.
        num_blocks: residual blocks a resolution, in each half.

    Raises:
        ValueError: the factor is another, or the number of multipliers.

    Example:
        >>> import torch
        >>> network = KLAutoencoder(channels=1, latent_channels=3, factor=4, base_channels=8)
        >>> mean, log_variance = network.encode(torch.zeros(2, 1, 32, 32))
        >>> mean.shape, network.decode(mean).shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 1, 32, 32]))
    """

    def __init__(
        self,
        *,
        channels: int,
        latent_channels: int = 4,
        factor: int = 4,
        base_channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        num_blocks: int = 1,
    ) -> None:
        super().__init__()
        if factor not in FACTORS:
            raise ValueError(f"factor is {factor}, expected one of {', '.join(map(str, FACTORS))}")
        levels = factor.bit_length()
        if len(channel_multipliers) != levels:
            raise ValueError(f"{len(channel_multipliers)} channel_multipliers, expected {levels} for factor {factor}")
        widths = [multiplier * base_channels for multiplier in channel_multipliers]
        self.factor, self.latent_channels = factor, latent_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1),
            *_pyramid([widths[0], *widths], num_blocks, Downsample),
            *_middle(widths[-1]),
            *_out(widths[-1], 2 * latent_channels),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
            *_middle(widths[-1]),
            *_pyramid([widths[-1], *reversed(widths)], num_blocks, Upsample),
            *_out(widths[0], channels),
        )

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the pixels, on which :func:`ddpm_core.first_stage.adaptive_weight` compares losses."""
        weight = self.decoder[-1].weight
        assert isinstance(weight, Tensor)
        return weight

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent.

        Args:
            x: (b, channels, h, w) in [-1, 1]; h and w divisible by the factor.

        Returns:
            two (b, z, h / f, w / f); the log-variance in [-30, 20], so that its exponential stays finite.

        Raises:
            ValueError: height or width is not divisible.
        """
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"images of {x.shape[-2]} x {x.shape[-1]} px can't be divided by factor {self.factor}")
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """(b, z, h / f, w / f) latents -> (b, channels, h, w), about [-1, 1] and not clipped."""
        return self.decoder(z)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What training needs: the reconstruction from a drawn latent, and the moments.

        Args:
            x: as in :meth:`encode`.
            noise: (b, z, h / f, w / f) standard normal.

        Returns:
            reconstruction (b, channels, h, w), mean and log-variance (b, z, h / f, w / f).
        """
        mean, log_variance = self.encode(x)
        return self.decode(reparameterize(mean, log_variance, noise)), mean, log_variance


class PatchDiscriminator(nn.Module):
    """Tells real from reconstructed patches: one number a patch, above 0 for real.

    Convolutions alone, so each number sees a patch of 9 * 2^n - 2 pixels across: 70 with three layers. Group
    normalisation where the source has batch normalisation: an image's numbers don't depend on the others of its batch.

    **Source**: Isola et al. 2017, section 3.2.2.

    Args:
        channels: of the image.
        base_channels: after the first convolution; doubled by each further one, up to eight times.
        num_layers: n, convolutions with stride 2; images need at least 3 * 2^n pixels a side.

    Example:
        >>> import torch
        >>> PatchDiscriminator(channels=1, base_channels=8, num_layers=2)(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 1, 6, 6])
    """

    def __init__(self, *, channels: int, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base_channels
        for layer in range(1, num_layers + 1):
            wider, stride = base_channels * min(2**layer, 8), 2 if layer < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), make_norm(wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> (b, 1, h', w')."""
        return self.layers(x)  # type: ignore[no-any-return]


def _pyramid(widths: list[int], num_blocks: int, resize: type[Downsample] | type[Upsample]) -> list[nn.Module]:
    """Blocks from each width to the next, the size changed between two resolutions."""
    layers: list[nn.Module] = []
    for level, (inside, outside) in enumerate(pairwise(widths)):
        if level > 0:
            layers.append(resize(inside))
        layers += [ResidualBlock(inside if block == 0 else outside, outside) for block in range(num_blocks)]
    return layers


def _middle(width: int) -> list[nn.Module]:
    return [ResidualBlock(width, width), SelfAttention(width), ResidualBlock(width, width)]


def _out(width: int, channels: int) -> list[nn.Module]:
    return [make_norm(width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]
