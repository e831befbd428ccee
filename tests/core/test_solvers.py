"""What all samplers promise, the order of the solvers, thresholding, and DDIM's way back and between."""

import math

import pytest
import torch

from ddpm_core import (
    PARAMETERIZATIONS,
    SPACINGS,
    NoiseSchedule,
    invert_ddim,
    register_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    slerp,
)
from ddpm_core.samplers.chain import threshold_
from ddpm_core.samplers.grid import make_grid
from tests.worlds import GaussianWorld, MixtureWorld, noise_source

SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm_solver": sample_dpm_solver, "heun": sample_heun}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
second_order = pytest.mark.parametrize("name", ["dpm_solver", "heun"])


def calls_of(name: str, steps: int) -> int:
    return 2 * steps - 1 if name == "heun" else steps


class Counted:
    """A denoiser that keeps the inputs of its calls and a copy of them."""

    def __init__(self, denoiser) -> None:
        self.denoiser, self.seen, self.steps = denoiser, [], []

    def __call__(self, x_t, t, condition):
        self.seen.append((x_t, x_t.clone()))
        self.steps.append(int(t[0]))
        return self.denoiser(x_t, t, condition)


@every_sampler
@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_works_with_the_promised_number_of_calls(name: str, spacing: str) -> None:
    schedule, noise = register_schedule(beta_schedule="cosine", timesteps=23), noise_source((64, 2))
    world = GaussianWorld(schedule)
    for steps in range(1, 24):
        counted, seen = Counted(world.denoiser("v")), []
        out = SAMPLERS[name](counted, schedule, noise(0), noise, parameterization="v", num_steps=steps, spacing=spacing,
                             callback=lambda k, x, x0, seen=seen: seen.append(k))  # fmt: skip
        assert seen == list(range(1, steps + 1))
        assert len(counted.steps) == calls_of(name, steps)
        assert set(counted.steps) == {step.t for step in make_grid(schedule, steps, spacing)}
        assert bool(out.isfinite().all())
        if spacing != "leading":  # few leading steps never see the noise they start in
            assert 0.1 < float(out.mean()) < 0.5
            assert float(out.std()) < 0.3
    with pytest.raises(ValueError, match="num_steps is 0"):
        SAMPLERS[name](world.denoiser("v"), schedule, noise(0), noise, num_steps=0)


@every_sampler
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_one_step_is_the_prediction_of_x0_whatever_the_network_predicts(name: str, parameterization: str) -> None:
    schedule, noise = register_schedule(beta_schedule="linear", timesteps=100), noise_source((8, 3))
    world = GaussianWorld(schedule)
    out = SAMPLERS[name](world.denoiser(parameterization), schedule, noise(0), noise, num_steps=1,
                         parameterization=parameterization, clip_denoised=False)  # fmt: skip
    expected = world.x0(noise(0), torch.full((8,), 99))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)  # the world's tables are float32


@every_sampler
def test_nothing_given_away_is_written_to_later(name: str) -> None:
    schedule, noise = register_schedule(beta_schedule="cosine", timesteps=50), noise_source((4, 3))
    world, stored = GaussianWorld(schedule, mean=0.9), torch.full((4, 3), 1.7, dtype=torch.float64)
    counted, kept, x_noisy = Counted(world.denoiser("x0")), [], noise(0)
    before = x_noisy.clone()
    out = SAMPLERS[name](counted, schedule, x_noisy, noise, parameterization="x0", num_steps=6,
                         callback=lambda k, x, x0: kept.extend([(x, x.clone()), (x0, x0.clone())]))  # fmt: skip
    assert all(torch.equal(tensor, copy) for tensor, copy in kept + counted.seen)
    assert torch.equal(x_noisy, before)
    assert torch.equal(kept[-2][0], out)
    plain = SAMPLERS[name](world.denoiser("x0"), schedule, x_noisy, noise, parameterization="x0", num_steps=6)
    assert torch.equal(plain, out)  # watching changes nothing
    counted = Counted(lambda x, t, c: stored)
    SAMPLERS[name](counted, schedule, x_noisy, noise, parameterization="x0", num_steps=6)
    assert bool((stored == 1.7).all())  # the network's own tensor is not clipped in place
    assert all(torch.equal(tensor, copy) for tensor, copy in counted.seen)


@every_sampler
def test_a_mixture_of_gaussians_comes_back_within_three_standard_errors(name: str) -> None:
    schedule, count = register_schedule(beta_schedule="cosine"), 20_000
    world, noise = MixtureWorld(schedule), noise_source((count, 1), seed=3)
    x = SAMPLERS[name](world.denoiser("v"), schedule, noise(0), noise, parameterization="v", clip_denoised=False,
                       num_steps={"ddpm": None, "ddim": 800}.get(name, 200), spacing="quad")  # fmt: skip
    first, second, _, fourth = world.moments()
    assert float(x.mean()) == pytest.approx(first, abs=3 * math.sqrt((second - first**2) / count))
    assert float(x.square().mean()) == pytest.approx(second, abs=3 * math.sqrt((fourth - second**2) / count))
    assert float((x < 0).double().mean()) == pytest.approx(0.3, abs=3 * math.sqrt(0.3 * 0.7 / count))


@second_order
def test_a_gaussian_comes_back_within_three_standard_errors(name: str) -> None:
    schedule, count = register_schedule(beta_schedule="linear"), 40_000
    noise = noise_source((count, 1))
    x = SAMPLERS[name](GaussianWorld(schedule).denoiser("eps"), schedule, noise(0), num_steps=100, spacing="quad",
                       clip_denoised=False)  # fmt: skip
    assert float(x.mean()) == pytest.approx(0.3, abs=3 * 0.2 / math.sqrt(count))
    assert float(x.std()) == pytest.approx(0.2, abs=3 * 0.2 / math.sqrt(2 * count))


def even_schedule(timesteps: int) -> NoiseSchedule:
    """log(signal / sigma) falls evenly from 2 to -2, so that a grid can be refined evenly on whole steps."""
    abar = torch.sigmoid(2 * torch.linspace(2, -2, timesteps, dtype=torch.float64))
    return NoiseSchedule(1 - abar / torch.cat((torch.ones(1, dtype=torch.float64), abar[:-1])))


def flow_errors(name: str, intervals: list[int], sampler=None) -> list[float]:
    """Largest distance from the exact flow of a Gaussian at step 0, started on it at the last step."""
    schedule = even_schedule(2**14 + 1)
    world, z = GaussianWorld(schedule, deviation=0.5), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = []
    for count in intervals:
        grid, states = make_grid(schedule, count + 1, "linspace"), []
        start = world.flow(z, grid[0].signal, grid[0].sigma)
        (sampler or SAMPLERS[name])(world.denoiser("v"), schedule, start, parameterization="v", spacing="linspace",
            num_steps=count + 1, clip_denoised=False, callback=lambda k, x, x0, states=states: states.append(x),
        )  # fmt: skip
        errors.append(float((states[-2] - world.flow(z, grid[-1].signal, grid[-1].sigma)).abs().max()))
    return errors


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver", 2), ("heun", 2)])
def test_the_declared_order_of_convergence(name: str, order: int) -> None:
    errors = flow_errors(name, [32, 64, 128, 256])
    slopes = -torch.tensor(errors).log2().diff()
    assert float(slopes.mean()) == pytest.approx(order, abs=0.1), errors


@second_order
def test_the_second_order_is_worth_its_calls(name: str) -> None:
    """Against DDIM with as many calls."""
    (error,), (ddim,) = flow_errors(name, [24]), flow_errors("ddim", [calls_of(name, 24)])
    assert error < ddim / 4


def test_dpm_solver_extrapolates_by_the_ratio_of_gains() -> None:
    """Three steps by hand, as in the paper's algorithm 2, on a grid whose gains in log-snr differ."""
    schedule = register_schedule(beta_schedule="linear", timesteps=100)
    predictions = [torch.tensor([[v]], dtype=torch.float64) for v in (0.3, -0.5, 0.8)]
    given = iter(predictions)
    states: list[float] = []
    sample_dpm_solver(lambda x, t, c: next(given), schedule, torch.tensor([[1.2]], dtype=torch.float64), num_steps=3,
                      parameterization="x0", callback=lambda k, x, x0: states.append(float(x)))  # fmt: skip
    grid = make_grid(schedule, 3)
    lambdas = [math.log(step.signal / step.sigma) for step in grid]
    x, h_last = 1.2, 0.0
    d = [0.3, -0.5]
    for i in range(2):
        step, following = grid[i], grid[i + 1]
        h = lambdas[i + 1] - lambdas[i]
        r = h_last / h
        data = d[0] if i == 0 else (1 + 1 / (2 * r)) * d[1] - 1 / (2 * r) * d[0]
        x = following.sigma / step.sigma * x - following.signal * math.expm1(-h) * data
        assert states[i] == pytest.approx(x, rel=1e-9)
        h_last = h
    assert states[2] == 0.8  # infinite log-snr at the end: first order, no extrapolation


def edm_heun(denoiser, schedule, x, *, num_steps, spacing, parameterization, callback, clip_denoised) -> None:
    """Karras et al. 2022, algorithm 1, in its own variables."""
    assert parameterization == "v"
    grid = make_grid(schedule, num_steps, spacing)
    s = [step.sigma / step.signal for step in grid]
    y = x / grid[0].signal

    def slope(y: torch.Tensor, i: int) -> torch.Tensor:
        x_t = y * grid[i].signal
        t = torch.full((len(x_t),), grid[i].t)
        x0 = grid[i].signal * x_t - grid[i].sigma * denoiser(x_t, t, None)
        return (y - x0) / s[i]

    for i in range(num_steps - 1):
        d = slope(y, i)
        y = y + (s[i + 1] - s[i]) / 2 * (d + slope(y + (s[i + 1] - s[i]) * d, i + 1))
        callback(i + 1, y * grid[i + 1].signal, None)
    callback(num_steps, y, None)


def test_heun_is_the_method_of_edm_where_steps_are_small() -> None:
    assert flow_errors("heun", [8, 32]) == pytest.approx(flow_errors("", [8, 32], edm_heun), rel=1e-6)


def test_heun_survives_a_first_step_out_of_pure_noise() -> None:
    """cosine starts at sigma 20,000; the plain method extrapolates by a factor of 600 there and is off by units."""
    schedule = register_schedule(beta_schedule="cosine")
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for steps, allowed in ((5, 0.2), (25, 0.025)):
        x = sample_heun(GaussianWorld(schedule).denoiser("v"), schedule, z, num_steps=steps, parameterization="v",
                        clip_denoised=False)  # fmt: skip
        assert float((x - (0.3 + 0.2 * z)).abs().max()) < allowed


@pytest.mark.parametrize(
    ("share", "given", "expected"),
    [
        (0.75, [0.0, -1.0, 2.0, 4.0, -8.0], [0.0, -0.25, 0.5, 1.0, -1.0]),
        (0.875, [0.0, -1.0, 2.0, 4.0, -8.0], [0.0, -1 / 6, 1 / 3, 2 / 3, -1.0]),  # half way from 4 to 8
        (1.0, [0.0, -1.0, 2.0, 4.0, -8.0], [0.0, -0.125, 0.25, 0.5, -1.0]),
        (0.75, [0.0, -0.1, 0.2, 0.5, -0.5], [0.0, -0.1, 0.2, 0.5, -0.5]),  # never stretched
        (0.75, [0.0, -0.1, 0.2, 0.5, -3.0], [0.0, -0.1, 0.2, 0.5, -1.0]),  # s is 1: a plain clip
    ],
)
def test_dynamic_thresholding_by_hand(share: float, given: list[float], expected: list[float]) -> None:
    """Each sample by itself: the other row is the same whoever stands beside it."""
    x0 = torch.tensor([given, [9.0, 9.0, 9.0, 9.0, 9.0]]).reshape(2, 1, 5)
    out = threshold_(x0.clone(), share).reshape(2, 5)
    torch.testing.assert_close(out, torch.tensor([expected, [1.0] * 5]))
    limit = x0.abs().flatten(1).quantile(share, dim=1).clamp(min=1)[:, None, None]
    torch.testing.assert_close(out.reshape(2, 1, 5), x0.clamp(-limit, limit) / limit)


@every_sampler
def test_every_sampler_thresholds_and_derives_eps_again(name: str) -> None:
    """A network that always says 4, -8, ... ; two steps: x = prev_signal x0 + w eps with the eps of the new x0."""
    schedule, noise = register_schedule(beta_schedule="linear", timesteps=100), noise_source((1, 5))
    raw = torch.tensor([[0.0, -1.0, 2.0, 4.0, -8.0]], dtype=torch.float64)
    x0 = torch.tensor([[0.0, -0.25, 0.5, 1.0, -1.0]], dtype=torch.float64)
    states = []
    out = SAMPLERS[name](lambda x, t, c: raw, schedule, noise(0), noise, parameterization="x0", num_steps=2,
                         dynamic_threshold=0.75, callback=lambda k, x, x0: states.append((x, x0)))  # fmt: skip
    torch.testing.assert_close(out, x0)
    torch.testing.assert_close(states[0][1], x0)
    if name != "ddpm":
        step = make_grid(schedule, 2)[0]
        eps = (noise(0) - step.signal * x0) / step.sigma
        torch.testing.assert_close(states[0][0], step.prev_signal * x0 + step.prev_sigma * eps)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share in"):
            SAMPLERS[name](lambda x, t, c: raw, schedule, noise(0), noise, dynamic_threshold=share)


def round_trip(parameterization: str, steps: int) -> float:
    schedule = register_schedule(beta_schedule="cosine", timesteps=4096)
    denoiser = GaussianWorld(schedule).denoiser(parameterization)
    data = 0.3 + 0.2 * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    kept, seen = data.clone(), []
    noise = invert_ddim(denoiser, schedule, data, parameterization=parameterization, num_steps=steps,
                        callback=lambda k, x, x0: seen.append(k))  # fmt: skip
    assert seen == list(range(1, steps + 1))
    assert torch.equal(data, kept)
    back = sample_ddim(denoiser, schedule, noise, parameterization=parameterization, num_steps=steps,
                       clip_denoised=False)  # fmt: skip
    return float((back - data).abs().max())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_inversion_and_sampling_give_the_data_back_ever_better(parameterization: str) -> None:
    errors = [round_trip(parameterization, steps) for steps in (16, 64, 256, 1024)]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 0.003
    assert errors[-1] < errors[0] / 20


def test_inversion_finds_the_noise_of_the_flow() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=4096)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found = invert_ddim(GaussianWorld(schedule).denoiser("v"), schedule, 0.3 + 0.2 * z, parameterization="v",
                        num_steps=1024)  # fmt: skip
    torch.testing.assert_close(found, z, rtol=0, atol=0.02)


def test_slerp_keeps_the_norm_and_moves_evenly_along_the_arc() -> None:
    a, b = (noise_source((3, 2, 50), seed=seed)(0) for seed in (1, 2))
    a, b = (x / x.flatten(1).norm(dim=1)[:, None, None] * 10 for x in (a, b))
    whole = (a * b).sum(dim=(1, 2)).div(100).acos()
    for weight in (0.0, 0.25, 0.5, 1.0):
        point = slerp(a, b, weight)
        torch.testing.assert_close(point.flatten(1).norm(dim=1), torch.full((3,), 10.0, dtype=torch.float64))
        assert float(torch.lerp(a, b, 0.5).flatten(1).norm(dim=1).max()) < 9.0  # a straight line does not
        part = (a * point).sum(dim=(1, 2)).div(100).clamp(max=1).acos()
        torch.testing.assert_close(part, weight * whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    each = slerp(a, b, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    torch.testing.assert_close(each, torch.stack((a[0], slerp(a, b, 0.25)[1], b[2])))
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a)  # parallel: no arc


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver, sample_heun])
def test_a_chain_that_starts_in_pure_noise_gives_back_the_gaussian(sampler, parameterization: str) -> None:
    schedule = register_schedule(beta_schedule="cosine", zero_terminal_snr=True)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = sampler(GaussianWorld(schedule).denoiser(parameterization), schedule, z, parameterization=parameterization,
                num_steps=200, clip_denoised=False)  # fmt: skip
    torch.testing.assert_close(x, 0.3 + 0.2 * z, atol=0.01, rtol=0)


def test_eps_on_such_a_chain_is_refused() -> None:
    schedule = register_schedule(beta_schedule="cosine", zero_terminal_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sample_heun(GaussianWorld(schedule).denoiser("eps"), schedule, torch.zeros(1, 1))
