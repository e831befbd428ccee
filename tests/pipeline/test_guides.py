"""Guidance from params.yaml to pixels: what guides is loaded, checked, and reaches the samples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_core import AutoGuidance, ClassifierFreeGuidance, ClassifierGuidance, IntervalGuidance
from pipeline.build.networks import build_network, build_schedule, make_classifier_spec, make_model_spec
from pipeline.build.sampling import build_guidance
from pipeline.config import load_params
from pipeline.engine.checkpoint import save_model
from pipeline.errors import UserError
from pipeline.guides import load_guides
from pipeline.lineage import ROOT
from pipeline.models import load_model
from pipeline.sections import Params

PARAMS = load_params(ROOT / "recipes/guided/params.yaml")
OFF = {"guidance": 1.0, "guidance_interval": None, "autoguidance": 1.0, "classifier_scale": 0.0}
CPU = torch.device("cpu")


def index(classes: tuple[str, ...] = ("cat", "dog")) -> SimpleNamespace:
    labels = np.arange(len(classes)) if classes else np.array([-1])
    return SimpleNamespace(folder=Path("shards"), image_size=8, channels=1, num_classes=len(classes), classes=classes,
                           labels=labels)  # fmt: skip


def changed(section: str, **values: object) -> Params:
    return PARAMS.model_copy(update={section: getattr(PARAMS, section).model_copy(update=values)})


def sample_params(**values: object):
    return changed("sample", **{**OFF, **values}).sample


def make_folders(folder: Path, *, guide: bool = True, **classifier: object) -> tuple[Path, Path, dict]:
    """A model folder and a classifier folder; `classifier` changes what the latter was trained on."""
    spec = make_model_spec(changed("model", base_channels=8), index())
    network = build_network(spec)
    torch.manual_seed(0)
    for parameter in network.parameters():  # residual branches start at zero, and classes with them
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    other = {name: weight * 0.5 for name, weight in network.state_dict().items()}
    save_model(folder / "model", network, spec, {}, guide=other if guide else None)
    other_spec = make_classifier_spec(changed("schedule", **classifier.pop("schedule", {})), index(**classifier))
    save_model(folder / "classifier", build_network(other_spec), other_spec, {})
    return folder / "model", folder / "classifier", spec


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    model, classifier, spec = make_folders(tmp_path)

    def names(**values: object) -> set[str]:
        return set(load_guides(sample_params(**values), spec, CPU, model=model, classifier=classifier))

    assert names() == set()
    assert names(autoguidance=2.0) == {"guide"}
    assert names(classifier_scale=-1.0) == {"classifier"}
    assert names(autoguidance=2.0, classifier_scale=1.0) == {"guide", "classifier"}


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, []),
        ({"guidance": 3.0}, [ClassifierFreeGuidance]),
        ({"autoguidance": 2.0}, [AutoGuidance]),
        ({"guidance": 0.0, "autoguidance": 2.0}, [ClassifierFreeGuidance, AutoGuidance]),
        ({"guidance": 0.0, "classifier_scale": 2.0}, [ClassifierGuidance, ClassifierFreeGuidance]),
        ({"guidance": 3.0, "classifier_scale": 2.0}, [ClassifierGuidance, ClassifierFreeGuidance]),
    ],
)
def test_the_network_is_wrapped_in_what_params_ask_for_and_in_nothing_else(values, kinds) -> None:
    spec = make_model_spec(changed("model", base_channels=8), index())
    network, schedule = build_network(spec), build_schedule(spec)
    others = {"guide": lambda *_: None, "classifier": lambda *_: None}
    inner = build_guidance(sample_params(**values), spec, network, schedule, **others)
    limited = build_guidance(sample_params(**values, guidance_interval=[0.2, 5.0]), spec, network, schedule, **others)
    assert isinstance(limited, IntervalGuidance)
    assert limited.interval == (0.2, 5.0)
    assert type(limited.guided) is type(inner)
    plain = limited.plain
    if values.get("guidance") == 0.0:  # purely unconditional, inside the interval and outside
        assert (plain.scale, plain.null) == (0.0, 2)
        plain = plain.denoiser
    assert plain is network
    for kind in kinds:
        assert type(inner) is kind
        inner = inner.denoiser
    assert inner is network


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classifier_scale": 2.0}, "sample.classifier_scale is 2.0, but the model has no classes: use 0"),
        ({"guidance": 2.0}, "sample.guidance is 2.0, but the model has no classes: use 1"),
        ({"autoguidance": 2.0}, "train.guide_images"),
    ],
)
def test_an_unconditional_model_without_a_guide_says_what_it_lacks(values, message: str) -> None:
    spec = make_model_spec(changed("model", base_channels=8), index(()))
    with pytest.raises(UserError, match=message):
        build_guidance(sample_params(**values), spec, build_network(spec), build_schedule(spec))


def test_what_guides_must_be_there_and_belong_to_the_model(tmp_path: Path) -> None:
    model, _, spec = make_folders(tmp_path / "a", guide=False)

    def load(classifier: Path, **values: object) -> None:
        load_guides(sample_params(**values), spec, CPU, model=model, classifier=classifier)

    with pytest.raises(UserError, match=r"holds no guide\.safetensors: set train\.guide_images"):
        load(tmp_path, autoguidance=2.0)
    with pytest.raises(UserError, match=r"holds no classifier: train one with `python -m pipeline\.classifier`"):
        load(tmp_path, classifier_scale=1.0)
    for name, other in (("b", {"classes": ("cat", "cow")}), ("c", {"schedule": {"cosine_s": 0.01}})):
        _, classifier, _ = make_folders(tmp_path / name, **other)
        with pytest.raises(UserError, match="other classes, images or noise than the model"):
            load(classifier, classifier_scale=1.0)
    _, classifier, _ = make_folders(tmp_path / "d", schedule={"v_posterior": 1.0})  # another sampling, the same noise
    load(classifier, classifier_scale=1.0)
    with pytest.raises(UserError, match="needs a classifier"):
        build_guidance(sample_params(classifier_scale=1.0), spec, build_network(spec), build_schedule(spec))


def test_a_classifier_needs_its_section_and_two_classes() -> None:
    with pytest.raises(UserError, match="no section classifier"):
        make_classifier_spec(load_params(ROOT / "params.yaml"), index())
    with pytest.raises(UserError, match="has 1 classes"):
        make_classifier_spec(PARAMS, index(("cat",)))
    with pytest.raises(UserError, match=r"classifier\.channel_multipliers has 5 entries"):
        make_classifier_spec(changed("classifier", channel_multipliers=[1] * 5), index())


def test_each_guidance_changes_the_samples_from_python(tmp_path: Path) -> None:
    folder, classifier, _ = make_folders(tmp_path)
    model = load_model(folder, classifier=classifier)
    choices = [{}, {"guidance": 3.0}, {"autoguidance": 3.0}, {"classifier_scale": 50.0}]
    drawn = [model.sample([0, 1], steps=4, **choice) for choice in choices]
    assert len({images.numpy().tobytes() for images in drawn}) == len(choices)
    for images, choice in zip(drawn, choices, strict=True):
        nowhere = model.sample([0, 1], steps=4, guidance_interval=(1e6, 1e7), **choice)
        everywhere = model.sample([0, 1], steps=4, guidance_interval=(0.0, 1e9), **choice)
        assert torch.equal(nowhere, drawn[0])
        assert torch.equal(everywhere, images)
    with pytest.raises(UserError, match="needs a classifier"):
        load_model(folder).sample([0], steps=2, classifier_scale=1.0)
