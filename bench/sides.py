"""Sides of a comparison as processes of their own: warmed up once, then working when it is their turn."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from bench.report import ROOT


class Side:
    """A process that says what it is in its first line of JSON and answers each later line of input with another.

    Args:
        name: in messages.
        module: of bench/, and its arguments.
        python: that has the side's packages.

    Raises:
        RuntimeError: it ended without a word; the last line that it wrote to standard error says why.
    """

    def __init__(self, name: str, module: str, *arguments: object, python: str = sys.executable) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, "-W", "ignore", "-m", module, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.about = self._read()

    def take_turn(self) -> dict[str, Any]:
        """One piece of work; what the process says of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.close()
        self.errors.seek(0)
        raise RuntimeError(f"{self.name}: {(self.errors.read().strip() or 'no output').splitlines()[-1]}")
