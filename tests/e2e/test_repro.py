"""The main job as a user runs it: `dvc repro` on a folder of images, twice, after a kill, and as an experiment."""

import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.runtime.files import load_json, sha256_file
from tests.projects import environment, make_project, run, stage

pytestmark = pytest.mark.slow

METRICS = {
    "fd_efficientnet_lite0", "fd_floor", "fd_like_for_like", "fd_ratio", "class_accuracy", "class_accuracy_real",
    "memorised_share", "memorised_share_real", "cas", "cas_real", "kid", "kid_error", "precision", "recall", "density",
    "coverage", "fd_class_mean", "fd_class_worst", "fd_low", "fd_high", "fd_infinity", "num_samples", "num_reference",
    "floor_images", "protocol", "protocol_sha256", "train_key",
}  # fmt: skip


def make_repository(folder: Path, **changes: object) -> Path:
    make_project(folder, **changes)
    for command in (
        ("git", "init", "-q"), ("git", "config", "user.email", "a@example.org"), ("git", "config", "user.name", "A"),
        ("dvc", "init", "-q"), ("dvc", "config", "core.analytics", "false"),
    ):  # fmt: skip
        done = run(folder, *command)
        assert done.returncode == 0, done.stderr
    (folder / ".gitignore").write_text("/images\n/.state/\n/mlflow.db\n/mlartifacts/\n__pycache__/\n")
    commit(folder, "start")
    return folder


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "-A")
    done = run(folder, "git", "commit", "-q", "-m", message)
    assert done.returncode == 0, done.stdout + done.stderr


def dvc(folder: Path, *arguments: str, **extra: str) -> str:
    done = run(folder, "dvc", *arguments, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def query(folder: Path, sql: str) -> list[tuple]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return database.execute(sql).fetchall()


def test_a_folder_of_images_becomes_a_scored_model_and_one_run(tmp_path: Path) -> None:
    folder = make_repository(tmp_path)
    dvc(folder, "repro", PIPELINE_TRACKING="1")
    scores = load_json(folder / "metrics/evaluate.json")
    assert set(scores) == METRICS
    assert scores["fd_ratio"] == pytest.approx(scores["fd_like_for_like"] / scores["fd_floor"])
    assert (scores["num_samples"], scores["num_reference"], scores["floor_images"]) == (60, 120, 60)
    assert "NOTE" in os.listdir(folder / "data/fetched")[0]

    # One row in the UI: params, curves, pictures, the score and the way back.
    assert query(folder, "select count(*) from runs") == [(1,)]
    assert query(folder, "select status from runs") == [("FINISHED",)]
    metrics = {name for (name,) in query(folder, "select distinct key from metrics")}
    assert {"train/loss", "train/images_per_second", "sample/images_per_second", "eval/fd_ratio"} <= metrics
    tags = dict(query(folder, "select key, value from tags"))
    assert tags["train_key"] == scores["train_key"] == load_json(folder / "model/model.json")["lineage"]["train_key"]
    assert {"git_commit", "dvc_lock_sha256", "shard_index_sha256", "world_size", "eval.protocol"} <= set(tags)
    # An evaluation at a later commit must not pass for the commit of the training.
    (origin,) = query(folder, "select count(*) from tags where key = 'git_commit' and value = (select value from tags "
                              "where key = 'eval.git_commit')")  # fmt: skip
    assert origin == (1,)
    images = list((folder / "mlartifacts").rglob("images/samples*.png"))
    assert len(images) == 2, images
    params = dict(query(folder, "select key, value from params"))
    assert params["train.total_images"] == "320"
    assert int(params["model.parameters"]) == load_json(folder / "metrics/train.json")["parameters"]
    assert 0 < float(params["model.gflop_per_image"]) < 0.01

    # Again: nothing to do. The metrics and plots commands work, before and after a change.
    commit(folder, "first")
    assert "up to date" in dvc(folder, "repro")
    assert "fd_ratio" in dvc(folder, "metrics", "show")
    assert Path(dvc(folder, "plots", "show").strip().removeprefix("file://")).is_file()
    dvc(folder, "exp", "run", "-S", "train.total_images=160")
    assert "train" in dvc(folder, "metrics", "diff")
    assert load_json(folder / "metrics/train.json")["images"] == 160
    assert "total_images" in dvc(folder, "params", "diff")


def test_killing_dvc_leaves_no_orphan_and_repro_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    folder = make_repository(tmp_path / "killed", train__total_images=3200, train__preview_every_images=3200)
    dvc(folder, "repro", "shard")
    process = subprocess.Popen(["dvc", "repro", "train"], cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    while not list(folder.glob(".state/train/*/images-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    assert any("pipeline.train" in " ".join(child.cmdline()) for child in children)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not (folder / "model").exists()
    assert "going on at" in dvc(folder, "repro", "train")

    whole = make_project(tmp_path / "whole", train__total_images=3200, train__preview_every_images=3200)
    stage(whole, "shard")
    stage(whole, "train")
    assert sha256_file(folder / "model/weights.safetensors") == sha256_file(whole / "model/weights.safetensors")


def test_a_flat_folder_is_unconditional(tmp_path: Path) -> None:
    folder = make_project(tmp_path, num_classes=0)
    for name in ("fetch", "shard", "reference", "train", "sample", "evaluate"):
        stage(folder, name)
    scores = load_json(folder / "metrics/evaluate.json")
    assert scores["class_accuracy"] is None
    assert scores["fd_ratio"] > 0
    assert load_json(folder / "model/model.json")["classes"] == []


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("shard", {"data__raw": "nowhere"}, "nowhere"),
        ("train", {"train__batch_size": 0}, "train.batch_size"),
        ("train", {}, "shards"),
        ("sample", {}, "model.json"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_two(tmp_path: Path, name, changes, expected) -> None:
    done = run(make_project(tmp_path, num_images=0, **changes), "python", "-m", f"pipeline.{name}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
