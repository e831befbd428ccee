"""Samplers with a network that also gives the variance, against the Gaussian whose reverse steps are known exactly."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    PARAMETERIZATIONS,
    invert_ddim,
    register_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
)
from ddpm_core.samplers.grid import make_grid
from tests.worlds import GaussianWorld, noise_source

STEPS, COUNT = 6, 40_000
SCHEDULE = register_schedule(beta_schedule="linear")
DEVIATIONS = torch.tensor([0.2, 0.7], dtype=torch.float64)  # of two channels: their exact variances differ
GRID = make_grid(
    SCHEDULE, STEPS, "quad"
)  # ends at t = 0, so that the last step, which draws nothing, leaves out little


def draw(denoiser, **settings) -> Tensor:
    noise = noise_source((COUNT, 2))
    return sample_ddpm(denoiser, SCHEDULE, noise(0), noise, num_steps=STEPS, spacing="quad", clip_denoised=False,
                       **settings)  # fmt: skip


def assert_moments(x: Tensor) -> None:
    """Mean and covariance within three standard errors."""
    mean, covariance, error = x.mean(0), x.T.cov(), 3 / math.sqrt(COUNT)
    assert bool(((mean - 0.3).abs() < error * DEVIATIONS).all()), mean
    spread = DEVIATIONS[:, None] * DEVIATIONS * torch.tensor([[math.sqrt(2), 1], [1, math.sqrt(2)]])
    assert bool(((covariance - DEVIATIONS.square().diag()).abs() < error * spread).all()), covariance


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_with_the_exact_variance_few_steps_give_back_the_gaussian(parameterization: str) -> None:
    world = GaussianWorld(SCHEDULE, deviation=DEVIATIONS)
    x = draw(world.learned(parameterization, GRID), parameterization=parameterization, learned_variance=True)
    assert_moments(x)


@pytest.mark.parametrize("v_posterior", [0.0, 0.5, 1.0])
def test_no_fixed_variance_does_so(v_posterior: float) -> None:
    """In as few steps beta_tilde is too small and beta too large; v_posterior is not asked when it is learned."""
    schedule = register_schedule(beta_schedule="linear", v_posterior=v_posterior)
    world, noise = GaussianWorld(schedule, deviation=DEVIATIONS), noise_source((COUNT, 2))
    fixed, learned = (
        sample_ddpm(network, schedule, noise(0), noise, num_steps=STEPS, spacing="quad", clip_denoised=False,
                    learned_variance=named)
        for network, named in ((world.denoiser("eps"), False), (world.learned("eps", GRID), True))
    )  # fmt: skip
    assert_moments(learned)
    errors = [(x.std(0) / DEVIATIONS - 1).abs().max() for x in (fixed, learned)]
    assert float(errors[0]) > 10 * float(errors[1]), errors


def test_the_variance_is_the_second_half_of_the_channels() -> None:
    """A network that puts it first, or pairs of channels, gives something else, so the order is really looked at."""
    network = GaussianWorld(SCHEDULE, deviation=DEVIATIONS).learned("eps", GRID)
    for order in ([2, 3, 0, 1], [0, 2, 1, 3], [0, 1, 3, 2]):
        with pytest.raises(AssertionError):
            assert_moments(draw(lambda x, t, c, order=order: network(x, t, c)[:, order], learned_variance=True))


@pytest.mark.parametrize(("v", "v_posterior"), [(1.0, 1.0), (-1.0, 0.0)])
def test_the_ends_of_v_are_the_fixed_variances_of_the_shorter_chain(v: float, v_posterior: float) -> None:
    schedule = register_schedule(beta_schedule="cosine", v_posterior=v_posterior)
    denoiser, noise = GaussianWorld(schedule).denoiser("v"), noise_source((16, 3))
    settings = {"parameterization": "v", "num_steps": 7}
    learned = sample_ddpm(lambda x, t, c: torch.cat((denoiser(x, t, c), torch.full_like(x, v)), dim=1), schedule,
                          noise(0), noise, learned_variance=True, **settings)  # fmt: skip
    fixed = sample_ddpm(denoiser, schedule, noise(0), noise, **settings)
    torch.testing.assert_close(learned, fixed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver, sample_heun, invert_ddim])
def test_samplers_of_the_flow_leave_the_variance_out(sampler) -> None:
    schedule, x = register_schedule(beta_schedule="cosine"), noise_source((4, 3, 2, 2))(0)
    denoiser = GaussianWorld(schedule).denoiser("v")
    settings = {"parameterization": "v", "num_steps": 5}
    both = sampler(lambda x, t, c: torch.cat((denoiser(x, t, c), 100 * x), dim=1), schedule, x, learned_variance=True,
                   **settings)  # fmt: skip
    assert torch.equal(both, sampler(denoiser, schedule, x, **settings))


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim, sample_dpm_solver, sample_heun])
def test_an_output_of_another_shape_is_refused_not_broadcast(sampler) -> None:
    noise = noise_source((2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\), expected \(2, 1, 4, 4\); .* learned_variance=True"):
        sampler(lambda x, t, c: torch.cat((x, x), dim=1), SCHEDULE, noise(0), noise)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\), expected \(2, 2, 4, 4\)"):
        sampler(lambda x, t, c: x, SCHEDULE, noise(0), noise, learned_variance=True)
