"""The tables against their definitions, and the forward process against closed forms."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import ddpm_core
from ddpm_core.noising import q_posterior, q_sample
from ddpm_core.schedules import BETA_SCHEDULES, NoiseSchedule, make_betas, make_tables, register_schedule


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
