"""Weights found by name: models, checkpoints, patterns, MLflow; and what is said where there are none."""

from pathlib import Path

import pytest
import torch

from ddpm_core import EMA
from pipeline.build.networks import build_network
from pipeline.engine import candidates
from pipeline.engine.candidates import as_fetched, find_candidates, load_average, load_guide_weights
from pipeline.engine.checkpoint import CheckpointFolder, load_model_spec, save_model_spec
from pipeline.engine.state import TrainState
from pipeline.errors import UserError
from tests.pipeline.test_models import make_model

KEY = "0123456789abcdef"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, and a training of two checkpoints whose average and network differ."""
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"), ("cat", "dog"))
    spec = load_model_spec(Path("model"))
    root = Path(".state/train") / KEY
    checkpoints = CheckpointFolder(root)
    network = build_network(spec, seed=1)
    training = TrainState(network, EMA(build_network(spec, seed=2), 10), torch.optim.AdamW(network.parameters()))
    for training.images_seen in (64, 128):
        checkpoints.save(training)
    spec.pop("format")
    save_model_spec(root, spec, {**spec.pop("lineage"), "train_key": KEY, "train": {"ema_half_life_images": 4000}})
    return Path(".state")


def names(text: str, state: Path) -> list[tuple[str, int | None]]:
    return [(one.name, one.images_seen) for one in find_candidates(text, state)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model", [("model", None)]),
        (f".state/train/{KEY}/images-000000000064", [("012345@64", 64)]),
        (f".state/train/{KEY}", [("012345@64", 64), ("012345@128", 128)]),
        (".state/train/*/images-*128,model", [("012345@128", 128), ("model", None)]),
        ("new=model,model", [("new", None)]),
        (f"late=.state/train/{KEY}/images-*128", [("late", 128)]),
        ("*", [("model", None)]),
    ],
)
def test_weights_are_found_by_what_people_type(state: Path, text: str, found: list) -> None:
    Path("notes").mkdir()
    assert names(text, state) == found


def test_what_is_not_there_is_an_error_that_says_what_is(state: Path) -> None:
    for text in ("modle", "nothing*", "model,", ".state/train/*/images-*999"):
        with pytest.raises(UserError, match=rf"is not there; there are model, .*{KEY}/images-0+64, .*images-0+128"):
            find_candidates(text, state)
    Path("model").rename("elsewhere")
    with pytest.raises(UserError, match="there is no model and no checkpoint"):
        find_candidates("model", Path("other"))


def test_average_and_network_are_two_sets_of_weights(state: Path) -> None:
    (one,) = find_candidates(f".state/train/{KEY}/images-*128", state)
    average, network = load_average(one, "average"), load_average(one, "network")
    assert average.keys() == network.keys() == build_network(one.spec).state_dict().keys()
    for seed, weights in ((1, network), (2, average)):
        expected = build_network(one.spec, seed=seed).state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert load_guide_weights(one) is None
    assert load_average(one, "4000").keys() == average.keys()  # the half-life of that average
    assert one.sha256("average") != one.sha256("network")
    with pytest.raises(UserError, match=r"EMA is 0\.05, but 012345@128 holds average and network"):
        load_average(one, "0.05")
    (model,) = find_candidates("model", state)
    with pytest.raises(UserError, match="EMA is network, but model holds average alone"):
        load_average(model, "network")


def test_a_training_of_an_earlier_version_is_read_by_the_model_that_came_of_it(state: Path) -> None:
    root = state / "train" / KEY
    described = load_model_spec(root)
    (root / "model.json").unlink()
    with pytest.raises(UserError, match=r"has no model\.json"):
        find_candidates(str(root), state)
    described.pop("format")
    save_model_spec(Path("model"), described, described.pop("lineage"))
    assert names(str(root), state) == [("012345@64", 64), ("012345@128", 128)]


def test_damage_is_noticed_and_code_is_not_run(state: Path) -> None:
    (one,) = find_candidates(f".state/train/{KEY}/images-*128", state)
    torch.save({"network": Path}, one.folder / "resume.pt")  # pickled by reference: code, not data
    with pytest.raises(UserError, match=r"resume.pt can't be read as weights"):
        load_average(one, "network")
    with pytest.raises(UserError, match=r"resume.pt is damaged"):
        one.sha256("network")
    (one.folder / "average.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"average.safetensors can't be read as weights"):
        load_average(one, "average")


def test_a_model_of_mlflow_is_fetched_once_and_called_by_its_address(state: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(candidates, "fetch_model", lambda uri: asked.append(uri) or Path("model"))
    found = find_candidates("models:/ddpm-pipeline@best", state)
    assert [(one.name, one.place, one.folder) for one in found] == [(asked[0], asked[0], Path("model"))]
    (again,) = find_candidates(as_fetched(found), state)  # as another process of a world gets it
    assert (again, len(asked)) == (found[0], 1)
    named = find_candidates(f"best=models:/ddpm-pipeline@best,.state/train/{KEY}/images-*64", state)
    assert find_candidates(as_fetched(named), state) == named
