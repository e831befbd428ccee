"""Samplers against closed forms: with the exact denoiser of Gaussian data they must give back that Gaussian."""

import pytest
import torch

from ddpm_core import (
    BETA_SCHEDULES,
    PARAMETERIZATIONS,
    SPACINGS,
    make_timesteps,
    register_schedule,
    sample_ddim,
    sample_ddpm,
)
from ddpm_core.samplers.grid import make_grid
from tests.worlds import GaussianWorld, noise_source

SHAPE = (40_000, 1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [1, 2, 7, 50, 1000])
def test_every_number_of_steps_gives_that_many_different_steps_inside_the_schedule(spacing, timesteps) -> None:
    falling = torch.linspace(5, -5, timesteps, dtype=torch.float64) ** 3
    for steps in range(1, timesteps + 1):
        grid = make_timesteps(timesteps, steps, spacing, log_snr=falling)
        assert len(grid) == len(set(grid)) == steps
        assert grid == sorted(grid, reverse=True)
        assert grid[-1] >= 0
        assert grid[0] < timesteps
    assert grid == list(reversed(range(timesteps)))


def test_trailing_starts_in_noise_and_leading_ends_at_the_data() -> None:
    assert make_timesteps(1000, 30, "trailing")[0] == 999
    assert make_timesteps(1000, 30, "leading")[-1] == 0
    assert [make_timesteps(1000, 30, "linspace")[i] for i in (0, -1)] == [999, 0]
    assert make_timesteps(1000, 5, "quad") == [999, 561, 249, 62, 0]
    assert make_timesteps(1000, 500, "quad")[-4:] == [3, 2, 1, 0]  # squares alone give 0, 0, 0, 0


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_even_in_log_snr_gives_exactly_s_steps_from_the_last_to_the_first(name: str, zero_terminal_snr: bool) -> None:
    schedule = register_schedule(beta_schedule=name, timesteps=120, zero_terminal_snr=zero_terminal_snr)
    for steps in range(1, 121):
        grid = [step.t for step in make_grid(schedule, steps, "logsnr")]
        assert len(set(grid)) == len(grid) == steps
        assert grid == sorted(grid, reverse=True)
        assert grid[0] == 119
        assert grid[-1] == (0 if steps > 1 else 119)


def test_even_in_log_snr_is_even_up_to_whole_steps() -> None:
    """On a long chain a whole step is a small part of log-snr, and nothing has to give way."""
    schedule = register_schedule(beta_schedule="linear", timesteps=20_000)
    gains = torch.tensor([step.log_snr_gain for step in make_grid(schedule, 12, "logsnr")][:-1])
    assert float(gains[:-3].max() / gains[:-3].min()) < 1.002
    assert float(gains.max() / gains.min()) < 1.06  # beside the data a whole step is a few per cent
    uneven = torch.tensor([4.0, 2.0, -0.3, -2.0, -4.0], dtype=torch.float64)
    assert make_timesteps(5, 3, "logsnr", log_snr=uneven) == [4, 2, 0]  # the nearest to 0, from either side
    assert make_timesteps(5, 3, "logsnr", log_snr=-uneven.flip(0)) == [4, 2, 0]
    crowded = torch.tensor([4.0, -3.0, -3.5, -3.6, -4.0], dtype=torch.float64)
    assert make_timesteps(5, 4, "logsnr", log_snr=crowded) == [4, 2, 1, 0]
    with pytest.raises(ValueError, match="needs the schedule's log_snr"):
        make_timesteps(1000, 4, "logsnr")


@pytest.mark.parametrize(
    ("steps", "spacing", "message"),
    [(0, "trailing", "from 1 to"), (1001, "trailing", "from 1 to"), (10, "even", "known: trailing")],
)
def test_an_impossible_grid_is_refused(steps: int, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_timesteps(1000, steps, spacing)


def test_the_grid_agrees_with_the_tables_and_ends_at_the_data() -> None:
    schedule = register_schedule(beta_schedule="cosine")
    grid = make_grid(schedule, 1000)
    assert (grid[-1].prev_signal, grid[-1].prev_sigma) == (1.0, 0.0)
    for step in (grid[0], grid[500], grid[-1]):
        assert step.signal == pytest.approx(float(schedule.sqrt_alphas_cumprod[step.t]), rel=1e-5)
        assert step.sigma == pytest.approx(float(schedule.sqrt_one_minus_alphas_cumprod[step.t]), rel=1e-5)
        assert step.beta == pytest.approx(float(schedule.betas[step.t]), rel=1e-5)


def moments(x: torch.Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std())


def exact_deviation(denoiser, schedule, parameterization: str, num_steps: int) -> float:
    """Deviation of ancestral samples, free of Monte Carlo noise: for a Gaussian of mean 0 a sample is a linear function
    of its draws, so row k of the batch is given a one as its k-th draw and zeros else, and the squares add up."""
    unit = torch.eye(num_steps, dtype=torch.float64)
    out = sample_ddpm(denoiser, schedule, unit[0][:, None], lambda k: unit[k][:, None],
                      parameterization=parameterization, num_steps=num_steps, clip_denoised=False)  # fmt: skip
    return float(out.square().sum().sqrt())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_ddpm_converges_to_the_gaussian_with_order_one(parameterization: str) -> None:
    """Variance beta_tilde leaves out the variance of x0 given x_t: a lack that must halve as steps double."""
    schedule = register_schedule(beta_schedule="cosine", timesteps=4096)
    denoiser = GaussianWorld(schedule, mean=0.0).denoiser(parameterization)
    errors = [0.2 - exact_deviation(denoiser, schedule, parameterization, steps) for steps in (256, 512, 1024)]
    slope = torch.tensor(errors).log2().diff().mean()
    assert float(slope) == pytest.approx(-1.0, abs=0.1)
    assert 0 < errors[-1] < 0.004


def test_ddpm_reproduces_the_mean_within_three_standard_errors() -> None:
    schedule, noise = register_schedule(beta_schedule="linear"), noise_source(SHAPE)
    x = sample_ddpm(GaussianWorld(schedule).denoiser("eps"), schedule, noise(0), noise, num_steps=100,
                    clip_denoised=False)  # fmt: skip
    assert moments(x)[0] == pytest.approx(0.3, abs=3 * 0.2 / SHAPE[0] ** 0.5)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_ddim_gives_back_the_gaussian(parameterization: str) -> None:
    schedule = register_schedule(beta_schedule="cosine")
    noise = noise_source(SHAPE)
    x = sample_ddim(
        GaussianWorld(schedule).denoiser(parameterization), schedule, noise(0), parameterization=parameterization,
        num_steps=500, clip_denoised=False,
    )  # fmt: skip
    mean, deviation = moments(x)
    assert mean == pytest.approx(0.3, abs=3 * 0.2 / SHAPE[0] ** 0.5)
    assert deviation == pytest.approx(0.2, abs=0.002)


def test_ddim_converges_with_order_one() -> None:
    """The exact flow of a Gaussian maps z to mean + deviation z at the end; the error must halve as steps double."""
    schedule = register_schedule(beta_schedule="cosine", timesteps=4096)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    steps, errors = [64, 128, 256, 512], []
    for num_steps in steps:
        x = sample_ddim(GaussianWorld(schedule).denoiser("v"), schedule, z, parameterization="v",
                        num_steps=num_steps, clip_denoised=False)  # fmt: skip
        errors.append(float((x - (0.3 + 0.2 * z)).abs().max()))
    slope = torch.tensor(errors).log2().diff().mean()
    assert float(slope) == pytest.approx(-1.0, abs=0.1)


def test_eta_one_over_all_steps_is_ancestral_sampling() -> None:
    schedule = register_schedule(beta_schedule="linear", timesteps=60)
    denoiser = GaussianWorld(schedule).denoiser("eps")
    noise = noise_source((64, 3))
    ancestral = sample_ddpm(denoiser, schedule, noise(0), noise)
    implicit = sample_ddim(denoiser, schedule, noise(0), noise, num_steps=None, eta=1.0)
    torch.testing.assert_close(ancestral, implicit, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("v_posterior", "expected"), [(0.0, "beta_tilde"), (1.0, "beta")])
def test_v_posterior_chooses_the_variance_and_the_last_step_has_none(v_posterior: float, expected: str) -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=4, v_posterior=v_posterior)
    noise, seen = noise_source(SHAPE), []
    x = sample_ddpm(lambda x, t, c: torch.zeros_like(x), schedule, torch.zeros(SHAPE, dtype=torch.float64), noise,
                    parameterization="x0", callback=lambda k, x, x0: seen.append(x))  # fmt: skip
    first = make_grid(schedule, 4)[0]
    beta_tilde = first.prev_sigma**2 / first.sigma**2 * first.beta
    variance = {"beta": first.beta, "beta_tilde": beta_tilde}[expected]
    assert float(seen[0].var()) == pytest.approx(variance, rel=0.03)
    assert not x.any()  # the last step is the predicted x0 itself


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_clipping_keeps_x0_and_eps_consistent_and_the_input_untouched(parameterization: str) -> None:
    schedule = register_schedule(beta_schedule="cosine")
    world = GaussianWorld(schedule, mean=3.0)
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
    kept = x.clone()
    out = sample_ddim(world.denoiser(parameterization), schedule, x, parameterization=parameterization, num_steps=20)
    assert torch.equal(x, kept)
    assert float(out.abs().max()) <= 1.0 + 1e-12


def test_the_callback_sees_every_step_and_noise_is_asked_for_by_place() -> None:
    schedule = register_schedule(beta_schedule="cosine")
    world, noise, seen, asked = GaussianWorld(schedule), noise_source((2, 3)), [], []

    def counted(k: int) -> torch.Tensor:
        asked.append(k)
        return noise(k)

    out = sample_ddim(world.denoiser("eps"), schedule, noise(0), counted, num_steps=5, eta=1.0,
                      callback=lambda k, x, x0: seen.append((k, x)))  # fmt: skip
    assert [k for k, _ in seen] == [1, 2, 3, 4, 5]
    assert asked == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], out)
    with pytest.raises(ValueError, match="needs `noise`"):
        sample_ddim(world.denoiser("eps"), schedule, noise(0), eta=0.5)
