"""Events on disk, appended by one process and read from any byte on: a queue that outlives crashes and outages."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG = logging.getLogger("pipeline.tracking")


class Spool:
    """The events on disk, one JSON object a line, and what must be remembered of them. One process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "files").mkdir(parents=True, exist_ok=True)
        self._lock_file = open(folder / "lock", "w")  # noqa: SIM115 - held until `release`
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = open(folder / "events.jsonl", "ab", buffering=0)  # noqa: SIM115
        except OSError:
            self._lock_file.close()
            raise
        os.register_at_fork(after_in_child=self._lock_file.close)  # a worker that outlives us must not hold the lock
        self._mutex = threading.Lock()
        self.last: dict[tuple[str, str], Any] = {}  # (kind, name) -> last step, or the copy last logged there
        self.size = self._file.tell()
        self.size = max((end for event, end in self.events(0) if self._remember(event)), default=0)
        self._file.truncate(self.size)  # a line that a kill cut short

    def _remember(self, event: dict[str, Any]) -> bool:
        kind = event["kind"]
        for name in event["values"] if kind == "metrics" else [event.get("name", "")]:
            step = event.get("step")
            self.last[kind, name] = event.get("file") if step is None else max(step, self.step(kind, name))
        return True

    def step(self, kind: str, name: str) -> int:
        """The last step of a curve or an image, -1 if there is none."""
        return int(self.last.get((kind, name), -1))

    def append(self, kind: str, **fields: Any) -> None:
        """Write one event, with the time; a failure costs that event and a warning."""
        event = {"kind": kind, "time": int(time.time() * 1000), **fields}
        with self._mutex:
            try:
                line = json.dumps(event, allow_nan=False).encode() + b"\n"
                if self._file.write(line) != len(line):
                    self._file.truncate(self.size)
                    raise OSError("disk full")
                self.size += len(line)
                self._remember(event)
            except (OSError, ValueError, TypeError) as error:  # ValueError: used after `close`
                LOG.warning("tracking: a %s event was lost, %s: %s", kind, self.folder, error)

    def events(self, start: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Each whole event from the byte `start` on, with the byte behind it."""
        with open(self.folder / "events.jsonl", "rb") as file:
            file.seek(start)
            end = start
            while end < self.size and (line := file.readline()).endswith(b"\n"):
                end += len(line)
                try:
                    yield json.loads(line), end
                except ValueError:
                    yield {"kind": "unreadable", "time": 0}, end

    def release(self) -> None:
        """Let another process have the folder."""
        self._file.close()
        self._lock_file.close()
