"""What is known of files from earlier runs: one row a file, found again by a key of its name and its state on disk.

A catalogue is a folder of packs. A pack is the work of one task: `NAME.npz` (the rows) and, where there is any,
`NAME.bin` (the payloads, one after the other). Packs are whole or absent and never change, so several processes and
machines may add to one folder, and what was not finished is simply missing. They are a cache: a lost pack costs time.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.listing import Found
from pipeline.errors import UserError
from pipeline.runtime.files import whole_file

KEY_BYTES = 16
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")  # never decoded, so that no trailing zero is lost
UNFINISHED_SECONDS = 3600  # others may be writing what is younger


def make_file_keys(raw: str | Path, images: Sequence[Found]) -> NDArray[np.bytes_]:
    """One key a file, `(N,)` of 16 bytes: of its relative path, size, inode, and times of change (data and inode).

    A file that is edited, replaced or renamed gets another key; so does a copy, whose content is then read again.
    """
    prefix = os.path.join(raw, "")
    keys = []
    for found in images:
        try:
            s = os.stat(prefix + found.path)
            state = f"{found.path}\0{s.st_size} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}"
        except OSError as error:  # gone since the listing: whoever opens it will say so
            state = f"{found.path}\0{error.errno}"
        keys.append(hashlib.blake2b(state.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES).digest())
    return np.frombuffer(b"".join(keys), KEY_DTYPE)


def save_pack(folder: Path, name: str, rows: NDArray[np.void], reasons: list[str]) -> None:
    """Add a pack to a catalogue. `rows` has a field `file` of KEY_DTYPE and may have `reason`: 0, or n for the n-th of
    `reasons`. Its payloads, if any, lie in `NAME.bin` already: the rows are what makes a pack exist."""
    with whole_file(folder / f"{name}.npz", durable=False) as aside, open(aside, "wb") as file:
        np.savez(file, rows=rows, reasons=np.array(reasons, dtype=np.str_))


def name_pack(keys: NDArray[np.bytes_]) -> str:
    """The name of the pack with the rows of these files."""
    return hashlib.blake2b(keys.tobytes(), digest_size=KEY_BYTES).hexdigest()


class Catalogue:
    """All rows of a folder of packs, as they are now.

    Args:
        folder: need not exist.
        dtype: of the rows; packs with others are not looked at.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.void]) -> None:
        self.folder = folder
        self.packs: list[str] = []
        self.reasons: list[str] = [""]
        parts, numbers = [np.empty(0, dtype)], [np.empty(0, np.int64)]
        for path in sorted(folder.glob("*.npz")):
            try:
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
                    rows, reasons = content["rows"], content["reasons"].tolist()
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # torn when the machine went down: its files count as unknown
            if rows.dtype != dtype:
                continue
            if reasons:
                rows["reason"][rows["reason"] > 0] += len(self.reasons) - 1
                self.reasons += reasons
            numbers.append(np.full(len(rows), len(self.packs)))
            self.packs.append(path.stem)
            parts.append(rows)
        rows = np.concatenate(parts)
        order = np.argsort(rows["file"], kind="stable")
        self._rows, self._pack_numbers = rows[order], np.concatenate(numbers)[order]
        self._keys = np.ascontiguousarray(self._rows["file"])

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Places in `keys` that have no row, ascending."""
        if not len(self):
            return np.arange(len(keys))
        places = np.searchsorted(self._keys, keys).clip(max=len(self) - 1)
        return np.flatnonzero(self._keys[places] != keys)

    def find(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The rows of files, and for each the number of its pack in `packs`.

        Raises:
            UserError: some are missing.
        """
        if num_missing := len(self.missing(keys)):
            raise UserError(f"{self.folder}: {num_missing:,} results are gone; did someone delete them? Run again")
        places = np.searchsorted(self._keys, keys)
        return self._rows[places], self._pack_numbers[places]

    def prune(self, keys: NDArray[np.bytes_]) -> None:
        """Delete the packs that hold none of these files, and what a kill has left unfinished an hour ago or more."""
        _, used = self.find(keys)
        keep = {self.packs[number] for number in np.unique(used)}
        known = set(self.packs)
        for path in self.folder.iterdir():
            old = time.time() - path.stat().st_mtime > UNFINISHED_SECONDS
            if path.stem not in keep and (path.stem in known or old):
                path.unlink(missing_ok=True)
