"""One value per image, and the parts of the loss against hand-worked numbers."""

import pytest
import torch

from ddpm_core.likelihood import model_log_variance, vlb_term
from ddpm_core.losses import LOSS_TYPES, classifier_loss, get_loss, min_snr_weights, p_losses, weighted_loss
from ddpm_core.noising import q_sample
from ddpm_core.schedules import NoiseSchedule, register_schedule
from ddpm_core.targets import to_x0
from tests.worlds import GaussianWorld


@pytest.mark.parametrize(("loss_type", "expected"), [("l1", 2.0), ("l2", 4.0), ("huber", 1.5)])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4, 4)])
def test_an_images_loss_is_the_mean_over_its_own_axes(loss_type: str, expected: float, shape: tuple[int, ...]) -> None:
    prediction = torch.zeros(shape)
    prediction[1] = 2
    assert get_loss(prediction, torch.zeros(shape), loss_type).tolist() == [0.0, expected]
    assert loss_type in LOSS_TYPES


def test_shapes_that_would_broadcast_and_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        get_loss(torch.zeros(2, 1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="known: l1, l2, huber"):
        get_loss(torch.zeros(2, 1), torch.zeros(2, 1), "l3")


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_weights_pick_and_scale_the_parts(parameterization: str) -> None:
    schedule = register_schedule()
    t, per_image = torch.tensor([0, 500]), torch.tensor([1.0, 3.0])
    parts = weighted_loss(schedule, parameterization, per_image, t, l_simple_weight=2.0, original_elbo_weight=0.5)
    weights = getattr(schedule, f"lvlb_weights_{parameterization}")[t]
    assert torch.equal(parts.loss_simple, per_image)
    assert torch.equal(parts.loss_vlb, weights * per_image)
    assert torch.equal(parts.loss, 2 * per_image + 0.5 * weights * per_image)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_with_the_exact_denoiser_the_loss_is_its_analytic_value(parameterization: str) -> None:
    """E|x0 - E[x0|x_t]|^2 of Gaussian data is its posterior variance; eps and v scale it by their squared gain."""
    schedule = register_schedule(beta_schedule="cosine")
    world = GaussianWorld(schedule)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.3 + 0.2 * torch.randn(4, 200_000, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.tensor([50, 300, 600, 900])
    loss = p_losses(world.denoiser(parameterization), schedule, x0, t, noise, parameterization=parameterization).loss
    abar = schedule.alphas_cumprod[t]
    posterior = 0.04 * (1 - abar) / (abar * 0.04 + 1 - abar)
    gain = {"x0": torch.ones(4), "eps": abar / (1 - abar), "v": 1 / (1 - abar)}[parameterization]
    torch.testing.assert_close(loss, posterior * gain, rtol=0.02, atol=0)


SNR_9_1_THIRD = NoiseSchedule(torch.tensor([0.1, 4 / 9, 0.5]), v_posterior=0.0)  # abar 0.9, 0.5, 0.25


@pytest.mark.parametrize(
    ("parameterization", "expected"),
    [("eps", [5 / 9, 1.0, 1.0]), ("x0", [5.0, 1.0, 1 / 3]), ("v", [5 / 10, 1 / 2, 1 / 4])],
)
def test_min_snr_weights_by_hand(parameterization: str, expected: list[float]) -> None:
    """snr is 9, 1 and 1/3, gamma 5."""
    t = torch.arange(3)
    got = min_snr_weights(SNR_9_1_THIRD, parameterization, t, 5.0)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=0)
    per_image = torch.tensor([1.0, 3.0, 6.0])
    parts = weighted_loss(SNR_9_1_THIRD, parameterization, per_image, t, l_simple_weight=2.0,
                          original_elbo_weight=0.5, min_snr_gamma=5.0)  # fmt: skip
    assert torch.equal(parts.loss_simple, per_image)  # logged without the weight, comparable between settings
    torch.testing.assert_close(parts.loss, 2 * torch.tensor(expected) * per_image + 0.5 * parts.loss_vlb)


def test_min_snr_weighs_the_same_error_alike_in_every_parameterization() -> None:
    """A unit error in x0 is one of snr in eps and of snr + 1 in v (squared)."""
    schedule = register_schedule(beta_schedule="cosine")
    t = torch.arange(0, 1000, 37)
    snr = schedule.snr[t]
    weights = {p: min_snr_weights(schedule, p, t, 3.0) for p in ("eps", "x0", "v")}
    torch.testing.assert_close(weights["eps"] * snr, weights["x0"])
    torch.testing.assert_close(weights["v"] * (snr + 1), weights["x0"])


def test_without_gamma_nothing_is_weighted_and_a_wrong_one_is_refused() -> None:
    schedule, t = register_schedule(), torch.tensor([3])
    per_image = torch.tensor([0.3])
    assert torch.equal(weighted_loss(schedule, "eps", per_image, t).loss, per_image)
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="min_snr_gamma is"):
            min_snr_weights(schedule, "eps", t, gamma)
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        min_snr_weights(schedule, "epsilon", t, 5.0)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        min_snr_weights(register_schedule(zero_terminal_snr=True), "eps", t, 5.0)


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_zero_terminal_snr_gives_finite_losses_and_eps_is_refused(parameterization: str) -> None:
    schedule = register_schedule(zero_terminal_snr=True)
    x0, t = torch.full((2, 1, 4), 0.5), torch.tensor([998, 999])
    noise = torch.ones_like(x0)
    for more in ({"min_snr_gamma": 5.0}, {"original_elbo_weight": 1.0}):
        parts = p_losses(lambda x, t, c: torch.zeros_like(x), schedule, x0, t, noise,
                         parameterization=parameterization, **more)  # fmt: skip
        assert bool(torch.isfinite(torch.stack((parts.loss, parts.loss_simple, parts.loss_vlb))).all())
    with pytest.raises(ValueError, match="zero terminal SNR"):
        p_losses(lambda x, t, c: x, schedule, x0, t, noise)


@pytest.fixture
def hybrid():
    """A network whose outputs are the parameters, its schedule and a batch with t = 0 in it."""
    generator = torch.Generator().manual_seed(0)
    schedule, t = register_schedule(beta_schedule="cosine", timesteps=400), torch.tensor([0, 1, 150, 399])
    x0 = (torch.randint(0, 256, (4, 2, 5), generator=generator) / 127.5) - 1
    noise = torch.randn(x0.shape, generator=generator)
    return schedule, x0, t, noise, 0.1 * torch.randn(4, 4, 5, generator=generator)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_mean_learns_from_the_simple_part_alone_and_the_variance_from_the_bound(hybrid, parameterization) -> None:
    schedule, x0, t, noise, output = hybrid
    output = output.requires_grad_()
    parts = p_losses(lambda x, t, c: output, schedule, x0, t, noise, parameterization=parameterization,
                     learned_variance=True)  # fmt: skip
    (total,) = torch.autograd.grad(parts.loss.sum(), output, retain_graph=True)
    (simple,) = torch.autograd.grad(parts.loss_simple.sum(), output, retain_graph=True)
    (bound,) = torch.autograd.grad(parts.loss_vlb.sum(), output)
    mean, variance = slice(0, 2), slice(2, 4)
    assert torch.equal(total[:, mean], simple[:, mean])
    assert not bound[:, mean].any()
    assert not simple[:, variance].any()
    torch.testing.assert_close(total[:, variance], 400 / 1000 * bound[:, variance], rtol=1e-4, atol=1e-5)
    assert bool(bound[:, variance].flatten(1).any(1).all())  # every step teaches it, t = 0 too
    assert bool(torch.isfinite(total).all())


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_the_hybrid_loss_is_the_simple_one_and_t_thousandths_of_the_exact_bound(hybrid, parameterization) -> None:
    schedule, x0, t, noise, output = hybrid
    parts = p_losses(lambda x, t, c: output, schedule, x0, t, noise, parameterization=parameterization,
                     learned_variance=True, min_snr_gamma=2.0, l_simple_weight=3.0)  # fmt: skip
    predicted = to_x0(schedule, parameterization, output[:, :2], q_sample(schedule, x0, t, noise), t)
    bound = vlb_term(schedule, x0, predicted, model_log_variance(schedule, output[:, 2:], t), t)
    torch.testing.assert_close(parts.loss_vlb, bound)
    weighted = 3 * min_snr_weights(schedule, parameterization, t, 2.0) * parts.loss_simple
    torch.testing.assert_close(parts.loss, weighted + 0.4 * bound)
    fixed = p_losses(lambda x, t, c: output[:, :2], schedule, x0, t, noise, parameterization=parameterization)
    assert torch.equal(fixed.loss, parts.loss_simple)


def test_the_bound_with_the_smallest_variance_is_the_weighted_error() -> None:
    """At v = -1 the variance is beta_tilde: the exact term is lvlb_t times the squared error."""
    schedule, t = register_schedule(), torch.tensor([5, 500, 999])
    x0 = torch.full((3, 1, 4), 0.25)
    noise = torch.linspace(-1, 1, 12).reshape(3, 1, 4)
    output = torch.cat((noise + 0.3, -torch.ones(3, 1, 4)), dim=1)
    parts = p_losses(lambda x, t, c: output, schedule, x0, t, noise, learned_variance=True)
    expected = schedule.lvlb_weights_eps[t] * 0.09
    torch.testing.assert_close(parts.loss_vlb, expected, rtol=2e-3, atol=0)


def test_a_learned_variance_excludes_the_bound_of_the_fixed_one() -> None:
    x0, t = torch.zeros(2, 1, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"original_elbo_weight is 0\.5"):
        p_losses(lambda x, t, c: torch.zeros(2, 2, 4), register_schedule(), x0, t, x0, learned_variance=True,
                 original_elbo_weight=0.5)  # fmt: skip
    with pytest.raises(ValueError, match=r"expected \(2, 2, 4\)"):
        p_losses(lambda x, t, c: x, register_schedule(), x0, t, x0, learned_variance=True)


def test_the_classifiers_loss_is_the_cross_entropy_at_the_noised_image() -> None:
    schedule, generator = register_schedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, generator=generator).unbind()
    t, labels = torch.tensor([0, 500, 999]), torch.tensor([1, 0, 3])
    parts = classifier_loss(lambda x_t, t: x_t, schedule, x0, t, noise, labels)
    logits = q_sample(schedule, x0, t, noise)
    expected = logits.logsumexp(1) - logits[torch.arange(3), labels]
    torch.testing.assert_close(parts.loss, expected)
    assert torch.equal(parts.loss_simple, parts.loss)
    assert not parts.loss_vlb.any()
