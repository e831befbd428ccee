"""Training in every order: two ranks with workers are one rank; sets that can't be mixed are refused in one line."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.projects import make_project, run, stage

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

MIX = [{"shards": "shards", "weight": 2.0}, {"shards": "other", "weight": 1.0}]
ORDERS = {
    "windowed": {"order__kind": "windowed", "order__lanes": 4, "order__window_images": 20},
    "windowed mix": {"order__kind": "windowed", "order__lanes": 4, "order__window_images": 20, "order__mix": MIX},
    "balanced mix": {"order__class_balanced": True, "order__mix": MIX},
}


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for w in load_file(folder / "model" / "weights.safetensors").values()])


@pytest.mark.parametrize("name", ORDERS)
def test_two_ranks_train_as_one(tmp_path: Path, name: str) -> None:
    one = make_project(tmp_path / "one", **ORDERS[name])
    stage(one, "shard")
    shutil.copytree(one / "shards", one / "other")
    two = tmp_path / "two"
    shutil.copytree(one, two)
    stage(one, "train")
    stage(two, "train", processes=2, PIPELINE_WORKERS="1")
    difference = float((weights(two) - weights(one)).norm() / weights(one).norm())
    assert difference < 1e-4


def test_sets_of_other_classes_are_refused(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "p", order__mix=MIX)
    stage(folder, "shard")
    (folder / "shards").rename(folder / "other")
    shutil.rmtree(folder / "images" / "0")
    stage(folder, "shard")
    done = run(folder, "python", "-m", "pipeline.train")
    assert done.returncode == 2
    assert "shards and other can't be mixed: they differ in classes (2 and 3 classes" in done.stderr
    assert "Traceback" not in done.stderr
