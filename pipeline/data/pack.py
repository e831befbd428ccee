"""Accepted images to finished tars: each tar a task of its own, named by all that decides about its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipeline.data.audit import Refused, read_file
from pipeline.data.examine import NOT_COPIED
from pipeline.data.listing import Found
from pipeline.data.shards import Shard
from pipeline.data.tally import Selection
from pipeline.data.writer import KEY_DIGITS, SUFFIXES, ShardFile
from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file, whole_file


@dataclass(frozen=True)
class Tar:
    """What goes into one tar, image by image, and where the payloads are.

    `rows` are of RESULT_DTYPE; `packs` are names of packs in the folder `payloads`.
    """

    folder: Path
    raw: str
    payloads: Path
    first_key: int
    key_digits: int
    encoding: str
    images: tuple[Found, ...]
    labels: tuple[int | None, ...]
    rows: NDArray[np.void]
    packs: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """Equal if and only if the tar's bytes are, up to the accidents of a 128-bit hash."""
        content = [self.first_key, self.key_digits, self.encoding, self.images, self.labels]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16)
        for field in ("file", "digest", "size", "crc32"):
            digest.update(self.rows[field].tobytes())
        return digest.hexdigest()


def plan_tars(
    folder: Path, raw: str, payloads: Path, encoding: str, shard_images: int, classes: Sequence[str], chosen: Selection
) -> list[Tar]:
    """Deal images out to tars of `shard_images`, with keys from 0 on that all have one width."""
    key_digits = max(KEY_DIGITS, len(str(len(chosen.images) - 1)))
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(classes)}
    tars = []
    for start in range(0, len(chosen.images), shard_images):
        part = slice(start, start + shard_images)
        images = tuple(chosen.images[part])
        labels = tuple(label_of.get(found.class_name) for found in images)
        where = (chosen.rows[part], tuple(chosen.packs[part]))
        tars.append(Tar(folder, raw, payloads, start, key_digits, encoding, images, labels, *where))
    return tars


def pack_tar(tar: Tar) -> bool:
    """Write a tar and, when it is whole, beside it what the index needs to know. Says whether there was work to do.

    A tar that is there from an earlier run is read and kept if its sha256 is right.

    Raises:
        UserError: a payload or a raw file is not what it was when it was checked.
    """
    if (found := load_finished(tar)) and sha256_file(tar.folder / f"{tar.name}.tar") == found[0].sha256:
        return False
    name = tar.name
    tar.folder.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(tar.folder / f"{name}.tar", durable=False) as aside,
        ShardFile(aside, key_digits=tar.key_digits) as file,
    ):
        for place, payload in enumerate(_read_payloads(tar)):
            path, class_name = tar.images[place]
            suffix = SUFFIXES.get(tar.encoding) or os.path.splitext(path)[1][1:].lower()
            meta = {"path": path} if class_name is None else {"path": path, "class": class_name}
            file.add(tar.first_key + place, payload, suffix, tar.labels[place], meta)
    with whole_file(tar.folder / f"{name}.npz", durable=False) as aside, open(aside, "wb") as out:
        np.savez(out, rows=file.rows, shard=np.array(json.dumps(asdict(file.describe("")))))
    return True


def _read_payloads(tar: Tar) -> Iterator[bytes]:
    """The payloads in order, each compared with the crc32 of when it was checked."""
    opened: dict[str, int] = {}
    try:
        for place, (offset, size, expected) in enumerate(tar.rows[["offset", "size", "crc32"]].tolist()):
            if offset == NOT_COPIED:
                where, remedy = os.path.join(tar.raw, tar.images[place].path), "changed while the stage ran"
                try:
                    payload = read_file(where)
                except Refused:
                    payload = b""
            else:
                where, remedy = tar.packs[place], f"in {tar.payloads} is damaged: delete that folder"
                if where not in opened:
                    opened[where] = os.open(tar.payloads / f"{where}.bin", os.O_RDONLY | os.O_CLOEXEC)
                payload = os.pread(opened[where], size, offset)
            if crc32(payload) != expected:
                raise UserError(f"{where} {remedy}; run again")
            yield payload
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is gone; run again") from None
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def load_finished(tar: Tar) -> tuple[Shard, NDArray[np.void]] | None:
    """A tar's entry in the index, still without a name, and its rows; None where it is not finished."""
    try:
        with open(tar.folder / f"{tar.name}.npz", "rb") as file, np.load(file, allow_pickle=False) as content:
            shard = Shard(**json.loads(str(content["shard"])))
            rows = content["rows"]
        whole = (tar.folder / f"{tar.name}.tar").stat().st_size == shard.num_bytes
        return (shard, rows) if whole else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None


def collect_tars(tars: Sequence[Tar], target: Path) -> tuple[list[Shard], NDArray[np.void]]:
    """Put finished tars into the folder of a set, as links where the file system can, and return the set's tables."""
    shards, parts = [], []
    for number, tar in enumerate(tars):
        finished = load_finished(tar)
        if finished is None:
            raise UserError(f"{tar.folder / tar.name}.tar is gone; run again")
        shard, rows = finished
        rows["shard"] = number
        name = f"{number:05d}.tar"
        source = tar.folder / f"{tar.name}.tar"
        try:
            os.link(source, target / name)
        except OSError:
            shutil.copyfile(source, target / name)
        shards.append(Shard(name, shard.num_images, shard.num_bytes, shard.sha256))
        parts.append(rows)
    return shards, np.concatenate(parts)
