"""Tars of far away, kept on this node: each fetched once for all its processes, checked, whole, and within a limit.

A folder that all processes of a node share, `SHA256.tar` for each shard, so that equal names of two sets can't meet.
Who fetches a shard holds `SHA256.lock` alone; who is about to open one shares a lock on the tar itself, and only what
nobody holds is removed to make room, what was used longest ago first. The kernel lets go of locks when a process ends.
A shard that is open may be removed: an open file goes on working until it is closed, also when its name is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.data.remote import Patience, RemoteError, RemoteFile, read_pieces
from pipeline.data.shards import Shard
from pipeline.errors import UserError

log = logging.getLogger(__name__)
TRIES_OF_WRONG_BYTES = 2


class ShardCache:
    """The folder of this node.

    Args:
        folder: made where it is missing, for this user alone.
        limit_bytes: shards are removed until one more fits below it. What other processes are opening or fetching at
            that moment stays, so the limit may be passed by one shard a process.
        patience: with the network.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, patience: Patience = Patience()) -> None:  # noqa: B008
        self.folder = Path(folder).absolute()
        self.limit_bytes = limit_bytes
        self.patience = patience

    def has(self, shard: Shard) -> bool:
        """Whether a shard is here, whole."""
        try:
            return self._path(shard).stat().st_size == shard.num_bytes
        except FileNotFoundError:
            return False

    @contextmanager
    def held(self, shard: Shard, file: RemoteFile) -> Iterator[Path]:
        """A shard's path, fetched where it was missing; the file stays at least as long as the context.

        Raises:
            UserError: it was not to be had, differs from the index, or does not fit; the message names shard and URL.
        """
        while (descriptor := self._hold(shard)) is None:
            self.fetch(shard, file)
        try:
            os.utime(descriptor)
            yield self._path(shard)
        finally:
            os.close(descriptor)

    def _hold(self, shard: Shard) -> int | None:
        try:
            descriptor = os.open(self._path(shard), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        here = False
        try:
            self._flock(descriptor, fcntl.LOCK_SH)
            here = self.has(shard) and _is_at(descriptor, self._path(shard))
        finally:
            if not here:
                os.close(descriptor)
        return descriptor if here else None

    def fetch(self, shard: Shard, file: RemoteFile) -> None:
        """See to it that a shard is here; wait where another process is fetching it."""
        with self._fetching(shard):
            if not self.has(shard):
                self._make_room(shard)
                try:
                    self._download(shard, file)
                except OSError as error:
                    raise UserError(
                        f"{self.folder}: {error.strerror} while fetching shard {shard.name}; free some space, or set "
                        "PIPELINE_CACHE to another disk or PIPELINE_CACHE_GB to less"
                    ) from None

    def adopt(self, path: Path, shard: Shard) -> None:
        """Take in a file on the same disk that is this shard; it is moved."""
        with self._fetching(shard):
            self._make_room(shard)
            path.replace(self._path(shard))

    def _download(self, shard: Shard, file: RemoteFile) -> None:
        part = self._path(shard).with_suffix(".part")  # one writer: we hold the lock
        try:
            for _ in range(TRIES_OF_WRONG_BYTES):
                digest = hashlib.sha256()
                with open(part, "wb") as out:
                    out.truncate(shard.num_bytes)  # counts as its full size while it grows
                    for piece in self._pieces(shard, file):
                        out.write(piece)
                        digest.update(piece)
                    out.flush()
                    os.fsync(out.fileno())
                if digest.hexdigest() == shard.sha256:
                    part.replace(self._path(shard))
                    return
                log.info("shard %s from %s: sha256 differs from the index", shard.name, file.shown)
        finally:
            part.unlink(missing_ok=True)
        raise RemoteError(
            f"shard {shard.name} from {file.shown}: its sha256 differs from the index; it was damaged or replaced "
            "there: upload it again, or make the index anew"
        )

    def _pieces(self, shard: Shard, file: RemoteFile) -> Iterator[bytes]:
        try:
            yield from read_pieces(file, shard.num_bytes, self.patience)
        except RemoteError as error:
            raise RemoteError(f"shard {shard.name} from {error}") from None

    def _make_room(self, shard: Shard) -> None:
        """Remove what was used longest ago, until a shard fits."""
        if shard.num_bytes > self.limit_bytes:
            raise UserError(
                f"shard {shard.name} has {shard.num_bytes:,} bytes, more than the cache may hold: raise "
                "PIPELINE_CACHE_GB, or write smaller shards"
            )
        with self.lock(self.folder / "room.lock"):
            files = []
            for path in [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]:
                with suppress(FileNotFoundError):  # removed or renamed since it was listed
                    status = path.stat()
                    files.append((status.st_mtime_ns, path, status.st_size))
            used = sum(size for _, _, size in files)
            for _, path, size in sorted(files):
                if used + shard.num_bytes <= self.limit_bytes:
                    break
                if self._remove(path):
                    used -= size

    def _remove(self, path: Path) -> bool:
        """Remove a shard, or what a killed process left of one, unless somebody is opening or fetching it."""
        try:
            with self.lock(path if path.suffix == ".tar" else path.with_suffix(".lock"), wait=False):
                path.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    @contextmanager
    def _fetching(self, shard: Shard) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = self._path(shard).with_suffix(".lock")
        with self.lock(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    @contextmanager
    def lock(self, path: Path, *, wait: bool = True) -> Iterator[None]:
        """Hold a file of this folder alone, making it where it is missing.

        Raises:
            BlockingIOError: another holds it, and `wait` is False.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):  # else it was removed while we waited: lock its successor
                    yield
                    return
            finally:
                os.close(descriptor)

    def _flock(self, descriptor: int, kind: int) -> None:
        try:
            fcntl.flock(descriptor, kind)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise UserError(
                    f"{self.folder} can't be locked ({error.strerror}): set PIPELINE_CACHE to a local disk"
                ) from None
            raise


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
