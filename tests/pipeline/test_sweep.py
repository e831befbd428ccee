"""The command as people start it: what it counts, keeps, refuses, and leaves in MLflow. A small extractor."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from torch import nn

import pipeline.reference
import pipeline.sweep
from ddpm_core import EMA
from pipeline.build.networks import build_network
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.checkpoint import CheckpointFolder, load_model_spec, save_model_spec
from pipeline.engine.features import Extractor
from pipeline.engine.state import TrainState
from pipeline.errors import Stopped, UserError
from pipeline.lineage import ROOT
from pipeline.runtime.files import load_json
from pipeline.runtime.tracking import open_tracker
from tests.pipeline.test_models import make_model

KEY = "fedcba9876543210"
QUICK = ["N=10", "STEPS=2"]


def make_extractor(name: str, device: Any, *, inception_weights: str | None = None) -> Extractor:
    """The brightness of quarters of an image."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    classifier = (torch.zeros(2, 4).double(), torch.zeros(2).double())
    return Extractor(
        name, 4, "", f"{name} in miniature", torch.device("cpu"), network, lambda images: images[:, :1].float(),
        classifier, 64,
    )  # fmt: skip


def write_digits(folder: Path, size: int) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (40, size, size, 1), dtype=np.uint8)
    samples = [Sample(image, i % 2, {}) for i, image in enumerate(pixels)]
    write_shards(folder, samples, image_size=size, channels=1, encoding="raw", classes=("cat", "dog"), shard_images=50)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, their reference, a model with classes and one without, one of other images, and a training's folder."""
    folder = tmp_path_factory.mktemp("made")
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params["evaluate"] |= {"real_images": 20, "kid_subsets": 2, "bootstrap": 0, "extrapolation": 0}
    YAML().dump(params, folder / "params.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline.reference, "load_extractor", make_extractor)
        write_digits(Path("shards"), 8)
        pipeline.reference.main()
        make_model(Path("model"), ("cat", "dog"))
        make_model(Path("unconditional"), ())
        make_model(Path("colour"), ("cat", "dog"), channels=3)
        spec = load_model_spec(Path("model"))
        network, root = build_network(spec, seed=1), Path(".state/train") / KEY
        state = TrainState(network, EMA(build_network(spec, seed=2), 10), torch.optim.AdamW(network.parameters()))
        for state.images_seen in (64, 128):
            nn.init.normal_(next(network.parameters()), std=state.images_seen / 100)
            state.ema.update(network, 10)
            CheckpointFolder(root).save(state)
        rest = {name: value for name, value in spec.items() if name not in ("format", "lineage")}
        save_model_spec(root, rest, {"train_key": KEY})
    return folder


@pytest.fixture
def sweep(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., str]:
    """Runs `python -m pipeline.sweep WORDS` in a copy of that folder; returns what it printed."""
    shutil.copytree(made, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.setenv("PIPELINE_TRACKING", "0")
    monkeypatch.setattr("pipeline.engine.reference.load_extractor", make_extractor)
    monkeypatch.setattr(pipeline.sweep, "StopRequest", lambda: SimpleNamespace(requested=False))

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pipeline.sweep", *words])
        pipeline.sweep.main()
        return capsys.readouterr().out

    return run


def rows(name: str = "s") -> list[dict[str, str]]:
    with open(Path("sweeps") / name / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_network_calls_are_counted_not_computed(sweep: Callable[..., str]) -> None:
    sweep("SAMPLER=ddim,ddpm,dpm_solver,heun", "STEPS=4", "GUIDANCE=1,0,3", "N=6", "NAME=s")
    found = {(row["sampler"], float(row["guidance"])): float(row["network_calls"]) for row in rows()}
    assert len(found) == 12
    for sampler in ("ddim", "ddpm", "dpm_solver"):
        assert [found[sampler, g] for g in (1, 0, 3)] == [4, 4, 8]
    assert [found["heun", g] for g in (1, 0, 3)] == [7, 7, 14]  # two a step but for the last


def test_a_sweep_is_a_table_a_picture_and_the_way_to_make_each_row_again(sweep: Callable[..., str]) -> None:
    printed = sweep("SAMPLER=ddim,heun", "STEPS=2,3", "N=10", "NAME=s")
    assert {path.name for path in Path("sweeps/s").iterdir()} == {"table.csv", "table.md", "plot.png", "sweep.json"}
    content = load_json(Path("sweeps/s/sweep.json"))
    assert [row["steps"] for row in content["rows"]] == [2, 3, 2, 3]
    assert content["protocols"][0].startswith("efficientnet_lite0 in miniature / 10 samples, 40 real")
    assert printed.splitlines()[2].split()[:3] == ["sampler", "steps", "network_calls"]
    row = content["rows"][3]
    assert (len(row["sha256"]["weights"]), row["path"], row["sample"]["sampler"]) == (64, "model", "heun")
    words = [word for word in row["reproduce"].split() if "=" in word]
    sweep(*words, "NAME=one")
    (one,) = load_json(Path("sweeps/one/sweep.json"))["rows"]
    assert one["key"] == row["key"]
    sweep(*words, "NAME=one", "--again")
    assert float(rows("one")[0]["fd_efficientnet_lite0"]) == row["fd_efficientnet_lite0"]


def test_what_is_scored_is_kept_and_only_what_is_new_is_computed(sweep: Callable[..., str], monkeypatch) -> None:
    drawn: list[str] = []
    real = pipeline.sweep.Scorer.__call__

    def scored(self, point, folder, label):
        drawn.append(f"{point.sample.sampler} {point.sample.steps}")
        return real(self, point, folder, label)

    monkeypatch.setattr(pipeline.sweep.Scorer, "__call__", scored)
    sweep("STEPS=2,3", "N=10", "NAME=s")
    before = rows()
    sweep("STEPS=2,3,4", "N=10", "NAME=s")
    assert drawn == ["ddim 2", "ddim 3", "ddim 4"]
    assert rows()[:2] == before
    kept = sorted(Path(".state/sweep").glob("*.json"))
    assert len(kept) == 3
    kept[0].write_text("{")  # cut short by a crash of the machine
    sweep("STEPS=2,3,4", "N=10", "NAME=s", "--again")
    assert len(drawn) == 6
    sweep("STEPS=2", "N=11", "NAME=s")  # any other setting is another point
    sweep("STEPS=2", "N=10", "SEED=1", "NAME=s")
    assert len(drawn) == 8


def test_a_stop_keeps_what_is_finished(sweep: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient:
        asked = 0

        @property
        def requested(self) -> bool:
            Impatient.asked += 1
            return Impatient.asked > 1

    monkeypatch.setattr(pipeline.sweep, "StopRequest", Impatient)
    with pytest.raises(Stopped, match="finished points are kept"):
        sweep("STEPS=2,3", "N=10", "NAME=s")
    assert len(list(Path(".state/sweep").glob("*.json"))) == 1
    assert not Path("sweeps/s").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SAMPLER=plms"], "SAMPLER: 'plms' is unknown; known: ddim, ddpm, dpm_solver, heun"),
        (["STEPS=1001"], "STEPS is 1001, more than the 1000 of model"),
        (["N=1"], "N: '1' is no whole number of at least 2"),
        (["STEPS=ten"], "STEPS: 'ten' is no whole number"),
        (["GUIDANCE=inf"], "GUIDANCE: 'inf' is no number"),
        (["CKPT=best"], f"CKPT: best is not there; there are model, .state/train/{KEY}/images-000000000064, .state"),
        (["CKPT=unconditional", "GUIDANCE=2"], "GUIDANCE is 2, but unconditional has no classes: use 1"),
        (["CKPT=colour"], "colour draws images of 8 px with 3 channels, but reference is of 8 px with 1"),
        (["EMA=network"], "EMA is network, but model holds average alone"),
        (["EMA=ema"], "EMA: 'ema' is unknown; known: average, network"),
        (["STEP=5"], "'STEP=5' is unknown; expected NAME=VALUE with a name of CKPT, EMA, SAMPLER"),
        (["--steps", "5"], "unrecognized arguments: --steps"),
        (["NAME=../s"], "NAME is '../s', expected the name of a folder"),
    ],
)
def test_what_can_not_be_scored_is_one_line_before_anything_is_computed(sweep, words, message, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.engine.reference.load_extractor", None)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sweep(*QUICK, *words) if not words[0].startswith(("STEPS", "N=")) else sweep(*words)
    assert "\n" not in str(error.value)
    assert not Path("sweeps").exists()


def test_a_model_of_other_images_or_no_reference_is_refused(sweep: Callable[..., str]) -> None:
    shutil.rmtree("shards")
    write_digits(Path("shards"), 16)
    with pytest.raises(UserError, match="draws images of 8 px with 1 channels, but reference is of 16 px"):
        sweep(*QUICK)
    shutil.rmtree("reference")
    shutil.rmtree("shards")
    write_digits(Path("shards"), 8)
    with pytest.raises(UserError, match=r"no readable reference .* run `dvc repro reference`"):
        sweep(*QUICK)


def test_weights_of_another_network_are_refused(sweep: Callable[..., str]) -> None:
    shutil.copy("colour/weights.safetensors", "model")
    with pytest.raises(UserError, match=r"weights don't fit the network of model\.json"):
        sweep(*QUICK)


def test_equal_weights_under_two_names_are_scored_once(sweep: Callable[..., str]) -> None:
    shutil.copytree("model", "copy")
    sweep("CKPT=model,copy", *QUICK, "NAME=s")
    assert [row["checkpoint"] for row in rows()] == ["model"]


def test_points_are_runs_below_the_sweep_and_the_sweep_below_the_training(sweep, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("PIPELINE_TRACKING", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    open_tracker(Path(".state"), KEY, run_name="training", tags={}, system_seconds=0).close()
    words = [f"CKPT=.state/train/{KEY}/images-*", "EMA=average,network", *QUICK, "NAME=s"]
    sweep(*words)
    sweep(*words)
    shutil.rmtree(".state/tracking")  # what was sent is then known by the server alone
    sweep(*words)
    client = MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 6
    (training,) = [run for run in runs if run.data.tags.get("train_key") == KEY]
    (whole,) = [run for run in runs if "sweep_key" in run.data.tags]
    points = [run for run in runs if "child_key" in run.data.tags]
    assert whole.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in points} == {whole.info.run_id}
    assert {run.info.status for run in [whole, *points]} == {"FINISHED"}
    assert {(run.data.params["checkpoint"], run.data.params["ema"]) for run in points} == {
        (f"{KEY[:6]}@{n}", ema) for n in (64, 128) for ema in ("average", "network")
    }
    name = "fd_efficientnet_lite0"
    for run in points:
        (point,) = client.get_metric_history(run.info.run_id, f"eval/{name}")
        assert point.step == int(run.data.params["checkpoint"].split("@")[1])
    for ema in ("average", "network"):
        curve = client.get_metric_history(whole.info.run_id, f"sweep/{name}/{ema}")
        asked = {row["images_seen"]: float(row[name]) for row in rows() if row["ema"] == ema}
        assert [(str(p.step), p.value) for p in curve] == list(asked.items())
    files = {file.path for file in client.list_artifacts(whole.info.run_id, "sweep")}
    assert files == {f"sweep/{file}" for file in ("table.csv", "table.md", "plot.png", "sweep.json")}


def test_a_foreign_model_needs_no_run_of_a_training(sweep, monkeypatch) -> None:
    monkeypatch.setenv("PIPELINE_TRACKING", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there: the scores come all the same
    sweep(*QUICK, "NAME=s")
    events = [json.loads(line) for line in next(Path(".state/tracking").rglob("events.jsonl")).read_text().splitlines()]
    assert [event["kind"] for event in events].count("child") == 1
