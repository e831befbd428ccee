"""Class labels and their dropping."""

import pytest
import torch

from ddpm_core import ClassEmbedding, drop_labels, timestep_embedding


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
