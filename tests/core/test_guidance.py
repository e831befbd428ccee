"""Guidance: its conventions, what it costs, and the distributions it leads to where they are known."""

import math

import pytest
import torch
from torch.nn import functional

from ddpm_core import (
    PARAMETERIZATIONS,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    IntervalGuidance,
    q_posterior,
    register_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    to_x0,
)
from ddpm_core.guidance import denoiser_at
from ddpm_core.samplers.grid import make_grid
from ddpm_core.schedules import at
from tests.worlds import MixtureWorld, noise_source

SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm_solver": sample_dpm_solver, "heun": sample_heun}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_parameterization = pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
SCHEDULE = register_schedule(beta_schedule="cosine", timesteps=100)
LABELS, STEPS = torch.tensor([4, 4]), torch.zeros(2, dtype=torch.int64)


class Recorder:
    """A denoiser whose output is its label, plus `shift`; with `learned_variance` twice the channels, the second half
    100 + label. Counts calls and images."""

    def __init__(self, shift: float = 0.0, *, learned_variance: bool = False) -> None:
        self.shift, self.learned_variance = shift, learned_variance
        self.calls = self.images = 0
        self.steps: list[int] = []

    def __call__(self, x_t, t, condition):
        self.calls, self.images = self.calls + 1, self.images + len(x_t)
        self.steps.append(int(t[0]) if t.device.type != "meta" else -1)
        label = condition["class"] if isinstance(condition, dict) else condition
        out = label.to(x_t.dtype).reshape(-1, *(1,) * (x_t.ndim - 1)).expand_as(x_t) + self.shift
        if isinstance(condition, dict):
            out = out + 1000 * condition["size"].to(x_t.dtype)[:, None]
        return torch.cat((out, 100 + out), dim=1) if self.learned_variance else out


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize(("scale", "expected", "images"), [(0.0, 10.0, 2), (1.0, 4.0, 2), (3.0, 10 + 3 * (4 - 10), 4)])
def test_guidance_follows_its_convention_on_every_channel_at_no_extra_cost(scale, expected, images, batched) -> None:
    denoiser = Recorder()
    guided = ClassifierFreeGuidance(denoiser, scale, null=10, batched=batched)
    assert guided(torch.zeros(2, 3), STEPS, LABELS).tolist() == [[expected] * 3] * 2
    assert denoiser.images == images
    assert denoiser.calls == (1 if images == 2 or batched else 2)


def test_on_an_accelerator_both_calls_are_one() -> None:
    denoiser = Recorder()
    meta = (torch.zeros(2, 3, device="meta"), STEPS.to("meta"), LABELS.to("meta"))
    assert ClassifierFreeGuidance(denoiser, 3.0, null=10)(*meta).shape == (2, 3)
    assert (denoiser.calls, denoiser.images) == (1, 4)


def test_the_unconditional_is_asked_for_as_it_is() -> None:
    guided = ClassifierFreeGuidance(lambda x_t, t, condition: x_t if condition is None else x_t + 1, 3.0, null=10)
    assert guided(torch.zeros(1, 1), STEPS[:1], None).tolist() == [[0.0]]


@pytest.mark.parametrize("batched", [False, True])
def test_the_null_of_several_conditions_is_a_mapping_and_what_it_leaves_out_stays(batched: bool) -> None:
    condition = {"class": LABELS, "size": torch.tensor([7, 8])}

    def guided(null):
        return ClassifierFreeGuidance(Recorder(), 3.0, null, batched=batched)(torch.zeros(2, 1), STEPS, condition)

    assert guided({"class": 10}).flatten().tolist() == [7000 - 8, 8000 - 8]
    assert guided({"class": 10, "size": torch.tensor(0)}).flatten().tolist() == [3 * 7000 - 8, 3 * 8000 - 8]
    for null in (10, {"label": 10}):
        with pytest.raises(TypeError, match="asked for those of"):
            guided(null)
    with pytest.raises(TypeError, match=r"of \['class'\], the denoiser is asked for one condition without a name"):
        ClassifierFreeGuidance(Recorder(), 3.0, {"class": 10})(torch.zeros(2, 1), STEPS, LABELS)


def test_a_query_that_is_no_label_has_a_null_of_its_shape() -> None:
    query, null = torch.ones(2, 3), torch.tensor([0.0, 1.0, 2.0])
    guided = ClassifierFreeGuidance(lambda x_t, t, condition: condition, 2.0, null)
    assert guided(torch.zeros(2, 3), STEPS, query).tolist() == [[2.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize("guidance", ["classifier-free", "auto", "classifier"])
def test_a_learned_variance_is_not_guided(guidance: str) -> None:
    network = Recorder(learned_variance=True)
    guided = {
        "classifier-free": ClassifierFreeGuidance(network, 3.0, null=10),
        "auto": AutoGuidance(network, Recorder(6.0, learned_variance=True), 3.0),
        "classifier": ClassifierGuidance(network, lambda x, t: -x.repeat(1, 5), 1.0, SCHEDULE, "x0"),
    }[guidance]
    out = guided(torch.zeros(2, 2, dtype=torch.float64), STEPS + 50, LABELS)
    assert out.shape == (2, 4)
    assert out[:, 2:].tolist() == [[104.0] * 2] * 2
    if guidance != "classifier":
        assert out[:, :2].tolist() == [[-8.0] * 2] * 2
    else:
        assert float((out[:, :2] - 4).abs().min()) > 0.1


def test_autoguidance_leads_away_from_the_guide_and_costs_nothing_at_one() -> None:
    for scale, expected, calls in ((3.0, 4 + 2 * 0.5, 1), (1.0, 4.0, 0)):
        guide = Recorder(-0.5)
        out = AutoGuidance(Recorder(), guide, scale)(torch.zeros(2, 3), STEPS, LABELS)
        assert out.tolist() == [[expected] * 3] * 2
        assert guide.calls == calls


def sigma_of(step) -> float:
    return step.sigma / step.signal if step.signal > 0 else math.inf


@every_sampler
def test_outside_the_interval_a_step_is_the_plain_one_at_its_cost(name: str) -> None:
    network, noise = Recorder(), noise_source((2, 3))
    plain = Recorder(0.5)
    guided = IntervalGuidance(ClassifierFreeGuidance(network, 3.0, null=10), plain, SCHEDULE, (0.3, 4.0))
    SAMPLERS[name](guided, SCHEDULE, noise(0), noise, condition=LABELS, num_steps=10)
    inside = {step.t for step in make_grid(SCHEDULE, 10) if 0.3 < sigma_of(step) <= 4.0}
    outside = {step.t for step in make_grid(SCHEDULE, 10)} - inside
    assert 2 < len(inside) < 8
    assert set(network.steps) == inside
    assert set(plain.steps) == outside
    calls = 2 * 10 - 1 if name == "heun" else 10
    assert network.calls / 2 + plain.calls == calls  # on the CPU guidance is two calls


def test_a_batch_of_mixed_steps_is_decided_sample_by_sample() -> None:
    network, plain = Recorder(), Recorder(0.5)
    guided = IntervalGuidance(ClassifierFreeGuidance(network, 3.0, null=10), plain, SCHEDULE, (0.3, 4.0))
    t = torch.arange(100)
    labels = torch.full((100,), 4)
    out = guided(torch.zeros(100, 1), t, labels)[:, 0]
    steps = make_grid(SCHEDULE, 100)[::-1]
    assert out.tolist() == [-8.0 if 0.3 < sigma_of(step) <= 4.0 else 4.5 for step in steps]
    for step in steps:
        single = denoiser_at(guided, step)(torch.zeros(1, 1), t[step.t][None], labels[:1])
        assert float(single) == float(out[step.t])


def test_pure_noise_lies_beyond_every_interval() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=10, zero_terminal_snr=True)
    plain = Recorder(0.5)
    guided = IntervalGuidance(Recorder(), plain, schedule, (0.1, 1e30))
    assert denoiser_at(guided, make_grid(schedule, 10)[0]) is plain
    assert guided(torch.zeros(2, 1), STEPS + 9, LABELS).tolist() == [[4.5]] * 2


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_empty_interval_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="rising noise levels"):
        IntervalGuidance(Recorder(), Recorder(), SCHEDULE, interval)


@every_sampler
def test_guidance_inside_guidance_is_decided_without_waiting_for_the_device(name: str) -> None:
    """On the meta device a tensor has no numbers: whoever reads one in the loop fails."""
    network, guide = Recorder(), Recorder(0.1)
    limited = IntervalGuidance(ClassifierFreeGuidance(network, 3.0, 10), network, SCHEDULE, (0.3, 4.0))
    guided = ClassifierFreeGuidance(AutoGuidance(limited, guide, 2.0), 0.0, null=10)
    x = torch.zeros(2, 3, device="meta")
    out = SAMPLERS[name](guided, SCHEDULE, x, lambda k: x, condition=LABELS.to("meta"), num_steps=10)
    assert out.shape == (2, 3)
    calls = 2 * 10 - 1 if name == "heun" else 10
    assert guide.calls == network.calls == calls
    assert calls * 2 < network.images < calls * 4  # doubled inside the interval only


# Classifier guidance, in a world of two classes where p(y | x_t) is known


def guided_by_classifier(world: MixtureWorld, parameterization: str, scale: float = 1.0) -> ClassifierGuidance:
    return ClassifierGuidance(
        world.denoiser(parameterization), world.classifier, scale, world.schedule, parameterization
    )


@each_parameterization
def test_at_scale_one_the_guided_output_is_that_of_the_classs_own_denoiser(parameterization: str) -> None:
    """grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t), without approximation."""
    world = MixtureWorld(SCHEDULE)
    x, t = torch.linspace(-3, 3, 100, dtype=torch.float64)[:, None], torch.arange(100)
    for y in (0, 1):
        guided = guided_by_classifier(world, parameterization)(x, t, torch.full((100,), y))
        expected = world.component(y).denoiser(parameterization)(x, t, None)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-5)  # tables are float32


@each_parameterization
@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddim", 500), ("dpm_solver", 100), ("heun", 100)])
def test_guided_samples_are_those_of_the_class_within_three_standard_errors(name, steps, parameterization) -> None:
    num, deviation = 4000, 0.3
    world = MixtureWorld(register_schedule(beta_schedule="cosine"), deviation=deviation)
    noise, labels = noise_source((num, 1), seed=3), torch.arange(num) % 2
    x = SAMPLERS[name](guided_by_classifier(world, parameterization), world.schedule, noise(0), noise,
                       condition=labels, parameterization=parameterization, num_steps=steps,
                       clip_denoised=False)  # fmt: skip
    for y in (0, 1):
        mine = x[labels == y]
        assert float(mine.mean()) == pytest.approx(world.means[y], abs=3 * deviation / len(mine) ** 0.5)
        assert float(mine.std()) == pytest.approx(deviation, abs=3 * deviation / (2 * len(mine)) ** 0.5)


@each_parameterization
@pytest.mark.parametrize("v_posterior", [0.0, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_the_ancestral_mean_is_shifted_by_scale_times_variance_times_gradient(
    parameterization: str, v_posterior: float, clip: bool
) -> None:
    """Algorithm 1 of Dhariwal and Nichol, step by step, from the posterior's own function and a gradient by hand."""
    schedule = register_schedule(beta_schedule="cosine", timesteps=7, v_posterior=v_posterior).double()
    network = lambda x_t, t, condition: torch.sin(3 * x_t) + 0.1 * t[:, None]  # noqa: E731
    weights = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 0.9]], dtype=torch.float64)  # of three classes
    guided = ClassifierGuidance(network, lambda x, t: x @ weights.T, 2.5, schedule, parameterization)
    noise, labels, seen = noise_source((5, 2)), torch.tensor([0, 1, 2, 1, 0]), []
    sample_ddpm(guided, schedule, noise(0), noise, condition=labels, parameterization=parameterization,
                clip_denoised=clip, callback=lambda k, x, x0: seen.append(x))  # fmt: skip
    x = noise(0)
    for k, after in enumerate(seen, start=1):
        t = torch.full((5,), 7 - k)
        x0 = to_x0(schedule, parameterization, network(x, t, None), x, t)
        mean, beta_tilde, _ = q_posterior(schedule, x0.clamp(-1, 1) if clip else x0, x, t)
        beta = at(schedule.betas, t, x)
        variance = beta if v_posterior else beta_tilde
        gradient = weights[labels] - functional.softmax(x @ weights.T, dim=1) @ weights
        expected = mean + 2.5 * variance * gradient + (variance.sqrt() * noise(k) if k < 7 else 0)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)  # tables were float32
        x = after


def test_the_classifier_is_not_asked_where_it_has_nothing_to_say() -> None:
    def classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    network, noise = Recorder(), noise_source((2, 3))
    for scale in (0.0, 2.0):
        guided = ClassifierGuidance(network, classifier, scale, SCHEDULE, "x0")
        limited = IntervalGuidance(guided, network, SCHEDULE, (1e5, 1e6))
        for denoiser in (guided, limited) if scale == 0 else (limited,):
            out = sample_ddpm(denoiser, SCHEDULE, noise(0), noise, condition=LABELS, parameterization="x0")
            assert out.tolist() == [[1.0] * 3] * 2
    alone = ClassifierGuidance(lambda x_t, t, condition: x_t, classifier, 2.0, SCHEDULE, "x0")
    assert sample_ddim(alone, SCHEDULE, noise(0), parameterization="x0").shape == (2, 3)  # no labels


def test_the_interval_reaches_the_ancestral_mean_and_an_inner_guidance_its_step() -> None:
    world = MixtureWorld(SCHEDULE)
    asked, inner = [], Recorder()

    def classifier(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(int(t[0]))
        return world.classifier(x, t)

    limited = IntervalGuidance(ClassifierFreeGuidance(inner, 3.0, 1), inner, SCHEDULE, (0.3, 4.0))
    guided = ClassifierGuidance(limited, classifier, 1.0, SCHEDULE, "x0")
    noise = noise_source((2, 1))
    sample_ddpm(IntervalGuidance(guided, inner, SCHEDULE, (1.0, 9.0)), SCHEDULE, noise(0), noise,
                condition=LABELS // 4, parameterization="x0")  # fmt: skip
    steps = make_grid(SCHEDULE, 100)
    assert asked == [step.t for step in steps if 1.0 < sigma_of(step) <= 9.0]
    assert inner.calls == 100 + len([step for step in steps if 1.0 < sigma_of(step) <= 4.0])


def test_nothing_is_guided_where_there_is_no_signal() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=10, zero_terminal_snr=True)
    guided = ClassifierGuidance(lambda x_t, t, c: x_t, lambda x, t: x * torch.ones(3), 5.0, schedule, "v")
    x = torch.ones(2, 1)
    assert torch.equal(guided(x, STEPS + 9, LABELS // 4), x)
    assert bool(guided(x.repeat(1, 1), STEPS + 5, LABELS // 4).isfinite().all())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_stay_inside(mode) -> None:
    weights = torch.nn.Parameter(torch.eye(2))
    guided = ClassifierGuidance(lambda x_t, t, c: x_t, lambda x, t: x @ weights, 1.0, SCHEDULE, "eps")
    with mode():
        x = torch.ones(2, 2)
        before = x.clone()
        out = sample_ddim(guided, SCHEDULE, x, condition=torch.tensor([0, 1]), num_steps=3)
        assert not out.requires_grad
        assert torch.equal(x, before)
    assert weights.grad is None


def test_what_classifier_guidance_can_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match="known: eps, x0, v"):
        ClassifierGuidance(Recorder(), lambda x, t: x, 1.0, SCHEDULE, "score")
    guided = ClassifierGuidance(lambda x_t, t, c: x_t, lambda x, t: x, 1.0, SCHEDULE, "eps")
    with pytest.raises(TypeError, match="labels"):
        guided(torch.ones(2, 2), STEPS, {"class": LABELS})
