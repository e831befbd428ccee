"""Stage `shard`: the folder of images `data.raw` -> audited WebDataset shards with an index, and a report.

Run as `python -m pipeline.shard`. A class whose every image is refused keeps its name and number, so that labels do
not depend on damage to other files; it is named in a warning and counted as `num_empty_classes`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline import paths
from pipeline.config import Params, ShardParams, load_params
from pipeline.data.audit import Found, Listing, Refused, list_images, open_image, survey, to_pixels
from pipeline.data.cache import ShardCache
from pipeline.data.foreign import Indexed, index_foreign
from pipeline.data.index import ShardIndex
from pipeline.data.tars import list_tars, looks_foreign
from pipeline.data.writer import Sample, write_shards
from pipeline.errors import UserError
from pipeline.machine import load_machine
from pipeline.runtime.files import save_json, save_text
from pipeline.runtime.process import run_stage

RAW_UP_TO_PX = 64
CHANNEL_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}


@dataclass
class Tally:
    """Running counts and exact integer sums over the accepted images. Keeps 16 bytes an image to find duplicates."""

    class_counts: dict[str, int]
    refused: list[tuple[str, str]]
    num_images: int = 0
    num_enlarged: int = 0
    num_duplicates: int = 0
    sums: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)

    def add(self, found: Found, pixels: NDArray[np.uint8], enlarged: bool) -> None:
        """Count an accepted image."""
        self.num_images += 1
        self.num_enlarged += enlarged
        if found.class_name is not None:
            self.class_counts[found.class_name] += 1
        digest = hashlib.blake2b(pixels.data, digest_size=16).digest()
        self.num_duplicates += digest in self.digests
        self.digests.add(digest)
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.int64)
        sums, squares = values.sum(axis=0).tolist(), (values**2).sum(axis=0).tolist()
        self.sums = [a + b for a, b in zip(self.sums or [0] * len(sums), sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares or [0] * len(sums), squares, strict=True)]


def read_pixels(raw: Path, found: Found, image_size: int, channels: int) -> tuple[NDArray[np.uint8], bool]:
    """One file as pixels, and whether it had to be enlarged. Pure: depends on the file and the arguments alone."""
    image = open_image(raw / found.path)
    return to_pixels(image, image_size, channels), min(image.size) < image_size


def accept(raw: Path, listing: Listing, tally: Tally, image_size: int, channels: int) -> Iterator[Sample]:
    """The samples of all acceptable files in order, one at a time; refusals and counts go to `tally`."""
    labels = {name: label for label, name in enumerate(listing.classes)}
    for found in tqdm(listing.images, desc="shard", unit="img", disable=None):
        try:
            pixels, enlarged = read_pixels(raw, found, image_size, channels)
        except Refused as refusal:
            tally.refused.append((found.path, str(refusal)))
            continue
        tally.add(found, pixels, enlarged)
        meta = {"path": found.path} if found.class_name is None else {"path": found.path, "class": found.class_name}
        yield Sample(pixels, None if found.class_name is None else labels[found.class_name], meta)


def check_refused(tally: Tally, max_broken_share: float) -> None:
    """Write the list of refused files, then fail if they are too many."""
    tally.refused.sort()
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows([("path", "reason"), *tally.refused])
    # A name that is no valid text on this system keeps its bytes as \udcXX.
    save_text(paths.REFUSED, text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8"))
    num_tried = tally.num_images + len(tally.refused)
    if tally.num_images and len(tally.refused) <= max_broken_share * num_tried:
        return
    first = "; ".join(f"{path} ({reason})" for path, reason in tally.refused[:3])
    raise UserError(
        f"{len(tally.refused):,} of {num_tried:,} files refused, more than shard.max_broken_share = "
        f"{max_broken_share:g} allows: {first}; all are in {paths.REFUSED}; repair or remove them, or raise the limit"
    )


def checked(samples: Iterator[Sample], tally: Tally, max_broken_share: float) -> Iterator[Sample]:
    """The same samples, and the check at their end: too many refusals leave no shards behind."""
    yield from samples
    check_refused(tally, max_broken_share)


def make_report(index: ShardIndex, listing: Listing, tally: Tally) -> dict[str, Any]:
    """The numbers of metrics/shard.json. Channel statistics are over accepted pixels, in 0..255."""
    num_pixels = tally.num_images * index.image_size**2
    names = CHANNEL_NAMES[index.channels]
    # Exact integers up to the division: the result does not depend on the order of summation.
    variances = [num_pixels * q - s * s for s, q in zip(tally.sums, tally.squares, strict=True)]
    counts = tally.class_counts.values()
    return {
        "num_images": index.num_images,
        "num_refused": len(tally.refused),
        "num_skipped": listing.num_skipped,
        "skipped": {"hidden": listing.num_hidden, "not_images": listing.num_other},
        "num_duplicates": tally.num_duplicates,
        "num_enlarged": tally.num_enlarged,
        "image_size": index.image_size,
        "channels": index.channels,
        "num_shards": len(index.shards),
        "num_bytes": sum(shard.num_bytes for shard in index.shards),
        "num_classes": index.num_classes,
        "num_empty_classes": sum(count == 0 for count in counts),
        "class_images_min": min(counts, default=0),
        "class_images_max": max(counts, default=0),
        "channel_mean": {name: s / num_pixels for name, s in zip(names, tally.sums, strict=True)},
        "channel_std": {name: math.sqrt(v) / num_pixels for name, v in zip(names, variances, strict=True)},
    }


def resolve(params: ShardParams, raw: Path, listing: Listing) -> tuple[int, int, str]:
    """Image size, channels and encoding with every `auto` decided from the data."""
    size, channels = params.image_size, params.channels
    if size == "auto" or channels == "auto":
        bar = tqdm(listing.images, desc="survey", unit="img", disable=None)
        auto_size, auto_channels = survey(raw, bar)
        size = auto_size if size == "auto" else size
        channels = auto_channels if channels == "auto" else channels
    encoding: str = params.encoding
    if encoding == "auto":
        encoding = "raw" if size <= RAW_UP_TO_PX else "png"
    return size, channels, encoding


def index_tars(params: Params) -> None:
    """The stage for tars made by others: `shards` gets an index that points to them, with encoding `original`."""
    if params.shard.encoding != "auto":
        raise UserError("params.yaml: shard.encoding must be auto: data.raw names tars, which are used as they are")
    machine = load_machine()
    tally = Tally({}, [])

    def check(parts: list[Indexed]) -> None:
        tally.refused = [row for part in parts for row in part.refused]
        tally.num_images = sum(len(part.rows) for part in parts)
        accepted = [sample for part in parts for sample in part.accepted]
        tally.num_enlarged = sum(sample.is_enlarged for sample in accepted)
        tally.num_duplicates = len(accepted) - len({sample.digest for sample in accepted})
        tally.sums = [sum(channel) for channel in zip(*(sample.sums for sample in accepted), strict=True)]
        tally.squares = [sum(channel) for channel in zip(*(sample.squares for sample in accepted), strict=True)]
        check_refused(tally, params.shard.max_broken_share)

    index, _ = index_foreign(
        list_tars(params.data.raw), paths.SHARDS, image_size=params.shard.image_size, channels=params.shard.channels,
        class_key=params.shard.class_key, cache=ShardCache(machine.cache, machine.cache_bytes),
        processes=len(os.sched_getaffinity(0)), check=check,
    )  # fmt: skip
    if index.num_classes:
        counts = np.bincount(index.labels, minlength=index.num_classes)
        tally.class_counts = dict(zip(index.classes, counts.tolist(), strict=True))
    save_json(paths.SHARD_REPORT, make_report(index, Listing([], index.classes, [], 0, 0), tally))
    print(f"{index.num_images:,} images in {len(index.shards)} tars of others, read as {index.image_size} px, "
          f"{index.channels} channels, {index.num_classes} classes; {len(tally.refused):,} refused")  # fmt: skip


def main() -> None:
    params = load_params(paths.PARAMS)
    if looks_foreign(params.data.raw):
        return index_tars(params)
    raw = Path(params.data.raw)
    listing = list_images(raw)
    image_size, channels, encoding = resolve(params.shard, raw, listing)
    tally = Tally(class_counts=dict.fromkeys(listing.classes, 0), refused=list(listing.refused))
    samples = accept(raw, listing, tally, image_size, channels)
    index = write_shards(
        paths.SHARDS,
        checked(samples, tally, params.shard.max_broken_share),
        image_size=image_size,
        channels=channels,
        encoding=encoding,
        classes=listing.classes,
        shard_images=params.shard.shard_images,
    )
    save_json(paths.SHARD_REPORT, make_report(index, listing, tally))
    for name, count in tally.class_counts.items():
        if count == 0:
            print(f"warning: class {name!r} has no readable image, see {paths.REFUSED}", file=sys.stderr)
    print(
        f"{index.num_images:,} images of {image_size} px, {channels} channels, {index.num_classes} classes in "
        f"{len(index.shards)} shards; {len(tally.refused):,} refused, {listing.num_skipped:,} skipped"
    )


if __name__ == "__main__":
    run_stage(main)
