"""One run per trained model, continued without repeats, and a logger that never holds up or ends a training."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.runtime import tracking
from pipeline.runtime.files import load_json
from pipeline.runtime.tracking import Tracker, open_tracker
from tests.pipeline.test_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the SQLite store: creating one takes some seconds, so all tests share it."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections as long as the test runs: bound, but not listened to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def begin(state: Path, key: str, **more: Any) -> Tracker:
    options: dict[str, Any] = {"batch_seconds": 0.05, "system_seconds": 0, "tags": {}} | more
    return open_tracker(state, key, run_name=f"name of {key}", **options)


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path.cwd() / 'mlflow.db'}")


def runs(key: str) -> list[Any]:
    experiment = client().get_experiment_by_name("ddpm-pipeline")
    return list(client().search_runs([experiment.experiment_id], f"tags.train_key = '{key}'"))


def points(key: str, metric: str) -> list[tuple[int, float]]:
    (run,) = runs(key)
    return [(point.step, point.value) for point in client().get_metric_history(run.info.run_id, metric)]


def files(key: str, under: str) -> list[str]:
    (run,) = runs(key)
    return [file.path for file in client().list_artifacts(run.info.run_id, under)]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def test_a_run_holds_all_that_was_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.txt").write_text("seen")
    with begin(tmp_path, "whole", tags={"stage": "train"}) as tracker:
        tracker.log_params({"train.learning_rate": 1e-4, "train.ema": None} | {f"many.{i}": i for i in range(120)})
        for step in range(30):
            tracker.log_metrics({"train/loss": 1 / (1 + step), "train/grad_norm": float(step)}, step)
        tracker.log_image("samples/grid", PIXELS, 10)
        tracker.log_image("grey", PIXELS[..., 0], 10)
        tracker.log_artifact(tmp_path / "report.txt", "reports")
        tracker.set_dataset("flowers", "f" * 64, "shards/index.json", {"num_images": 7})
    (run,) = runs("whole")
    assert (run.info.status, run.info.run_id, run.info.run_name) == ("FINISHED", tracker.run_id, "name of whole")
    assert run.data.params["train.learning_rate"] == "0.0001"
    assert len(run.data.params) == 122
    assert run.data.tags["stage"] == "train"
    assert points("whole", "train/loss") == [(step, 1 / (1 + step)) for step in range(30)]
    assert sum("samples~grid+step+10+" in name and name.endswith(".png") for name in files("whole", "images")) == 1
    assert files("whole", "reports") == ["reports/report.txt"]
    (dataset,) = [entry.dataset for entry in run.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest, dataset.profile) == ("flowers", "f" * 36, '{"num_images": 7}')
    assert Path("mlartifacts").is_dir()
    assert warnings_of(caplog) == []
    assert capfd.readouterr() == ("", "")


def train(state: Path, key: str, steps: range) -> None:
    with begin(state, key) as tracker:
        for step in steps:
            tracker.log_metrics({"loss": float(step)}, step)
            tracker.log_image("grid", PIXELS, step)
        tracker.log_metrics({"fid": float(len(steps))}, 9, replace=True)
        tracker.set_dataset("flowers", "abc", "shards", {})


@pytest.mark.parametrize("spool", ["kept", "lost"])
def test_a_resumed_run_goes_on_and_repeats_nothing(tmp_path: Path, spool: str) -> None:
    train(tmp_path / "first", spool, range(6))
    train(tmp_path / ("first" if spool == "kept" else "second"), spool, range(3, 8))
    assert points(spool, "loss") == [(step, float(step)) for step in range(8)]
    assert points(spool, "fid") == [(9, 6.0), (9, 5.0)]
    (run,) = runs(spool)
    assert (run.data.metrics["fid"], run.info.status, len(run.inputs.dataset_inputs)) == (5.0, "FINISHED", 1)
    steps = sorted(int(name.split("+")[2]) for name in files(spool, "images") if name.endswith(".png"))
    assert steps == list(range(8))
    if spool == "kept":
        events = (tmp_path / "first/tracking/kept/events.jsonl").read_text().splitlines()
        assert sum(json.loads(event)["kind"] == "image" for event in events) == 8


def test_a_spool_sent_twice_leaves_each_point_once(tmp_path: Path) -> None:
    train(tmp_path, "twice", range(3))
    (tmp_path / "tracking/twice/sent.json").unlink()
    train(tmp_path, "twice", range(3))
    assert [step for step, _ in points("twice", "loss")] == [0, 1, 2]
    assert len(points("twice", "fid")) == 2
    assert len(files("twice", "images")) == 2 * 3


def test_a_run_deleted_on_the_server_is_written_anew(tmp_path: Path) -> None:
    train(tmp_path, "deleted", range(3))
    client().delete_run(runs("deleted")[0].info.run_id)
    begin(tmp_path, "deleted").close()
    assert [step for step, _ in points("deleted", "loss")] == [0, 1, 2]


def test_what_a_dead_server_missed_is_sent_later(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:s3cret@127.0.0.1:{closed_port}")
    tracker = begin(tmp_path, "late")
    slowest = 0.0
    for step in range(300):
        began = time.perf_counter()
        tracker.log_metrics({"loss": float(step)}, step)
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.002)
    tracker.log_image("grid", PIXELS, 5)
    tracker.close(timeout_seconds=20)
    assert slowest < 1.0  # a call that waited for the server would take seconds
    assert tracker.run_id is None
    down, unsent = warnings_of(caplog)
    assert f"http://127.0.0.1:{closed_port}" in down
    assert "303 events are not in MLflow" in unsent
    assert str(tmp_path / "tracking" / "late") in unsent
    assert "s3cret" not in caplog.text
    assert "ann" not in caplog.text.replace("cannot", "")

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    caplog.clear()
    begin(tmp_path, "late").close()
    assert warnings_of(caplog) == []
    assert points("late", "loss") == [(step, float(step)) for step in range(300)]
    assert len(files("late", "images")) == 2


def test_a_torn_last_line_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, "torn", range(2))
    events = tmp_path / "tracking/torn/events.jsonl"
    with open(events, "ab") as file:
        file.write(b'\0\0 not JSON\n{"kind": "metrics", "ste')
    train(tmp_path, "torn", range(4))
    assert [step for step, _ in points("torn", "loss")] == [0, 1, 2, 3]
    assert b'"ste{' not in events.read_bytes()
    assert [text for text in warnings_of(caplog) if "unreadable" not in text] == []


def test_a_second_writer_is_refused_and_the_folder_named(tmp_path: Path) -> None:
    first = begin(tmp_path, "shared")
    with pytest.raises(UserError, match=r"another process writes to .*tracking/shared"):
        begin(tmp_path, "shared")
    first.close()
    begin(tmp_path, "shared").close()


def test_the_first_parameter_stays_and_the_new_one_becomes_a_tag(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate in (1e-4, 2e-4):
        with begin(tmp_path, "changed") as tracker:
            tracker.log_params({"rate": rate, "seed": 7})
            tracker.log_metrics({"loss": 1.0}, 1)
    (run,) = runs("changed")
    assert run.data.params == {"rate": "0.0001", "seed": "7"}
    assert run.data.tags["changed.rate"] == "0.0002"
    assert "changed.seed" not in run.data.tags
    assert [("rate stays 0.0001, not 0.0002" in text) for text in warnings_of(caplog)] == [True]


def test_values_that_are_not_finite_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with begin(tmp_path, "finite") as tracker:
        for step, value in enumerate([1.0, float("nan"), float("inf"), 4.0]):
            tracker.log_metrics({"loss": value}, step)
    assert points("finite", "loss") == [(0, 1.0), (3, 4.0)]
    assert [("loss is nan at step 1" in text) for text in warnings_of(caplog)] == [True]


def test_an_event_that_mlflow_refuses_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with begin(tmp_path, "refused", batch_seconds=5) as tracker:
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.log_metrics({"no such name?*": 1.0}, 1)
        tracker.log_image("bad key?", PIXELS, 1)
        tracker.log_image("bad pixels", PIXELS.astype(float), 1)
        tracker.log_artifact(tmp_path / "absent")
        tracker.log_metrics({"loss": 2.0}, 2)
    assert points("refused", "loss") == [(0, 1.0), (2, 2.0)]
    assert [text.split(":")[1].split(" ")[1:4] for text in warnings_of(caplog)] == [
        ["image", "bad", "pixels"],
        ["file", f"{tmp_path / 'absent'}", "was"],
        ["skipped", "a", "metrics"],
        ["skipped", "a", "image"],
    ]


class Stopped(Exception):  # noqa: N818 - stands for the one in pipeline.errors, known by its name
    pass


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped(), "KILLED"), (SystemExit(75), "KILLED"), (KeyboardInterrupt(), "KILLED"), (ValueError(), "FAILED")],
)
def test_the_end_of_a_stage_is_the_status_of_the_run(tmp_path: Path, error: BaseException, status: str) -> None:
    key = type(error).__name__
    with pytest.raises(type(error)), begin(tmp_path, key):
        raise error
    assert runs(key)[0].info.status == status
    tracker = begin(tmp_path, key)
    for _ in range(200):
        if runs(key)[0].info.status == "RUNNING":
            break
        time.sleep(0.05)
    assert runs(key)[0].info.status == "RUNNING"
    tracker.close()
    tracker.close("FAILED")
    assert runs(key)[0].info.status == "FINISHED"


def test_the_load_of_the_machine_is_sampled_and_goes_on_counting(tmp_path: Path) -> None:
    for _ in range(2):
        with begin(tmp_path, "system", system_seconds=0.1):
            time.sleep(1)
    steps = [step for step, _ in points("system", tracking.CLOCK)]
    assert len(steps) > 4
    assert steps == list(range(len(steps)))
    (run,) = runs("system")
    assert 10 < run.data.metrics["system/process_memory_megabytes"] < 1e5
    assert "system/network_receive_megabytes" in run.data.metrics


def test_a_disabled_tracker_touches_nothing(tmp_path: Path) -> None:
    with begin(tmp_path, "off", enabled=False) as tracker:
        tracker.log_params({"a": 1})
        tracker.log_metrics({"loss": 1.0, "bad": 2.0}, 1)
        tracker.log_image("grid", PIXELS, 1)
        tracker.log_artifact(tmp_path / "absent")
        tracker.set_dataset("a", "b", "c", {})
        tracker.set_tags({"a": "b"})
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_the_spool_is_the_queue(tmp_path: Path) -> None:
    """What is sent is read from the file: `sent.json` ends at the file's last byte and nothing is held in memory."""
    train(tmp_path, "queue", range(4))
    folder = tmp_path / "tracking/queue"
    assert load_json(folder / "sent.json")["offset"] == (folder / "events.jsonl").stat().st_size


def test_the_module_imports_neither_mlflow_nor_torch() -> None:
    code = (
        "import sys, pipeline.runtime.tracking; sys.exit(', '.join({'mlflow', 'torch', 'PIL'} & set(sys.modules)) or 0)"
    )
    root = Path(tracking.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_is_registered_once_and_the_best_has_its_alias(tmp_path: Path) -> None:
    make_model(tmp_path / "model", ("cat", "dog"))
    for score in (2.0, 2.0, 1.5):
        with begin(tmp_path, "registered") as tracker:
            tracker.register_model(tmp_path / "model", score_name="fd", score=score, protocol="p")
    (version,) = client().search_model_versions("name = 'ddpm-pipeline'")
    assert version.tags["score"] == "1.5"
    assert client().get_model_version_by_alias("ddpm-pipeline", "best").version == version.version
    lines = (tmp_path / "tracking/registered/events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "model" for line in lines) == 2
