"""One MLflow run per trained model (or sweep), written to by several stages, that can never hold up or end a training.

The caller only appends to `<state>/tracking/<key>/events.jsonl`. One daemon thread imports mlflow (in sender.py),
reads that file from where it last got to, and sends; the file is the queue, so memory stays bounded however long the
server is away. What was not sent stays there until any stage opens the same key again.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file, sha256_json, whole_file
from pipeline.runtime.monitor import CLOCK, LoadMonitor
from pipeline.runtime.sender import CHUNK, Sender, redact
from pipeline.runtime.spool import Spool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG = logging.getLogger("pipeline.tracking")
LONGEST_PAUSE_SECONDS = 120.0


def status_for(error: BaseException | None) -> str:
    """The status of a run whose stage ended with `error`: a stop on request is KILLED, a failure FAILED.

    Example:
        >>> status_for(None), status_for(KeyboardInterrupt()), status_for(ValueError())
        ('FINISHED', 'KILLED', 'FAILED')
    """
    if error is None:
        return "FINISHED"
    names = {kind.__name__ for kind in type(error).__mro__}
    return "KILLED" if names & {"SystemExit", "KeyboardInterrupt", "Stopped"} else "FAILED"


def open_tracker(
    state: Path,
    key: str,
    *,
    run_name: str,
    tags: Mapping[str, str],
    key_tag: str = "train_key",
    parent_key: str | None = None,
    enabled: bool = True,
    batch_seconds: float = 3.0,
    system_seconds: float = 10.0,
) -> Tracker:
    """The run of a key in the experiment `MLFLOW_EXPERIMENT_NAME`, found by that tag or created, set to RUNNING.

    The store is `MLFLOW_TRACKING_URI`, or else `mlflow.db` and `mlartifacts/` in the current folder.

    Args:
        state: folder that outlives the stage; the events lie in `state/tracking/<key>/` and stay there.
        key: hash that names the trained model, or what else `key_tag` is of.
        run_name: shown in the UI; counts only when the run is created.
        key_tag: the tag that holds the key.
        parent_key: train_key of the run that this one is a child of, where there is one.
        enabled: `False` gives a tracker that does nothing and touches neither disk nor mlflow.
        batch_seconds: pause between two sendings.
        system_seconds: pause between two samples of this machine's load, 0 for none.

    Raises:
        UserError: another process writes to the same folder, or it cannot be written to.
    """
    if not enabled:
        return Tracker(None)
    folder = state / "tracking" / key
    try:
        spool = Spool(folder)
    except BlockingIOError as error:
        raise UserError(f"tracking: another process writes to {folder}; wait for it or stop it") from error
    except OSError as error:
        raise UserError(f"tracking: cannot write to {folder}: {error.strerror}") from error
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    sender = Sender(
        spool,
        uri=uri or f"sqlite:///{Path.cwd() / 'mlflow.db'}",
        artifacts=None if uri else (Path.cwd() / "mlartifacts").as_uri(),
        key_tag=key_tag,
        key=key,
        run_name=run_name,
        parent_key=parent_key,
    )
    tracker = Tracker(sender, batch_seconds, system_seconds)
    tracker.set_tags(tags)
    return tracker


def _link_or_copy(source: Path, target: Path) -> None:
    """A model is large and its folder is replaced, never written into: another name for the same bytes will do."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


class Tracker:
    """What a stage sees. No method raises or waits for the network, except that `close` waits as long as it is told.

    Without a sender it does nothing: ranks other than 0 hold such a one.
    """

    def __init__(self, sender: Sender | None, batch_seconds: float = 3.0, system_seconds: float = 10.0) -> None:
        self._sender = sender
        self._batch_seconds, self._system_seconds = batch_seconds, system_seconds
        self._closing = threading.Event()
        self._warned: set[str] = set()
        self._machine: LoadMonitor | None = None
        self._append("status", status="RUNNING")
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        if sender:
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, `None` as long as the server has not told it."""
        return self._sender.run_id if self._sender else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record settings under flat names. Where the run already holds another value the old one stays, the new one
        becomes the tag `changed.<name>`, and one warning says so.
        """
        self._append_values("params", {name: str(value)[:6000] for name, value in params.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._append_values("tags", {name: str(value)[:5000] for name, value in tags.items()})

    def log_metrics(self, values: Mapping[str, float], step: int, *, replace: bool = False) -> None:
        """Record points of curves.

        A point at or before the last step of its curve is dropped: a resumed training repeats them bit for bit.
        With `replace` it is always added, and MLflow shows the newest: for results that an evaluation may recompute.
        Values that are not finite are dropped, with one warning for each name.
        """
        kept = {}
        for name, value in values.items():
            if not math.isfinite(value):
                if name not in self._warned:
                    LOG.warning("tracking: %s is %s at step %d; such points are left out", name, value, step)
                self._warned.add(name)
            elif replace or step > self._last_step("metrics", name):
                kept[name] = float(value)
        self._append_values("metrics", kept, step=int(step), replace=replace)

    def log_image(self, key: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Record an image, uint8 of shape (h, w) or (h, w, 3), shown in a grid by step; repeats as in `log_metrics`."""
        if self._sender is None or step <= self._last_step("image", key):
            return
        from PIL import Image

        file = f"files/{re.sub('[^0-9A-Za-z_.-]', '~', key)}-{step}.png"
        try:
            with whole_file(self._sender.spool.folder / file) as aside:
                Image.fromarray(pixels).save(aside, "png")
            self._append("image", name=key, step=int(step), file=file)
        except (OSError, ValueError, TypeError) as error:
            LOG.warning("tracking: image %s at step %d was not kept: %s", key, step, error)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Record a copy of one file as it is now; the same bytes in the same place are sent once."""
        if self._sender is None:
            return
        spool, name = self._sender.spool, f"{folder or ''}/{path.name}"
        try:
            file = f"files/{sha256_file(path)[:16]}/{path.name}"
            if spool.last.get(("artifact", name)) != file:
                with whole_file(spool.folder / file) as aside:
                    shutil.copyfile(path, aside)
                self._append("artifact", name=name, folder=folder, file=file)
        except OSError as error:
            LOG.warning("tracking: file %s was not kept: %s", path, error)

    def register_model(self, folder: Path, *, score_name: str, score: float | None, protocol: str) -> None:
        """Put the model in `folder` into MLflow's registry, under the experiment's name; the alias `best` goes to the
        lowest score among models scored by the same protocol. The same weights and score are sent once.
        """
        if self._sender is None:
            return
        spool = self._sender.spool
        try:
            place = f"models/{sha256_file(folder / 'weights.safetensors')[:16]}"
            file = f"{place} {score} {protocol}"
            if spool.last.get(("model", score_name)) == file:
                return
            for source in folder.iterdir():
                with whole_file(spool.folder / place / source.name) as aside:
                    _link_or_copy(source, aside)
            self._append("model", name=score_name, file=file, place=place, score=score, protocol=protocol)
        except OSError as error:
            LOG.warning("tracking: model %s was not kept: %s", folder, error)

    def set_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object]) -> None:
        """Name the data set the model is trained on; MLflow keeps 36 characters of the digest."""
        file = digest[:36]  # what the spool remembers of the event
        if self._sender and self._sender.spool.last.get(("dataset", name)) != file:
            self._append("dataset", name=name, file=file, source=source, profile=json.dumps(dict(profile), default=str))

    def log_child(
        self,
        key: str,
        *,
        run_name: str,
        params: Mapping[str, object],
        metrics: Mapping[str, float],
        step: int,
        tags: Mapping[str, str],
    ) -> None:
        """Record a finished run of its own below this one, found again by its key; the same content is sent once."""
        content = {
            "params": {name: str(value)[:6000] for name, value in params.items()},
            "metrics": {name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            "tags": {name: str(value)[:5000] for name, value in tags.items()},
        }
        file = sha256_json([content, step])[:16]  # what the spool remembers of the event
        if self._sender and self._sender.spool.last.get(("child", key)) != file:
            self._append("child", name=key, file=file, run_name=run_name, at=int(step), **content)

    def close(self, status: str = "FINISHED", timeout_seconds: float = 60.0) -> None:
        """Set the run's status (FINISHED, KILLED or FAILED) and send what the server takes within the time."""
        if self._sender is None or self._closing.is_set():
            return
        self._append("status", status=status)
        self._sender.deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join(timeout_seconds)
        if unsent := sum(1 for _ in self._sender.spool.events(self._sender.offset)):
            where, folder = redact(self._sender.uri), self._sender.spool.folder
            text = "tracking: %d events are not in MLflow (%s) yet; %s keeps them until a stage opens this run again"
            LOG.warning(text, unsent, where, folder)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        status = status_for(error)
        self.close(status, 15.0 if status == "KILLED" else 60.0)  # whoever stops us may not wait long

    def _last_step(self, kind: str, name: str) -> int:
        return self._sender.spool.step(kind, name) if self._sender else -1

    def _append(self, kind: str, **fields: Any) -> None:
        if self._sender:
            self._sender.spool.append(kind, **fields)

    def _append_values(self, kind: str, values: Mapping[str, object], **fields: Any) -> None:
        items = list(values.items())
        for start in range(0, len(items), CHUNK):
            self._append(kind, values=dict(items[start : start + CHUNK]), **fields)

    def _work(self) -> None:
        """The thread: sample the machine, send, pause; after a failure pause longer, and say so once an outage."""
        assert self._sender is not None
        sender = self._sender
        failures, retry_at, sample_at, closing = 0, 0.0, 0.0, False
        self._sample()
        while not closing:
            closing = self._closing.wait(self._batch_seconds)  # seen before sending: what came before `close` is sent
            if time.monotonic() >= sample_at:
                sample_at = time.monotonic() + self._system_seconds
                self._sample()
            if time.monotonic() < retry_at and not closing:
                continue
            try:
                sender.send_pending()
                failures = 0
            except Exception as error:  # mlflow raises requests', sqlalchemy's and its own; none may end a training
                if not failures:
                    where, reason = redact(sender.uri), redact(f"{type(error).__name__}: {error}")
                    LOG.warning("tracking: MLflow (%s) fails, the run goes on and tries again: %s", where, reason)
                retry_at = time.monotonic() + min(LONGEST_PAUSE_SECONDS, 5.0 * 2 ** min(failures, 10))
                failures += 1
        sender.spool.release()

    def _sample(self) -> None:
        if self._sender is None or not self._system_seconds:
            return
        try:
            if self._machine is None:
                self._machine = LoadMonitor()  # the first load is the one since now
            else:
                floor = self._sender.floor.get(CLOCK, -1)
                step = 1 + max(self._last_step("metrics", CLOCK), floor)
                self.log_metrics(self._machine.sample(), step, replace=True)
        except Exception as error:  # whatever psutil or a GPU driver raises
            LOG.warning("tracking: the load of this machine cannot be read, it is left out: %s", error)
            self._system_seconds = 0
