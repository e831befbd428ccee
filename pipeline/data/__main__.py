"""Look at a shard set, check it, or index tars made by others: `python -m pipeline.data show | verify | index`."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline import paths
from pipeline.build.training import build_order
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.foreign import Indexed, index_foreign
from pipeline.data.inspection import describe, draw_sheet, find_damage
from pipeline.data.sources import open_sets, open_shards
from pipeline.data.store import MixedStore, ShardStore
from pipeline.data.tars import list_tars
from pipeline.errors import UserError
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import save_text, whole_file
from pipeline.runtime.process import run_stage

MOST_SHOWN = 10_000


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run one command."""
    given = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace, Machine], None] = given.run
    run(given, load_machine())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    place = {"nargs": "?", "default": "", "help": "folder or URL, dvc:// for the DVC remote (default: as in training)"}

    one = commands.add_parser("show", help="a contact sheet of a range of the order, and its statistics")
    one.add_argument("place", **place)  # type: ignore[arg-type]
    one.add_argument("--epoch", type=_count, default=0, help="which pass over the set (default 0)")
    one.add_argument("--start", type=_count, default=0, help="first place in the epoch (default 0)")
    one.add_argument("--count", type=_count, default=100, help=f"images, at most {MOST_SHOWN:,} (default 100)")
    one.add_argument("--out", type=Path, default=Path("sheet.png"), help="the picture (default sheet.png)")
    one.add_argument("--seed", type=_count, help="of the order (default: train.seed of params.yaml)")
    one.set_defaults(run=show)

    one = commands.add_parser("verify", help="compare every shard with its sha256 and every image with its crc32")
    one.add_argument("place", **place)  # type: ignore[arg-type]
    one.set_defaults(run=verify)

    one = commands.add_parser("index", help="make an index of tars made by others, which stay where they are")
    one.add_argument("source", help="folder, tar, pattern like s3://bucket/{00000..00099}.tar, or a .txt list of them")
    one.add_argument("out", type=Path, help="folder for index.json and samples.npy")
    one.add_argument(
        "--image-size", type=_count_or_auto, default="auto", help="px when read (default auto: at most 64)"
    )
    one.add_argument("--channels", type=_count_or_auto, choices=(1, 3, "auto"), default="auto")
    one.add_argument("--class-key", default="cls", help="cls, or a key in .json; empty for none (default cls)")
    one.add_argument("--processes", type=_count, default=1, help="tars looked at side by side (default 1)")
    one.set_defaults(run=index)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def _count_or_auto(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _cache(machine: Machine) -> ShardCache:
    return ShardCache(machine.cache, machine.cache_bytes)


def show(given: argparse.Namespace, machine: Machine) -> None:
    """Draw some images in the order in which training sees them, and say what they are."""
    if not 0 < given.count <= MOST_SHOWN:
        raise UserError(f"--count is {given.count}, expected 1 to {MOST_SHOWN:,}")
    params = load_params()
    if given.seed is not None:
        params = params.model_copy(update={"train": params.train.model_copy(update={"seed": given.seed})})
    mixed = [] if given.place else [entry.shards for entry in params.order.mix or ()]
    indexes, sources = open_sets(mixed or [paths.SHARDS], given.place or machine.shards, _cache(machine))
    num_images = sum(index.num_images for index in indexes)
    if given.start >= num_images:
        raise UserError(f"--start is {given.start:,}, but an epoch has {num_images:,} images")
    start = given.epoch * num_images + given.start
    ids = build_order(params, indexes).images_at(np.arange(start, start + given.count))
    images, labels = MixedStore([ShardStore(*pair) for pair in zip(indexes, sources, strict=True)]).read(ids)
    with whole_file(given.out) as aside:
        Image.fromarray(draw_sheet(images)).save(aside, "PNG")
    print("\n".join(describe(indexes, ids, images, labels)))
    print(f"{given.count:,} images from place {given.start:,} of epoch {given.epoch} on, row by row: {given.out}")


def verify(given: argparse.Namespace, machine: Machine) -> None:
    """Read every byte of a set; one line for each shard that is not what the index says.

    Raises:
        SystemExit: 1 if there are any.
    """
    place = given.place or machine.shards
    index, source = open_shards(paths.SHARDS, place, _cache(machine), whole=False)
    damaged = 0
    with tqdm(total=sum(s.num_bytes for s in index.shards), unit="B", unit_scale=True, disable=None) as bar:
        for number in range(len(index.shards)):
            problem = find_damage(index, source, number, _cache(machine).patience, bar.update)
            if problem:
                damaged += 1
                bar.write(problem, file=sys.stdout)
    verdict = f"{damaged:,} damaged" if damaged else f"all as in the index {index.sha256[:16]}"
    print(f"{len(index.shards):,} shards, {index.num_images:,} images: {verdict}")
    if damaged:
        sys.exit(1)


def index(given: argparse.Namespace, machine: Machine) -> None:
    """Index tars where they are."""
    refused = given.out.with_name(given.out.name + ".refused.csv")
    made, parts = index_foreign(
        list_tars(given.source), given.out, image_size=given.image_size, channels=given.channels,
        class_key=given.class_key or None, cache=_cache(machine), processes=max(1, given.processes),
        check=partial(save_refused, refused),
    )  # fmt: skip
    num_refused = sum(len(part.refused) for part in parts)
    print(f"{made.num_images:,} images in {len(made.shards)} tars, {made.num_classes} classes, read as "
          f"{made.image_size} px with {made.channels} channels; {num_refused:,} refused, see {refused}")  # fmt: skip


def save_refused(path: Path, parts: list[Indexed]) -> None:
    """Write the table of samples that are not used, and why."""
    text = io.StringIO()
    rows = sorted(row for part in parts for row in part.refused)
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rows])
    save_text(path, text.getvalue().encode("utf-8", "backslashreplace").decode("utf-8"))


if __name__ == "__main__":
    run_stage(main)
