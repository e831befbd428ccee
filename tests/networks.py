"""Networks as they are after a while: none of their zero-initialised outputs is zero any more."""

from __future__ import annotations

from typing import TypeVar

import torch

from ddpm_core import DenoisingNetwork

Network = TypeVar("Network", bound=DenoisingNetwork)


def fill_zeros(network: Network) -> Network:
    """Small normal numbers in place of zeros, so that inputs show; in evaluation mode."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network.eval()
