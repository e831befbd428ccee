"""One loader of images in a process of its own: `python -m bench.loaders SIDE FOLDER PX FORM WORKERS`.

FORM is `raw` (uint8 pixels as .npy or the peer's own array type) or `jpeg` (the same JPEG bytes on every side); with
`-simplejpeg` the peers decode by simplejpeg as we do. Each side delivers batches of 256 uint8 images with their labels
in a shuffled order, from WORKERS loader processes. Protocol as in bench/worker.py; an answer is a number of images and
the seconds they took, after the first batches of a pass. `write` in place of WORKERS makes the side's files first.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import time
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bench.peers import LOADERS

BATCH = 256
SHARD_IMAGES = 2000
SKIPPED = 8  # batches at the start of a pass: workers start, buffers fill
Decoder = Callable[[bytes], np.ndarray]


def decode_by_pillow(payload: bytes) -> np.ndarray:
    """What a peer's own decoder does."""
    return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))


def decode_by_simplejpeg(payload: bytes) -> np.ndarray:
    """Our decoder, for a peer."""
    import simplejpeg

    return simplejpeg.decode_jpeg(payload)


class Images:
    """The images that every side stores, as bench/reading.py left them in a folder."""

    def __init__(self, folder: Path, px: int, form: str) -> None:
        self.labels = np.load(folder / f"{px}.labels.npy")
        self.form, self.px = form, px
        self._pixels = np.load(folder / f"{px}.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def payload(self, number: int) -> Any:
        """Pixels as an array, or JPEG bytes."""
        pixels = np.ascontiguousarray(self._pixels[number])
        if self.form == "raw":
            return pixels
        memory = io.BytesIO()
        Image.fromarray(pixels).save(memory, "JPEG", quality=90)
        return memory.getvalue()


def write_tars(images: Images, folder: Path) -> None:
    """By webdataset's own writer, then indexed: the very same tars are read by webdataset and by us."""
    import tarfile

    from webdataset import TarWriter

    from pipeline.data.index import SAMPLE_DTYPE, save_index
    from pipeline.data.shards import Shard
    from pipeline.runtime.files import sha256_file

    suffix = "npy" if images.form == "raw" else "jpg"
    shards, rows = [], []
    for start in range(0, len(images), SHARD_IMAGES):
        path = folder / f"{len(shards):05d}.tar"
        crcs = {}
        with TarWriter(str(path), encoder=False) as tar:
            for number in range(start, min(start + SHARD_IMAGES, len(images))):
                payload = images.payload(number)
                if images.form == "raw":
                    memory = io.BytesIO()
                    np.lib.format.write_array(memory, payload, version=(1, 0))
                    payload = memory.getvalue()
                label = str(images.labels[number]).encode()
                tar.write({"__key__": f"{number:08d}", suffix: payload, "cls": label})
                crcs[f"{number:08d}.{suffix}"] = (int(images.labels[number]), zlib.crc32(payload))
        with tarfile.open(path) as tar:
            rows += [(m.offset_data, m.size, len(shards), *crcs[m.name]) for m in tar if m.name in crcs]
        shards.append(Shard(path.name, len(crcs), path.stat().st_size, sha256_file(path)))
    save_index(folder, image_size=images.px, channels=3, encoding=images.form, classes=tuple(map(str, range(10))),
               shards=shards, samples=np.array(rows, SAMPLE_DTYPE))  # fmt: skip


def load_ours(folder: Path, workers: int, decode: Decoder | None) -> Iterator[torch.Tensor]:
    """Fully random order, every crc32 checked."""
    from pipeline.data.index import load_index
    from pipeline.data.loader import iterate_batches
    from pipeline.data.order import RandomOrder

    index = load_index(folder)
    steps = range(4 * index.num_images // BATCH)  # four passes: one is soon over
    order = RandomOrder(index.num_images, seed=0)
    for batch in iterate_batches([index], order, batch_size=BATCH, steps=steps, share=slice(0, BATCH), workers=workers):
        yield batch.images


def load_webdataset(folder: Path, workers: int, decode: Decoder | None) -> Iterator[torch.Tensor]:
    """Shards shuffled, then a buffer of 1,000; batches are made in the workers, as its documentation advises."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    suffix = "jpg" if decode else "npy"
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000)
    if decode is decode_by_simplejpeg:
        data = data.decode(webdataset.handle_extension("jpg", decode))
    else:
        data = data.decode("rgb8")
    data = data.to_tuple(suffix, "cls").batched(BATCH)
    for images, _ in DataLoader(data, batch_size=None, num_workers=workers):
        yield images


@cache
def import_streaming() -> tuple[Any, Any]:
    """mosaicml-streaming without its packages' __init__, which import torchvision and transformers for parts that no
    one uses here: its own files, unchanged."""
    spec = importlib.util.find_spec("streaming")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    place = Path(next(iter(spec.submodule_search_locations)))
    for name, folder in (("streaming", place), ("streaming.base", place / "base")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from streaming.base.dataset import StreamingDataset
    from streaming.base.format.mds.writer import MDSWriter

    return StreamingDataset, MDSWriter


def write_mds(images: Images, folder: Path) -> None:
    """MDS shards: arrays of one shape, or JPEG bytes."""
    kind = f"ndarray:uint8:{images.px},{images.px},3" if images.form == "raw" else "bytes"
    with import_streaming()[1](out=str(folder), columns={"image": kind, "label": "int"}) as writer:
        for number in range(len(images)):
            writer.write({"image": images.payload(number), "label": int(images.labels[number])})


class Decoding:
    """Collation of (payload, label) items whose payload may have to be decoded; runs in the workers."""

    def __init__(self, decode: Decoder | None) -> None:
        self.decode = decode

    def __call__(self, items: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        items = list(items)
        images = [self.decode(item["image"]) if self.decode else item["image"] for item in items]
        return torch.from_numpy(np.stack(images)), torch.tensor([item["label"] for item in items])


def load_mosaicml(folder: Path, workers: int, decode: Decoder | None) -> Iterator[torch.Tensor]:
    """Its default shuffle, from local shards."""
    data = import_streaming()[0](local=str(folder), shuffle=True, batch_size=BATCH)
    for images, _ in DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=Decoding(decode)):
        yield images


def write_litdata(images: Images, folder: Path) -> None:
    """Chunks of 64 MB: arrays or JPEG bytes."""
    from litdata.streaming import Cache

    cache = Cache(str(folder), chunk_bytes=64_000_000)
    for number in range(len(images)):
        cache[number] = {"image": images.payload(number), "label": int(images.labels[number])}
    cache.done()
    cache.merge()


def load_litdata(folder: Path, workers: int, decode: Decoder | None) -> Iterator[torch.Tensor]:
    """Shuffled, by its own loader."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder), shuffle=True)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, collate_fn=Decoding(decode), prefetch_factor=2
    )  # torch's default, which the others have
    for images, _ in loader:
        yield images


SIDES = {
    "ours": (write_tars, load_ours),
    "webdataset": (write_tars, load_webdataset),
    "mosaicml-streaming": (write_mds, load_mosaicml),
    "litdata": (write_litdata, load_litdata),
}


def time_pass(batches: Iterator[torch.Tensor], px: int) -> tuple[int, float]:
    """Images and seconds of one pass, its first batches left out."""
    for _ in range(SKIPPED):
        next(batches)
    images, start = 0, time.perf_counter()
    for batch in batches:
        assert batch.dtype == torch.uint8
        assert sorted(batch.shape[1:]) == [3, px, px]
        images += len(batch)
    return images, time.perf_counter() - start


def read_ours(folder: Path) -> tuple[int, float]:
    """Every image and label once in a random order, in this process: bytes, crc32, pixels in place."""
    from pipeline.data.index import load_index
    from pipeline.data.order import RandomOrder
    from pipeline.data.store import ShardStore

    index = load_index(folder)
    store, order = ShardStore(index), RandomOrder(index.num_images, seed=0)
    store.read(order.images_at(np.arange(BATCH)))
    start = time.perf_counter()
    for first in range(0, index.num_images, BATCH):
        store.read(order.images_at(np.arange(first, first + BATCH)))
    return -(-index.num_images // BATCH) * BATCH, time.perf_counter() - start


def read_webdataset(folder: Path) -> tuple[int, float]:
    """Every sample once as it stands in the tars, undecoded: the least that stock webdataset can do."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    start = time.perf_counter()
    count = sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))
    return count, time.perf_counter() - start


def main() -> None:
    """Answer until standard input ends."""
    side, folder, px, form, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    stored = form.removesuffix("-simplejpeg")
    kind = "tars" if side in ("ours", "webdataset") else side
    own = folder / f"{px}-{stored}-{kind}"
    if workers == "write":
        own.mkdir()
        SIDES[side][0](Images(folder, px, stored), own)
        return
    if workers == "raw":
        work = {"ours": read_ours, "webdataset": read_webdataset}[side]
        turn = lambda: work(own)  # noqa: E731
    else:
        decode = {"raw": None, "jpeg": decode_by_pillow}.get(form, decode_by_simplejpeg)
        turn = lambda: time_pass(SIDES[side][1](own, int(workers), decode), px)  # noqa: E731
    title = side if side == "ours" else f"{LOADERS[side][1]} {version(LOADERS[side][1])}"
    print(json.dumps({"title": title}), file=out)
    for _ in sys.stdin:
        images, seconds = turn()
        print(json.dumps({"images": images, "seconds": seconds}), file=out, flush=True)


if __name__ == "__main__":
    main()
