"""What the report says of a set: counts, sizes, statistics of the pixels, duplicates, classes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.catalogue import Catalogue
from pipeline.data.duplicates import Duplicates
from pipeline.data.examine import Form
from pipeline.data.index import ShardIndex
from pipeline.data.listing import Found, Listing

CHANNEL_NAMES = {1: ("grey",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class Selection:
    """What was found out about each file, in the order of the listing: the accepted, and why the others are not.

    `rows` are of RESULT_DTYPE, `packs` names for each image the pack in the catalogue with its payload, `refused` is
    `(path, reason)`, sorted.
    """

    images: list[Found]
    rows: NDArray[np.void]
    packs: list[str]
    refused: list[tuple[str, str]]

    def part(self, chosen: NDArray[np.bool_]) -> Selection:
        """Some of the accepted."""
        places = np.flatnonzero(chosen).tolist()
        images, packs = [self.images[place] for place in places], [self.packs[place] for place in places]
        return replace(self, images=images, rows=self.rows[chosen], packs=packs)


class ClassCount(NamedTuple):
    """A row of metrics/classes.csv; `images` are those to train on."""

    label: int
    name: str
    images: int
    held_out: int
    refused: int


def select(listing: Listing, keys: NDArray[np.bytes_], results: Catalogue) -> Selection:
    """Put the results into the order of the listing, and the refused apart."""
    rows, numbers = results.find(keys)
    good = rows["reason"] == 0
    away = zip(np.flatnonzero(~good).tolist(), rows["reason"][~good].tolist(), strict=True)
    refused = [*listing.refused, *((listing.images[place].path, results.reasons[reason]) for place, reason in away)]
    images = [listing.images[place] for place in np.flatnonzero(good).tolist()]
    return Selection(images, rows[good], [results.packs[n] for n in numbers[good].tolist()], sorted(refused))


def make_table(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV. A name that is no valid text on this system keeps its bytes as \\udcXX."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8")


def count_classes(listing: Listing, selection: Selection, held_out: NDArray[np.bool_]) -> list[ClassCount]:
    """The classes by label."""
    counts = {name: [0, 0, 0] for name in listing.classes}
    for found, away in zip(selection.images, held_out.tolist(), strict=True):
        if found.class_name is not None:
            counts[found.class_name][away] += 1
    accepted = set(selection.images)
    for found in listing.images:
        if found.class_name is not None and found not in accepted:
            counts[found.class_name][2] += 1
    return [ClassCount(label, name, *counts[name]) for label, name in enumerate(listing.classes)]


def make_report(
    listing: Listing,
    form: Form,
    index: ShardIndex,
    selection: Selection,
    duplicates: Duplicates,
    held_out: NDArray[np.bool_],
    classes: Sequence[ClassCount],
) -> dict[str, Any]:
    """The numbers of metrics/shard.json; `num_images` and what follows from it are those to train on, statistics are of
    all accepted images."""
    counts = [row.images for row in classes]
    shorter = np.minimum(selection.rows["width"], selection.rows["height"])
    return {
        "num_images": index.num_images,
        "num_held_out": int(held_out.sum()),
        "num_refused": len(selection.refused),
        "num_skipped": listing.num_skipped,
        "skipped": {"hidden": listing.num_hidden, "not_images": listing.num_other},
        "num_duplicates": duplicates.num_exact,
        "num_near_duplicates": duplicates.num_near,
        "largest_duplicate_group": duplicates.largest_group,
        "num_enlarged": int((shorter < form.image_size).sum()),
        "image_size": index.image_size,
        "channels": index.channels,
        "num_shards": len(index.shards),
        "num_bytes": sum(shard.num_bytes for shard in index.shards),
        "num_classes": index.num_classes,
        "num_empty_classes": sum(count == 0 for count in counts),
        "class_images_min": min(counts, default=0),
        "class_images_max": max(counts, default=0),
        **summarise_pixels(selection.rows, form),
    }


def summarise_pixels(rows: NDArray[np.void], form: Form) -> dict[str, Any]:
    """Mean and standard deviation of each channel over all pixels, in 0..255, and the files' own sizes in px."""
    num_pixels = len(rows) * form.image_size**2
    names = CHANNEL_NAMES[form.channels]
    # Exact integers up to the division: the result does not depend on the order of summation.
    sums = [sum(rows["sums"][:, channel].tolist()) for channel in range(form.channels)]
    squares = [sum(rows["squares"][:, channel].tolist()) for channel in range(form.channels)]
    variances = [num_pixels * q - s * s for s, q in zip(sums, squares, strict=True)]
    sizes = {}
    for side in ("width", "height"):
        ordered = np.sort(rows[side])
        sizes[side] = {"min": int(ordered[0]), "median": int(ordered[(len(rows) - 1) // 2]), "max": int(ordered[-1])}
    return {
        "channel_mean": {name: s / num_pixels for name, s in zip(names, sums, strict=True)},
        "channel_std": {name: math.sqrt(v) / num_pixels for name, v in zip(names, variances, strict=True)},
        "file_px": sizes,
    }
