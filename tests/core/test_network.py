"""What holds for every network of ours: checkpointing, layouts, precisions, compilation, and the count of its cost."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import (
    ContextConcat,
    Cost,
    DenoisingNetwork,
    DiT,
    UNet,
    count_cost,
    register_schedule,
    sample_ddim,
)
from ddpm_core.guidance import denoiser_at
from ddpm_core.nn.attention import HeadNorm, attend, count_heads, make_head_norms
from ddpm_core.samplers.grid import make_grid
from tests.networks import fill_zeros

BUILDERS = {
    "unet": lambda **more: UNet(image_size=8, channels=2, num_classes=3, base_channels=16, **more),
    "dit": lambda **more: DiT(image_size=8, channels=2, num_classes=3, width=32, depth=3, num_heads=2, **more),
}
every_network = pytest.mark.parametrize("name", BUILDERS)


def build(name: str, **more) -> DenoisingNetwork:
    torch.manual_seed(0)
    return fill_zeros(BUILDERS[name](**more))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 8, 8, generator=generator), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 2])


def gradients(network: nn.Module, denoiser=None) -> list[Tensor]:
    """Of a loss in all weights and in x_t, dropout drawn from the same seed each time."""
    x_t, t, labels = batch()
    x_t.requires_grad_()
    torch.manual_seed(1)
    loss = (network if denoiser is None else denoiser)(x_t, t, labels).square().sum()
    return list(torch.autograd.grad(loss, [x_t, *network.parameters()]))


def kept_bytes(network: nn.Module) -> int:
    """What a forward pass keeps for the backward pass, inputs of checkpointed blocks left out."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(*batch())
    assert out.requires_grad
    return sum(kept.values())


@every_network
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_memory_and_never_results(name: str, dropout: float) -> None:
    network = build(name, dropout=dropout, qk_norm=True).train()
    plain, memory = gradients(network), kept_bytes(network)
    network.activation_checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(network), strict=True))
    assert kept_bytes(network) < 0.5 * memory
    if dropout:  # and dropout was at work
        network.eval()
        assert not torch.equal(plain[0], gradients(network)[0])


@every_network
def test_blocks_run_once_more_in_the_backward_pass_and_not_at_all_while_sampling(name: str, monkeypatch) -> None:
    network, calls = build(name), []
    blocks = [*network.down, network.middle_in] if name == "unet" else network.blocks
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    network.activation_checkpointing = True
    gradients(network)
    assert len(calls) == 2
    monkeypatch.delattr("ddpm_core.nn.network.checkpoint")
    with torch.no_grad():
        network(*batch())
    assert len(calls) == 3


@every_network
def test_checkpointing_under_autocast_computes_again_in_the_same_precision(name: str) -> None:
    def both() -> Iterator[list[Tensor]]:
        for checkpointing in (False, True):
            network = build(name, qk_norm=True)
            network.activation_checkpointing = checkpointing
            with torch.autocast("cpu", torch.bfloat16):
                yield gradients(network)

    plain, again = both()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("unet", {"channel_multipliers": (1,), "num_blocks": 1}), ("dit", {})])
def test_a_traced_network_with_checkpointing_has_the_same_gradients(name: str, more: dict) -> None:
    """As torch.compile sees it, without the minutes that its code generator takes: one graph, no break, and what is
    computed again draws its dropout again."""
    network = build(name, qk_norm=True, dropout=0.3, **more).train()
    plain = gradients(network)
    network.activation_checkpointing = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own tracing
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        traced = gradients(network, compiled)
    torch._dynamo.reset()
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@every_network
def test_channels_last_is_a_layout_and_no_other_network(name: str) -> None:
    network = build(name)
    plain = gradients(network)
    network.to(memory_format=torch.channels_last)
    for a, b in zip(plain, gradients(network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@every_network
def test_bfloat16_needs_no_other_network(name: str) -> None:
    """Under autocast and cast as a whole; a warning would be an error here."""
    network = build(name, qk_norm=True)
    x_t, t, labels = batch()
    full = network(x_t, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x_t, t, labels).float(), full, rtol=0.1, atol=0.1)
    cast = network.bfloat16()(x_t.bfloat16(), t, labels)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), full, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_qk_norm_bounds_the_logits(scale: float) -> None:
    """By hand; with it the size of queries and keys does not matter, without it attention becomes a choice of one."""
    qkv = torch.randn(1, 5, 3 * 12, generator=torch.Generator().manual_seed(0))
    qkv[..., :24] *= scale
    query_norm, key_norm = make_head_norms(6, True)
    with torch.no_grad():
        query_norm.weight.fill_(1.5)
    out = attend(qkv, 2, query_norm, key_norm)
    query, key, value = qkv.reshape(1, 5, 3, 2, 6).permute(2, 0, 3, 1, 4)
    query, key = (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() for v in (query, key))
    logits = 1.5 * query @ key.transpose(-1, -2) / 6**0.5
    assert float(logits.detach().abs().max()) <= 1.5 * 6**0.5 + 1e-4
    expected = (logits.softmax(-1) @ value).transpose(1, 2).reshape(1, 5, 12)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_qk_norm_is_off_unless_asked_and_then_a_scale_for_queries_and_one_for_keys() -> None:
    for name in BUILDERS:
        plain, normed = build(name).state_dict(), build(name, qk_norm=True).state_dict()
        assert set(plain) < set(normed)
        surplus = {key.split(".")[-2] for key in set(normed) - set(plain)}
        assert surplus == {"query_norm", "key_norm"}
    norm = HeadNorm(4, eps=1e-6)
    assert norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_heads_have_at_most_64_channels_and_divide_the_width() -> None:
    assert [count_heads(n) for n in (16, 64, 65, 96, 192, 384)] == [1, 1, 5, 2, 3, 6]


def test_the_cost_of_a_transformer_is_its_formula() -> None:
    width, depth, patch, channels, tokens = 32, 3, 2, 2, 16
    network = build("dit")
    products = (
        256 * width + width**2  # the step's embedding
        + tokens * channels * patch**2 * width  # patches in
        + depth * (tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2)  # qkv, out, MLP; logits, mix; adaLN
        + 2 * width**2 + tokens * channels * patch**2 * width  # the last adaLN, patches out
    )  # fmt: skip
    assert count_cost(network, network.input_shape) == (sum(p.numel() for p in network.parameters()), 2 * products)


def test_the_cost_of_a_convolution_is_its_formula() -> None:
    class Conv(nn.Conv2d):
        def forward(self, x, t, condition):
            size = {key: len(value) for key, value in (condition or {}).items()}
            assert size in ({}, {"a": 1})
            return super().forward(x)

    cost = count_cost(Conv(3, 5, 3, padding=1), (3, 7, 9), {"a": torch.zeros(1)})
    assert cost == Cost(3 * 5 * 9 + 5, 2 * 3 * 5 * 9 * 7 * 9)


@every_network
def test_counting_changes_nothing_and_is_that_of_a_real_forward_pass(name: str) -> None:
    network = build(name, dropout=0.5).train()
    network.activation_checkpointing = True
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    cost = count_cost(network, network.input_shape, torch.tensor([1]))
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert all(torch.equal(tensor, weights[key]) for key, tensor in network.state_dict().items())
    assert not any(p.is_meta or p.grad is not None for p in network.parameters())
    assert count_cost(network, network.input_shape).flop_per_image == cost.flop_per_image
    assert count_cost(network.bfloat16().requires_grad_(False), network.input_shape) == cost


@pytest.mark.parametrize("make", [
    lambda: UNet(image_size=8, channels=1, num_classes=3, base_channels=8),
    lambda: DiT(image_size=8, channels=1, num_classes=3, width=32, depth=1, num_heads=2),
    lambda: ContextConcat(UNet(image_size=8, channels=1, context_channels=1, base_channels=8)),
])  # fmt: skip
def test_a_sampler_embeds_each_step_once_and_for_one_row(make: Callable[[], nn.Module]) -> None:
    """Not once more in every call and for every sample of the batch; the output is the plain network's."""
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    inner = network.network if isinstance(network, ContextConcat) else network
    rows: list[int] = []
    inner.time_mlp.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    x = torch.randn(5, 1, 8, 8)
    condition = {"context": torch.randn(5, 1, 8, 8)} if inner is not network else torch.arange(5) % 3
    sampler = partial(
        sample_ddim, schedule=register_schedule(), x_noisy=x, condition=condition, parameterization="v", num_steps=4
    )
    drawn = sampler(network)
    assert rows == [1] * 4
    rows.clear()
    plain = sampler(lambda x_t, t, condition: network(x_t, t, condition))
    assert rows == [5] * 4
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(drawn, x)


def test_a_compiled_network_stays_compiled_in_a_sampler() -> None:
    network = UNet(image_size=8, channels=1, base_channels=8).eval()
    compiled = torch.compile(network, backend="eager")
    step = make_grid(register_schedule(), 4)[0]
    assert denoiser_at(compiled, step) is compiled
    assert denoiser_at(network, step) is not network
    plain = nn.Identity()
    assert denoiser_at(ContextConcat(plain), step).network is plain
