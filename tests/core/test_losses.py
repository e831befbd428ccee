"""One value per image, and the parts of the loss against hand-worked numbers."""

import pytest
import torch

from ddpm_core.losses import LOSS_TYPES, get_loss, p_losses, weighted_loss
from ddpm_core.schedules import register_schedule
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
