"""Every parameterization stands for the same x0 and noise."""

import pytest
import torch

from ddpm_core.noising import q_sample
from ddpm_core.schedules import register_schedule
from ddpm_core.targets import PARAMETERIZATIONS, predict_noise_from_start, to_target, to_x0


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (6, 3)])
def test_the_right_output_leads_back_to_x0_and_noise(parameterization: str, shape: tuple[int, ...]) -> None:
    schedule = register_schedule(beta_schedule="linear")
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    t = torch.tensor([1, 10, 100, 300, 500, 700])
    x_t = q_sample(schedule, x0, t, noise)
    back = to_x0(schedule, parameterization, to_target(schedule, parameterization, x0, noise, t), x_t, t)
    torch.testing.assert_close(back, x0, atol=1e-3, rtol=0)
    torch.testing.assert_close(predict_noise_from_start(schedule, x_t, t, x0), noise, atol=1e-3, rtol=0)


def test_an_unknown_parameterization_is_refused() -> None:
    x = torch.zeros(1, 2)
    t = torch.tensor([0])
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        to_target(register_schedule(), "epsilon", x, x, t)
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        to_x0(register_schedule(), "epsilon", x, x, t)
