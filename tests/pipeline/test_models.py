"""A trained model from Python."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.build import build_network, make_model_spec
from pipeline.config import load_params
from pipeline.engine.checkpoint import save_model
from pipeline.errors import UserError
from pipeline.models import TrainedModel, load_model

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def make_model(folder: Path, classes: tuple[str, ...]) -> TrainedModel:
    labels = np.arange(len(classes)) if classes else np.array([-1])
    index = SimpleNamespace(image_size=8, channels=1, num_classes=len(classes), classes=classes, labels=labels)
    small = PARAMS.model_copy(update={"model": PARAMS.model.model_copy(update={"base_channels": 8})})
    spec = make_model_spec(small, index)
    network = build_network(spec)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
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
