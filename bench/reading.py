"""Images a second from files in the page cache, as a training reads them: shuffled, with labels.

`raw_random_read`: one process, 32 px, uint8 pixels as .npy. Ours reads every image once in a fully random order,
checks its crc32 and puts it in its place of a batch; webdataset streams the very same tars in the order in which they
lie, undecoded and unshuffled. Ours must be 30 times as fast.

`decoded_32px` and `decoded_256px_jpeg`: batches of 256 uint8 images with their labels, shuffled, from as many loader
processes as there are cores. Every side stores the same JPEG files of quality 90; the peers decode by Pillow, their own
decoder (litdata's is torchvision's, which does not run here), we by simplejpeg. Ours must be 6 times as fast as the
fastest peer at 32 px and 1.5 times at 256 px. `..._same_decoder` gives the peers simplejpeg too: what is left is the
reading. `decoded_32px_raw` stores uncompressed pixels on every side, which is our default up to 64 px: .npy in tars for
us and webdataset, `ndarray` in MDS, arrays in litdata's chunks. Our batches come as (b, c, h, w), those of the peers as
(b, h, w, c), which spares them a transposition; we check each crc32, they don't.

The images are crops of scikit-learn's two photographs. A turn is one pass (four of ours), without the first eight
batches of each, in which workers start.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.peers import LOADERS, python_for
from bench.report import ROOT, Row, num_cores, run
from bench.sides import Side

ROUNDS = 5
NUM_IMAGES = {32: 30_000, 256: 4_000}
NAMES = ("ours", *LOADERS)


def make_images(folder: Path, px: int, count: int) -> None:
    """Crops of photographs at random places and scales, and labels."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.default_rng(px)
    pixels = np.lib.format.open_memmap(folder / f"{px}.npy", "w+", np.uint8, (count, px, px, 3))
    for number in range(count):
        photo = photos[number % 2]
        side = int(random.uniform(1.0, 400 / px) * px)
        left, top = random.integers(photo.width - side), random.integers(photo.height - side)
        pixels[number] = np.asarray(photo.resize((px, px), box=(left, top, left + side, top + side)))
    pixels.flush()
    np.save(folder / f"{px}.labels.npy", random.integers(0, 10, count))


class Loader(Side):
    """A loader's process, waiting for its turn."""

    def __init__(self, name: str, *arguments: object) -> None:
        super().__init__(name, "bench.loaders", name, *arguments, python=python_of(name))
        self.title = str(self.about["title"])
        self.rates: list[float] = []

    def turn(self) -> None:
        """One pass."""
        answer = self.take_turn()
        self.rates.append(answer["images"] / answer["seconds"])

    @property
    def median(self) -> float:
        """Images a second."""
        return statistics.median(self.rates)


def python_of(name: str) -> str:
    """The Python that has the side's packages."""
    return python_for(name) if name in LOADERS else sys.executable


def compare(bar: str, names: tuple[str, ...], target: float | None, *arguments: object) -> Row:
    """Rounds in which every side that runs takes a turn; ours against the fastest peer."""
    sides, notes = [], []
    for name in names:
        try:
            sides.append(Loader(name, *arguments))
        except RuntimeError as error:
            notes.append(f"left out: {error}")
            print(f"bench: {notes[-1]}", file=sys.stderr)
    for round_ in range(ROUNDS):
        for place in range(len(sides)):
            sides[(round_ + place) % len(sides)].turn()
    for side in sides:
        side.close()
    ours, *peers = sides
    if ours.name != "ours" or not peers:
        raise SystemExit(f"bench: nothing to compare: {'; '.join(notes)}")
    best = max(peers, key=lambda side: side.median)
    spread = [f"{s.title} {s.median:,.0f} ({min(s.rates):,.0f} to {max(s.rates):,.0f})" for s in sides]
    return Row(bar, ours.median, best.median, best.title, "images/s", target, "; ".join([*spread, *notes]))


def measure() -> list[Row]:
    """All rows."""
    workers = num_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for px, count in NUM_IMAGES.items():
            make_images(folder, px, count)
        for px, form in ((32, "raw"), (32, "jpeg"), (256, "jpeg")):
            for side in NAMES[1:]:
                command = [python_of(side), "-W", "ignore", "-m", "bench.loaders", side, str(folder), str(px), form]
                subprocess.run([*command, "write"], cwd=ROOT, check=False)
        return [
            compare("raw_random_read", ("ours", "webdataset"), 30.0, folder, 32, "raw", "raw"),
            compare("decoded_32px", NAMES, 6.0, folder, 32, "jpeg", workers),
            compare("decoded_32px_same_decoder", NAMES, None, folder, 32, "jpeg-simplejpeg", workers),
            compare("decoded_32px_raw", NAMES, None, folder, 32, "raw", workers),
            compare("decoded_256px_jpeg", NAMES, 1.5, folder, 256, "jpeg", workers),
            compare("decoded_256px_jpeg_same_decoder", NAMES, None, folder, 256, "jpeg-simplejpeg", workers),
        ]


if __name__ == "__main__":
    run(__file__, measure)
