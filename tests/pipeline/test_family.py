"""The family of scores on Gaussians, whose distances are known."""

import pytest
import torch
from torch import Tensor

from ddpm_core.frechet import frechet_distance, frechet_distance_of_features, moments_of_features
from pipeline.engine.family import FamilySettings, Whole, bootstrap_interval, extrapolate, score_family
from pipeline.errors import UserError

DIM = 8
SETTINGS = FamilySettings(kid_subsets=10, kid_size=100, bootstrap=40, extrapolation=8)


def draw(n: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed)) + shift


def test_all_scores_are_there_and_tell_near_from_far() -> None:
    labels, logits = torch.arange(600) % 3, draw(600, seed=2)
    near = score_family(draw(600), draw(600, seed=1), labels, labels, logits, SETTINGS)
    far = score_family(draw(600), draw(600, 1.0, seed=1), labels, labels, logits, SETTINGS)
    assert set(near) == {
        "kid", "kid_error", "precision", "recall", "density", "coverage", "inception_score",
        "inception_score_deviation",
        "fd_class_0", "fd_class_1", "fd_class_2", "fd_class_mean", "fd_class_worst", "fd_low", "fd_high", "fd_infinity",
    }  # fmt: skip
    assert all(isinstance(value, float) for value in near.values())
    assert abs(near["kid"]) < 4 * near["kid_error"] < far["kid"]
    for name in ("precision", "recall", "density", "coverage"):
        assert near[name] > far[name], name
    assert near["fd_low"] <= near["fd_infinity"] < 0.2 < 7 < far["fd_low"] < far["fd_high"] < 9.5  # truth: 0, 8
    assert far["fd_class_mean"] <= far["fd_class_worst"] < 12
    again = score_family(draw(600), draw(600, seed=1), labels, labels, logits, SETTINGS)
    assert again == pytest.approx(near, rel=1e-9, abs=1e-12)


def test_a_class_is_compared_with_its_own_images() -> None:
    labels = torch.arange(900) % 3
    real, samples = draw(900), draw(900, seed=1)
    samples[labels == 2] += 2
    swapped = torch.where(labels == 0, -1, labels)  # -1 is no class
    found = score_family(real, samples, labels, swapped)
    assert "fd_class_0" not in found
    assert found["fd_class_worst"] == found["fd_class_2"] == pytest.approx(4 * DIM, rel=0.1)
    assert found["fd_class_1"] < 1
    assert found["fd_class_mean"] == pytest.approx((found["fd_class_1"] + found["fd_class_2"]) / 2)


def test_infinitely_many_samples_take_the_bias_off() -> None:
    real = draw(20_000)
    few = draw(100, 0.5, seed=1)
    full = float((draw(20_000, 0.5, seed=1).mean(0) - real.mean(0)).square().sum())
    biased = frechet_distance_of_features(real, few)
    assert abs(extrapolate(moments_of_features(real), few, 12)["fd_infinity"] - full) < abs(biased - full)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(20):
        found = bootstrap_interval(draw(300, seed=2 * seed), draw(300, 0.6, seed=2 * seed + 1), 40, 0.9)
        held += found["fd_low"] <= DIM * 0.36 <= found["fd_high"]
    assert 14 <= held <= 20


def test_an_interval_of_kept_features_is_that_of_the_whole_sets() -> None:
    real, samples = draw(4000), draw(4000, 0.6, seed=1)
    whole = Whole(moments_of_features(real), moments_of_features(samples))
    truth = frechet_distance(*whole[:2])
    found = bootstrap_interval(real[::8], samples[::8], 40, 0.95, whole)
    assert found["fd_low"] < truth < found["fd_high"]
    alone = bootstrap_interval(real[::8], samples[::8], 40, 0.95)
    ratio = (alone["fd_high"] - alone["fd_low"]) / (found["fd_high"] - found["fd_low"])
    assert ratio == pytest.approx(8**0.5, rel=0.35)  # an error falls with the root of the number
    fixed = bootstrap_interval(real[:2], samples[::8], 40, 0.95, Whole(*whole[:2], published=True))
    assert fixed["fd_low"] < truth < fixed["fd_high"]
    assert fixed["fd_high"] - fixed["fd_low"] < found["fd_high"] - found["fd_low"]  # one side less to draw


def test_what_few_images_do_not_allow_is_left_out() -> None:
    found = score_family(draw(3), draw(3, seed=1), torch.arange(3), torch.arange(3), None, SETTINGS)
    assert not {"kid", "precision", "fd_class_mean"} & set(found)
    real = moments_of_features(draw(5))
    assert extrapolate(real, draw(2), 4) == {} == extrapolate(real, draw(50), 1)


@pytest.mark.parametrize(
    ("real", "samples", "message"),
    [
        (draw(5), draw(1), "samples: 1 images, scores need at least 2"),
        (draw(1), draw(5), "real: 1 images"),
        (draw(5), draw(5)[:, :3], "samples: features have 3 dims, those of real images 8"),
        (draw(5), draw(5) / 0, "samples: features are not finite"),
    ],
)
def test_sets_without_scores_are_errors_of_one_line(real: Tensor, samples: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_family(real, samples)
