"""Where the tars of a set come from: this folder, another one, a URL, the DVC remote, or wherever others left them."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.cache import ShardCache
from pipeline.data.index import INDEX_NAME, SAMPLES_NAME, ShardIndex, check_alike, load_index, verify_samples
from pipeline.data.remote import (
    Folder,
    RemoteError,
    RemoteFile,
    is_url,
    open_folder,
    open_remote,
    read_pieces,
    read_whole,
    redact,
    size_of,
)
from pipeline.data.shards import Shard
from pipeline.data.store import LocalSource, ShardSource
from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file, whole_folder

log = logging.getLogger(__name__)
PREFETCH_THREADS = 2


def open_shards(
    folder: str | Path, location: str, cache: ShardCache, *, whole: bool = True
) -> tuple[ShardIndex, ShardSource]:
    """Open a set where the machine says that it is. Where it lies is speed, what it holds is the result: two places
    are the same set if and only if their `index.json` are.

    Args:
        folder: where the stage put it, or would have.
        location: `PIPELINE_SHARDS`: empty for `folder`, another folder, a URL, or `dvc://[REMOTE]` for the output
            `folder` of `dvc.lock` as it lies in the DVC remote.
        cache: of this node, for tars that lie behind a URL.
        whole: fail at once where a tar of a local set is missing or has another size.

    Raises:
        UserError: there is no such set, or `folder` holds the index of another.
    """
    if not is_url(location):
        index = load_index(location or folder, tars_elsewhere=not whole)
        foreign = bool(index.shards.have_url.any())
        source: ShardSource = CachedSource(index.shards, None, cache) if foreign else LocalSource(index.folder)
    else:
        place = open_folder(location, str(folder))
        index = fetch_index(place, cache)
        foreign = bool(index.shards.have_url.any())
        source = CachedSource(index.shards, None if foreign else place, cache)
    known = Path(folder, INDEX_NAME)
    if location and known.is_file() and sha256_file(known) != index.sha256:
        raise UserError(
            f"PIPELINE_SHARDS={redact(location)} is not the set of {known}, which is what the results depend on: "
            "upload that one, or bring the folder up to date (`dvc checkout`, or `dvc repro shard`)"
        )
    return index, source


def open_sets(
    folders: Sequence[str | Path], location: str, cache: ShardCache
) -> tuple[tuple[ShardIndex, ...], tuple[ShardSource, ...]]:
    """Open the sets that a training draws from, one or several that are mixed; `location` is for a single one.

    Raises:
        UserError: as :func:`open_shards`; sets that can't be mixed; a location for several.
    """
    if location and len(folders) > 1:
        raise UserError("PIPELINE_SHARDS names one place, but order.mix has several sets: unset it, and name an index "
                        "whose tars lie elsewhere in order.mix (`python -m pipeline.data index`)")  # fmt: skip
    indexes, sources = zip(*(open_shards(folder, location, cache) for folder in folders), strict=True)
    check_alike(indexes)
    return indexes, sources


def fetch_index(place: Folder, cache: ShardCache) -> ShardIndex:
    """The index of a set that lies elsewhere; its samples.npy is fetched once for all processes of this node.

    Raises:
        UserError: not to be had, or damaged.
    """
    data = read_whole(place.file(INDEX_NAME), cache.patience)
    target = cache.folder / "sets" / hashlib.sha256(data).hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with cache.lock(target.with_suffix(".lock")):
        if not (target / SAMPLES_NAME).is_file():
            file = place.file(SAMPLES_NAME)
            with whole_folder(target) as aside:
                (aside / INDEX_NAME).write_bytes(data)
                with open(aside / SAMPLES_NAME, "wb") as out:
                    for piece in read_pieces(file, size_of(file, cache.patience), cache.patience):
                        out.write(piece)
                try:
                    verify_samples(load_index(aside, tars_elsewhere=True))
                except UserError as error:
                    reason = str(error).removeprefix(str(aside)).partition(";")[0]
                    raise RemoteError(f"{place.shown}{reason}; upload the set again") from None
    return load_index(target, tars_elsewhere=True)


class CachedSource:
    """Tars of a set that lies elsewhere, as files of this machine; the counterpart of `LocalSource`.

    The tar that was asked for last can't be removed before the next is asked for, so there is time to open it. A
    pickled source carries neither that nor its threads.

    Args:
        shards: of the set, for :meth:`prefetch`.
        folder: where the set is; None where every shard has a place of its own (`Shard.url`).
        cache: of this node. Shards whose place is a path are read there and not copied.
    """

    def __init__(self, shards: Sequence[Shard], folder: Folder | None, cache: ShardCache) -> None:
        self.shards = shards
        self._folder = folder
        self._cache = cache
        self._start()

    def _start(self) -> None:
        self._held: Any = None
        self._wanted: list[Shard] = []
        self._fetching: set[str] = set()
        self._num_threads = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "_folder": self._folder, "_cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def local_path(self, shard: Shard) -> Path:
        """A tar as a file on this machine, fetched first where it is not.

        Raises:
            UserError: it can't be had; one line with the shard and the URL it should have come from.
        """
        file = self.remote_file(shard)
        if file is None:
            return Path(shard.url)
        self.release()
        held = self._cache.held(shard, file)
        path = held.__enter__()
        self._held = held
        return path

    def release(self) -> None:
        """Let go of the tar that was asked for last."""
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(None, None, None)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Start to fetch the shards that will be needed next, soonest first, beside the caller.

        A later call replaces what an earlier one left waiting. At most half the cache is filled ahead, so that what
        is fetched is not removed before it is used. What fails is left to :meth:`local_path`, which tries again and
        reports it.
        """
        wanted, room = [], self._cache.limit_bytes // 2
        for number in numbers:
            shard = self.shards[number]
            room -= shard.num_bytes
            if room < 0:
                break
            if self._is_far(shard) and not self._cache.has(shard):
                wanted.append(shard)
        with self._lock:
            self._wanted = [shard for shard in wanted if shard.sha256 not in self._fetching]
            for _ in range(min(len(self._wanted), PREFETCH_THREADS - self._num_threads)):
                self._num_threads += 1
                # A daemon: no download may hold up the end of the process; its rest is removed by the next.
                threading.Thread(target=self._fetch_wanted, name="prefetch", daemon=True).start()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._num_threads -= 1
                    return
                shard = self._wanted.pop(0)
                self._fetching.add(shard.sha256)
            try:
                file = self.remote_file(shard)
                assert file is not None
                self._cache.fetch(shard, file)
            except Exception as error:  # whatever it is, the reader meets it where it can be reported
                log.info("prefetch: %s", error if isinstance(error, UserError) else type(error).__name__)
            finally:
                with self._lock:
                    self._fetching.discard(shard.sha256)

    def remote_file(self, shard: Shard) -> RemoteFile | None:
        """A tar where it lies; None if that is a path on this machine."""
        if not self._is_far(shard):
            return None
        return open_remote(shard.url) if self._folder is None else self._folder.file(shard.name)

    def _is_far(self, shard: Shard) -> bool:
        return self._folder is not None or is_url(shard.url)
