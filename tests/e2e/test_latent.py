"""Latent diffusion from images to a score, stage by stage, and what stands between a model and wrong latents."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML

from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.lineage import ROOT
from pipeline.models import load_model
from pipeline.runtime.files import load_json, sha256_file
from tests.projects import make_latent_project, run, stage

pytestmark = pytest.mark.slow
STAGES = ("shard", "reference", "autoencoder", "encode", "train", "sample", "evaluate")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_latent_project(tmp_path_factory.mktemp("latent"))
    for name in STAGES:
        stage(folder, name)
    return folder


def test_images_become_a_scored_model_of_latents(finished: Path) -> None:
    model, note = load_json(finished / "model/model.json"), load_json(finished / "latents/latents.json")
    assert model["first_stage"] == note["first_stage"]
    assert model["first_stage"]["weights_sha256"] == sha256_file(finished / "first_stage/weights.safetensors")
    assert model["network"]["image_size"] == 8
    assert model["network"]["channels"] == 4
    latents, shards, samples = (load_index(finished / name) for name in ("latents", "shards", "samples"))
    assert (latents.image_size, latents.channels, latents.encoding) == (8, 8, "moments")
    assert np.array_equal(latents.samples["label"], shards.samples["label"])
    assert (samples.image_size, samples.channels, samples.encoding) == (16, 1, "raw")
    scores, encode = load_json(finished / "metrics/evaluate.json"), load_json(finished / "metrics/encode.json")
    assert scores["fd_reconstruction"] == encode["fd_reconstruction"] > 0
    assert scores["psnr_reconstruction"] == encode["psnr_reconstruction"] > 10
    assert scores["fd_like_for_like"] > encode["fd_reconstruction"]


def test_the_scale_is_that_of_the_stored_latents(finished: Path) -> None:
    index = load_index(finished / "latents")
    moments = ShardStore(index).read(np.arange(index.num_images))[0].astype(np.float64)
    mean, log_variance = np.split(moments, 2, axis=1)
    scale = load_json(finished / "latents/latents.json")["first_stage"]["scale"]
    assert scale == pytest.approx(1 / np.sqrt(mean.var() + np.exp(log_variance).mean()), rel=1e-12)


def test_the_model_folder_is_complete_by_itself(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "elsewhere")
    model = load_model(tmp_path / "elsewhere")
    images = model.sample(["0", "1"], steps=4, seed=0)
    assert images.shape == (2, 1, 16, 16)
    index = load_index(finished / "samples")
    stored = torch.from_numpy(ShardStore(index).read(np.arange(2))[0])
    assert (images.int() - stored.int()).abs().max() <= 1


def test_an_exported_model_of_latents_is_complete_too(finished: Path) -> None:
    done = run(finished, "python", "-m", "pipeline.export", "torch")
    assert done.returncode == 0, done.stderr
    assert load_model(finished / "export").sample(["2"], steps=2).shape == (1, 1, 16, 16)
    assert "1 x 16 x 16" in (finished / "export/README.md").read_text()


@pytest.mark.parametrize(
    ("name", "victim", "said"),
    [
        ("sample", "model/first_stage.safetensors", "put the right weights back"),
        ("train", "first_stage/weights.safetensors", "put the right weights back"),
    ],
)
def test_an_exchanged_first_stage_is_refused_in_one_line(finished: Path, tmp_path: Path, name, victim, said) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / ".state", ignore_errors=True)
    exchanged = bytearray((folder / victim).read_bytes())
    exchanged[-1] ^= 1
    (folder / victim).write_bytes(exchanged)
    done = run(folder, "python", "-m", f"pipeline.{name}")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_images_of_another_size_are_refused_by_encode(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("image_size: 16", "image_size: 8"))
    for name in ("shard", "reference"):
        stage(folder, name)
    done = run(folder, "python", "-m", "pipeline.encode")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "run `dvc repro autoencoder`" in done.stderr


@pytest.mark.parametrize("name", ["autoencoder", "encode"])
def test_without_its_section_a_stage_says_so(tmp_path: Path, name: str) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline")
    shutil.copytree(ROOT / "ddpm_core", tmp_path / "ddpm_core")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    done = run(tmp_path, "python", "-m", f"pipeline.{name}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"no section `{name}`" in done.stderr


def test_the_recipe_names_every_stage_and_section() -> None:
    recipe = YAML(typ="safe").load((ROOT / "recipes/latent/dvc.yaml").read_text())["stages"]
    assert list(recipe) == ["fetch", *STAGES]
    for name, content in recipe.items():
        assert content["cmd"] == f"python -m pipeline.{name}"
        assert name in content["params"]
