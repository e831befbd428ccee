"""From a folder of images to finished shards, against `webdataset.ShardWriter` fed by Pillow.

`shard_32px`: 32-pixel JPEG files whose bytes are passed through. Both sides read every file, decode it to see that it
is whole, write it with its label and a JSON of its path and class into tars of 1,000, and flush the tars to the disk;
one process each, Python's start and imports left out. The peer lists the files, decodes with Pillow and hands the bytes
to ShardWriter. Ours is the stage `shard` as a user runs it, so beyond the equal work it looks for exact and near
duplicates, takes statistics of the pixels, hashes the tars, writes the index and draws the contact sheet. It decodes
plain JPEG files by simplejpeg, several times as fast as Pillow: a part of the ratio. `shard_32px_encoded`: the same
against Pillow images given to ShardWriter, which then encodes them, its usual way. `shard_32px_writer`: the writers
alone, the same records from memory. `shard_two_processes`: our stage on 128-pixel JPEG files brought to 64 pixels, raw,
in two processes against one, their start included. `shard_second_run`: the stage once more with 1 % new files, against
the run from nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

from bench.report import ROOT, Row, run

ROUNDS = 3
SMALL_IMAGES, LARGE_IMAGES = 20_000, 24_000
CLASSES = 10


def write_images(folder: Path, num_images: int, size: int, start: int = 0) -> None:
    """JPEG files of colour gradients with some noise, in ten classes."""
    rng = np.random.default_rng((num_images, size, start))
    for number in range(start, start + num_images):
        patch_ = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((size, size), 3)
        noisy = np.asarray(patch_).astype(np.int16) + rng.integers(-6, 7, (size, size, 3), dtype=np.int16)
        path = folder / f"class {number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


@contextlib.contextmanager
def project(folder: Path, images: Path, **changes: object) -> Iterator[None]:
    """A working folder for the stage: our params.yaml with `data.raw` and some keys of `shard` changed."""
    from ruamel.yaml import YAML

    folder.mkdir()
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text())
    params["data"]["raw"] = str(images)
    params["shard"].update(changes)
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def time_stage(processes: int) -> float:
    """Seconds of the stage `shard` in the current folder."""
    from pipeline.shard import main

    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with patch.dict(os.environ, PIPELINE_SHARD_PROCESSES=str(processes)), quiet[0], quiet[1]:
        start = time.perf_counter()
        main()
        return time.perf_counter() - start


def flush(path: str) -> None:
    """Have a file's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def time_peer(images: Path, target: Path, encode: bool) -> float:
    """Seconds of ShardWriter fed by Pillow; `encode` gives it images instead of the files' bytes."""
    import webdataset

    target.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        files = sorted(images.rglob("*.jpg"))
        labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in files}))}
        pattern = str(target / "%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=1000, maxsize=2**40, verbose=0, post=flush) as writer:
            for number, path in enumerate(files):
                data = path.read_bytes()
                image = Image.open(io.BytesIO(data)).convert("RGB")
                name = path.parent.name
                meta = {"path": f"{name}/{path.name}", "class": name}
                payload = image if encode else data
                writer.write({"__key__": f"{number:08d}", "jpg": payload, "cls": labels[name], "json": meta})
        return time.perf_counter() - start


def time_writers(images: Path, target: Path) -> tuple[float, float]:
    """Seconds of our writer and of ShardWriter for the same records, flushed."""
    import webdataset

    from pipeline.data.writer import ShardFile

    target.mkdir()
    records = [(path.read_bytes(), {"path": path.name, "class": path.parent.name}) for path in images.rglob("*.jpg")]
    start = time.perf_counter()
    for first in range(0, len(records), 1000):
        with ShardFile(target / f"{first}.tar") as file:
            for key, (data, meta) in enumerate(records[first : first + 1000], first):
                file.add(key, data, "jpg", 3, meta)
        flush(str(target / f"{first}.tar"))
    ours = time.perf_counter() - start
    start = time.perf_counter()
    with webdataset.ShardWriter(str(target / "%05d"), maxcount=1000, maxsize=2**40, verbose=0, post=flush) as writer:
        for key, (data, meta) in enumerate(records):
            writer.write({"__key__": f"{key:08d}", "jpg": data, "cls": 3, "json": meta})
    return ours, time.perf_counter() - start


def measure_small(folder: Path) -> list[Row]:
    """Pass-through of 32-pixel files."""
    images = folder / "small"
    write_images(images, SMALL_IMAGES, 32)
    seconds: dict[str, list[float]] = {"ours": [], "bytes": [], "encoded": [], "writer": [], "wds": []}
    work = folder / "work"
    for round_ in range(-1, ROUNDS):
        with project(work, images, image_size=32, channels=3, encoding="original"):
            took = {"ours": time_stage(1)}
        for side in ("bytes", "encoded"):
            took[side] = time_peer(images, work / side, side == "encoded")
        took["writer"], took["wds"] = time_writers(images, work / "writers")
        shutil.rmtree(work)
        if round_ >= 0:  # the first fills the page cache
            for side, value in took.items():
                seconds[side].append(value)
    rates = {side: SMALL_IMAGES / statistics.median(values) for side, values in seconds.items()}
    peer = f"webdataset {version('webdataset')} ShardWriter"
    least, most = min(seconds["ours"]), max(seconds["ours"])
    spread = f"{SMALL_IMAGES:,} files, median of {ROUNDS}; ours took {least:.2f} to {most:.2f} s"
    return [
        Row("shard_32px", rates["ours"], rates["bytes"], f"{peer}, bytes", "images/s", 8.0, spread),
        Row("shard_32px_encoded", rates["ours"], rates["encoded"], f"{peer}, Pillow images", "images/s"),
        Row("shard_32px_writer", rates["writer"], rates["wds"], peer, "images/s"),
    ]


def measure_large(folder: Path) -> list[Row]:
    """Two processes against one, and a second run against the first."""
    images, work = folder / "large", folder / "work"
    write_images(images, LARGE_IMAGES, 128)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    again = []
    num_new = LARGE_IMAGES // 100
    for round_ in range(-1, ROUNDS):
        for processes in (1, 2):
            with project(work, images, image_size=64, channels=3):
                took = time_stage(processes)
                if processes == 1:
                    write_images(images, num_new, 128, start=LARGE_IMAGES)
                    took_again = time_stage(1)
            for number in range(LARGE_IMAGES, LARGE_IMAGES + num_new):
                (images / f"class {number % CLASSES}" / f"{number:06d}.jpg").unlink(missing_ok=True)
            shutil.rmtree(work)
            if round_ >= 0:
                seconds[processes].append(took)
                if processes == 1:
                    again.append(took_again)
    one, two, second = (statistics.median(values) for values in (seconds[1], seconds[2], again))
    return [
        Row("shard_two_processes", LARGE_IMAGES / two, LARGE_IMAGES / one, "one process", "images/s", 1.7,
            f"{LARGE_IMAGES:,} files, medians of {ROUNDS}"),
        Row("shard_second_run", second, one, "from nothing", "s",
            note=f"{num_new:,} new files among {LARGE_IMAGES:,}; the tars are written anew, as keys move"),
    ]  # fmt: skip


def measure() -> list[Row]:
    """All rows, on files in a folder beside the project's, so on its disk."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-", suffix=".part") as folder:
        return [*measure_small(Path(folder)), *measure_large(Path(folder))]


if __name__ == "__main__":
    run(__file__, measure)
