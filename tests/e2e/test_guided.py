"""recipes/guided: `dvc repro` in its folder, the classifier stage on one and two ranks and after a kill, the guide."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.runtime.files import load_json, sha256_file
from tests.projects import environment, make_project, run, stage

pytestmark = pytest.mark.slow

CHANGES = {
    "train__guide_images": 32,
    "sample__sampler": "ddim",
    "sample__classifier_scale": 3.0,
    "classifier__total_images": 320,
    "classifier__batch_size": 16,
    "classifier__warmup_images": 32,
    "classifier__log_every_images": 32,
    "classifier__checkpoint_every_images": 64,
    "classifier__ema_half_life_images": 50,
    "classifier__base_channels": 8,
    "classifier__channel_multipliers": [1],
    "classifier__dropout": 0.0,  # torch's dropout is not the same for another number of ranks
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe made by `dvc repro` in its folder below a repository."""
    root = tmp_path_factory.mktemp("repository")
    folder = make_project(root / "recipes/guided", recipe="recipes/guided", **CHANGES)
    for name in ("pipeline", "ddpm_core"):
        shutil.move(folder / name, root / name)
    for command in (("git", "init", "-q"), ("dvc", "init", "-q")):
        assert run(root, *command).returncode == 0
    done = run(folder, "dvc", "repro", timeout=900, PYTHONPATH=str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    again = run(folder, "dvc", "status", PYTHONPATH=str(root))
    assert "up to date" in again.stdout
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same project before training."""
    folder = make_project(tmp_path / "other", recipe="recipes/guided", **CHANGES)
    stage(folder, "shard")
    return folder


def vector(path: Path) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in load_file(path).values()])


def pixels(folder: Path) -> np.ndarray:
    index = load_index(folder / "samples")
    return ShardStore(index).read(np.arange(index.num_images))[0]


def start(folder: Path, module: str, state: str) -> subprocess.Popen[str]:
    """A training that has written its first checkpoint."""
    process = subprocess.Popen(
        ["python", "-m", module], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(f".state/{state}/*/images-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_recipe_runs_in_its_folder_and_says_how_good_its_classifier_is(guided: Path) -> None:
    accuracy = load_json(guided / "metrics/classifier.json")
    assert (accuracy["num_images"], accuracy["held_out"]) == (12, True)
    quarters = [accuracy[f"accuracy_q{quarter}"] for quarter in range(4)]
    assert accuracy["accuracy"] == pytest.approx(sum(quarters) / 4)
    assert all(0 <= share <= 1 and share * 12 == pytest.approx(round(share * 12)) for share in quarters)
    assert load_json(guided / "metrics/evaluate.json")["num_samples"] == 60
    assert not (guided.parents[1] / "model").exists()


@pytest.mark.distributed
def test_two_ranks_train_the_classifier_that_one_trains(guided: Path, sharded: Path) -> None:
    stage(sharded, "classifier", processes=2, PIPELINE_MICRO_BATCH="3")
    one, two = (vector(folder / "classifier/weights.safetensors") for folder in (guided, sharded))
    assert float((two - one).norm() / one.norm()) < 1e-3
    scores = [load_json(folder / "metrics/classifier.json") for folder in (guided, sharded)]
    assert scores[1]["num_images"] == scores[0]["num_images"]
    assert scores[1]["accuracy"] == pytest.approx(scores[0]["accuracy"], abs=1 / 12)
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_classifier_goes_on_to_the_same_bits(guided: Path, sharded: Path, number: signal.Signals) -> None:
    process = start(sharded, "pipeline.classifier", "classifier")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 75, said
    assert not (sharded / "classifier").exists()
    assert "going on at" in stage(sharded, "classifier")
    for name in ("classifier/weights.safetensors", "metrics/classifier.json"):
        assert sha256_file(sharded / name) == sha256_file(guided / name), name


def test_the_guide_survives_a_kill_and_is_the_earlier_model(guided: Path, sharded: Path) -> None:
    process = start(sharded, "pipeline.train", "train")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert "going on at" in stage(sharded, "train")
    for name in ("weights", "guide"):
        assert sha256_file(sharded / f"model/{name}.safetensors") == sha256_file(guided / f"model/{name}.safetensors")
    assert not torch.equal(vector(guided / "model/guide.safetensors"), vector(guided / "model/weights.safetensors"))
    # The average after 32 images is what a training that ends there publishes.
    params = sharded / "params.yaml"
    text = params.read_text().replace("total_images: 320", "total_images: 32", 1)
    params.write_text(text.replace("learning_rate_schedule: cosine", "learning_rate_schedule: constant"))
    stage(sharded, "train")
    short = vector(sharded / "model/weights.safetensors")
    assert torch.equal(short, vector(sharded / "model/guide.safetensors"))


def test_each_guidance_of_params_reaches_the_samples(guided: Path) -> None:
    params = guided / "params.yaml"
    text, drawn = params.read_text(), {}
    choices = {
        "classifier": (3.0, 1.0),
        "auto": (0.0, 3.0),
        "none": (0.0, 1.0),
    }
    for name, (scale, auto) in choices.items():
        changed = text.replace("classifier_scale: 3.0", f"classifier_scale: {scale}")
        params.write_text(changed.replace("autoguidance: 1.0", f"autoguidance: {auto}"))
        stage(guided, "sample", PYTHONPATH=str(guided.parents[1]))
        drawn[name] = pixels(guided)
    params.write_text(text)
    assert len({images.tobytes() for images in drawn.values()}) == 3


def test_sampling_with_a_classifier_that_is_not_there_is_one_line(guided: Path, sharded: Path) -> None:
    shutil.copytree(guided / "model", sharded / "model")
    done = run(sharded, "python", "-m", "pipeline.sample")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: classifier holds no classifier: train one with")
