"""The bound against closed forms: with the exact denoiser of Gaussian data it is the cross-entropy of that Gaussian."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core.likelihood import (
    bits_per_dim,
    discretised_gaussian_log_likelihood,
    model_log_variance,
    prior_kl,
    vlb_term,
)
from ddpm_core.schedules import NoiseSchedule, make_betas, make_tables, register_schedule
from tests.worlds import GaussianWorld

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1
NUM_DIMS = 512


def matched_draws(count: int, num_dims: int = NUM_DIMS) -> Tensor:
    """(count, num_dims) near-normal numbers whose means are 0, squares 1 and products 0, exactly: what is quadratic in
    them has no Monte Carlo error."""
    draws = torch.randn(num_dims, count + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[:, 0] = 1
    return torch.linalg.qr(draws).Q.T[1:] * math.sqrt(num_dims)


class LearnedWorld(GaussianWorld):
    """A network that gives the exact mean and the exact variance of x_{t-1} given x_t."""

    def network(self, parameterization: str):
        tables = make_tables(self.schedule.betas.double(), 0.0)
        abar = tables["alphas_cumprod"]
        posterior = self.deviation**2 * (1 - abar) / (self.deviation**2 * abar + 1 - abar)  # Var(x0 | x_t)
        beta_tilde = (1 - tables["alphas_cumprod_prev"]) / (1 - abar) * tables["betas"]
        exact = (beta_tilde + tables["posterior_mean_coef1"] ** 2 * posterior).log()
        low, high = tables["log_beta_tilde_clipped"], tables["log_betas"]
        v = 2 * (exact - low) / (high - low) - 1
        denoiser = self.denoiser(parameterization)

        def predict(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            mean = denoiser(x_t, t, condition)
            return torch.cat((mean, v[t].reshape(-1, 1, 1).expand_as(mean)), dim=1)

        return predict


def world_data(schedule: NoiseSchedule, mean: float = 0.3, deviation: float = 0.2):
    draws = matched_draws(1 + schedule.num_timesteps, NUM_DIMS)
    x0 = (mean + deviation * draws[0]).reshape(1, 1, NUM_DIMS)
    return x0, lambda t: draws[1 + t].reshape(1, 1, NUM_DIMS)


def cross_entropy_bits(schedule: NoiseSchedule, mean: float = 0.3, deviation: float = 0.2) -> float:
    """Entropy of the data in bins of 1 / 127.5, and the mismatch between the end of their chain and the prior."""
    abar = float(schedule.alphas_cumprod[-1])
    variance = abar * deviation**2 + 1 - abar
    entropy = 0.5 * math.log(2 * math.pi * math.e * deviation**2) - math.log(1 / 127.5)
    return (entropy + 0.5 * (variance + abar * mean**2 - 1 - math.log(variance))) / math.log(2)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_with_the_exact_mean_and_variance_the_bound_is_the_cross_entropy(parameterization: str) -> None:
    """Bins are a third of the last step's deviation here, so that the mass of a bin is its width times the density."""
    schedule = register_schedule(beta_schedule="linear", timesteps=200)
    x0, noise = world_data(schedule)
    network = LearnedWorld(schedule).network(parameterization)
    bits = bits_per_dim(network, schedule, x0, noise, parameterization=parameterization, learned_variance=True,
                        clip_denoised=False)  # fmt: skip
    assert float(bits.total) == pytest.approx(cross_entropy_bits(schedule), abs=1e-4)
    assert bits.terms.shape == (200, 1)
    torch.testing.assert_close(bits.total, bits.prior + bits.terms.sum(0))


def test_zero_terminal_snr_costs_no_prior() -> None:
    schedule = register_schedule(beta_schedule="linear", timesteps=200, zero_terminal_snr=True)
    x0, noise = world_data(schedule)
    bits = bits_per_dim(LearnedWorld(schedule).network("v"), schedule, x0, noise, parameterization="v",
                        learned_variance=True, clip_denoised=False)  # fmt: skip
    assert bits.prior.tolist() == [0.0]
    assert float(bits.total) == pytest.approx(cross_entropy_bits(schedule), abs=1e-4)


@pytest.mark.parametrize("v_posterior", [0.0, 0.3, 1.0])
def test_with_a_fixed_variance_each_term_is_its_analytic_value(v_posterior: float) -> None:
    """The squared error is Var(x0 | x_t), and the variance's own mismatch is the KL of two Gaussians of one mean."""
    schedule = register_schedule(beta_schedule="linear", timesteps=200, v_posterior=v_posterior)
    x0, noise = world_data(schedule)
    bits = bits_per_dim(GaussianWorld(schedule).denoiser("eps"), schedule, x0, noise, clip_denoised=False)
    exact = make_tables(make_betas("linear", 200), v_posterior)
    abar, beta = exact["alphas_cumprod"], exact["betas"]
    error = 0.04 * (1 - abar) / (0.04 * abar + 1 - abar)
    ratio = (1 - exact["alphas_cumprod_prev"]) / (1 - abar) * beta / exact["posterior_variance"]
    kl = 0.5 * (ratio - 1 - ratio.log()) + ratio * exact["lvlb_weights_x0"] * error
    torch.testing.assert_close(bits.terms[1:, 0], kl[1:] / math.log(2), rtol=2e-4, atol=1e-7)
    first = exact["posterior_variance"][1]
    width = 1 / 127.5  # a uniform shift within the bin adds width^2 / 12 of variance to the second order
    nll = 0.5 * (2 * math.pi * first).log() - math.log(width) + 0.5 * error[0] / first
    nll -= width**2 / 24 * (error[0] / first - 1) / first
    assert float(bits.terms[0]) == pytest.approx(float(nll) / math.log(2), abs=2e-3)


def test_the_prior_counts_the_signal_that_is_left() -> None:
    schedule = register_schedule(beta_schedule="linear")
    abar = float(schedule.alphas_cumprod[-1])
    x0 = torch.tensor([[1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    one, none = (0.5 * (abar * s - abar - math.log1p(-abar)) for s in (1.0, 0.0))
    assert prior_kl(schedule, x0).tolist() == pytest.approx([one, none], rel=1e-3)


@pytest.mark.parametrize("deviation", [1e-3, 0.006, 0.05, 1.0])
@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.11, 0.999, 1.2])
def test_the_masses_of_all_bins_add_up_to_one(mean: float, deviation: float) -> None:
    log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
    log_mass = discretised_gaussian_log_likelihood(LEVELS, torch.tensor(mean, dtype=torch.float64), log_variance)
    assert bool(torch.isfinite(log_mass).all())
    assert float(log_mass.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_bin_is_one_grey_level_wide() -> None:
    """Half a level to each side: erf(1 / (255 sqrt(2) deviation)) for a value right on the mean."""
    log_mass = discretised_gaussian_log_likelihood(LEVELS[128], LEVELS[128], torch.tensor(-9.0).double())
    assert float(log_mass.exp()) == pytest.approx(math.erf(math.exp(4.5) / 255 / math.sqrt(2)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_far_from_the_mean_the_likelihood_has_no_floor(dtype: torch.dtype, sign: int) -> None:
    """log Phi(-z) is -z^2 / 2 - log(z sqrt(2 pi)) far out; a mass floored at 1e-12 would give -27.6."""
    mean = sign * torch.tensor(0.5, dtype=dtype)
    mean.requires_grad_()
    log_mass = discretised_gaussian_log_likelihood(sign * LEVELS[128].to(dtype), mean, torch.tensor(-9.0, dtype=dtype))
    z = (0.5 - float(LEVELS[128]) - 1 / 255) * math.exp(4.5)
    assert float(log_mass.detach()) == pytest.approx(-(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)), rel=1e-3)
    log_mass.backward()
    assert math.isfinite(mean.grad.item())
    assert mean.grad.item() * sign < 0


def test_the_variance_of_the_first_step_is_no_floor_either() -> None:
    """Clipped at 1e-20 it would charge tens of bits for an error of a tenth of a grey level."""
    schedule = register_schedule(beta_schedule="linear")
    x0 = torch.full((1, 1, 4), float(LEVELS[200]))
    bits = bits_per_dim(lambda x, t, c: x0 + 0.1 / 127.5, schedule, x0, lambda t: torch.zeros_like(x0),
                        parameterization="x0")  # fmt: skip
    assert 0 < float(bits.terms[0]) < 2


def test_what_the_network_predicts_is_clipped_where_asked() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=4)
    x0 = torch.ones(2, 1, 3)
    both = [bits_per_dim(lambda x, t, c: 3 * torch.ones_like(x), schedule, x0, torch.zeros_like(x0).mul,
                         parameterization="x0", clip_denoised=clip) for clip in (True, False)]  # fmt: skip
    assert both[0].terms[1:].abs().max() < 1e-6
    assert bool((both[1].terms[1:] > 0.1).all())


def test_a_wrong_number_of_channels_is_refused() -> None:
    x0 = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), expected \(2, 6, 4\)"):
        bits_per_dim(lambda x, t, c: x, register_schedule(), x0, lambda t: x0, learned_variance=True)


def test_a_term_is_the_kl_of_the_two_gaussians() -> None:
    schedule, t = register_schedule(beta_schedule="cosine", v_posterior=0.5), torch.tensor([700, 3])
    v = torch.tensor([-0.4, 0.7]).reshape(2, 1, 1)
    log_variance = model_log_variance(schedule, v, t)
    x0, predicted = torch.full((2, 1, 1), 0.5), torch.full((2, 1, 1), 0.3)
    got = vlb_term(schedule, x0, predicted, log_variance, t)
    for i, step in enumerate(t.tolist()):
        abar, prev = (float(schedule.alphas_cumprod[s]) for s in (step, step - 1))
        beta = float(schedule.betas[step])
        shift = math.sqrt(prev) * beta / (1 - abar) * 0.2
        beta_tilde = (1 - prev) / (1 - abar) * beta
        frac = (float(v[i]) + 1) / 2
        own = math.exp(frac * math.log(beta) + (1 - frac) * math.log(beta_tilde))
        normal = torch.distributions.Normal
        expected = torch.distributions.kl_divergence(
            normal(torch.tensor(shift).double(), math.sqrt(beta_tilde)), normal(0.0, math.sqrt(own))
        )
        assert float(got[i]) == pytest.approx(float(expected), rel=2e-3)
