"""Restoration: the operators against dense decompositions, DDRM against what its derivation promises, and how near it
comes to the best possible answer where that is known."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    PARAMETERIZATIONS,
    SPACINGS,
    Colourise,
    Deblur,
    Denoise,
    Inpaint,
    LinearOperator,
    Separable,
    SuperResolve,
    gaussian_kernel,
    register_schedule,
    restore_ddrm,
)
from ddpm_core.samplers.grid import make_grid
from tests.worlds import GaussianWorld, noise_source

SHAPE = (3, 4, 8)
OPERATORS = {
    "denoise": Denoise(SHAPE),
    "inpaint": Inpaint(torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) > 0.4),
    "super_resolve": SuperResolve(SHAPE, 2),
    "deblur": Deblur(SHAPE, gaussian_kernel(0.7)),
    "double": Deblur(SHAPE, torch.tensor([0.5, 0.0, 0.5])),  # a wave of four pixels vanishes
    "colourise": Colourise(SHAPE),
    "separable": Separable([3, torch.randn(2, 4, generator=torch.Generator().manual_seed(1)), 8]),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def dense(operator: LinearOperator) -> Tensor:
    """The matrix of an operator, a column an input."""
    units = torch.eye(math.prod(operator.shape), dtype=torch.float64).reshape(-1, *operator.shape)
    return operator(units).flatten(1).T


@every_operator
def test_an_operator_is_its_decomposition_and_agrees_with_the_dense_one(name: str) -> None:
    operator = OPERATORS[name]
    matrix, size = dense(operator), math.prod(operator.shape)
    expected = torch.zeros(size, dtype=torch.float64)
    expected[: min(matrix.shape)] = torch.linalg.svdvals(matrix)
    found = operator.singular_values.flatten().sort(descending=True).values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    units = torch.eye(size, dtype=torch.float64).reshape(-1, *operator.shape)
    v = operator.from_spectrum(units).flatten(1)
    torch.testing.assert_close(v @ v.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(operator.to_spectrum(operator.from_spectrum(units)), units)
    seen = operator.observation_to_spectrum(operator(units))
    torch.testing.assert_close(seen, operator.singular_values * operator.to_spectrum(units))  # U^T H = S V^T
    noise = noise_source((50, *operator.observed_shape))(0)
    known = operator.singular_values.expand(operator.shape) > 0
    kept = operator.observation_to_spectrum(noise)[:, known].square().sum()
    assert float(kept) <= float(noise.square().sum()) * (1 + 1e-12)
    if int(known.sum()) == math.prod(operator.observed_shape):  # U is then a rotation of y
        torch.testing.assert_close(kept, noise.square().sum())

    y = operator(noise_source((2, *operator.shape))(0))
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ y.flatten(1).T
    torch.testing.assert_close(operator.pseudo_inverse(y).flatten(1), expected.T, rtol=1e-8, atol=1e-8)


def test_what_each_operator_does_to_an_image() -> None:
    image = torch.arange(96.0).reshape(1, *SHAPE)
    assert SuperResolve(SHAPE, 4)(image)[0, 0].tolist() == [[13.5, 17.5]]
    assert Colourise(SHAPE)(image)[0, 0, 0].tolist() == [32.0 + i for i in range(8)]
    assert torch.equal(Denoise(SHAPE)(image), image)
    flat = torch.full((1, *SHAPE), -1.0)
    torch.testing.assert_close(Deblur(SHAPE, gaussian_kernel(1.5))(flat), flat)  # no dark or bright frame
    edge = Deblur((1, 3, 3), torch.tensor([0.25, 0.5, 0.25]))(torch.eye(3)[None, None])
    torch.testing.assert_close(edge[0, 0, 0], torch.tensor([0.6250, 0.3125, 0.0625]))
    mask = torch.zeros(SHAPE)
    mask[0] = 1
    assert Inpaint(mask)(image).tolist() == (image * mask).tolist()
    assert {k: float(o.singular_values.max()) for k, o in OPERATORS.items() if k in ("super_resolve", "colourise")} == {
        "super_resolve": pytest.approx(1 / 2), "colourise": pytest.approx(1 / math.sqrt(3)),
    }  # fmt: skip
    assert int((OPERATORS["double"].singular_values > 0).sum()) < 96 <= int((Denoise(SHAPE).singular_values > 0).sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SuperResolve((1, 4, 6), 4), "factor is 4, expected a whole number that divides 4 and 6"),
        (lambda: SuperResolve((1, 4, 6), 0), "factor is 0"),
        (lambda: Deblur((1, 4, 4), torch.ones(4)), "k odd"),
        (lambda: Separable([torch.ones(3, 2)]), "no more rows than columns"),
        (lambda: Denoise((1, 4, 4)).to_spectrum(torch.zeros(2, 1, 4, 5)), r"x has shape \(2, 1, 4, 5\)"),
        (lambda: SuperResolve((1, 4, 4), 2).pseudo_inverse(torch.zeros(2, 1, 4, 4)), r"expected \(b, 1, 2, 2\)"),
        (lambda: Inpaint(torch.ones(2)).to_spectrum(torch.zeros(2, 3)), r"expected \(b, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


VALUES = torch.tensor([1.0, 0.3, 0.05, 0.002, 0.0], dtype=torch.float64)
TURNED = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
MIXED = Separable([TURNED.T @ torch.diag(VALUES) @ TURNED])


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("noise_sigma", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.0, 0.6), (1.0, 0.0)])
def test_every_step_has_the_noise_that_the_denoiser_was_trained_for(
    eta: float, eta_b: float, noise_sigma: float, beta_schedule: str
) -> None:
    """Proposition 3.1 of the paper: with the true x0 for the prediction, x_t given x0 is N(signal x0, sigma^2),
    whatever H, eta and eta_b are. A step is linear in its draws: a unit in each gives the covariance, exactly."""
    # cosine here ends in pure noise; linear ends at 156 deviations, less than the noise of the smallest value seen
    schedule = register_schedule(None, beta_schedule, 200, zero_terminal_snr=beta_schedule == "cosine")
    grid, size = make_grid(schedule, 12, "linspace"), 5
    settings = {"noise_sigma": noise_sigma, "parameterization": "x0", "num_steps": 12, "eta": eta, "eta_b": eta_b,
                "clip_denoised": False, "spacing": "linspace"}  # fmt: skip
    seen: list[Tensor] = []

    def knows(x0: Tensor):
        return lambda x_t, t, condition: seen.append(x_t) or x0.expand_as(x_t)

    def unit(draw: int) -> Tensor:  # of y's noise, the start, and one a step
        rows = torch.zeros(size * 14, size, dtype=torch.float64)
        rows[draw * size : (draw + 1) * size] = torch.eye(size, dtype=torch.float64)
        return rows

    nothing = torch.zeros(1, size, dtype=torch.float64)
    restore_ddrm(knows(nothing), schedule, MIXED, noise_sigma * unit(0), unit(1), lambda k: unit(k + 1), **settings)
    for step, rows in zip(grid, seen, strict=True):
        expected = step.sigma**2 * torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(rows.T @ rows, expected, rtol=1e-9, atol=1e-12)
    if schedule.zero_terminal_snr:  # else what is not seen begins at 0, not at signal x0: little but not nothing
        seen.clear()
        x0 = torch.linspace(-1, 1, size, dtype=torch.float64)[None]
        restore_ddrm(knows(x0), schedule, MIXED, MIXED(x0), nothing, lambda k: nothing, **settings)
        for step, mean in zip(grid, seen, strict=True):
            torch.testing.assert_close(mean, step.signal * x0, rtol=1e-9, atol=1e-9)


def test_a_coordinate_is_the_observed_one_until_the_chain_knows_it_better() -> None:
    """With eta_b = 1 the prediction counts exactly from where noise_sigma / s exceeds sigma / signal."""
    schedule, noise = register_schedule(beta_schedule="cosine"), noise_source((1, 5))
    spectra: list[list[Tensor]] = [[], []]
    for guess, seen in zip((0.5, -0.5), spectra, strict=True):
        restore_ddrm(lambda x, t, c, guess=guess: torch.full_like(x, guess), schedule, MIXED, noise(50), noise(51),
                     noise, noise_sigma=0.03, parameterization="x0", spacing="logsnr", num_steps=40,
                     callback=lambda k, x, x0, seen=seen: seen.append(MIXED.to_spectrum(x)))  # fmt: skip
    counts = set()
    for step, one, other in zip(make_grid(schedule, 40, "logsnr"), *spectra, strict=True):
        same = (one - other).abs()[0] < 1e-9
        expected = MIXED.singular_values * step.prev_sigma / step.prev_signal >= 0.03
        assert same.tolist() == (expected & (MIXED.singular_values > 0)).tolist()
        counts.add(int(same.sum()))
    assert counts == {0, 1, 2, 3, 4}


@every_operator
def test_without_noise_the_result_explains_the_observation(name: str) -> None:
    """Whatever the denoiser says, here something wild."""
    operator, shape = OPERATORS[name], (2, *SHAPE)
    schedule, noise = register_schedule(beta_schedule="cosine"), noise_source(shape)
    y = operator(noise_source(shape, seed=5)(0).clamp(-1, 1))
    x = restore_ddrm(lambda x, t, c: (3 * x).sin(), schedule, operator, y, noise(0), noise, num_steps=7)
    torch.testing.assert_close(operator(x), y, rtol=1e-9, atol=1e-9)
    if name == "inpaint":
        known = operator.singular_values > 0
        assert torch.equal(x[:, known], y[:, known])
        assert not torch.equal(x[:, ~known], y[:, ~known])


def denoised_error(deviation: float, noise_sigma: float, **settings: object) -> float:
    """Mean squared error over that of the best estimate, for x ~ N(0, deviation^2) and y = x + noise_sigma z."""
    schedule = register_schedule(beta_schedule="cosine")
    units = torch.eye(60, dtype=torch.float64)[..., None]
    out = restore_ddrm(GaussianWorld(schedule, 0.0, deviation).denoiser("v"), schedule, Denoise([1]), units[0],
                       units[1], lambda k: units[k + 1], noise_sigma=noise_sigma, parameterization="v",
                       clip_denoised=False, **settings)[:, 0]  # fmt: skip
    of_y, own = float(out[0]), float(out[1:].square().sum())
    signal, noise = deviation**2, noise_sigma**2
    return ((of_y - 1) ** 2 * signal + of_y**2 * noise + own) * (signal + noise) / (signal * noise)


@pytest.mark.parametrize(
    ("noise_sigma", "measured"), [(0.02, 1.41), (0.05, 1.26), (0.1, 1.22), (0.2, 1.30), (0.5, 1.75)]
)
def test_denoising_a_gaussian_comes_near_the_least_error(noise_sigma: float, measured: float) -> None:
    """No estimate is below 1, and a draw from the exact posterior is at 2; DDRM lies between."""
    assert denoised_error(0.2, noise_sigma) == pytest.approx(measured, abs=0.01)


def test_a_grid_that_ends_far_from_the_data_wastes_the_observation() -> None:
    assert denoised_error(0.2, 0.02, spacing="trailing") > 2.5 * denoised_error(0.2, 0.02)


def inpainted(correlation: float, **settings: object) -> tuple[float, float]:
    """Of two correlated values the first is seen: by how much the second follows it, and its own variance."""
    schedule = register_schedule(beta_schedule="cosine")
    cov = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64) / 25

    def exact(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        abar = schedule.alphas_cumprod[t[0]].double()
        noisy = abar * cov + (1 - abar) * torch.eye(2, dtype=torch.float64)
        return x_t @ (abar.sqrt() * cov @ torch.linalg.inv(noisy)).T

    def unit(draw: int) -> Tensor:
        rows = torch.zeros(600, 2, dtype=torch.float64)
        rows[2 * draw], rows[2 * draw + 1] = torch.eye(2, dtype=torch.float64)
        return rows

    out = restore_ddrm(exact, schedule, Inpaint(torch.tensor([1, 0])), unit(299), unit(0), unit, parameterization="x0",
                       clip_denoised=False, **settings)  # fmt: skip
    return float(out[598, 1]), float(out[:598, 1].square().sum())


def test_what_is_missing_follows_what_is_seen_more_with_more_steps() -> None:
    """The conditional mean follows by the correlation, 0.9, with a variance of (1 - 0.81) / 25. DDRM follows less, as
    its predicted x0 takes the seen value for noisier than it is, and comes nearer with more steps, unless eta is 0."""
    slopes = [inpainted(0.9, num_steps=steps)[0] for steps in (20, 50, 200)]
    assert slopes == sorted(slopes)
    assert slopes == pytest.approx([0.605, 0.739, 0.858], abs=0.005)
    assert inpainted(0.9, num_steps=200, eta=0.0)[0] < 0.5
    assert inpainted(0.9)[1] == pytest.approx(0.19 / 25, rel=0.1)
    assert inpainted(0.0)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_any_parameterization_and_grid_restores(parameterization: str) -> None:
    schedule, shape = register_schedule(beta_schedule="linear", timesteps=50), (6, *SHAPE)
    noise, operator = noise_source(shape), OPERATORS["deblur"]
    y = operator(0.3 + 0.2 * noise_source(shape, seed=9)(0)) + 0.05 * noise_source(shape, seed=8)(0)
    kept, seen = y.clone(), []
    for spacing in SPACINGS:
        for steps in (1, 2, 50):
            out = restore_ddrm(
                GaussianWorld(schedule).denoiser(parameterization), schedule, operator, y, noise(0), noise,
                noise_sigma=0.05, parameterization=parameterization, num_steps=steps, spacing=spacing,
                callback=lambda k, x, x0: seen.append((k, x)),
            )  # fmt: skip
            assert torch.equal(seen[-1][1], out)
            assert seen[-1][0] == steps
            if spacing != "leading":  # few leading steps never see the noise they start in
                assert float(out.mean()) == pytest.approx(0.3, abs=0.05)
            assert float(out.abs().max()) <= 1.0 + 1e-9  # the last step is the clipped x0
    assert torch.equal(y, kept)


def test_the_result_has_the_dtype_of_the_noise_and_each_sample_stands_alone() -> None:
    schedule, shape = register_schedule(beta_schedule="cosine"), (4, *SHAPE)
    world, operator = GaussianWorld(schedule), OPERATORS["super_resolve"]
    draws = {k: noise_source(shape)(k).float() for k in range(9)}
    y = operator(draws[0])
    whole, alone = (
        restore_ddrm(world.denoiser("v"), schedule, operator, y[part], draws[0][part], lambda k, p=part: draws[k][p],
                     noise_sigma=0.1, parameterization="v", num_steps=8)
        for part in (slice(0, 4), slice(2, 3))
    )  # fmt: skip
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole[2:3], alone)


@pytest.mark.parametrize("wrong", [{"noise_sigma": -0.1}, {"eta": 1.5}, {"eta_b": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    noise = noise_source((2, *SHAPE))
    with pytest.raises(ValueError, match="noise_sigma, eta, eta_b are"):
        restore_ddrm(lambda x, t, c: x, register_schedule(), Denoise(SHAPE), noise(0), noise(1), noise, **wrong)
