"""What a network costs: its parameters, and floating-point operations an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ddpm_core.conditioning import Condition


class Cost(NamedTuple):
    """Parameters, and operations of a forward pass with one image; a product and its sum count as two."""

    parameters: int
    flop_per_image: int


@torch.no_grad()
def count_cost(network: nn.Module, input_shape: tuple[int, ...], condition: Condition = None) -> Cost:
    """Count without computing: the network runs on tensors that have shapes and no content.

    Matrix products and convolutions count, what works element by element does not. Tensors without content also take
    attention as two plain products, which are counted; torch's counter knows nothing of the CPU's fused kernel.
    Weights, gradients and random numbers stay as they are.

    Args:
        network: `network(x_t, t, condition)`, on any device.
        input_shape: of one image, (c, ...), context channels included.
        condition: (1, ...), where it has one; only its shape and dtype count.

    Example:
        >>> from ddpm_core import UNet
        >>> count_cost(UNet(image_size=8, channels=1, base_channels=16), (1, 8, 8))
        Cost(parameters=277297, flop_per_image=13600768)
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    empty = {  # of one precision, so that they agree with x_t
        name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    x_t, t = torch.empty(1, *input_shape, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    if isinstance(condition, torch.Tensor):
        condition = condition.to("meta")
    elif condition is not None:
        condition = {name: tensor.to("meta") for name, tensor in condition.items()}
    with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        functional_call(network, empty, (x_t, t, condition))
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops())
