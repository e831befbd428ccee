"""The average against its closed form."""

import pytest
import torch
from torch import nn

from ddpm_core.ema import EMA


def test_after_one_half_life_half_is_new_whatever_the_batch() -> None:
    for batch in (1, 10, 50):
        network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(network.weight)
        ema = EMA(network, half_life_images=100)
        nn.init.ones_(network.weight)
        for _ in range(100 // batch):
            ema.update(network, batch)
        assert float(next(ema.network.parameters())) == pytest.approx(0.5, abs=1e-5)


def test_it_is_float32_frozen_and_follows_buffers() -> None:
    network = nn.BatchNorm1d(2).to(torch.bfloat16)
    ema = EMA(network, 10)
    network.running_mean.fill_(3.0)
    ema.update(network, 1)
    assert {p.dtype for p in ema.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert ema.network.running_mean.tolist() == [3.0, 3.0]


def test_a_half_life_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="half_life_images is 0"):
        EMA(nn.Linear(1, 1), 0)
