"""Tars made by others: which ones a source names, and what lies in each, with nothing lost in silence."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.data.remote import is_url, list_remote, redact
from pipeline.errors import UserError

IMAGE_SUFFIXES = frozenset(("jpg", "jpeg", "png", "webp", "npy"))
KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # webdataset's rule: cut at the base name's first dot
BLOCK = tarfile.BLOCKSIZE


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass
class Group:
    """The files of one sample by suffix; `problem` says why it can't be used, where that is known from names alone."""

    key: str
    files: dict[str, Member] = field(default_factory=dict)
    problem: str = ""

    def images(self) -> list[Member]:
        """Those that are images."""
        return [file for suffix, file in self.files.items() if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]


def list_tars(source: str) -> list[str]:
    """The tars that a source names, in the order of their samples.

    Args:
        source: a folder or URL of `.tar` files, sorted by name; a path or URL of one; either with braces, such as
            `s3://bucket/{00000..00099}.tar`; or a `.txt` file with one of these a line (`#` begins a comment).

    Returns:
        Paths as given (relative ones stay so) and URLs.

    Raises:
        UserError: there are none, one is named twice, or a URL holds a password or a token.
    """
    if source.endswith(".txt") and not is_url(source):
        lines = [line.partition("#")[0].strip() for line in Path(source).read_text(encoding="utf-8").splitlines()]
    else:
        lines = [source]
    tars = [tar for line in lines if line for tar in _expand(line)]
    if not tars:
        raise UserError(
            f"{redact(source)}: no .tar files; name a folder, a pattern like a/{{00000..00099}}.tar, or a list"
        )
    twice = [tar for tar, count in Counter(tars).items() if count > 1]
    if twice:
        raise UserError(f"{redact(source)}: {twice[0]} is named twice; its samples would count double")
    return tars


def _expand(line: str) -> Iterator[str]:
    from braceexpand import braceexpand

    if is_url(line) and redact(line) != line:
        raise UserError(
            f"{redact(line)}: the URL holds a password or token, which would be written into the index; give it in the "
            "environment or in the provider's usual file"
        )
    try:
        places = list(braceexpand(line))
    except ValueError:
        raise UserError(f"{line}: unbalanced braces") from None
    for place in places:
        if place.endswith(".tar"):
            yield place
        elif is_url(place):
            yield from list_remote(place, "*.tar")
        else:
            yield from sorted(str(path) for path in Path(place).glob("*.tar"))


def looks_foreign(raw: str) -> bool:
    """Whether `data.raw` is a source of tars rather than a folder of images."""
    if is_url(raw) or raw.endswith((".tar", ".txt")):
        return True
    return Path(raw).is_dir() and any(Path(raw).glob("*.tar"))


def name_shards(tars: list[str]) -> list[str]:
    """A name for each tar: that of its file, numbered where two are equal."""
    names = [PurePosixPath(tar.partition("?")[0] if is_url(tar) else tar).name for tar in tars]
    return names if len(set(names)) == len(names) else [f"{place:05d}-{name}" for place, name in enumerate(names)]


def read_groups(path: Path, shown: str) -> Iterator[Group]:
    """The samples of a tar, in its order.

    Raises:
        UserError: the tar is damaged: no archive, cut short, a broken header, or something behind its end. Python's
            tarfile, and with it webdataset, takes most of these for the end.
    """
    current: Group | None = None
    seen: set[str] = set()
    last = "its start"
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    last = f"{member.name!r}"
                    for group in _assign(member, current, seen):
                        if group is not current and current is not None:
                            yield current
                        current = group
                end = tar.offset
        except tarfile.TarError as error:
            raise UserError(f"{shown}: damaged after {last} ({error}); fetch it again, or leave it out") from None
        if current is not None:
            yield current
        _check_end(file.fileno(), end, shown, last)


def _assign(member: tarfile.TarInfo, current: Group | None, seen: set[str]) -> Iterator[Group]:
    """The group that a member belongs to, new or the current one; none for what is no part of a sample."""
    name = member.name
    if member.isdir() or re.search(r"(^|/)__[^/]*__($|/)", name):  # the second is webdataset's own metadata
        return
    parts = KEY_AND_SUFFIX.fullmatch(name)
    if parts is None:
        if PurePosixPath(name).suffix.lower()[1:] in IMAGE_SUFFIXES:
            yield Group(name, problem="its name begins with a dot, so it has no key")
        return
    key, suffix = parts[1], parts[2].lower()
    if current is None or current.key != key:
        current = Group(key)
        if key in seen:
            current.problem = "its key was there before; the files of a sample must lie side by side"
        seen.add(key)
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        current.problem = "its name leaves the folder: absolute, or with `..`"
    elif not member.isreg() or member.issparse():
        current.problem = f"{name} is no regular file"
    elif suffix in current.files:
        current.problem = f"two files for {suffix} under one key"
    current.files[suffix] = Member(name, member.offset_data, member.size)
    yield current


def _check_end(descriptor: int, end: int, shown: str, last: str) -> None:
    """An archive ends in zeros. Anything else means that the reader stopped before the data did."""
    block = os.pread(descriptor, BLOCK, end)
    if len(block) < BLOCK:
        raise UserError(f"{shown}: cut short after {last}: it has no end-of-archive marker; fetch it again")
    if block.count(0) != BLOCK:
        raise UserError(f"{shown}: damaged header at byte {end:,}, after {last}; fetch it again, or leave it out")
    while rest := os.pread(descriptor, 1 << 20, end):
        if rest.count(0) != len(rest):
            raise UserError(
                f"{shown}: more data behind its end at byte {end:,}, after {last}: two tars in one file, or a header "
                "that was wiped; split or fetch it again"
            )
        end += len(rest)
