"""Where our conventions and diffusers' agree the numbers do, to 1e-5. Where they don't, docs/parity.md says who is
right; each such line has its test here too, so that the page notices when a new version changes its mind.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_core as ddpm

diffusers = pytest.importorskip("diffusers", reason="extra `parity`")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers, about tensors
]

T = 1000
SHAPE = (3, 2, 4, 4)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TRAILING = {"timestep_spacing": "trailing", "clip_sample_range": 1.0}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ends(name: str) -> dict[str, float]:
    """Both sides get the same end points: latent-diffusion's for scaled_linear."""
    return {"start": 0.00085, "end": 0.012} if name == "scaled_linear" else {"start": 1e-4, "end": 2e-2}


def ours(name: str = "linear", timesteps: int = T) -> ddpm.NoiseSchedule:
    points = ends(name)
    return ddpm.register_schedule(
        beta_schedule=name, timesteps=timesteps, linear_start=points["start"], linear_end=points["end"]
    )


def theirs(kind: str, name: str = "linear", *, exact: bool = True, **settings: Any) -> Any:
    """A scheduler of diffusers; `exact`: with its tables derived again in float64, for its own are float32 sums."""
    points = ends(name)
    peer = getattr(diffusers, kind)(
        num_train_timesteps=T, beta_schedule=SCHEDULES[name], beta_start=points["start"], beta_end=points["end"],
        **settings,
    )  # fmt: skip
    if exact:
        peer.betas = ours(name).betas.double()
        peer.alphas = 1 - peer.betas
        peer.alphas_cumprod = peer.alphas.cumprod(0)
    return peer


def network(x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
    """Any smooth function of both will do that keeps x from growing without bounds, where last bits would grow too."""
    return 0.9 * x_t + 0.1 * torch.sin(1.7 * x_t + t.reshape(-1, *(1,) * (x_t.ndim - 1)) / 300)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_tables(name: str) -> None:
    schedule, peer = ours(name), theirs("DDPMScheduler", name, exact=False)
    torch.testing.assert_close(schedule.betas, peer.betas, **CLOSE)
    torch.testing.assert_close(schedule.alphas_cumprod, peer.alphas_cumprod, **CLOSE)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_and_velocity(name: str) -> None:
    x0, noise, t = draw(*SHAPE), draw(*SHAPE, seed=1), torch.tensor([0, 500, 999])
    schedule, peer = ours(name), theirs("DDPMScheduler", name)
    torch.testing.assert_close(ddpm.q_sample(schedule, x0, t, noise), peer.add_noise(x0, noise, t), **CLOSE)
    torch.testing.assert_close(
        ddpm.to_target(schedule, "v", x0, noise, t), peer.get_velocity(x0, noise, t), **CLOSE
    )  # fmt: skip


PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("v_posterior", [0.0, 1.0])
@pytest.mark.parametrize("parameterization", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 500, 999])
def test_posterior_step(parameterization: str, v_posterior: float, t: int) -> None:
    """One ancestral step with the same noise."""
    schedule = ddpm.register_schedule(beta_schedule="linear", v_posterior=v_posterior)
    peer = theirs(
        "DDPMScheduler", variance_type="fixed_large" if v_posterior else "fixed_small",
        prediction_type=PREDICTIONS[parameterization],
    )  # fmt: skip
    x_t, batch_t = draw(*SHAPE), torch.full((3,), t)
    output = network(x_t, batch_t)
    expected = peer.step(output, t, x_t, generator=torch.Generator().manual_seed(5)).prev_sample
    x0 = ddpm.to_x0(schedule, parameterization, output, x_t, batch_t).clamp(-1, 1)
    mean, _, log_variance = ddpm.q_posterior(schedule, x0, x_t, batch_t)
    drawn = mean + (log_variance / 2).exp() * draw(*SHAPE, seed=5)
    torch.testing.assert_close(drawn, expected, **CLOSE)


def walk(peer: Any, num_steps: int, x: Tensor, noise: Any = None, **settings: Any) -> Tensor:
    peer.set_timesteps(num_steps)
    for k, t in enumerate(peer.timesteps, start=1):
        drawn = {} if noise is None else {"variance_noise": noise(k)}
        x = peer.step(network(x, t.expand(len(x))), t, x, **drawn, **settings).prev_sample
    return x


@pytest.mark.parametrize("parameterization", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 10, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_trajectory(parameterization: str, num_steps: int, eta: float) -> None:
    """Where S divides T; else diffusers' previous step is not a step of its grid. In float64, as rounding adds up
    over a thousand steps."""

    def noise(k: int) -> Tensor:
        return draw(*SHAPE, seed=100 + k).double()

    peer = theirs("DDIMScheduler", prediction_type=PREDICTIONS[parameterization], clip_sample=True, **TRAILING)
    expected = walk(peer, num_steps, draw(*SHAPE).double(), noise, eta=eta, use_clipped_model_output=True)
    got = ddpm.sample_ddim(
        network, ours(), draw(*SHAPE).double(), noise, parameterization=parameterization, num_steps=num_steps, eta=eta
    )
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("parameterization", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_dpm_solver_trajectory(parameterization: str, num_steps: int, name: str) -> None:
    peer = theirs(
        "DPMSolverMultistepScheduler", name, prediction_type=PREDICTIONS[parameterization], solver_order=2,
        algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero", timestep_spacing="trailing",
    )  # fmt: skip
    expected = walk(peer, num_steps, draw(*SHAPE).double())
    got = ddpm.sample_dpm_solver(
        network,
        ours(name),
        draw(*SHAPE).double(),
        parameterization=parameterization,
        num_steps=num_steps,
        clip_denoised=False,
    )
    torch.testing.assert_close(got, expected, **CLOSE)


# Disagreements: docs/parity.md


def test_their_tables_are_float32_sums() -> None:
    """1 - abar loses digits where abar is near 1: the mean of the posterior at t = 1 is off by 5e-5 there."""
    x_t, t = draw(*SHAPE), torch.ones(3, dtype=torch.int64)
    x0 = network(x_t, t).clamp(-1, 1)
    beta = torch.linspace(1e-4, 2e-2, T, dtype=torch.float64)[:2]
    abar, abar_prev = (1 - beta).prod(), 1 - beta[0]
    right = abar_prev.sqrt() * beta[1] / (1 - abar) * x0 + (1 - beta[1]).sqrt() * (1 - abar_prev) / (1 - abar) * x_t
    variance = (1 - abar_prev) / (1 - abar) * beta[1]
    right = right + variance.sqrt() * draw(*SHAPE, seed=5)
    peer = theirs("DDPMScheduler", exact=False, prediction_type="sample", variance_type="fixed_small")
    off = peer.step(network(x_t, t), 1, x_t, generator=torch.Generator().manual_seed(5)).prev_sample - right
    mean, _, log_variance = ddpm.q_posterior(ours(), x0, x_t, t)
    ours_off = mean + (log_variance / 2).exp() * draw(*SHAPE, seed=5) - right
    assert ours_off.abs().max() < 1e-6
    assert off.abs().max() > 2e-5


def test_fewer_timesteps_are_another_noise_level_there() -> None:
    """diffusers keeps the end points of beta: 100 steps of `linear` end at sqrt(abar) 0.6, far from pure noise."""
    peer = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    assert math.sqrt(peer.alphas_cumprod[-1]) > 0.5
    assert math.sqrt(ours(timesteps=100).alphas_cumprod[-1]) < 0.02


def test_sigmoid_is_of_beta_there_and_of_abar_here() -> None:
    peer = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule="sigmoid")
    ramp = torch.sigmoid(torch.linspace(-6, 6, T)) * (2e-2 - 1e-4) + 1e-4
    torch.testing.assert_close(peer.betas, ramp)
    assert (ddpm.register_schedule(beta_schedule="sigmoid").alphas_cumprod - peer.alphas_cumprod).abs().max() > 0.1


@pytest.mark.parametrize("num_steps", [30, 300, 999])
def test_ddim_steps_that_do_not_divide_t(num_steps: int) -> None:
    """The step before is t - T // S there, whether or not the grid visits it."""
    peer = theirs("DDIMScheduler", clip_sample=True, **TRAILING)
    peer.set_timesteps(num_steps)
    visited = [int(t) for t in peer.timesteps]
    believed = [t - T // num_steps for t in visited[:-1]]
    assert believed != visited[1:]
    steps = ddpm.make_timesteps(T, num_steps)
    assert len(set(steps)) == num_steps


def test_leading_spacing_never_sees_the_last_steps_on_either_side() -> None:
    peer = theirs("DDIMScheduler", timestep_spacing="leading")
    peer.set_timesteps(50)
    assert int(peer.timesteps[0]) == ddpm.make_timesteps(T, 50, "leading")[0] == 980
    assert ddpm.make_timesteps(T, 50, "trailing")[0] == T - 1


def test_the_end_of_the_chain_is_noisy_there_by_default() -> None:
    """set_alpha_to_one is theirs to set, and steps_offset with it; with False the last abar is that of step 0."""
    peer = theirs("DDIMScheduler", exact=False, set_alpha_to_one=False)
    assert peer.final_alpha_cumprod == peer.alphas_cumprod[0] < 1


def test_log_of_the_first_posterior_variance() -> None:
    """Clipped at 1e-20 there, 46 nats below; entry 1 stands in for entry 0 here."""
    peer = theirs("DDPMScheduler", variance_type="fixed_small_log")
    there = 2 * math.log(float(peer._get_variance(0)))
    here = float(ours().log_beta_tilde_clipped[0])
    assert there < -45
    assert -10 < here < -9


def test_ancestral_with_fewer_steps() -> None:
    """The same shorter chain on both sides where S divides T."""
    peer = theirs("DDPMScheduler", **TRAILING)
    peer.set_timesteps(50)
    x = draw(*SHAPE)
    generators = torch.Generator().manual_seed(9)
    drawn: list[Tensor] = []
    for t in peer.timesteps:
        x = peer.step(network(x, t.expand(3)), t, x, generator=generators).prev_sample
    generators = torch.Generator().manual_seed(9)
    drawn = [torch.randn(SHAPE, generator=generators) for _ in range(50)]
    got = ddpm.sample_ddpm(network, ours(), draw(*SHAPE), lambda k: drawn[k - 1], num_steps=50)
    torch.testing.assert_close(got, x, **CLOSE)
