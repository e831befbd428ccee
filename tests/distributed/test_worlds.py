"""Two ranks are one rank; interrupted is uninterrupted; a sample is its seed's."""

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
from pipeline.runtime.files import sha256_file
from tests.projects import environment, make_project, stage

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project trained and sampled by one process."""
    folder = make_project(tmp_path_factory.mktemp("one"))
    for name in ("shard", "train", "sample"):
        stage(folder, name)
    return folder


@pytest.fixture
def untrained(tmp_path: Path, trained: Path) -> Path:
    """The same project before training."""
    folder = make_project(tmp_path / "other")
    stage(folder, "shard")
    assert load_index(folder / "shards").sha256 == load_index(trained / "shards").sha256
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


def pixels(folder: Path) -> np.ndarray:
    index = load_index(folder / "samples")
    return ShardStore(index).read(np.arange(index.num_images))[0].astype(int)


def test_two_ranks_train_the_same_model_and_draw_the_same_samples_as_one(trained: Path, untrained: Path) -> None:
    stage(untrained, "train", processes=2, PIPELINE_MICRO_BATCH="3")  # uneven micro-batches, gradients accumulated
    # Adam turns the rounding of a vanishing gradient into a step, so single weights may differ; as a whole they don't.
    one, two = (torch.cat([w.flatten() for w in weights(folder).values()]) for folder in (trained, untrained))
    assert float((two - one).norm() / one.norm()) < 1e-4
    curves = [np.loadtxt(folder / "plots/loss.csv", delimiter=",", skiprows=1) for folder in (trained, untrained)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4)
    # Samples of one and the same model: bit-equal at the same micro-batch, a grey level at another.
    for name in ("weights.safetensors", "model.json"):
        (untrained / "model" / name).write_bytes((trained / "model" / name).read_bytes())
    stage(untrained, "sample", processes=2)
    assert np.array_equal(pixels(untrained), pixels(trained))
    stage(untrained, "sample", PIPELINE_SAMPLE_BATCH="7")
    assert np.abs(pixels(untrained) - pixels(trained)).max() <= 1


def start_training(folder: Path, *launcher: str, **extra: str) -> subprocess.Popen[str]:
    """A training that has written its first checkpoint."""
    command = ["python", *launcher, "-m", "pipeline.train"]
    process = subprocess.Popen(command, cwd=folder, env=environment(**extra), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob(".state/train/*/images-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_two_ranks_stop_together_and_one_goes_on(trained: Path, untrained: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start_training(untrained, *launcher, PIPELINE_WORKERS="2")  # the signal reaches the workers too
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert said.count("stopped: at") == 1, said
    assert "DataLoader worker" not in said
    assert "going on at" in stage(untrained, "train")
    one, two = (torch.cat([w.flatten() for w in weights(folder).values()]) for folder in (trained, untrained))
    assert float((two - one).norm() / one.norm()) < 1e-4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_training_goes_on_to_the_same_bits(trained: Path, untrained: Path, number: signal.Signals) -> None:
    process = start_training(untrained)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert not (untrained / "model").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 75, said
        assert "stopped: at" in said
    assert "going on at" in stage(untrained, "train")
    assert sha256_file(untrained / "model/weights.safetensors") == sha256_file(trained / "model/weights.safetensors")
    for name in ("model/model.json", "plots/loss.csv", "metrics/train.json"):
        assert (untrained / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_changed_parameter_starts_anew_and_the_old_result_comes_back_at_once(trained: Path, untrained: Path) -> None:
    params = (untrained / "params.yaml").read_text()
    stage(untrained, "train")
    (untrained / "params.yaml").write_text(params.replace("  seed: 0", "  seed: 1", 1))
    assert "going on at" not in stage(untrained, "train")
    assert sha256_file(untrained / "model/weights.safetensors") != sha256_file(trained / "model/weights.safetensors")
    (untrained / "params.yaml").write_text(params)
    assert "going on at 320 images" in stage(untrained, "train")
    assert sha256_file(untrained / "model/weights.safetensors") == sha256_file(trained / "model/weights.safetensors")
