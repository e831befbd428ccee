"""The classifier of noisy images."""

import pytest
import torch

from ddpm_core import NoisyClassifier
from ddpm_core.nn.classifier import POOLINGS


def make(**changes) -> NoisyClassifier:
    torch.manual_seed(0)
    settings = {"image_size": 8, "channels": 1, "num_classes": 3, "base_channels": 16, "channel_multipliers": (1, 2)}
    return NoisyClassifier(**{**settings, **changes}).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_depend_on_the_image_and_the_step_and_have_a_gradient(pooling: str) -> None:
    classifier = make(pooling=pooling)
    torch.nn.init.normal_(classifier.down[0].conv_out.weight, std=0.1)  # residual branches start at zero
    x = torch.randn(4, 1, 8, 8).requires_grad_()
    logits = classifier(x, torch.tensor([0, 9, 99, 999]))
    assert logits.shape == (4, 3)
    torch.testing.assert_close(logits[1:2], classifier(x[1:2], torch.tensor([9])))
    assert not torch.allclose(logits[1:2], classifier(x[1:2], torch.tensor([500])))
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_attention_pooling_knows_where_a_pixel_is_and_the_mean_does_not() -> None:
    t, h = torch.tensor([10]), torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    for pooling, equal in (("mean", True), ("attention", False)):
        classifier = make(pooling=pooling, attention_resolutions=())
        pool = classifier.pool if classifier.pool is not None else lambda h: h.mean((2, 3))
        assert torch.allclose(pool(h), pool(h.flip(-1)), atol=1e-6) == equal
        assert classifier(torch.zeros(1, 1, 8, 8), t).shape == (1, 3)


def test_it_learns() -> None:
    """Bright against dark images, at a step that leaves some signal."""
    classifier, generator = make(num_classes=2, base_channels=8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    for _ in range(30):
        labels = torch.randint(0, 2, (32,), generator=generator)
        x = (labels * 2.0 - 1)[:, None, None, None] * 0.5 + torch.randn(32, 1, 8, 8, generator=generator)
        logits = classifier(x, torch.full((32,), 100))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2
    assert float((logits.argmax(1) == labels).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "can't be halved 1 times"),
        ({"num_classes": 1}, "at least 2"),
        ({"pooling": "max"}, "known: attention, mean"),
    ],
)
def test_what_can_not_be_built_is_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)
