"""Stage `shard`: the folder of images `data.raw` -> audited WebDataset shards with an index, and a report.

Run as `python -m pipeline.shard`. A class whose every image is refused keeps its name and number, so that labels do
not depend on damage to other files; it is named in a warning and counted as `num_empty_classes`.

What was found out about each file, and its payload, is kept in `PIPELINE_STATE/shard/<key>/`: a second run, after a
kill or with new files in the folder, only does what is missing. The output depends on the files and parameters alone,
never on that history, the number of processes or of nodes. See docs/sharding.md.

Where `data.raw` names tars made by others they are indexed instead, and stay where they are. See docs/data.md.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, features

from pipeline import paths
from pipeline.config import load_params
from pipeline.data.cache import ShardCache
from pipeline.data.catalogue import make_file_keys
from pipeline.data.contact import choose_examples, draw_contact_sheet, draw_sheet
from pipeline.data.duplicates import Duplicates, draw_held_out, find_duplicates, list_duplicates
from pipeline.data.examine import HEADER_DTYPE, RESULT_DTYPE, Form, auto_size, examine_files, survey_files
from pipeline.data.foreign import Indexed, index_foreign
from pipeline.data.index import Preparation, ShardIndex, load_index, save_index
from pipeline.data.listing import Found, Listing, list_images
from pipeline.data.pack import Tar, collect_tars, pack_tar, plan_tars
from pipeline.data.sources import open_shards
from pipeline.data.store import ShardStore
from pipeline.data.tally import ClassCount, Selection, count_classes, make_report, make_table, select
from pipeline.data.tars import list_tars, looks_foreign
from pipeline.data.work import Work
from pipeline.data.writer import describe_encoder
from pipeline.errors import UserError
from pipeline.lineage import source_sha256
from pipeline.machine import Machine, load_machine
from pipeline.runtime.files import locked_folder, save_json, save_text, sha256_json, whole_file, whole_folder
from pipeline.runtime.process import run_stage
from pipeline.sections import Params

RAW_UP_TO_PX = 64
KEPT_SECONDS = 7 * 24 * 3600  # for which results for other parameters are kept


def main() -> None:
    params, machine = load_params(paths.PARAMS), load_machine()
    worker, raw = machine.shard_worker, params.data.raw
    if worker and "DVC_STAGE" in os.environ:
        raise UserError("PIPELINE_SHARD_WORKER is set, but a worker makes no outputs: use it with "
                        "`python -m pipeline.shard` on each node, and then start `dvc repro` without it")  # fmt: skip
    if looks_foreign(raw):
        return index_tars(params, machine)
    listing = list_images(raw)
    gc.freeze()  # a tuple for each file: the collector need not go through them again and again
    work = Work(raw, listing, make_file_keys(raw, listing.images), count_processes(machine), worker)
    form = resolve(params, work, machine.state / "shard")
    state = machine.state / "shard" / make_key(raw, asdict(form))
    with locked_folder(state / "workers" / f"{worker[0]}-of-{worker[1]}" if worker else state):
        os.utime(state)
        results = work.complete("check", partial(examine_files, form=form), state / "results", RESULT_DTYPE)
        if worker and (num_missing := len(results.missing(work.keys))):
            print(f"worker {worker[0]}/{worker[1]}: done; {num_missing:,} files are with others. When all are done, "
                  "start them once more to pack the tars, or `dvc repro` for all that is left")  # fmt: skip
            return
        selection = select(listing, work.keys, results)
        check_refused(selection, params.shard.max_broken_share)
        duplicates = find_duplicates(selection.rows, form.channels, form.image_size, params.shard.near_duplicate_bits)
        held_out = draw_held_out(selection.rows["digest"], duplicates.groups, params.shard.held_out_share)
        tars = plan(params, work, form, state, selection, held_out)
        tasks = work.part_of([*tars[False], *tars[True]])
        num_packed = sum(work.run("pack", pack_tar, tasks, len(selection.images)))
        print(f"pack: {num_packed:,} of {len(tasks):,} tars written", flush=True)
        if worker:
            return
        index = publish(form, listing.classes, tars)
        draw = partial(draw_contact_sheet, raw, form, selection.images)
        report(listing, form, index, selection, duplicates, held_out, draw)
        results.prune(work.keys)
        forget_others(state)


def count_processes(machine: Machine) -> int:
    """As many as asked for, else one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return machine.shard_processes or cores


def index_tars(params: Params, machine: Machine) -> None:
    """The stage for tars made by others: `shards` gets an index that points to them, with encoding `original`."""
    config = params.shard
    if config.encoding not in ("auto", "original"):
        raise UserError("params.yaml: shard.encoding must be auto: data.raw names tars, which are used as they are")
    if config.held_out_share:
        raise UserError("params.yaml: shard.held_out_share must be 0: data.raw names tars, which are used as they are; "
                        "leave some out of data.raw instead")  # fmt: skip
    if machine.shard_worker:
        raise UserError(
            "PIPELINE_SHARD_WORKER is set, but data.raw names tars, which are not dealt to workers: unset it"
        )
    cache = ShardCache(machine.cache, machine.cache_bytes)
    selection = Selection([], np.empty(0, RESULT_DTYPE), [], [])

    def check(parts: list[Indexed]) -> None:
        nonlocal selection
        named = any(sample.class_ is not None for part in parts for sample in part.accepted)
        images = [Found(s.name, str(s.class_) if named else None) for part in parts for s in part.accepted]
        refused = sorted(row for part in parts for row in part.refused)
        selection = Selection(images, np.concatenate([part.results for part in parts]), [], refused)
        check_refused(selection, config.max_broken_share)

    index, _ = index_foreign(
        list_tars(params.data.raw), paths.SHARDS, image_size=config.image_size, channels=config.channels,
        class_key=config.class_key, cache=cache, preparation=Preparation(config.resize_filter, config.crop),
        processes=count_processes(machine), check=check,
    )  # fmt: skip
    form = Form(index.image_size, 1 if index.channels == 1 else 3, index.encoding, config.jpeg_quality,
                config.resize_filter, config.crop)  # fmt: skip
    duplicates = find_duplicates(selection.rows, form.channels, form.image_size, config.near_duplicate_bits)
    listing, held_out = Listing(selection.images, index.classes, [], 0, 0), np.zeros(index.num_images, np.bool_)
    store = ShardStore(*open_shards(paths.SHARDS, "", cache))
    examples = [
        (name, list(store.read(np.array(ids))[0].transpose(0, 2, 3, 1)))
        for name, ids in choose_examples(selection.images)
    ]
    report(listing, form, index, selection, duplicates, held_out, partial(draw_sheet, examples=examples))


def make_key(raw: str, form: dict[str, Any]) -> str:
    """The name of a folder of results: equal if what decides about a file's result, other than the file, is."""
    libraries = {name: str(features.version(name)) for name in ("jpg", "zlib", "webp", "libtiff")}
    versions = {"Pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, **libraries}
    code = source_sha256("pipeline.data.examine")
    return sha256_json({"raw": raw, "form": form, "versions": versions, "code": code})[:16]


def resolve(params: Params, work: Work, state: Path) -> Form:
    """The form of the images, with every `auto` decided from the data."""
    config = params.shard
    size, channels, encoding = config.image_size, config.channels, str(config.encoding)
    if size == "auto" or channels == "auto":
        if work.worker:
            raise UserError("PIPELINE_SHARD_WORKER is set: give shard.image_size and shard.channels as numbers in "
                            "params.yaml, since for `auto` every worker would open every file")  # fmt: skip
        folder = state / f"survey-{make_key(work.raw, {})}"
        with locked_folder(folder):
            os.utime(folder)
            headers = work.complete("survey", survey_files, folder / "headers", HEADER_DTYPE)
            rows, _ = headers.find(work.keys)
            headers.prune(work.keys)
        readable = rows["reason"] == 0
        size = auto_size(rows["side"][readable]) if size == "auto" else size
        if channels == "auto":
            channels = 3 if work.has_colour(np.flatnonzero(readable & ~rows["grey"]).tolist()) else 1
    if encoding == "auto":
        encoding = "raw" if size <= RAW_UP_TO_PX else "png"
    return Form(size, channels, encoding, config.jpeg_quality, config.resize_filter, config.crop)


def check_refused(selection: Selection, max_broken_share: float) -> None:
    """Write the list of refused files, then fail if they are too many."""
    refused = selection.refused
    save_text(paths.REFUSED, make_table([("path", "reason"), *refused]))
    num_tried = len(selection.images) + len(refused)
    if selection.images and len(refused) <= max_broken_share * num_tried:
        return
    first = "; ".join(f"{path} ({reason})" for path, reason in refused[:3])
    raise UserError(
        f"{len(refused):,} of {num_tried:,} files refused, more than shard.max_broken_share = {max_broken_share:g} "
        f"allows: {first}; all are in {paths.REFUSED}; repair or remove them, or raise the limit"
    )


def plan(
    params: Params, work: Work, form: Form, state: Path, selection: Selection, held_out: NDArray[np.bool_]
) -> dict[bool, list[Tar]]:
    """The tars of the training set (False) and of what is held out (True)."""
    config = params.shard
    if held_out.all():
        raise UserError(f"shard.held_out_share = {config.held_out_share:g} leaves none of the {len(held_out):,} images "
                        "for training; lower it")  # fmt: skip
    folder = state / f"tars-{source_sha256('pipeline.data.pack')[:8]}"
    where = (folder, work.raw, state / "results", form.encoding, config.shard_images, work.listing.classes)
    return {away: plan_tars(*where, selection.part(held_out == away)) for away in (False, True)}


def publish(form: Form, classes: tuple[str, ...], tars: dict[bool, list[Tar]]) -> ShardIndex:
    """Put the finished tars into the stage's output, with an index each for the training set and what is held out."""
    how = Preparation(form.resize_filter, form.crop, describe_encoder(form.encoding, form.jpeg_quality))
    with whole_folder(paths.SHARDS) as aside:
        for away in (False, True):
            if tars[away]:
                folder = aside / paths.HELD_OUT.name if away else aside
                folder.mkdir(exist_ok=True)
                shards, samples = collect_tars(tars[away], folder)
                save_index(folder, image_size=form.image_size, channels=form.channels, encoding=form.encoding,
                           classes=classes, shards=shards, samples=samples, preparation=how)  # fmt: skip
    shutil.rmtree(tars[False][0].folder, ignore_errors=True)
    return load_index(paths.SHARDS)


def report(
    listing: Listing,
    form: Form,
    index: ShardIndex,
    selection: Selection,
    duplicates: Duplicates,
    held_out: NDArray[np.bool_],
    draw: Callable[[str], Image.Image],
) -> None:
    """Write the report, `draw` the contact sheet under a title, and print what a person must know."""
    classes = count_classes(listing, selection, held_out)
    numbers = make_report(listing, form, index, selection, duplicates, held_out, classes)
    save_text(paths.DUPLICATES, make_table(list_duplicates(selection.images, duplicates)))
    save_text(paths.CLASSES, make_table([ClassCount._fields, *classes]))
    title = (
        f"{numbers['num_images']:,} images of {numbers['image_size']} px, {numbers['channels']} channels, "
        f"{numbers['num_classes']} classes in {numbers['num_shards']} shards; {numbers['num_held_out']:,} held out, "
        f"{numbers['num_refused']:,} refused, {numbers['num_skipped']:,} skipped, "
        f"{numbers['num_duplicates']:,} duplicates and {numbers['num_near_duplicates']:,} near ones"
    )
    with whole_file(paths.CONTACT_SHEET) as aside:
        draw(title).save(aside, "PNG")
    save_json(paths.SHARD_REPORT, numbers)
    for row in classes:
        if row.images == 0:
            why = f"all of it is held out, see {paths.CLASSES}" if row.held_out else f"see {paths.REFUSED}"
            print(f"warning: class {row.name!r} has no image to train on: {why}", file=sys.stderr)
    print(title)


def forget_others(state: Path) -> None:
    """Delete results for other parameters that no run has used for a week."""
    for other in state.parent.iterdir():
        if time.time() - other.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(other, ignore_errors=True)


if __name__ == "__main__":
    run_stage(main)
