"""Any callable `(x_t, t, condition)` is a denoiser: vectors instead of images, an MLP or a plain function.

This is the whole of it for a user's own estimator: train with `p_losses`, draw with a sampler. No base class, no image.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import (
    ClassifierFreeGuidance,
    bits_per_dim,
    p_losses,
    register_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    timestep_embedding,
)

SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm_solver": sample_dpm_solver, "heun": sample_heun}
SCHEDULE = register_schedule(beta_schedule="cosine", timesteps=50)
MEAN = torch.tensor([0.5, -0.5, 0.0])
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


class MLP(nn.Module):
    """Vectors of three numbers, and the sign of all of them as a condition."""

    def __init__(self, learned_variance: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 + 16 + 1, 64),
            nn.SiLU(),
            nn.Linear(64, 64),
            nn.SiLU(),
            nn.Linear(64, 3 * (1 + learned_variance)),
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.layers(torch.cat((x_t, timestep_embedding(t, 16), condition[:, None].float()), dim=1))


def draw_data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """N(s MEAN, 0.1^2) with s = +-1, and s."""
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return sign[:, None] * MEAN + 0.1 * torch.randn(count, 3, generator=generator), sign


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "learned"])
def trained(request) -> tuple[MLP, bool]:
    torch.manual_seed(0)
    network, generator = MLP(request.param), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters())
    for i in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / 600)
        x0, sign = draw_data(256, generator)
        t, noise = torch.randint(0, 50, (256,), generator=generator), torch.randn(256, 3, generator=generator)
        parts = p_losses(network, SCHEDULE, x0, t, noise, sign, parameterization="v", learned_variance=request.param)
        parts.loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, request.param


@every_sampler
def test_a_network_on_vectors_learns_and_samples(trained, name: str) -> None:
    network, learned_variance = trained
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(400, 3, generator=generator) for _ in range(21)]
    sign = torch.tensor([-1, 1]).repeat(200)
    x = SAMPLERS[name](network, SCHEDULE, draws[0], draws.__getitem__, condition=sign, parameterization="v",
                       num_steps=20, learned_variance=learned_variance)  # fmt: skip
    assert x.shape == (400, 3)
    error = (x - sign[:, None] * MEAN).reshape(200, 2, 3)
    assert float(error.mean(0).abs().max()) < 0.05
    assert 0.05 < float(error.std()) < 0.2


def test_the_bound_knows_vectors_too(trained) -> None:
    """Better than a normal distribution of the data's own variance would do, in bins of a grey level."""
    network, learned_variance = trained
    x0, sign = draw_data(200, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    bits = bits_per_dim(network, SCHEDULE, x0, lambda t: torch.randn(200, 3, generator=generator), sign,
                        parameterization="v", learned_variance=learned_variance)  # fmt: skip
    naive = 0.5 * torch.log2(2 * math.pi * math.e * x0.var(0)).mean() + math.log2(127.5)
    assert float(bits.total.mean()) < float(naive)


@every_sampler
@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 9), (5, 1, 2, 3, 4)])
def test_a_plain_function_of_any_rank_is_a_denoiser(name: str, shape: tuple[int, ...]) -> None:
    """It always says 0.25, so that is what comes out, guided or not."""

    def quarter(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return torch.full_like(x_t, 0.25)

    noise = torch.randn(9, *shape, generator=torch.Generator().manual_seed(0))
    for denoiser in (quarter, ClassifierFreeGuidance(quarter, 3.0, 10)):
        x = SAMPLERS[name](denoiser, SCHEDULE, noise[0], noise.__getitem__, num_steps=8, parameterization="x0",
                           condition=torch.zeros(5, dtype=torch.int64))  # fmt: skip
        torch.testing.assert_close(x, torch.full(shape, 0.25))
    loss = p_losses(quarter, SCHEDULE, torch.full(shape, 0.5), torch.arange(5), noise[0], parameterization="x0").loss
    torch.testing.assert_close(loss, torch.full((5,), 0.0625))
