"""A trained model from Python."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.build.networks import build_network, make_model_spec
from pipeline.config import load_params
from pipeline.engine.checkpoint import save_model
from pipeline.errors import UserError
from pipeline.models import TrainedModel, load_model

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def make_model(folder: Path, classes: tuple[str, ...], *, channels: int = 1, context: str = "none") -> TrainedModel:
    labels = np.arange(len(classes)) if classes else np.array([-1])
    index = SimpleNamespace(image_size=8, channels=channels, num_classes=len(classes), classes=classes, labels=labels)
    small = PARAMS.model_copy(
        update={"model": PARAMS.model.model_copy(update={"base_channels": 8, "context": context})}
    )
    spec = make_model_spec(small, index)
    network = build_network(spec)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save_model(folder, network, spec, {})
    return load_model(folder)


def test_names_and_numbers_mean_the_same_class_and_an_image_is_its_seeds(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", ("cat", "dog"))
    images = model.sample(["dog", 1, "cat"], steps=3)
    assert (images.shape, images.dtype) == ((3, 1, 8, 8), torch.uint8)
    again = model.sample([1, 1], steps=3)
    assert (images[:2].int() - again.int()).abs().max() <= 1
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(model.sample(["dog"], steps=3, seed=1), images[:1])


def test_without_labels(tmp_path: Path) -> None:
    assert make_model(tmp_path / "m", ("a", "b")).sample(num_images=4, steps=2).shape == (4, 1, 8, 8)
    unconditional = make_model(tmp_path / "n", ())
    assert unconditional.sample(num_images=2, steps=2, sampler="heun").shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="the model is unconditional"):
        unconditional.sample([0])


@pytest.mark.parametrize("label", ["bird", 2, -1])
def test_an_unknown_label_is_named_with_the_known_ones(tmp_path: Path, label: object) -> None:
    with pytest.raises(UserError, match=r"classes of this model: cat, dog"):
        make_model(tmp_path / "m", ("cat", "dog")).sample([label])


def photos(count: int, channels: int = 3, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def test_holes_are_painted_and_what_is_known_comes_back_as_it_was(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", ("cat", "dog"), channels=3, context="inpaint")
    given, mask = photos(3), np.zeros((3, 1, 8, 8), dtype=bool)
    mask[:, :, 2:5, 1:7] = True
    images = model.sample(["dog", "cat", 0], context=given, mask=mask, steps=3).numpy()
    hole = np.broadcast_to(mask, images.shape)
    assert np.array_equal(images[~hole], given[~hole])
    assert not np.array_equal(images[hole], given[hole])
    alone = model.sample(["dog"], context=torch.from_numpy(given[:1]), mask=torch.from_numpy(mask[:1]), steps=3)
    assert np.abs(alone[0].numpy().astype(int) - images[0]).max() <= 1
    assert not np.array_equal(model.sample(["cat", 1, 1], context=given, mask=mask, steps=3).numpy()[0], images[0])
    given[hole] = 0  # what lies in a hole tells nothing
    assert np.array_equal(model.sample(["dog", "cat", 0], context=given, mask=mask, steps=3).numpy(), images)


@pytest.mark.parametrize(("context", "channels", "size"), [("super_resolution", 3, 2), ("colour", 1, 8)])
def test_small_and_grey_images_are_taken_as_they_are(tmp_path: Path, context: str, channels: int, size: int) -> None:
    model = make_model(tmp_path / "m", (), channels=3, context=context)
    given = photos(2, channels, size)
    images = model.sample(context=given, steps=2)
    assert images.shape == (2, 3, 8, 8)
    assert not torch.equal(images, model.sample(context=255 - given, steps=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "context is none, but this model needs uint8"),
        ({"context": np.zeros((1, 3, 8, 8))}, r"context is float64 \(1, 3, 8, 8\)"),
        ({"context": photos(1)[0]}, r"context is uint8 \(3, 8, 8\)"),
        ({"context": photos(1)}, "mask is none"),
        ({"labels": [0], "context": photos(2), "mask": np.ones((2, 1, 8, 8), bool)}, "1 labels for 2 images"),
    ],
)
def test_a_model_with_a_context_says_what_it_needs(tmp_path: Path, arguments: dict, message: str) -> None:
    model = make_model(tmp_path / "m", ("cat", "dog"), channels=3, context="inpaint")
    with pytest.raises(UserError, match=message):
        model.sample(**arguments)


def test_a_model_without_a_context_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trained without a context"):
        make_model(tmp_path / "m", ()).sample(context=photos(1, 1))
