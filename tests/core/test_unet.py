"""The network: shapes, an identity at the start, and that each input reaches the output."""

import hashlib

import pytest
import torch

from ddpm_core import UNet
from ddpm_core.nn.unet import Stage
from tests.networks import fill_zeros


def trained_a_little(**arguments) -> UNet:
    """A network whose zero-initialised outputs have been filled, so that inputs show."""
    torch.manual_seed(0)
    return fill_zeros(UNet(**{"image_size": 8, "channels": 1, "num_classes": 3, "base_channels": 16, **arguments}))


@pytest.mark.parametrize(("size", "channels", "multipliers"), [(8, 1, (1, 2)), (16, 3, (1, 2, 3)), (12, 3, (2, 1))])
def test_the_output_has_the_shape_of_the_image_and_starts_at_zero(size, channels, multipliers) -> None:
    network = UNet(image_size=size, channels=channels, base_channels=24, channel_multipliers=multipliers)
    out = network(torch.randn(2, channels, size, size), torch.tensor([0, 5]))
    assert out.shape == (2, channels, size, size)
    assert not out.any()


def test_step_label_and_every_pixel_reach_the_output() -> None:
    network = trained_a_little()
    x, t, labels = torch.randn(1, 1, 8, 8), torch.tensor([10]), torch.tensor([1])
    base = network(x, t, labels)
    assert not torch.allclose(base, network(x, t + 500, labels))
    assert not torch.allclose(base, network(x, t, labels + 1))
    x.requires_grad_()
    network(x, t, labels)[0, 0, 0, 0].backward()
    assert bool((x.grad != 0).all())


def test_a_skip_connection_comes_after_what_comes_from_below() -> None:
    stage, embedding = Stage(24, 8, 16, 0.0, False, False), torch.randn(2, 16)
    below, skip = torch.randn(2, 16, 4, 4), torch.randn(2, 8, 4, 4)
    assert torch.equal(stage(embedding, below, skip), stage(embedding, torch.cat((below, skip), dim=1)))


def test_no_label_is_the_null_label() -> None:
    network = trained_a_little()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 20])
    assert torch.equal(network(x, t, None), network(x, t, torch.tensor([3, 3])))


def test_an_image_does_not_depend_on_its_batch() -> None:
    network = trained_a_little()
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(network(x, t, labels)[2:3], network(x[2:3], t[2:3], labels[2:3]), rtol=1e-5, atol=1e-5)


def test_context_a_learned_variance_and_an_embedder() -> None:
    class Embedder(torch.nn.Module):
        def forward(self, condition, batch_size):
            return condition.expand(batch_size, 64)

    network = trained_a_little(num_classes=0, context_channels=2, learned_variance=True, embedder=Embedder())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 20])
    out = network(x, t, torch.zeros(1, 64))
    assert out.shape == (2, 2, 8, 8)
    assert not torch.allclose(out, network(x, t, torch.ones(1, 64)))


def test_what_can_not_work_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be halved 2 times"):
        UNet(image_size=10, channels=1, channel_multipliers=(1, 2, 2))
    with pytest.raises(ValueError, match="both given"):
        trained_a_little(embedder=torch.nn.Identity())
    with pytest.raises(ValueError, match="num_classes=0"):
        UNet(image_size=8, channels=1, base_channels=8)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1))


def test_the_initial_weights_are_what_they_always_were() -> None:
    """Names, order and draws: the default run repeats bit for bit only while none of them changes."""
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=1, num_classes=10, base_channels=16, num_blocks=1, dropout=0.1)
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        digest.update(name.encode())
        if "class_embedding" not in name:  # normal numbers go through a logarithm, whose last bit is the machine's
            digest.update(parameter.detach().numpy().tobytes())
    assert digest.hexdigest() == "8d27ecbbb704d6d7be3aabbe5f2a74a7cf861525a71d90965160b1ebb450f099"
