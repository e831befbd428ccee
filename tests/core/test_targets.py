"""Every parameterization stands for the same x0 and noise."""

import pytest
import torch

from ddpm_core.noising import q_sample
from ddpm_core.schedules import register_schedule
from ddpm_core.targets import (
    PARAMETERIZATIONS,
    predict_noise_from_start,
    predict_start_from_noise,
    split_output,
    to_target,
    to_x0,
)


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
    torch.testing.assert_close(predict_start_from_noise(schedule, x_t, t, noise), x0, atol=1e-3, rtol=0)


def test_an_unknown_parameterization_is_refused() -> None:
    x = torch.zeros(1, 2)
    t = torch.tensor([0])
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        to_target(register_schedule(), "epsilon", x, x, t)
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        to_x0(register_schedule(), "epsilon", x, x, t)


def test_eps_is_refused_where_the_last_step_holds_no_signal() -> None:
    schedule = register_schedule(zero_terminal_snr=True)
    x, t = torch.ones(2, 3), torch.tensor([0, 999])
    for refused in (
        lambda: to_target(schedule, "eps", x, x, t),
        lambda: to_x0(schedule, "eps", x, x, t),
        lambda: predict_start_from_noise(schedule, x, t, x),
    ):
        with pytest.raises(ValueError, match="zero terminal SNR: use 'v' or 'x0'"):
            refused()


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_x0_is_found_again_at_zero_terminal_snr(parameterization: str) -> None:
    schedule = register_schedule(zero_terminal_snr=True)
    x0, noise, t = torch.full((1, 2), 0.7), torch.full((1, 2), -0.4), torch.tensor([999])
    x_t = q_sample(schedule, x0, t, noise)
    assert torch.equal(x_t, noise)
    output = to_target(schedule, parameterization, x0, noise, t)
    assert torch.equal(to_x0(schedule, parameterization, output, x_t, t), x0)


def test_the_output_of_a_learned_variance_is_two_halves_of_the_channels() -> None:
    x_t = torch.zeros(2, 3, 4, 4)
    output = torch.arange(6.0).reshape(1, 6, 1, 1).expand(2, 6, 4, 4)
    prediction, v = split_output(output, x_t)
    assert prediction[0, :, 0, 0].tolist() == [0, 1, 2]
    assert v[1, :, 0, 0].tolist() == [3, 4, 5]
    for wrong in (x_t, torch.zeros(2, 6, 4, 5), torch.zeros(1, 6, 4, 4)):
        with pytest.raises(ValueError, match=r"expected \(2, 6, 4, 4\) for a learned variance"):
            split_output(wrong, x_t)
