"""The transformer: patches, positions, an identity at the start, and that each input reaches the output."""

import pytest
import torch
from einops import rearrange
from torch import nn

from ddpm_core import DiT
from ddpm_core.nn.dit import DiTBlock, sine_cosine_positions
from tests.networks import fill_zeros


def trained_a_little(**arguments) -> DiT:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "channels": 1, "num_classes": 3, "width": 32, "depth": 2, "num_heads": 2}
    return fill_zeros(DiT(**{**sizes, **arguments}))


@pytest.mark.parametrize(("size", "channels", "patch"), [(8, 1, 2), (12, 3, 4), (6, 2, 1), (8, 3, 8)])
def test_the_output_has_the_shape_of_the_image_and_starts_at_zero(size, channels, patch) -> None:
    network = DiT(image_size=size, channels=channels, patch_size=patch, width=24, depth=1, num_heads=3)
    out = network(torch.randn(2, channels, size, size), torch.tensor([0, 5]))
    assert out.shape == (2, channels, size, size)
    assert not out.any()


def test_a_block_starts_as_the_identity_whatever_it_is_told() -> None:
    block, tokens = DiTBlock(16, 2, 4.0, 0.0, False), torch.randn(2, 5, 16)
    assert torch.equal(block(torch.randn(2, 16), tokens), tokens)
    assert block.to_out.weight.any()  # only the gates are closed


def test_dropout_is_in_both_branches() -> None:
    block, tokens = DiTBlock(16, 2, 4.0, 1.0, False), torch.randn(2, 5, 16)
    nn.init.normal_(block.modulation.weight)
    assert torch.equal(block(torch.randn(2, 16), tokens), tokens)  # all of it
    assert not torch.equal(block.eval()(torch.randn(2, 16), tokens), tokens)


def test_step_label_and_every_pixel_reach_the_output() -> None:
    network = trained_a_little()
    x, t, labels = torch.randn(1, 1, 8, 8), torch.tensor([10]), torch.tensor([1])
    base = network(x, t, labels)
    assert not torch.allclose(base, network(x, t + 500, labels))
    assert not torch.allclose(base, network(x, t, labels + 1))
    assert torch.equal(network(x, t, None), network(x, t, torch.tensor([3])))
    x.requires_grad_()
    network(x, t, labels)[0, 0, 0, 0].backward()
    assert bool((x.grad != 0).all())


def test_a_patch_comes_back_to_its_place() -> None:
    """With closed gates and pure copies in and out, the output is the normalised patch where the patch was."""
    network = DiT(image_size=8, channels=3, patch_size=4, width=48, depth=1, num_heads=2).eval()
    with torch.no_grad():
        network.positions.zero_()
        nn.init.eye_(network.patch_in.weight)
        nn.init.eye_(network.patch_out.weight)
    x = torch.randn(2, 3, 8, 8)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)  # (b, c, y, x, p, q), by another way than ours
    mean, variance = patches.mean((1, 4, 5), keepdim=True), patches.var((1, 4, 5), keepdim=True, correction=0)
    expected = rearrange((patches - mean) / (variance + 1e-6).sqrt(), "b c y x p q -> b c (y p) (x q)")
    torch.testing.assert_close(network(x, torch.tensor([1, 2])), expected, rtol=1e-4, atol=1e-5)


def test_moving_patches_moves_the_output_only_without_positions() -> None:
    network, x, t = trained_a_little(), torch.randn(1, 1, 8, 8), torch.tensor([10])
    moved = x.roll((2, 4), dims=(2, 3))
    assert not torch.allclose(network(moved, t), network(x, t).roll((2, 4), dims=(2, 3)), atol=1e-3)
    network.positions.zero_()
    torch.testing.assert_close(network(moved, t), network(x, t).roll((2, 4), dims=(2, 3)), rtol=1e-4, atol=1e-5)


def test_positions_tell_row_from_column_and_are_no_weights() -> None:
    positions = sine_cosine_positions(16, 5)
    assert positions.shape == (25, 16)
    assert float((torch.cdist(positions, positions) + 10 * torch.eye(25)).min()) > 0.3
    grid = positions.reshape(5, 5, 16)
    assert torch.equal(grid[2, :, :8], grid[2, :1, :8].expand(5, -1))  # half of it is the row's
    assert torch.equal(grid[..., :8], grid[..., 8:].transpose(0, 1))
    assert "positions" not in trained_a_little().state_dict()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_context_a_learned_variance_and_an_embedder(qk_norm: bool) -> None:
    class Embedder(nn.Module):
        def forward(self, condition, batch_size):
            return condition.expand(batch_size, 32)

    network = trained_a_little(num_classes=0, context_channels=2, learned_variance=True, embedder=Embedder(),
                               qk_norm=qk_norm, dropout=0.5)  # fmt: skip
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 20])
    out = network(x, t, torch.zeros(1, 32))
    assert out.shape == (2, 2, 8, 8)
    assert not torch.allclose(out, network(x, t, torch.ones(1, 32)))
    network.train()
    assert not torch.equal(network(x, t, torch.zeros(1, 32)), network(x, t, torch.zeros(1, 32)))  # dropout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, "image_size 8 is not a multiple of patch_size 3"),
        ({"num_heads": 3}, "width 32 is not a multiple of 4 and of num_heads 3"),
        ({"width": 30}, "width 30 is not a multiple of 4"),
        ({"embedder": nn.Identity()}, "both given"),
    ],
)
def test_what_can_not_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained_a_little(**arguments)
    with pytest.raises(ValueError, match="num_classes=0"):
        trained_a_little(num_classes=0)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1))
