"""The other network, a learned variance and the settings that save memory, from images to samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.models import load_model
from pipeline.runtime.files import load_json, sha256_file
from tests.projects import make_project, stage

pytestmark = pytest.mark.slow
LEARNED = {"model__learned_variance": True, "model__qk_norm": True, "sample__sampler": "ddpm"}
DIT = {"model__network": "dit", "model__depth": 2, "model__patch_size": 4, **LEARNED}


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([w.flatten() for w in load_file(folder / "model/weights.safetensors").values()])


def test_a_transformer_with_a_learned_variance_trains_and_samples(tmp_path: Path) -> None:
    folder = make_project(tmp_path, **DIT)
    stage(folder, "shard")
    said = stage(folder, "train")
    spec, metrics = load_json(folder / "model/model.json"), load_json(folder / "metrics/train.json")
    assert f"train: dit, {metrics['parameters']:,} parameters, 0.000" in said
    assert spec["network"] | {"name": "dit", "width": 32, "num_heads": 1, "learned_variance": True} == spec["network"]
    curve = np.genfromtxt(folder / "plots/loss.csv", delimiter=",", names=True)
    assert curve["loss"][-1] < curve["loss"][0]
    np.testing.assert_allclose(curve["loss"], curve["loss_simple"] + curve["loss_vlb"], rtol=1e-5)  # T is 1000
    stage(folder, "sample")
    images = ShardStore(load_index(folder / "samples")).read(np.arange(60))[0]
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60
    drawn = load_model(folder / "model").sample([0, 1], steps=4, sampler="ddpm", guidance=2.0)
    assert drawn.shape == (2, 1, 8, 8)


def test_checkpointed_activations_train_the_same_bits(tmp_path: Path) -> None:
    folder, hashes = make_project(tmp_path, model__dropout=0.2, **LEARNED), []
    stage(folder, "shard")
    for value in ("0", "1"):
        stage(folder, "train", PIPELINE_ACTIVATION_CHECKPOINTING=value, PIPELINE_STATE=f"state{value}")
        hashes.append(sha256_file(folder / "model/weights.safetensors"))
    assert hashes[0] == hashes[1]


@pytest.mark.distributed
def test_two_ranks_with_both_settings_train_the_same_model_as_one_without(tmp_path: Path) -> None:
    folder = make_project(tmp_path, **LEARNED)
    stage(folder, "shard")
    stage(folder, "train")
    one = weights(folder)
    stage(folder, "train", processes=2, PIPELINE_ACTIVATION_CHECKPOINTING="1", PIPELINE_CHANNELS_LAST="1",
          PIPELINE_MICRO_BATCH="3", PIPELINE_STATE="other")  # fmt: skip
    assert float((weights(folder) - one).norm() / one.norm()) < 1e-4
