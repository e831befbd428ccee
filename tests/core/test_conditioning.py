"""Class labels, their dropping, and guidance."""

import pytest
import torch

from ddpm_core import ClassEmbedding, ClassifierFreeGuidance, drop_labels, timestep_embedding


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


class Recorder:
    """A denoiser whose output is its label, and which counts images."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x_t, t, labels):
        self.images += len(x_t)
        return labels[:, None].expand_as(x_t).float()


@pytest.mark.parametrize(("scale", "expected", "images"), [(0.0, 10.0, 2), (1.0, 4.0, 2), (3.0, 10 + 3 * (4 - 10), 4)])
def test_guidance_follows_its_convention_on_every_channel_at_no_extra_cost(scale, expected, images) -> None:
    denoiser = Recorder()
    guided = ClassifierFreeGuidance(denoiser, scale, null_label=10)
    out = guided(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.tensor([4, 4]))
    assert out.tolist() == [[expected] * 3] * 2
    assert denoiser.images == images
