"""Servers on loopback: one over HTTP that fails as it is told, one that speaks S3."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

HANG_SECONDS = 3.0


class FolderServer:
    """A folder over HTTP with ranges. `trouble[name]` is a list of what the next GETs of a file meet instead: a status
    such as `500`, `hang`, `cut` (a body shorter than its Content-Length), `flip` (one wrong byte), `whole` (the range
    is not heeded). The last one stays. `gets` counts requests, `sent` bytes of bodies."""

    def __init__(self, folder: Path) -> None:
        self.trouble: dict[str, list[str]] = {}
        self.gets: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.headers: defaultdict[str, list[str]] = defaultdict(list)
        self.pause_seconds = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(folder))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> FolderServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, folder: Path) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                name = self.path.partition("?")[0].removeprefix("/")
                server.headers[name].append(str(self.headers))
                what = "fine"
                if body:
                    server.gets[name] += 1
                    waiting = server.trouble.get(name, [])
                    what = waiting[0] if waiting else "fine"
                    if len(waiting) > 1:
                        waiting.pop(0)
                    time.sleep(server.pause_seconds)
                if what == "hang":
                    time.sleep(HANG_SECONDS)
                    return
                if what.isdecimal() or not (folder / name).is_file():
                    self.send_error(int(what) if what.isdecimal() else 404)
                    return
                self._send(name, (folder / name).read_bytes(), what, body)

            def _send(self, name: str, data: bytes, what: str, body: bool) -> None:
                found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if found and what != "whole":
                    start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
                    if start >= len(data):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                    data = data[start:stop]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if what == "cut":
                    data = data[: len(data) // 2]
                if what == "flip":
                    data = bytes([data[0] ^ 1]) + data[1:]
                if body:
                    server.sent[name] += len(data)
                    self.wfile.write(data)

        return Handler


@contextmanager
def s3_server(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[str]:
    """moto's S3 on loopback with one bucket, `bucket`; yields its address. The environment points to it, and the files
    of this machine's user with credentials are hidden behind an empty one in `folder`."""
    import fsspec
    from moto.server import ThreadedMotoServer

    (folder / "no-credentials").touch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "AKIATESTONLY",
        "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "no-credentials"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
    }.items():
        patch.setenv(name, value)
    try:
        reset = Request(f"http://{host}:{port}/moto-api/reset", method="POST")  # what moto holds belongs to the process
        urlopen(reset, timeout=30).close()
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield f"http://{host}:{port}"
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()
