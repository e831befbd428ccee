"""The feature network's maps as a perceptual distance sees them: differentiable, at several depths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.engine.lite0 import build_efficientnet_lite0, find_weights, load_weights

# Places in the network after the last block of each resolution: 1/2, 1/4, 1/8, 1/16, 1/32.
TAPS = (2, 4, 6, 12, 17)
LEAST_PX = 64


class PerceptualFeatures:
    """Images -> feature maps of EfficientNet-Lite0 at five depths. Frozen; gradients reach the images.

    Images below 64 px are enlarged to that, so that the deepest map has more than one place.

    Args:
        device: where images come from.
    """

    def __init__(self, device: torch.device) -> None:
        network = build_efficientnet_lite0(load_weights(find_weights())).to(device)
        self.layers: list[nn.Module] = list(network.children())[: TAPS[-1] + 1]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """(b, 1 or 3, h, w) in [-1, 1] -> five feature maps (b, c, h', w')."""
        x = (127.5 * images + 0.5) / 128  # (pixel - 127) / 128, as the network was trained
        if min(x.shape[-2:]) < LEAST_PX:
            size = [max(LEAST_PX, side) for side in x.shape[-2:]]
            x = functional.interpolate(x, size, mode="bilinear", align_corners=False)
        x = x.expand(-1, 3, -1, -1)
        maps = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in TAPS:
                maps.append(x)
        return maps
