"""A model for other programs: equal numbers in every format, a card that says only what is known, MLflow and back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import export
from pipeline.engine.card import make_card
from pipeline.engine.export import FORMATS, export_denoiser, make_inputs
from pipeline.errors import UserError
from pipeline.models import load_model
from pipeline.runtime.files import load_json, save_json
from pipeline.runtime.registry import fetch_model, prepare_mlflow, register_model
from tests.pipeline.test_models import make_model

LINEAGE = {
    "train_key": "k" * 16, "images_seen": 640, "precision": "float32", "shard_index_sha256": "5" * 64,
    "code_sha256": "c" * 64, "train": {"batch_size": 16, "learning_rate": 1e-3},
}  # fmt: skip
SCORES = {"train_key": "k" * 16, "fd_efficientnet_lite0": 2.0461, "num_samples": 1800, "protocol": "lite0 / 1,800"}


def with_lineage(folder: Path) -> Path:
    save_json(folder / "model.json", {**load_json(folder / "model.json"), "lineage": LINEAGE})
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("classes", [("cat", "dog"), ()])
def test_an_exported_denoiser_gives_equal_numbers_for_any_number_of_images(
    tmp_path: Path, name: str, classes: tuple[str, ...]
) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime", reason="extra `export`")
        pytest.importorskip("onnxscript", reason="extra `export`")
    model = make_model(tmp_path / "m", classes)
    path, difference = export_denoiser(model.network, model.spec, 1000, name, tmp_path)
    assert path.exists()
    assert difference < 1e-5
    if name == "torch":  # read back in a process of its own, without our code
        inputs = make_inputs(model.spec, 1000, 5)
        torch.save(inputs, tmp_path / "inputs.pt")
        program = (
            "import sys, torch; sys.path = [p for p in sys.path if p]\n"
            "f = torch.export.load(sys.argv[1]).module(); print(float(f(*torch.load(sys.argv[2])).sum()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(path), str(tmp_path / "inputs.pt")],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        with torch.no_grad():
            assert float(done.stdout) == pytest.approx(float(model.network(*inputs).sum()), rel=1e-4)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(tmp_path / "m", ())

    def wrong(network: torch.nn.Module, inputs: object, path: Path) -> object:
        path.write_text("x")
        return lambda *inputs: network(*inputs) * 1.01

    monkeypatch.setitem(FORMATS, "torch", ("denoiser.pt2", wrong))
    with pytest.raises(UserError, match="differs by 1"):
        export_denoiser(model.network, model.spec, 1000, "torch", tmp_path)
    assert not (tmp_path / "denoiser.pt2").exists()


def test_a_model_with_a_context_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", ())
    spec = {**model.spec, "network": {**model.spec["network"], "context_channels": 2}}
    with pytest.raises(UserError, match="takes a context"):
        make_inputs(spec, 1000, 2)


def test_the_command_writes_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", ("cat", "dog"))
    with_lineage(tmp_path / "model")
    (tmp_path / "metrics").mkdir()
    save_json(tmp_path / "metrics/evaluate.json", SCORES)
    monkeypatch.setattr(sys, "argv", ["export", "torch"])
    export.main()
    assert sorted(os.listdir("export")) == ["README.md", "denoiser.pt2", "model.json", "weights.safetensors"]
    card = Path("export/README.md").read_text()
    assert "| fd_efficientnet_lite0 | 2.046 |" in card
    assert "Protocol: lite0 / 1,800" in card
    assert load_model("export").sample(["cat"], steps=2).shape == (1, 1, 8, 8)

    save_json(tmp_path / "metrics/evaluate.json", {**SCORES, "train_key": "other"})
    monkeypatch.setattr(sys, "argv", ["export"])
    export.main()
    card = Path("export/README.md").read_text()
    assert "2.046" not in card
    assert "None: no evaluation of these weights" in card


def test_a_card_names_data_and_origin(tmp_path: Path) -> None:
    spec = load_json(with_lineage_of(tmp_path))
    card = make_card(spec, None, {"num_images": 1797, "num_refused": 3}, {"git_commit": "abc"})
    assert card.startswith("---\nlibrary_name: ddpm-pipeline\n")
    for line in ("| images | 1,797 |", "| refused files | 3 |", "| git_commit | abc |", "| images seen | 640 |"):
        assert line in card
    many = {**spec, "classes": [f"c{i}" for i in range(30)]}
    assert "c19 and 10 more" in make_card(many, None, None, {})


def with_lineage_of(folder: Path) -> Path:
    make_model(folder / "m", ("cat", "dog"))
    return with_lineage(folder / "m") / "model.json"


def test_registered_once_ranked_by_score_and_loaded_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_mlflow()
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=store, registry_uri=store)
    experiment = client.create_experiment("x", (tmp_path / "artifacts").as_uri())
    first, second = (client.create_run(experiment).info.run_id for _ in range(2))
    model = make_model(tmp_path / "model", ("cat", "dog"))
    ranked = {"score_name": "fd", "protocol": "p"}

    assert register_model(client, first, "digits", tmp_path / "model", score=1.0, **ranked) == "1"
    assert register_model(client, first, "digits", tmp_path / "model", score=1.0, **ranked) == "1"
    assert client.get_model_version_by_alias("digits", "best").version == 1
    assert register_model(client, second, "digits", tmp_path / "model", score=0.5, **ranked) == "2"
    assert client.get_model_version_by_alias("digits", "best").version == 2
    # A score of another protocol can't take the place; it is the best of its own.
    register_model(client, first, "digits", tmp_path / "model", score=0.4, score_name="fd", protocol="q")
    register_model(client, second, "digits", tmp_path / "model", score=None, **ranked)
    assert client.get_model_version("digits", "2").tags["score"] == ""

    expected = model.sample(["dog", "cat"], steps=2)
    for uri in ("models:/digits@best", "models:/digits/latest", f"runs:/{first}/registered_model"):
        assert torch.equal(load_model(uri).sample(["dog", "cat"], steps=2), expected)
    with pytest.raises(UserError, match="MLflow gives no such model"):
        fetch_model("models:/digits@worst")

    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(store)
    served = mlflow.pyfunc.load_model("models:/digits/2")
    images = served.predict(pd.DataFrame({"label": ["dog", "cat"]}), params={"steps": 2})
    assert images.dtype == np.uint8
    assert np.array_equal(images, expected.numpy())
    assert not list((tmp_path / "artifacts").rglob("*.pkl"))
