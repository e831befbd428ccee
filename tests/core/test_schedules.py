"""The tables against their definitions, and the forward process against closed forms."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch

import ddpm_core
from ddpm_core.noising import learned_log_variance, q_posterior, q_sample
from ddpm_core.samplers.ddim import sample_ddim
from ddpm_core.samplers.ddpm import sample_ddpm
from ddpm_core.schedules import (
    BETA_SCHEDULES,
    NoiseSchedule,
    make_betas,
    make_tables,
    register_schedule,
    rescale_zero_terminal_snr,
)
from tests.worlds import GaussianWorld, noise_source


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("timesteps", [50, 1000, 4000])
def test_the_chain_ends_in_noise_at_any_length(name: str, timesteps: int) -> None:
    assert register_schedule(beta_schedule=name, timesteps=timesteps).sqrt_alphas_cumprod[-1] < 0.1


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_vlb_weights_equal_the_exact_kl(name: str) -> None:
    """KL between q(x_prev | x_t, x0) and the same with a wrong x0, for an error of one in each parameterisation."""
    tables = make_tables(make_betas(name, 1000), 0.0)
    abar, t = tables["alphas_cumprod"], slice(1, None)
    kl_x0 = tables["posterior_mean_coef1"] ** 2 / (2 * tables["posterior_variance"])
    x0_error = {"x0": torch.ones_like(abar), "eps": (1 - abar) / abar, "v": 1 - abar}  # squared, for a unit error
    for parameterization, squared in x0_error.items():
        weight = tables[f"lvlb_weights_{parameterization}"]
        torch.testing.assert_close(weight[t], (kl_x0 * squared)[t], rtol=1e-10, atol=0)
        assert weight[0] == weight[1]


def test_sigmoid_is_the_papers_ramp() -> None:
    """Jabri et al. 2022, algorithm 1: (s(end) - s(u (end - start) + start)) / (s(end) - s(start)) with s at tau."""
    betas = make_betas("sigmoid", 1000, sigmoid_start=-3.0, sigmoid_end=3.0, sigmoid_tau=0.7)
    abar = (1 - betas).cumprod(0)

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x / 0.7))

    for i in (0, 250, 499, 900, 998):
        u = (i + 1) / 1000
        assert float(abar[i]) == pytest.approx((s(3) - s(6 * u - 3)) / (s(3) - s(-3)), rel=1e-9)
    assert float(abar[499]) == pytest.approx(0.5)
    assert float(betas[-1]) == 0.999  # the ramp reaches 0


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("timesteps", [50, 1000])
def test_zero_terminal_snr_is_reached_and_the_first_step_kept(name: str, timesteps: int) -> None:
    """Lin et al. 2023: sqrt(abar) is an affine function of what it was."""
    plain = make_betas(name, timesteps)
    betas = rescale_zero_terminal_snr(plain)
    before, after = ((1 - b).cumprod(0).sqrt() for b in (plain, betas))
    assert float(betas[-1]) == 1.0
    assert float(betas[0]) == pytest.approx(float(plain[0]), rel=1e-9)
    expected = before[0] * (before - before[-1]) / (before[0] - before[-1])
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), betas, rtol=1e-9, atol=1e-12)  # nothing left to do


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_leaves_infinities_only_where_eps_is_divided_by_the_signal(name: str) -> None:
    schedule = register_schedule(beta_schedule=name, zero_terminal_snr=True)
    assert schedule.zero_terminal_snr
    assert not register_schedule(beta_schedule=name).zero_terminal_snr
    infinite = {key for key, table in schedule.named_buffers() if not bool(torch.isfinite(table).all())}
    expected = {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "lvlb_weights_eps", "log_snr"}
    assert infinite == expected
    assert all(bool(torch.isfinite(schedule.get_buffer(key)[:-1]).all()) for key in infinite)
    assert float(schedule.log_snr[-1]) == -math.inf
    assert not any(bool(torch.isnan(table).any()) for table in schedule.buffers())


def test_given_betas_are_kept_or_rescaled_as_asked() -> None:
    given = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(register_schedule(given).betas, given)
    rescaled = register_schedule(given, zero_terminal_snr=True)
    torch.testing.assert_close(rescaled.betas, rescale_zero_terminal_snr(given).float())
    assert NoiseSchedule(torch.tensor([0.1, 0.2, 1.0])).zero_terminal_snr


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_log_snr_is_the_logarithm_of_snr_and_falls(name: str) -> None:
    tables = make_tables(make_betas(name, 1000), 0.0)
    torch.testing.assert_close(tables["log_snr"], tables["snr"].log(), rtol=1e-9, atol=1e-12)
    assert bool((tables["log_snr"].diff() < 0).all())


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_samplers_walk_a_chain_with_zero_terminal_snr(parameterization: str) -> None:
    schedule = register_schedule(beta_schedule="linear", zero_terminal_snr=True)
    noise = noise_source((20_000, 1))
    network = GaussianWorld(schedule).denoiser(parameterization)
    for x in (
        sample_ddim(network, schedule, noise(0), num_steps=200, parameterization=parameterization, clip_denoised=False),
        sample_ddpm(network, schedule, noise(0), noise, num_steps=200, parameterization=parameterization,
                    clip_denoised=False),
    ):  # fmt: skip
        assert float(x.mean()) == pytest.approx(0.3, abs=0.006)
        assert float(x.std()) == pytest.approx(0.2, abs=0.02)


def test_log_variance_takes_entry_one_for_entry_zero() -> None:
    schedule = register_schedule(beta_schedule="linear")
    assert schedule.posterior_variance[0] == 0
    log_variance = schedule.posterior_log_variance_clipped
    assert log_variance[0] == log_variance[1] == pytest.approx(-9.8, abs=0.1)


def test_tables_survive_a_cast_and_stay_out_of_checkpoints() -> None:
    schedule = register_schedule()
    before = schedule.alphas_cumprod.clone()
    assert torch.equal(schedule.to(torch.bfloat16).alphas_cumprod, before)
    assert not schedule.state_dict()


def test_the_learned_variance_lies_between_its_extremes_whatever_the_fixed_one_is() -> None:
    """The range is [beta_tilde, beta], not [the schedule's mixture, beta]."""
    schedule = register_schedule(v_posterior=1.0)
    plain = register_schedule()
    assert torch.equal(schedule.log_beta_tilde_clipped, plain.posterior_log_variance_clipped)
    torch.testing.assert_close(schedule.log_betas, schedule.betas.log())
    v = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    got = learned_log_variance(v, schedule.log_betas[5], schedule.log_beta_tilde_clipped[5])
    low, high = schedule.log_beta_tilde_clipped[5], schedule.log_betas[5]
    torch.testing.assert_close(got, torch.stack((low, (low + high) / 2, high, 2 * high - low)))


def test_step_by_step_noising_has_the_moments_of_q_sample() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=100)
    x0, t = torch.full((1, 3), 0.7), torch.tensor([60])
    mean, variance = torch.full((3,), 0.7), torch.zeros(3)
    for beta in schedule.betas[:61]:
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
    zero = q_sample(schedule, x0, t, torch.zeros(1, 3))
    one = q_sample(schedule, x0, t, torch.ones(1, 3))
    torch.testing.assert_close(zero[0], mean)
    torch.testing.assert_close((one - zero)[0] ** 2, variance)


def test_posterior_agrees_with_bayes() -> None:
    """Product of N(x_prev; sqrt(abar_prev) x0, 1 - abar_prev) and N(x_t; sqrt(alpha) x_prev, beta), by precisions."""
    schedule = NoiseSchedule(make_betas("linear", 1000))
    i, x0, x_t = 400, torch.tensor([[0.3]]), torch.tensor([[-1.1]])
    beta, abar_prev = schedule.betas[i].double(), schedule.alphas_cumprod_prev[i].double()
    precision = 1 / (1 - abar_prev) + (1 - beta) / beta
    mean = (abar_prev.sqrt() * 0.3 / (1 - abar_prev) + (1 - beta).sqrt() * -1.1 / beta) / precision
    got_mean, got_variance, _ = q_posterior(schedule, x0, x_t, torch.tensor([i]))
    assert float(got_mean) == pytest.approx(float(mean), rel=1e-4)
    assert float(got_variance) == pytest.approx(float(1 / precision), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_betas("cosin", 10), "known: linear"),
        (lambda: make_betas("linear", 10), r"must lie in \(0, 1\)"),
        (lambda: NoiseSchedule(torch.full((2, 2), 0.1)), "expected"),
        (lambda: NoiseSchedule(torch.full((4,), 0.1), v_posterior=2.0), "v_posterior"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 1.0, 0.1])), r"the last in \(0, 1\]"),
        (lambda: NoiseSchedule(torch.tensor([0.1, 0.1, 1.1])), r"the last in \(0, 1\]"),
        (lambda: NoiseSchedule(torch.tensor([0.1, float("nan")])), "found nan"),
        (lambda: make_betas("linear", 20, linear_end=0.02), r"in \(0, 1\), found"),  # 1 by chance, not on purpose
        (lambda: make_betas("sigmoid", 20, sigmoid_tau=0.0), "tau above 0"),
        (lambda: make_betas("sigmoid", 20, sigmoid_start=3.0), "start below end"),
        (lambda: rescale_zero_terminal_snr(torch.tensor([0.1, 0.0])), "must lie in"),
    ],
)
def test_a_wrong_schedule_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_core_imports_only_torch_einops_and_the_standard_library() -> None:
    allowed = {"torch", "einops", "ddpm_core", *sys.stdlib_module_names}
    for path in Path(ddpm_core.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, path
