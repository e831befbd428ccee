"""Files that are whole or absent: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

CHUNK_BYTES = 1 << 20
DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal sha256 of a JSON-able value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    """A disk that is full or read-only becomes one line that names what was being written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"{path} can't be written ({error.strerror}); make room and run again") from None


@contextmanager
def whole_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`; on a clean exit its file takes the name `path`, otherwise it is removed.

    Args:
        path: the file.
        durable: flush it to the disk before the rename. Without it only a crash of the machine can lose content: for
            what can be made again.

    Raises:
        UserError: the disk is full.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with whole_file(target) as aside:
        ...     _ = aside.write_text("all of it")
        >>> target.read_text()
        'all of it'
    """
    path = Path(path)
    with _full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(descriptor)
        aside = Path(name)
        try:
            yield aside
            aside.chmod(0o644)
            if durable:
                _flush(aside)
            aside.replace(path)
            if durable:
                _flush(path.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Like :func:`whole_file` for a folder: a folder already at `path` is replaced, never mixed with.

    A path has one writer at a time: what an earlier one left unfinished is removed.

    Args:
        path: the folder.
        durable: flush every file to the disk before the rename. Without it only a crash of the machine can lose
            content; right for many small files that are quick to make again (a flush costs milliseconds each).

    Raises:
        UserError: the disk is full.
    """
    path = Path(path)
    with _full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in path.parent.glob(f".{path.name}.*.part"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            yield aside
            aside.chmod(0o755)
            if durable:
                for child in sorted(aside.rglob("*")):
                    _flush(child)
                _flush(aside)
            if path.exists():
                shutil.rmtree(path)
            aside.replace(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Hold a folder for this process, making it where it is missing; the kernel lets go when the process ends.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode() or "?"
            raise UserError(
                f"{path} is in use by process {holder}: the same work already runs; wait or end it"
            ) from None
        except OSError as error:
            raise UserError(
                f"{path} can't be locked ({error.strerror}): set PIPELINE_STATE to a file system with locks"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def save_text(path: str | Path, text: str) -> None:
    """Write a small text file whole."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def save_json(path: str | Path, value: Any) -> None:
    """Write a JSON-able value whole, readable by people and stable under diff."""
    save_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def load_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
