"""Look-ups: exact, nearest, quantised; and a denoiser that learns a conditional mean through each."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpm_core import (
    Conditions,
    ExactEmbedding,
    NearestEmbedding,
    QuantizedEmbedding,
    drop_conditions,
    p_losses,
    register_schedule,
    sample_ddim,
    take_auxiliary_loss,
    timestep_embedding,
)


def test_an_exact_key_finds_its_row_and_none_the_null_row() -> None:
    embedding = ExactEmbedding([7, "circle", -2], dim=4)
    rows = embedding.rows(["circle", 7, None, -2])
    assert (rows.tolist(), rows.dtype) == ([1, 0, 3, 2], torch.int64)
    assert torch.equal(embedding(rows, 4), embedding.table.weight[rows])
    assert torch.equal(embedding(None, 2), embedding.table.weight[[3, 3]])
    assert torch.equal(embedding(rows[2:3], 1), embedding(None, 1))


@pytest.mark.parametrize(
    ("keys", "asked", "near"),
    [
        (["circle", "square", "star", "line"], "sqare", "'square'"),
        ([10, 20, 30, 40, "a"], 31, "30, 40, 20"),
        (["10", "b"], 11, "'10'"),
        ([1, 2], "x", "[12], [12]"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_ones(keys, asked, near) -> None:
    with pytest.raises(LookupError, match=rf"key {asked!r} is unknown; nearest of {len(keys)} known: {near}"):
        ExactEmbedding(keys, 4).rows([keys[0], asked])


@pytest.mark.parametrize("keys", [[], ["a", "b", "a"]])
def test_keys_must_differ(keys) -> None:
    with pytest.raises(ValueError, match="none twice"):
        ExactEmbedding(keys, 4)


def test_the_nearest_key_by_euclidean_distance_counts_and_ties_take_the_first() -> None:
    keys = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    embedding = NearestEmbedding(keys, dim=4)
    # (1.9, 1.9) is nearer to none than by its corner: by the largest coordinate alone it would be a tie.
    query = torch.tensor([[1.6, 0.1], [1.5, 0.0], [3.0, 0.0], [-9.0, 1.0], [0.5, 2.0], [math.nan, 0.0]])
    assert embedding.rows(query).tolist() == [1, 0, 1, 0, 2, 4]
    assert torch.equal(embedding(query, 6), embedding.table.weight[embedding.rows(query)])
    assert torch.equal(embedding(query[-1:], 1), embedding(None, 1))
    many = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    expected = (many[:, None] - many[None, 50:150]).square().sum(-1).argmin(1)
    assert torch.equal(NearestEmbedding(many[50:150], 4).rows(many), expected)


def test_keys_are_saved_with_their_rows() -> None:
    saved = NearestEmbedding(torch.tensor([[1.0], [2.0]]), dim=4)
    other = NearestEmbedding(torch.tensor([[5.0], [6.0]]), dim=4)
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(torch.tensor([[1.1]]), 1), saved(torch.tensor([[1.1]]), 1))
    assert "keys" not in dict(other.named_parameters())


@pytest.mark.parametrize("keys", [torch.zeros(0, 2), torch.zeros(3), torch.tensor([[math.inf]])])
def test_bad_keys_are_refused(keys) -> None:
    with pytest.raises(ValueError, match=r"finite numbers \(n, d\)"):
        NearestEmbedding(keys, 4)


def quantized(**arguments) -> QuantizedEmbedding:
    torch.manual_seed(0)
    return QuantizedEmbedding(**{"num_codes": 8, "code_dim": 2, "dim": 4, **arguments})


def test_the_gradient_passes_straight_through_the_choice_of_a_code() -> None:
    embedding = quantized()
    query = torch.randn(5, 2, requires_grad=True)
    out = embedding(query, 5)
    code = embedding.codebook.detach()[embedding.rows(query)].requires_grad_()
    assert torch.equal(out, embedding.embed(code))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (embedding.embed(code) * weight).sum().backward()
    torch.testing.assert_close(query.grad, code.grad)
    assert embedding.codebook.grad is None  # codes learn from the auxiliary loss alone


def test_the_auxiliary_loss_pulls_codes_fully_and_queries_by_the_commitment_weight() -> None:
    embedding = quantized(commitment_weight=0.1)
    query = torch.randn(6, 2, requires_grad=True)
    embedding(query, 6)
    loss = take_auxiliary_loss(embedding)
    rows = embedding.rows(query)
    gap = (query - embedding.codebook[rows]).detach()
    torch.testing.assert_close(loss, 1.1 * gap.square().sum(1))
    loss.sum().backward()
    torch.testing.assert_close(query.grad, 0.1 * 2 * gap)
    expected = torch.zeros(8, 2).index_add_(0, rows, -2 * gap)
    torch.testing.assert_close(embedding.codebook.grad, expected)
    assert take_auxiliary_loss(embedding) is None  # never twice


def test_a_query_of_nan_is_the_null_row_without_a_loss_or_a_nan_in_any_gradient() -> None:
    embedding = quantized(encoder=nn.Linear(3, 2))
    query = torch.randn(3, 3)
    query[1, 2] = math.nan
    out = embedding(query, 3)
    assert torch.equal(out[1:2], embedding(None, 1))
    torch.testing.assert_close(out[:1], embedding(query[:1], 1))
    embedding(query, 3)
    loss = take_auxiliary_loss(embedding)
    assert (loss > 0).tolist() == [True, False, True]
    (out.sum() + loss.sum()).backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_outside_of_training_nothing_is_left_behind() -> None:
    embedding = quantized()
    with torch.no_grad():
        embedding(torch.randn(2, 2), 2)
    embedding.eval()(torch.randn(2, 2), 2)
    assert take_auxiliary_loss(embedding) is None
    copy.deepcopy(embedding)


def test_dead_codes_move_onto_recent_queries_the_same_way_everywhere() -> None:
    queries = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [6.0, 5.0], [5.0, 6.0], [math.nan, 0.0]])
    u = torch.tensor([0.9, 0.8, 0.3, 0.1, 0.2, 0.0])
    book = torch.tensor([[0.0, 0.1], [90.0, 0.0], [0.0, 90.0]])
    ranks = []
    for _ in range(2):
        embedding = quantized(num_codes=3)
        embedding.codebook.data.copy_(book)
        moved = embedding.reset_dead_codes(queries, u)
        assert moved.tolist() == [False, True, True]
        assert torch.equal(embedding.codebook[0], book[0])
        assert embedding.codebook[1:].tolist() == [[6.0, 5.0], [5.0, 6.0]]
        ranks.append(embedding.codebook.detach())
    assert torch.equal(*ranks)
    assert not embedding.reset_dead_codes(queries, u).any()  # now all are used
    assert embedding.reset_dead_codes(queries, u, least_uses=2).tolist() == [False, False, True]
    lonely = quantized(num_codes=3)
    assert lonely.reset_dead_codes(queries[:1], u[:1], least_uses=5).tolist() == [True, False, False]


def test_without_resets_codes_die_and_with_them_the_codebook_is_used() -> None:
    queries = torch.randn(512, 2, generator=torch.Generator().manual_seed(1)) * 0.05 + 20
    used = []
    for reset in (False, True):
        embedding = quantized(num_codes=16)
        optimizer = torch.optim.Adam(embedding.parameters(), lr=0.05)
        for step in range(40):
            batch = queries[torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))]
            if reset and step % 10 == 0:
                u = torch.rand(64, generator=torch.Generator().manual_seed(step))
                embedding.reset_dead_codes(batch, u)
            embedding(batch, 64)
            optimizer.zero_grad()
            take_auxiliary_loss(embedding).mean().backward()
            optimizer.step()
        used.append(len(embedding.rows(queries).unique()))
    assert used[0] == 1
    assert used[1] >= 12


class Denoiser(nn.Module):
    """A small network on vectors, with an embedder for its condition."""

    def __init__(self, dim: int, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder
        self.first, self.last = nn.Linear(dim + 64, 64), nn.Linear(64, dim)
        self.middle = nn.Linear(64, 64)

    def forward(self, x_t: Tensor, t: Tensor, condition) -> Tensor:
        told = timestep_embedding(t, 64) + self.embedder(condition, len(x_t))
        h = functional.silu(self.first(torch.cat((x_t, told), dim=1)))
        return self.last(functional.silu(self.middle(h)))


def test_the_auxiliary_loss_reaches_the_training_loss_also_through_compile_and_micro_batches() -> None:
    schedule = register_schedule(beta_schedule="cosine", timesteps=50)
    torch.manual_seed(1)
    x0, noise, query = torch.randn(8, 2), torch.randn(8, 2), torch.rand(8, 1)
    t = torch.arange(8) * 6
    gradients = []
    for parts, wrap in ((1, lambda n: n), (3, lambda n: n), (2, lambda n: torch.compile(n, backend="aot_eager"))):
        network = Denoiser(2, quantized(code_dim=1, dim=64))
        denoiser = wrap(network)
        for part in torch.arange(8).chunk(parts):
            losses = p_losses(denoiser, schedule, x0[part], t[part], noise[part], query[part])
            assert bool((losses.loss > losses.loss_simple).all())
            (losses.loss.sum() / 8).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        assert network.embedder.codebook.grad.any()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    assert torch.equal(p_losses(network.eval(), schedule, x0, t, noise, query).loss,
                       p_losses(network.eval(), schedule, x0, t, noise, query).loss_simple)  # fmt: skip


def circle(query: Tensor) -> Tensor:
    """(b, 1) in [0, 1) -> the mean of the data there, (b, 2)."""
    return torch.cat((torch.cos(2 * math.pi * query), torch.sin(2 * math.pi * query)), dim=1) * 0.7


@pytest.mark.parametrize("kind", ["nearest", "quantized"])
def test_a_denoiser_learns_the_mean_of_the_data_given_a_continuous_query(kind: str) -> None:
    """x0 ~ N(circle(query), 0.05^2). Without the query the best mean is the centre, 0.7 away."""
    torch.manual_seed(0)
    grid = (torch.arange(32)[:, None] + 0.5) / 32
    embedder = NearestEmbedding(grid, 64) if kind == "nearest" else QuantizedEmbedding(32, 1, 64)
    conditions = Conditions({"angle": embedder})
    network, schedule = Denoiser(2, conditions), register_schedule(beta_schedule="cosine", timesteps=100)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(1000):
        query = torch.rand(256, 1)
        if kind == "quantized" and step % 100 == 0:
            embedder.reset_dead_codes(query, torch.rand(256))
        x0 = circle(query) + 0.05 * torch.randn(256, 2)
        told = drop_conditions({"angle": query}, {"angle": torch.rand(256) < 0.1}, conditions.null)
        loss = p_losses(network, schedule, x0, torch.randint(100, (256,)), torch.randn(256, 2), told,
                        parameterization="v").loss.mean()  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    asked = torch.tensor([[0.05], [0.3], [0.55], [0.8]]).repeat_interleave(200, 0)
    samples = sample_ddim(network, schedule, torch.randn(800, 2), condition={"angle": asked},
                          parameterization="v", num_steps=20)  # fmt: skip
    means = samples.reshape(4, 200, 2).mean(1)
    # Half a cell of the dictionary is 0.07 on the circle.
    assert float((means - circle(asked[::200])).norm(dim=1).max()) < 0.15
    free = sample_ddim(network, schedule, torch.randn(400, 2), parameterization="v", num_steps=20)
    assert float(free.norm(dim=1).mean()) > 0.4  # the ring as a whole
    assert float(free.mean(0).norm()) < 0.2
