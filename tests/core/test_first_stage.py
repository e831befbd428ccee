"""The autoencoder of latent diffusion: shapes, closed forms, the adversary's weight, the scale of latents."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_core import (
    KLAutoencoder,
    LatentScale,
    PatchDiscriminator,
    adaptive_weight,
    first_stage_loss,
    hinge_loss,
    kl_to_standard_normal,
    perceptual_distance,
    reparameterize,
)
from ddpm_core.nn.blocks import ResidualBlock


def make(factor: int = 4, **changes) -> KLAutoencoder:
    torch.manual_seed(0)
    multipliers = [1, 2, 3, 3][: factor.bit_length()]
    return KLAutoencoder(**{"channels": 3, "latent_channels": 2, "factor": factor, "base_channels": 8,
                            "channel_multipliers": multipliers, **changes})  # fmt: skip


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_latents_are_factor_times_smaller_and_decode_back(factor: int) -> None:
    network, x = make(factor), torch.randn(2, 3, 16, 32)
    mean, log_variance = network.encode(x)
    assert mean.shape == log_variance.shape == (2, 2, 16 // factor, 32 // factor)
    assert network.decode(mean).shape == x.shape
    noise = torch.randn(mean.shape)
    out, *moments = network(x, noise)
    torch.testing.assert_close(out, network.decode(mean + log_variance.exp().sqrt() * noise))
    assert torch.equal(moments[0], mean)
    assert torch.equal(moments[1], log_variance)


def test_every_weight_is_trained() -> None:
    network = make()
    x, z = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 4, 4)
    for _ in range(2):  # residual branches end in zeros, so the weights before those move from the second step on
        for p in network.parameters():
            p.grad = None
        out, mean, log_variance = network(x, z)
        first_stage_loss(out, x, mean, log_variance).loss.sum().backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
    assert all(p.grad.abs().max() > 0 for p in network.parameters())
    assert any(p is network.last_layer for p in network.parameters())
    assert network.last_layer.shape[0] == 3


def test_the_log_variance_is_clipped_so_that_its_exponential_is_finite() -> None:
    network = make()
    nn.init.constant_(network.encoder[-1].bias, 1e3)
    assert float(network.encode(torch.zeros(1, 3, 16, 16))[1].detach().max()) == 20
    nn.init.constant_(network.encoder[-1].bias, -1e3)
    assert float(network.encode(torch.zeros(1, 3, 16, 16))[1].detach().min()) == -30


@pytest.mark.parametrize(
    ("changes", "said"), [({"factor": 3}, "2, 4, 8"), ({"channel_multipliers": [1, 2]}, "expected 3 for factor 4")]
)
def test_what_can_not_be_built_is_said(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**changes)


def test_an_image_must_be_divisible_by_the_factor() -> None:
    for shape in ((1, 3, 16, 18), (1, 3, 18, 16)):
        with pytest.raises(ValueError, match="factor 4"):
            make().encode(torch.zeros(shape))
    assert make(channel_multipliers=[1, 1, 1], num_blocks=2).encode(torch.zeros(1, 3, 8, 8))[0].shape == (1, 2, 2, 2)


def test_a_block_without_embedding_is_one_whose_embedding_says_nothing() -> None:
    torch.manual_seed(0)
    plain = ResidualBlock(8, 8)
    modulated = ResidualBlock(8, 8, 4)
    nn.init.normal_(plain.conv_out.weight)
    nn.init.zeros_(modulated.modulation.bias)
    modulated.load_state_dict({**modulated.state_dict(), **{k: v for k, v in plain.state_dict().items()
                                                            if not k.startswith("norm_out")}})  # fmt: skip
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(modulated(x, torch.zeros(2, 4)), plain(x))
    nn.init.constant_(plain.norm_out.bias, 0.5)  # its own shift
    assert not torch.allclose(modulated(x, torch.zeros(2, 4)), plain(x))


def test_reparameterised_draws_have_the_moments_and_their_gradients() -> None:
    noise = torch.randn(100_000, dtype=torch.float64)
    mean, log_variance = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, math.log(4.0)))
    z = reparameterize(mean.expand(len(noise)), log_variance.expand(len(noise)), noise)
    assert float(z.detach().mean()) == pytest.approx(0.5, abs=4 * 2 / math.sqrt(len(noise)))
    assert float(z.detach().std()) == pytest.approx(2.0, rel=0.01)
    by_mean, by_log_variance = torch.autograd.grad(z.sum(), (mean, log_variance))
    assert float(by_mean) == len(noise)
    assert float(by_log_variance) == pytest.approx(float(noise.sum()))  # 0.5 * std * noise


def test_kl_is_that_of_torch_distributions_and_zero_at_the_prior() -> None:
    mean, log_variance = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), exact, rtol=1e-12, atol=0)
    assert kl_to_standard_normal(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0.0, 0.0]


def test_the_loss_adds_its_parts_by_their_weights() -> None:
    x, y = torch.randn(2, 2, 3, 4, 4).unbind()
    mean, log_variance = torch.randn(2, 2, 5, 2, 2).unbind()

    def features(image: torch.Tensor) -> list[torch.Tensor]:
        return [image, image[:, :, ::2, ::2] + 1]

    loss = first_stage_loss(x, y, mean, log_variance, loss_type="l2", kl_weight=0.3, features=features,
                            perceptual_weight=0.7)  # fmt: skip
    torch.testing.assert_close(loss.reconstruction, (x - y).square().mean((1, 2, 3)))
    torch.testing.assert_close(loss.kl, kl_to_standard_normal(mean, log_variance))
    torch.testing.assert_close(loss.perceptual, perceptual_distance(features, x, y))
    torch.testing.assert_close(loss.loss, loss.reconstruction + 0.7 * loss.perceptual + 0.3 * loss.kl / 48)
    plain = first_stage_loss(x, y, mean, log_variance, kl_weight=0.0)
    torch.testing.assert_close(plain.loss, (x - y).abs().mean((1, 2, 3)))
    assert plain.perceptual.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="no features"):
        first_stage_loss(x, y, mean, log_variance, perceptual_weight=1.0)


def test_perceptual_distance_by_hand() -> None:
    first = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    second = torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert float(perceptual_distance(lambda x: [x], first, second)) == pytest.approx(2 * 0.2**2)
    assert float(perceptual_distance(lambda x: [x, x], first, 7 * second)) == pytest.approx(4 * 0.2**2)  # length: no
    assert float(perceptual_distance(lambda x: [x], first, -first)) == pytest.approx(4.0)
    assert float(perceptual_distance(lambda x: [x], first, first)) == 0


def test_hinge_loss_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [1.0, -1.0]]), torch.tensor([[-2.0, 0.0], [-1.0, 1.0]])
    assert hinge_loss(real, fake).tolist() == [0.375, 1.0]


def test_the_adaptive_weight_makes_the_gradients_equal_and_is_bounded() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((3 * w).sum(), (0.5 * w).sum(), w)
    assert float(weight) == pytest.approx(6.0, rel=1e-5)
    assert not weight.requires_grad
    assert float(adaptive_weight((1e9 * w).sum(), (0.0 * w).sum(), w)) == 1e4


@pytest.mark.parametrize(("num_layers", "size", "patches"), [(1, 8, 2), (2, 32, 6), (3, 32, 2), (3, 24, 1)])
def test_a_patch_is_what_the_discriminator_sees(num_layers: int, size: int, patches: int) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(channels=1, base_channels=8, num_layers=num_layers)
    x = torch.randn(2, 1, size, size)
    out = network(x)
    assert out.shape == (2, 1, patches, patches)
    alone = network(x[:1])
    torch.testing.assert_close(alone, out[:1])
    # Norms see the whole map, so what a number depends on is read off the convolutions alone.
    field = size_of_field(network)
    assert field == 9 * 2**num_layers - 2


def size_of_field(network: PatchDiscriminator) -> int:
    field = 1
    for layer in reversed(list(network.layers)):
        if isinstance(layer, nn.Conv2d):
            field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
    return field


def test_the_scale_over_many_batches_is_that_of_numpy_over_all_draws() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(3.0, 2.0, (1000, 2, 4, 4))
    log_variance = rng.normal(0.0, 1.0, mean.shape)
    scale = LatentScale()
    for start in range(0, 1000, 70):
        scale.add(torch.from_numpy(mean[start : start + 70]), torch.from_numpy(log_variance[start : start + 70]))
    exact = 1 / np.sqrt(mean.var() + np.exp(log_variance).mean())
    assert scale.value == pytest.approx(exact, rel=1e-12)
    draws = mean + np.exp(log_variance / 2) * rng.normal(size=mean.shape)
    assert scale.value == pytest.approx(1 / draws.std(), rel=0.02)
    first = LatentScale()
    first.add(torch.from_numpy(mean[:8]), torch.from_numpy(log_variance[:8]))
    assert first.value != pytest.approx(exact, rel=1e-3)  # one batch is not enough


def test_large_float32_latents_keep_their_digits() -> None:
    mean = 1000 + torch.randn(50, 100)
    scale = LatentScale()
    scale.add(mean, torch.full_like(mean, -30.0))
    assert scale.value == pytest.approx(1 / mean.double().numpy().std(), rel=1e-6)


def test_there_is_no_scale_without_spread() -> None:
    scale = LatentScale()
    with pytest.raises(ValueError, match="no scale"):
        _ = scale.value
    scale.add(torch.ones(4, 1), torch.full((4, 1), -1e9))
    with pytest.raises(ValueError, match="no scale"):
        _ = scale.value
