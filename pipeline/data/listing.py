"""What lies in a folder of images: files to try, files refused by name or kind, files skipped. Nothing is opened.

Every file under the folder is exactly one of the three, so that the numbers add up.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
# Companions of images: captions, tables, metadata, Windows' Thumbs.db, DVC's pointers.
OTHER_SUFFIXES = frozenset(
    (".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml", ".html", ".pdf", ".ini", ".db", ".dvc")
)
OTHER_NAMES = frozenset(("license", "readme"))


class Found(NamedTuple):
    """A file by its path relative to the raw folder (posix) and its class, None in a flat folder."""

    path: str
    class_name: str | None


@dataclass(frozen=True)
class Listing:
    """What lies in a raw folder. `images` is sorted by class, then path; `classes` is empty for a flat folder."""

    images: list[Found]
    classes: tuple[str, ...]
    refused: list[tuple[str, str]]
    num_hidden: int
    num_other: int

    @property
    def num_skipped(self) -> int:
        return self.num_hidden + self.num_other


def list_images(raw: str | Path) -> Listing:
    """Sort the files under a folder into images to try, refused (path, reason) and skipped.

    The sub-folders that hold images are the classes, files deeper down belong to the first level; without them the set
    is unconditional. Independent of the file system's order. Skipped: hidden files, files in hidden folders, and known
    companions of images (text, tables, metadata). Refused: links that leave the folder, links to folders, what is no
    regular file, and unknown suffixes.

    Raises:
        UserError: the folder is missing or holds no images, or images lie both beside and inside sub-folders.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise UserError(f"{raw} not found: put your images there, or set data.raw to the folder that holds them")
    root = raw.resolve()
    paths: list[str] = []
    refused: list[tuple[str, str]] = []
    num_hidden = num_other = 0
    for path, entry in _walk(raw):
        name = entry.name
        suffix = name[name.rfind(".") :] if "." in name else ""
        if path.startswith(".") or "/." in path:
            num_hidden += 1
        elif reason := _wrong_kind(entry, root):
            refused.append((path, reason))
        elif suffix.lower() in IMAGE_SUFFIXES:
            paths.append(path)
        elif suffix.lower() in OTHER_SUFFIXES or name.lower() in OTHER_NAMES:
            num_other += 1
        else:
            kind = suffix if len(suffix) > 1 else "no suffix"
            refused.append((path, f"{kind}: not one of {' '.join(sorted(IMAGE_SUFFIXES))}"))
    if not paths:
        raise UserError(f"{raw}: no images ({' '.join(sorted(IMAGE_SUFFIXES))}); put some there, or set data.raw")
    flat = [path for path in paths if "/" not in path]
    if flat and len(flat) < len(paths):
        inside = next(path for path in paths if "/" in path)
        raise UserError(
            f"{raw}: images both beside sub-folders ({min(flat)}) and inside them ({inside}); "
            "move all into sub-folders, one a class, or all into one flat folder"
        )
    images = sorted((Found(path, None if flat else path.split("/")[0]) for path in paths), key=_place)
    classes = tuple(sorted({found.class_name for found in images if found.class_name is not None}))
    return Listing(images, classes, sorted(refused), num_hidden, num_other)


def _place(found: Found) -> tuple[str, str]:
    return found.class_name or "", found.path


def _walk(raw: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative posix paths of all that is no folder; a link to a folder is one entry and is not followed."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(raw / folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{folder}{entry.name}/")
                    else:
                        yield folder + entry.name, entry
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; make the folder readable or move it away") from None


def _wrong_kind(entry: os.DirEntry[str], root: Path) -> str | None:
    """Why an entry is no regular file of the raw folder, judged without opening it; None if it is one."""
    try:
        if not entry.is_symlink():
            return None if entry.is_file(follow_symlinks=False) else "not a regular file"
        target = Path(entry.path).resolve(strict=True)
        if not target.is_relative_to(root):
            return "link that leaves the folder; copy the file instead"
        if target.is_dir():
            return "link to a folder; not followed"
        return None if stat.S_ISREG(target.stat().st_mode) else "not a regular file"
    except (OSError, RuntimeError):
        return "link to nothing"
