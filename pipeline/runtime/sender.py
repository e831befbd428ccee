"""From the queue on disk to MLflow, in the thread that sends."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections import Counter
from typing import Any

from pipeline.runtime.files import load_json, save_json
from pipeline.runtime.monitor import CLOCK
from pipeline.runtime.registry import prepare_mlflow, register_model
from pipeline.runtime.spool import Spool

LOG = logging.getLogger("pipeline.tracking")
EXPERIMENT = "ddpm-pipeline"
PARENT, CHILD = "mlflow.parentRunId", "child_key"  # tags
CHUNK = 50  # values an event
LIMITS = {"metrics": 800, "params": CHUNK, "tags": CHUNK}  # values a call; the server allows 1000, 100 and 100


def redact(text: object) -> str:
    """One line of at most 300 characters, without the `user:password@` and the query of any address in it.

    Example:
        >>> redact("no route to http://ann:secret@host:5000/api?sig=1")
        'no route to http://host:5000/api?...'
    """
    line = re.sub(r"://\S*@", "://", " ".join(str(text).split()))
    return re.sub(r"\?\S+", "?...", line)[:300]


class Sender:
    """Reads the spool and talks to MLflow. Lives in the recorder's thread, but for `run_id` and `offset`.

    The run is the one whose tag `key_tag` is `key`; where a training with the tag train_key = `parent_key` has a run,
    it is that one's child.
    """

    def __init__(
        self, spool: Spool, *, uri: str, artifacts: str | None, key_tag: str, key: str, run_name: str,
        parent_key: str | None = None,
    ) -> None:  # fmt: skip
        self.spool, self.uri, self.artifacts = spool, uri, artifacts
        self.key_tag, self.key, self.run_name, self.parent_key = key_tag, key, run_name, parent_key
        sent = load_json(spool.folder / "sent.json") if (spool.folder / "sent.json").exists() else {}
        self.run_id: str | None = sent.get("run_id")
        self.offset: int = sent.get("offset", 0) if sent.get("offset", 0) <= spool.size else 0
        self.deadline = math.inf
        self.floor: dict[str, int] = {}  # last step the server holds, looked up when the spool does not know
        self._client: Any = None
        self._experiment_id = ""
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        self._params: dict[str, str] = {}
        self._images: set[tuple[str, int]] = set()

    def send_pending(self) -> None:
        """Send all events; whatever goes wrong between us and MLflow is raised, and the rest waits."""
        if self._client is None:
            self._connect()
        while time.monotonic() < self.deadline:
            events, end = self._next_group()
            if not events:
                return
            self._send(events)
            self._save_offset(end)

    def _save_offset(self, offset: int) -> None:
        self.offset = offset
        save_json(self.spool.folder / "sent.json", {"run_id": self.run_id, "offset": offset})

    def _connect(self) -> None:
        prepare_mlflow()
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._experiment, self.artifacts)
        run = _first_run(client, experiment, **{self.key_tag: self.key})
        if run is None:
            began = next((event["time"] for event, _ in self.spool.events(0)), None)
            run = client.create_run(experiment, began, {self.key_tag: self.key}, self.run_name)
        if self.parent_key and (parent := _first_run(client, experiment, train_key=self.parent_key)):
            client.set_tag(run.info.run_id, PARENT, parent.info.run_id)
        known = run.info.run_id == self.run_id
        self.run_id = run.info.run_id
        self._experiment_id = experiment
        self._params = dict(run.data.params)
        self._images = {
            (match[1], int(match[2]))
            for file in client.list_artifacts(self.run_id, "images")
            if (match := re.fullmatch(r"images/(.+)\+step\+(\d+)\+timestamp.*\.png", file.path))
        }
        if not known or self.offset == 0:  # another store, or a spool that was lost: what does the server hold?
            curves = [key for key in run.data.metrics if not key.startswith("system/") or key == CLOCK]
            self.floor = {key: max(p.step for p in client.get_metric_history(self.run_id, key)) for key in curves}
            self._save_offset(0)
        self._client = client

    def _next_group(self) -> tuple[list[dict[str, Any]], int]:
        """The next events that fit into one call: its cost is per call, 0.4 s for 1000 points and 0.03 s for one."""
        events: list[dict[str, Any]] = []
        end, counts = self.offset, Counter[str]()
        for event, after in self.spool.events(self.offset):
            kind = event["kind"]
            if kind not in LIMITS:
                return (events, end) if events else ([event], after)
            counts[kind] += len(event["values"])
            if counts[kind] > LIMITS[kind]:
                break
            events.append(event)
            end = after
        return events, end

    def _send(self, events: list[dict[str, Any]]) -> None:
        """Send a group; if MLflow refuses its content (not: cannot be reached), find and skip the event it refuses."""
        from mlflow.exceptions import MlflowException

        try:
            if events[0]["kind"] in LIMITS:
                self._send_values(events)
            else:
                self._send_one(events[0])
        except (MlflowException, ValueError, TypeError, KeyError, FileNotFoundError) as error:
            if isinstance(error, MlflowException) and error.error_code not in (
                "INVALID_PARAMETER_VALUE",
                "BAD_REQUEST",
            ):
                raise
            if len(events) == 1:
                LOG.warning("tracking: skipped a %s event that MLflow refuses: %s", events[0]["kind"], redact(error))
                return
            half = len(events) // 2
            self._send(events[:half])
            self._send(events[half:])

    def _send_values(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        points: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        changed: list[str] = []
        for event in events:
            for name, value in event["values"].items():
                if event["kind"] == "metrics":
                    if event["replace"] or event["step"] > self.floor.get(name, -1):
                        points.append(Metric(name, value, event["time"], event["step"]))
                elif event["kind"] == "tags":
                    tags[name] = value
                elif (held := self._params.get(name, params.get(name))) is None:
                    params[name] = value
                elif held != value:
                    tags[f"changed.{name}"] = value
                    changed.append(f"{name} stays {held}, not {value}")
        self._client.log_batch(
            self.run_id, points, [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
        )
        self._params |= params
        if changed:
            LOG.warning("tracking: MLflow keeps a run's first parameters: %s; see its tags", redact("; ".join(changed)))

    def _send_one(self, event: dict[str, Any]) -> None:
        client, kind, when = self._client, event["kind"], event["time"]
        if kind == "image":
            from PIL import Image

            shown = (event["name"].replace("/", "~"), event["step"])
            if shown not in self._images:
                with Image.open(self.spool.folder / event["file"]) as image:
                    client.log_image(self.run_id, image, key=event["name"], step=event["step"], timestamp=when)
                self._images.add(shown)
        elif kind == "artifact":
            client.log_artifact(self.run_id, self.spool.folder / event["file"], event["folder"])
        elif kind == "model":
            register_model(
                client, str(self.run_id), self._experiment, self.spool.folder / event["place"],
                score_name=event["name"], score=event["score"], protocol=event["protocol"],
            )  # fmt: skip
        elif kind == "child":
            self._send_child(event)
        elif kind == "dataset":
            from mlflow.entities import Dataset, DatasetInput, InputTag

            data = Dataset(
                event["name"], event["file"], "local", json.dumps({"uri": event["source"]}), profile=event["profile"]
            )
            client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
        elif kind == "status" and event["status"] == "RUNNING":
            client.update_run(self.run_id, "RUNNING")
        elif kind == "status":
            client.set_terminated(self.run_id, event["status"], when)
        else:
            raise ValueError(f"events.jsonl holds a line of kind {kind}")

    def _send_child(self, event: dict[str, Any]) -> None:
        """A run of its own below this one, found again by its key: what it already holds is not sent twice."""
        from mlflow.entities import Metric, Param, RunTag

        client, when, own = self._client, event["time"], {CHILD: event["name"], PARENT: str(self.run_id)}
        run = _first_run(client, self._experiment_id, **own)
        if run is None:
            run = client.create_run(self._experiment_id, when, own, event["run_name"])
        metrics = [
            Metric(name, value, when, event["at"])
            for name, value in event["metrics"].items()
            if run.data.metrics.get(name) != value
        ]
        params = [Param(*item) for item in event["params"].items() if item[0] not in run.data.params]
        client.log_batch(run.info.run_id, metrics, params, [RunTag(*item) for item in event["tags"].items()])
        client.set_terminated(run.info.run_id, "FINISHED", when)


def _first_run(client: Any, experiment: str, **tags: str) -> Any:
    """The oldest run with these tags; None if there is none."""
    text = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return next(iter(client.search_runs([experiment], text, order_by=["start_time ASC"], max_results=1)), None)
