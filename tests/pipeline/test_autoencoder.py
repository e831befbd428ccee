"""A step of the autoencoder: what it adds up, when the adversary begins, and that it resumes to the same bits."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ddpm_core import EMA, KLAutoencoder, PatchDiscriminator, first_stage_loss, hinge_loss
from pipeline.data.loader import Batch
from pipeline.data.pixels import to_unit_range
from pipeline.engine.autoencoder import LOGGED, Adversary, AutoencoderPlan, AutoencoderState, AutoencoderStep
from pipeline.engine.checkpoint import CheckpointFolder
from pipeline.engine.loop import _log_row
from pipeline.engine.perceptual import PerceptualFeatures
from pipeline.runtime.rng import Stream, draw_normal, draw_uniform
from pipeline.runtime.topology import Topology

BATCH = 12
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"))


def make_step(*, adversarial: bool = False, rate: float = 1e-2, micro_batch: int = BATCH, **changes) -> AutoencoderStep:
    torch.manual_seed(0)
    network = KLAutoencoder(
        channels=1, latent_channels=2, factor=2, base_channels=8, channel_multipliers=[1, 1], num_blocks=1
    )
    adversary = None
    if adversarial:
        critic = PatchDiscriminator(channels=1, base_channels=8, num_layers=1)
        adversary = Adversary(critic, torch.optim.AdamW(critic.parameters(), lr=0.0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    state = AutoencoderState(network, EMA(network, 10), optimizer, adversary=adversary)
    plan = AutoencoderPlan(seed=0, batch_size=BATCH, micro_batch=micro_batch, max_grad_norm=1.0, dtype=torch.float32,
                           learning_rate=lambda images: rate, adversarial_weight=1.0 * adversarial,
                           **{"horizontal_flip": False, "loss": first_stage_loss, **changes})  # fmt: skip
    return AutoencoderStep(plan, state, ALONE)


def batch_at(step: int) -> Batch:
    images = torch.randint(0, 256, (BATCH, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(step))
    return Batch(images, torch.full((BATCH,), -1), torch.arange(step * BATCH, (step + 1) * BATCH))


def weights(step: AutoencoderStep) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in step.state.network.parameters()])


def of_critic(step: AutoencoderStep) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in step.state.adversary.network.parameters()])


@pytest.mark.parametrize("flip", [False, True])
def test_noise_and_flips_are_keyed_by_place(flip: bool) -> None:
    step, batch = make_step(horizontal_flip=flip), batch_at(3)
    x, noise = step._draw(to_unit_range(batch.images), batch.positions)
    assert torch.equal(noise, draw_normal(0, Stream.POSTERIOR, batch.positions, (2, 4, 4)))
    mirrored = draw_uniform(0, Stream.FLIP, batch.positions) < 0.5
    for image, plain, mirror in zip(x, to_unit_range(batch.images), mirrored & flip, strict=True):
        assert torch.equal(image, plain.flip(-1) if mirror else plain)
    assert mirrored.any()
    assert not mirrored.all()


@pytest.mark.parametrize("micro_batch", [BATCH, 5])
def test_a_row_holds_the_means_over_its_images_however_they_are_cut(micro_batch: int) -> None:
    kept = []

    def loss(*args):
        kept.append(first_stage_loss(*args, kl_weight=0.1))
        return kept[-1]

    step = make_step(loss=loss, micro_batch=micro_batch)
    step(batch_at(0))
    step(batch_at(1))
    row = _log_row(step.state, step, ALONE)
    assert tuple(row) == ("images", *LOGGED, "learning_rate") == step.state.columns
    for name in ("loss", "reconstruction", "kl"):
        everyone = torch.cat([getattr(part, name).detach() for part in kept]).double()
        assert row[name] == pytest.approx(float(everyone.mean()), rel=1e-6)
    assert row["loss"] > row["reconstruction"]
    assert row["images"] == 2 * BATCH
    apart = make_step(loss=partial(first_stage_loss, kl_weight=0.1), micro_batch=micro_batch)
    norms = []
    for number in range(2):
        apart(batch_at(number))
        norms.append(_log_row(apart.state, apart, ALONE)["grad_norm"])
    assert row["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-6)
    assert norms[0] > 0
    assert row["adversarial"] == row["discriminator"] == row["adaptive_weight"] == row["perceptual"] == 0
    assert not step.state.sums.any()


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, parts = make_step(rate=0.0), make_step(rate=0.0, micro_batch=5)
    for step in (whole, parts):
        step.state.optimizer.zero_grad = lambda set_to_none: None
        step(batch_at(0))
    for one, other in zip(whole.state.network.parameters(), parts.state.network.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_the_adversary_begins_when_it_shall() -> None:
    late, never = make_step(adversarial=True, adversarial_start_images=2 * BATCH), make_step()
    before = of_critic(late)
    for number in range(2):
        late(batch_at(number))
        never(batch_at(number))
    assert torch.equal(weights(late), weights(never))
    assert torch.equal(of_critic(late), before)
    assert not late.state.sums[4:7].any()
    late(batch_at(2))
    never(batch_at(2))
    assert not torch.equal(weights(late), weights(never))
    assert not torch.equal(of_critic(late), before)
    assert (late.state.sums[4:7] != 0).all()


def test_the_critic_learns_the_hinge_loss_of_what_was_made() -> None:
    step = make_step(adversarial=True, rate=0.0)
    critic, batch = step.state.adversary.network, batch_at(0)
    step.state.adversary.optimizer.zero_grad = lambda set_to_none: None
    step(batch)
    got = [p.grad.clone() for p in critic.parameters()]
    critic.zero_grad()
    x, noise = step._draw(to_unit_range(batch.images), batch.positions)
    made = step.state.network(x, noise)[0].detach()
    hinge = hinge_loss(critic(x), critic(made))
    hinge.mean().backward()
    hinge = hinge.detach()
    total = torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
    assert float(total) > 0
    for one, p in zip(got, critic.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-6)
    row = _log_row(step.state, step, ALONE)
    assert row["discriminator"] == pytest.approx(float(hinge.mean()), rel=1e-5)
    assert row["adversarial"] == pytest.approx(-float(critic(made).detach().mean()), rel=1e-4)
    assert row["adaptive_weight"] > 0


def test_the_adversarial_part_pulls_as_hard_as_the_pixels() -> None:
    """At the last layer the two gradients are equally long, whatever the critic's scale."""
    step = make_step(adversarial=True, rate=0.0)
    for p in step.state.adversary.network.parameters():
        p.data *= 3.0
    batch = batch_at(0)
    x, noise = step._draw(to_unit_range(batch.images), batch.positions)
    made, mean, log_variance = step.state.network(x, noise)
    loss = first_stage_loss(made, x, mean, log_variance).loss.mean()
    against, weight = step._against_critic(made, loss)
    by_pixels, by_critic = (
        torch.autograd.grad(value, step.network.last_layer, retain_graph=True)[0].norm()
        for value in (loss, weight * against.mean())
    )
    assert float(by_critic) == pytest.approx(float(by_pixels), rel=1e-3)


@pytest.mark.parametrize("adversarial", [False, True])
def test_interrupted_is_uninterrupted_bit_for_bit(tmp_path: Path, adversarial: bool) -> None:
    whole = make_step(adversarial=adversarial)
    for number in range(4):
        whole(batch_at(number))
        if number == 1:
            _log_row(whole.state, whole, ALONE)
            CheckpointFolder(tmp_path).save(whole.state)
    again = make_step(adversarial=adversarial)
    CheckpointFolder(tmp_path).resume(again.state, ALONE, "autoencoder")
    assert again.state.images_seen == 2 * BATCH
    assert again.state.history == whole.state.history
    for number in (2, 3):
        again(batch_at(number))
    assert torch.equal(weights(again), weights(whole))
    assert torch.equal(again.state.sums, whole.state.sums)
    if adversarial:
        assert torch.equal(of_critic(again), of_critic(whole))


def test_training_lowers_the_loss() -> None:
    step = make_step(loss=partial(first_stage_loss, loss_type="l2"))
    rows = []
    for number in range(30):
        step(Batch(batch_at(0).images // 2, batch_at(0).labels, batch_at(number).positions))
        rows.append(_log_row(step.state, step, ALONE)["reconstruction"])
    assert rows[-1] < 0.7 * rows[0]


def test_perceptual_features_see_blur_more_than_a_shift_of_brightness() -> None:
    from ddpm_core import perceptual_distance

    features = PerceptualFeatures(torch.device("cpu"))
    x = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float() - 0.5
    assert [tuple(m.shape[1:]) for m in features(x)] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (112, 4, 4),
        (320, 2, 2),
    ]
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1).requires_grad_()
    blur = perceptual_distance(features, blurred, x)
    brighter = perceptual_distance(features, x + float((blurred.detach() - x).abs().mean()), x)
    assert (blur > 2 * brighter).all()
    blur.sum().backward()
    assert blurred.grad.abs().max() > 0
    assert features(torch.zeros(1, 3, 96, 80))[0].shape[2:] == (48, 40)
