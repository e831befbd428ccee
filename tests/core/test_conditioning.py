"""Class labels, several conditions, and clean context."""

import pytest
import torch
from torch import nn

from ddpm_core import (
    ClassEmbedding,
    Condition,
    Conditions,
    ContextConcat,
    UNet,
    composite,
    drop_conditions,
    drop_labels,
    p_losses,
    register_schedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    timestep_embedding,
)


def test_steps_get_different_embeddings_and_odd_sizes_are_refused() -> None:
    embedding = timestep_embedding(torch.arange(1000), 64)
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert float(distances.min()) > 0.05
    assert torch.equal(embedding[0], torch.tensor([1.0] * 32 + [0.0] * 32))
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(torch.arange(3), 7)


def test_no_labels_are_the_null_row() -> None:
    table = ClassEmbedding(3, 8)
    null = table(torch.tensor([table.null_label] * 2), 2)
    assert torch.equal(table(None, 2), null)
    assert not torch.equal(table(torch.tensor([0, 1]), 2), null)
    with pytest.raises(IndexError):
        table(torch.tensor([4]), 1)


def test_dropping_leaves_the_callers_labels_alone() -> None:
    labels = torch.tensor([0, 1, 2])
    assert drop_labels(labels, torch.tensor([True, False, True]), 3).tolist() == [3, 1, 3]
    assert labels.tolist() == [0, 1, 2]


def two_conditions() -> Conditions:
    torch.manual_seed(0)
    return Conditions({"class": ClassEmbedding(3, 8), "size": ClassEmbedding(2, 8)})


def test_conditions_add_up_and_a_missing_one_is_its_null_row() -> None:
    conditions = two_conditions()
    of_class, of_size = conditions.embedders["class"], conditions.embedders["size"]
    labels, sizes = torch.tensor([0, 2]), torch.tensor([1, 1])
    both = conditions({"size": sizes, "class": labels}, 2)
    torch.testing.assert_close(both, of_class(labels, 2) + of_size(sizes, 2))
    torch.testing.assert_close(conditions({"class": labels}, 2), of_class(labels, 2) + of_size(None, 2))
    torch.testing.assert_close(conditions(None, 2), of_class(None, 2) + of_size(None, 2))
    nothing = {name: torch.tensor([null, null]) for name, null in conditions.null.items()}
    assert torch.equal(conditions(nothing, 2), conditions(None, 2))


def test_conditions_that_can_not_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['colour'\] are unknown; known: class, size"):
        two_conditions()({"class": torch.tensor([0]), "colour": torch.tensor([0])}, 1)
    with pytest.raises(TypeError, match="without a name"):
        two_conditions()(torch.tensor([0]), 1)
    with pytest.raises(ValueError, match="no embedders"):
        Conditions({})


def test_each_condition_is_dropped_by_its_own_mask() -> None:
    query = {"class": torch.tensor([0, 1]), "angle": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    null = {"class": 3, "angle": torch.tensor(torch.nan)}
    dropped = drop_conditions(query, {"angle": torch.tensor([True, False])}, null)
    assert dropped["class"].tolist() == [0, 1]
    assert dropped["angle"].isnan().tolist() == [[True, True], [False, False]]
    assert not query["angle"].isnan().any()
    for drop in ({"other": torch.tensor([True])}, {"class": torch.tensor([True])}):
        with pytest.raises(ValueError, match="can't drop"):
            drop_conditions(query, drop, {"angle": null["angle"]})


class Watched(nn.Module):
    """A network with two context channels that keeps what it was given; it predicts x0 = context / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.told: list[Condition] = []

    def forward(self, x_t, t, condition):
        self.seen.append(x_t)
        self.told.append(condition)
        return x_t[:, 1:2] / 2


def samplers(denoiser, schedule, x_noisy, condition):
    shared = {"condition": condition, "parameterization": "x0", "num_steps": 5}
    generator = torch.Generator().manual_seed(0)

    def noise(k):
        return torch.randn(x_noisy.shape, generator=generator)

    yield sample_ddim(denoiser, schedule, x_noisy, noise, eta=1.0, **shared)
    yield sample_ddpm(denoiser, schedule, x_noisy, noise, **shared)
    yield sample_dpm_solver(denoiser, schedule, x_noisy, **shared)
    yield sample_heun(denoiser, schedule, x_noisy, **shared)


def test_context_channels_are_never_noised_and_never_returned() -> None:
    network, schedule = Watched(), register_schedule(beta_schedule="cosine", timesteps=20)
    torch.manual_seed(0)
    context, labels = torch.rand(2, 2, 4, 4), torch.tensor([1, 0])
    condition = {"context": context, "class": labels}
    denoiser = ContextConcat(network)
    losses = p_losses(denoiser, schedule, torch.rand(2, 1, 4, 4), torch.tensor([3, 19]), torch.randn(2, 1, 4, 4),
                      condition, parameterization="x0")  # fmt: skip
    assert losses.loss.shape == (2,)
    for out in samplers(denoiser, schedule, torch.randn(2, 1, 4, 4), condition):
        torch.testing.assert_close(out, context[:, :1] / 2)
    assert len(network.seen) > 20
    assert all(torch.equal(x[:, 1:], context) for x in network.seen)  # at every step, clean
    assert all(x.shape == (2, 3, 4, 4) for x in network.seen)
    assert all(list(told) == ["class"] for told in network.told)
    assert list(condition) == ["context", "class"]  # the caller's is left alone
    denoiser(torch.zeros(2, 1, 4, 4), labels, {"context": context})
    assert network.told[-1] is None


def test_a_context_that_is_missing_or_of_other_images_is_refused() -> None:
    denoiser, x_t, t = ContextConcat(Watched()), torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    for condition in (None, torch.zeros(2), {"class": torch.zeros(2)}):
        with pytest.raises(ValueError, match="condition named 'context'"):
            denoiser(x_t, t, condition)
    for shape in ((1, 2, 4, 4), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="only axis 1 may differ"):
            denoiser(x_t, t, {"context": torch.zeros(shape)})


def test_a_u_net_learns_from_context_and_class_at_once() -> None:
    torch.manual_seed(0)
    conditions = Conditions({"class": ClassEmbedding(3, 32)})
    unet = UNet(image_size=8, channels=1, context_channels=2, base_channels=8, embedder=conditions)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    network = ContextConcat(unet)
    x_t, t, context = torch.randn(2, 1, 8, 8), torch.tensor([5, 9]), torch.rand(2, 2, 8, 8)
    base = network(x_t, t, {"context": context, "class": torch.tensor([0, 1])})
    assert base.shape == x_t.shape
    assert not torch.equal(base, network(x_t, t, {"context": context, "class": torch.tensor([2, 1])}))
    assert not torch.equal(base, network(x_t, t, {"context": context + 1, "class": torch.tensor([0, 1])}))
    base.sum().backward()
    assert conditions.embedders["class"].table.weight.grad.any()
    assert unet.conv_in.weight.grad[:, 1:].any()


def test_known_pixels_come_back_exactly() -> None:
    torch.manual_seed(0)
    samples, known = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mask = (torch.rand(2, 1, 4, 4) < 0.5).float()
    out = composite(samples, known, mask)
    hole = mask.bool().expand_as(out)
    assert torch.equal(out[hole], samples[hole])
    assert torch.equal(out[~hole], known[~hole])
