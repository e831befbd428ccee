"""Latents: two ranks are one rank, and a stopped autoencoder goes on to the same bits."""

import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.index import load_index
from pipeline.data.store import ShardStore
from pipeline.first_stage import load_trained
from pipeline.runtime.files import load_json, sha256_file
from tests.projects import environment, make_latent_project, stage

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project encoded by one process."""
    folder = make_latent_project(tmp_path_factory.mktemp("one"))
    for name in ("shard", "reference", "autoencoder", "encode"):
        stage(folder, name)
    return folder


@pytest.fixture
def other(tmp_path: Path, encoded: Path) -> Path:
    """The same project before the autoencoder."""
    folder = make_latent_project(tmp_path / "other")
    for name in ("shard", "reference"):
        stage(folder, name)
    return folder


def weights(folder: Path) -> torch.Tensor:
    """All but the biases: one in front of a norm that takes it out again has no gradient but rounding, which Adam makes
    into steps of full size. What they do is compared by :func:`reconstruct`."""
    found = load_file(folder / "first_stage/weights.safetensors")
    return torch.cat([weight.flatten() for name, weight in found.items() if not name.endswith(".bias")])


def reconstruct(folder: Path, images: torch.Tensor) -> torch.Tensor:
    network = load_trained(folder / "first_stage")[0].network.eval()
    with torch.no_grad():
        return network.decode(network.encode(images)[0])


def test_two_ranks_train_the_same_autoencoder_and_store_the_same_latents_as_one(encoded: Path, other: Path) -> None:
    stage(other, "autoencoder", processes=2, PIPELINE_MICRO_BATCH="3")
    one, two = weights(encoded), weights(other)
    assert float((two - one).norm() / one.norm()) < 1e-4
    images = torch.from_numpy(ShardStore(load_index(encoded / "shards")).read(np.arange(60))[0]).float() / 127.5 - 1
    torch.testing.assert_close(reconstruct(other, images), reconstruct(encoded, images), rtol=1e-4, atol=1e-5)
    curves = [np.loadtxt(folder / "plots/autoencoder.csv", delimiter=",", skiprows=1) for folder in (encoded, other)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-3)
    # Latents of one and the same first stage: bit-equal, whatever the machine's batch.
    for name in ("weights.safetensors", "model.json"):
        (other / "first_stage" / name).write_bytes((encoded / "first_stage" / name).read_bytes())
    stage(other, "encode", processes=2, PIPELINE_SAMPLE_BATCH="7")
    names = sorted(path.name for path in (encoded / "latents").iterdir())
    assert len(names) == 6  # three tars, index.json, samples.npy, latents.json
    for name in names:
        assert (other / "latents" / name).read_bytes() == (encoded / "latents" / name).read_bytes(), name
    ours, theirs = (load_json(folder / "metrics/encode.json") for folder in (other, encoded))
    assert ours["fd_reconstruction"] == pytest.approx(theirs["fd_reconstruction"], rel=1e-6)
    assert ours["psnr_reconstruction"] == pytest.approx(theirs["psnr_reconstruction"], rel=1e-9)


def test_two_ranks_with_an_adversary_stay_in_step(tmp_path: Path) -> None:
    folder = make_latent_project(
        tmp_path, autoencoder__adversarial_weight=0.5, autoencoder__adversarial_start_images=160
    )
    stage(folder, "shard")
    stage(folder, "autoencoder", processes=2, PIPELINE_MICRO_BATCH="3")
    curve = np.genfromtxt(folder / "plots/autoencoder.csv", delimiter=",", names=True)
    assert (curve["discriminator"][curve["images"] <= 160] == 0).all()
    assert (curve["discriminator"][curve["images"] > 160] > 0).all()


def test_a_stopped_autoencoder_goes_on_to_the_same_bits(encoded: Path, other: Path) -> None:
    process = subprocess.Popen(
        ["python", "-m", "pipeline.autoencoder"], cwd=other, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(other.glob(".state/autoencoder/*/images-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert not (other / "first_stage").exists()
    assert "autoencoder: going on at" in stage(other, "autoencoder")
    for name in ("first_stage/weights.safetensors", "first_stage/model.json", "plots/autoencoder.csv"):
        assert sha256_file(other / name) == sha256_file(encoded / name), name
