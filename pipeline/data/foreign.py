"""WebDataset shards made by others, used where they are: each is read once, checked, and gets rows in an index of ours.

Nothing is extracted or copied: names in a tar are only names, and the index points at the bytes of each image. A sample
is what stock webdataset makes of it: files that lie side by side and whose names agree up to the first dot. What it
loses without a word is an error here (a damaged tar), or refused with a reason (a sample).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.data.audit import Refused, is_grey, to_pixels
from pipeline.data.cache import ShardCache
from pipeline.data.decode import AS_AUDITED
from pipeline.data.examine import RESULT_DTYPE, auto_size, measure_pixels
from pipeline.data.index import SAMPLE_DTYPE, Preparation, ShardIndex, load_index, save_index
from pipeline.data.npy import open_original
from pipeline.data.remote import is_url, open_remote, read_pieces, size_of
from pipeline.data.shards import Shard
from pipeline.data.tars import Group, Member, name_shards, read_groups
from pipeline.errors import UserError
from pipeline.runtime.files import sha256_file, whole_folder

T = TypeVar("T")
MOST_CLASSES = 1_000_000
MOST_META_BYTES = 1 << 20


class Accepted(NamedTuple):
    """A sample that is used: its name with that of the tar, and its class as given there."""

    name: str
    class_: int | str | None


@dataclass
class Indexed:
    """What one tar gave: rows of the index, as many `accepted` and `results`, what their pixels are (of RESULT_DTYPE,
    without a file, offset and size), and `(tar and name, reason)` of what was refused."""

    shard: Shard
    rows: NDArray[np.void]
    accepted: list[Accepted]
    results: NDArray[np.void]
    refused: list[tuple[str, str]]


@contextmanager
def at_hand(tar: str, cache: ShardCache, known: Shard | None = None) -> Iterator[tuple[Path, Shard]]:
    """A tar as a file of this machine, and its size and sha256; one from elsewhere stays in the cache for the training.

    Args:
        tar: path or URL.
        cache: of this node.
        known: what an earlier call gave, so that it need not be fetched again.

    Raises:
        UserError: not to be had.
    """
    if not is_url(tar):
        if not Path(tar).is_file():
            raise UserError(f"{tar}: not found; mend the pattern, or bring the file there")
        yield Path(tar), known or Shard(Path(tar).name, 0, Path(tar).stat().st_size, sha256_file(tar), tar)
        return
    file = open_remote(tar)
    if known is not None:
        with cache.held(known, file) as path:
            yield path, known
        return
    size, digest = size_of(file, cache.patience), hashlib.sha256()
    cache.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = tempfile.mkstemp(dir=cache.folder, suffix=".part")
    try:
        with open(descriptor, "wb") as out:
            for piece in read_pieces(file, size, cache.patience):
                out.write(piece)
                digest.update(piece)
            out.flush()
            os.fsync(out.fileno())
        shard = Shard(PurePosixPath(tar).name, 0, size, digest.hexdigest(), tar)
        cache.adopt(Path(name), shard)
        with cache.held(shard, file) as path:
            yield path, shard
    finally:
        Path(name).unlink(missing_ok=True)


def survey_tar(tar: str, cache: ShardCache) -> tuple[Shard, Counter[int], bool]:
    """How many images have which shorter side, and whether one has colour. Refusals are left to :func:`index_tar`."""
    sides: Counter[int] = Counter()
    colour = False
    with at_hand(tar, cache) as (path, shard), open(path, "rb") as file:
        for group in read_groups(path, tar):
            try:
                member = _only_image(group)
                image = open_original(os.pread(file.fileno(), member.size, member.offset))
            except Refused:
                continue
            sides[min(image.size)] += 1
            colour = colour or not is_grey(image)
    return shard, sides, colour


def index_tar(
    tar: str,
    known: Shard | None,
    cache: ShardCache,
    image_size: int,
    channels: int,
    class_key: str | None,
    preparation: Preparation,
) -> Indexed:
    """Check every sample of a tar and make its rows, with `shard` 0 and `label` -1 for now.

    Raises:
        UserError: the tar can't be had or is damaged.
    """
    rows, accepted, results, refused = [], [], [], []
    with at_hand(tar, cache, known) as (path, shard), open(path, "rb") as file:
        for group in read_groups(path, tar):
            try:
                member = _only_image(group)
                payload = os.pread(file.fileno(), member.size, member.offset)
                image = open_original(payload)
                class_ = _class_of(group, file.fileno(), class_key)
            except Refused as refusal:
                refused.append((f"{shard.name}/{group.key}", str(refusal)))
                continue
            rows.append((member.offset, member.size, 0, -1, zlib.crc32(payload)))
            accepted.append(Accepted(f"{shard.name}/{member.name}", class_))
            pixels = to_pixels(image, image_size, channels, preparation.resize_filter, preparation.crop)
            results.append(_describe(pixels, image.size))
    table = np.array(rows, dtype=SAMPLE_DTYPE)
    found = np.concatenate([np.empty(0, RESULT_DTYPE), *results])
    return Indexed(replace(shard, num_images=len(rows)), table, accepted, found, refused)


def _describe(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.void]:
    row = np.zeros(1, RESULT_DTYPE)
    row["width"], row["height"] = size
    row["digest"] = hashlib.sha256(pixels.data).digest()[:16]
    row["sums"], row["squares"], row["phash"] = measure_pixels(pixels[None])
    return row


def _only_image(group: Group) -> Member:
    if group.problem:
        raise Refused(group.problem)
    images = group.images()
    if not images:
        raise Refused(f"no image beside {', '.join(sorted(group.files)) or 'nothing'}")
    if len(images) > 1:
        some = ", ".join(member.name for member in images[:3])
        raise Refused(f"{len(images)} images under one key ({some}): a key ends at the first dot")
    if not 0 < images[0].size < 2**32:
        raise Refused("empty file" if not images[0].size else "4 GiB or more")
    return images[0]


def _class_of(group: Group, descriptor: int, class_key: str | None) -> int | str | None:
    if class_key is None:
        return None
    member = group.files.get("cls" if class_key == "cls" else "json")
    if member is None:
        if class_key == "cls":
            return None  # an error only if others have one
        raise Refused("no json, so no class")
    if member.size > MOST_META_BYTES:
        raise Refused(f"{member.name} is larger than {MOST_META_BYTES:,} bytes")
    try:
        text = os.pread(descriptor, member.size, member.offset).decode("utf-8").strip()
        value = text if class_key == "cls" else json.loads(text)[class_key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused(f"{member.name} holds no {class_key if class_key != 'cls' else 'text'}") from None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise Refused(f"class {str(value)[:50]!r} is neither a whole number nor a text")
    if isinstance(value, int) and not 0 <= value < MOST_CLASSES:
        raise Refused(f"class {value} is not in [0, {MOST_CLASSES:,})")
    return value


def number_classes(indexed: list[Indexed]) -> tuple[str, ...]:
    """Turn the classes of all rows into labels, in place, and refuse rows without one if others have one.

    Whole numbers stay what they are, and classes between them that no image has exist too, so that labels agree with
    those of other parts of the same set; texts are sorted.

    Returns:
        The names by label; empty if no row has a class.
    """
    known = {sample.class_ for part in indexed for sample in part.accepted if sample.class_ is not None}
    if not known:
        return ()
    numbers = [value for value in known if isinstance(value, int)]
    names = list(map(str, range(max(numbers) + 1))) if len(numbers) == len(known) else sorted(map(str, known))
    labels = {name: label for label, name in enumerate(names)}
    for part in indexed:
        kept = [place for place, sample in enumerate(part.accepted) if sample.class_ is not None]
        lost = [sample.name for sample in part.accepted if sample.class_ is None]
        part.refused.extend((name, "no class, while other samples have one") for name in lost)
        part.rows, part.results = part.rows[kept], part.results[kept]
        part.accepted = [part.accepted[place] for place in kept]
        part.rows["label"] = [labels[str(sample.class_)] for sample in part.accepted]
        part.shard = replace(part.shard, num_images=len(kept))
    return tuple(names)


def index_foreign(
    tars: list[str],
    out: str | Path,
    *,
    image_size: int | Literal["auto"],
    channels: int | Literal["auto"],
    class_key: str | None,
    cache: ShardCache,
    preparation: Preparation = AS_AUDITED,
    processes: int = 1,
    check: Callable[[list[Indexed]], None] = lambda parts: None,
) -> tuple[ShardIndex, list[Indexed]]:
    """Index tars where they are: `out` gets index.json and samples.npy, encoding `original`, and no image.

    Args:
        tars: as from :func:`pipeline.data.tars.list_tars`.
        out: folder, replaced if it exists.
        image_size, channels: what images are brought to when they are read; `auto` as in the stage `shard`.
        class_key: see :func:`index_tar`.
        cache: of this node, for tars behind URLs.
        preparation: how images are brought to their form when they are read.
        processes: tars that are looked at side by side; the result is the same.
        check: is shown what was found before anything is written, and may raise.

    Returns:
        The index, and for each tar what was found, refused samples included.

    Raises:
        UserError: a tar can't be had or is damaged, or no sample is usable. No folder is left then.
    """
    known: list[Shard | None] = [None] * len(tars)
    if image_size == "auto" or channels == "auto":
        surveys = _each(partial(survey_tar, cache=cache), (tars,), processes, "survey")
        known = [shard for shard, _, _ in surveys]
        sides = sum((sides for _, sides, _ in surveys), Counter[int]())
        image_size = auto_size(np.array([*sides.elements()], np.uint32)) if image_size == "auto" else image_size
        channels = (3 if any(colour for *_, colour in surveys) else 1) if channels == "auto" else channels
    look = partial(
        index_tar, cache=cache, image_size=image_size, channels=channels, class_key=class_key, preparation=preparation
    )
    indexed = _each(look, (tars, known), processes, "index")
    classes = number_classes(indexed)
    check(indexed)
    names = name_shards(tars)
    used = [
        (replace(part.shard, name=name), part.rows) for name, part in zip(names, indexed, strict=True) if len(part.rows)
    ]
    if not used:
        reasons = "; ".join(f"{name} ({reason})" for part in indexed for name, reason in part.refused[:2])[:300]
        raise UserError(f"{tars[0]}{' and others' * (len(tars) > 1)}: no usable image: {reasons or 'nothing inside'}")
    for number, (_, rows) in enumerate(used):
        rows["shard"] = number
    with whole_folder(out) as aside:
        save_index(
            aside, image_size=image_size, channels=channels, encoding="original", classes=classes,
            shards=[shard for shard, _ in used], samples=np.concatenate([rows for _, rows in used]),
            preparation=preparation,
        )  # fmt: skip
    return load_index(out), indexed


def _each(work: Callable[..., T], arguments: tuple[Sequence[object], ...], processes: int, label: str) -> list[T]:
    """Results in the order of the arguments, from several processes where that is asked for."""
    bar = partial(tqdm, total=len(arguments[0]), desc=label, unit="tar", disable=None)
    if processes == 1:
        return list(bar(map(work, *arguments)))
    # Spawned: a fork would copy the locks of the threads that fsspec keeps.
    with ProcessPoolExecutor(min(processes, len(arguments[0])), mp_context=get_context("spawn")) as pool:
        return list(bar(pool.map(work, *arguments)))
