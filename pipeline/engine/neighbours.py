"""The real images nearest to samples, by pixels and by features: whether a model has learnt pictures by heart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipeline.data.pixels import make_grid
from pipeline.engine.collect import ImageReader, spread
from pipeline.engine.tables import Row

SHOWN = 3  # neighbours of a sample
_NEAREST_ROWS, _SPREAD_ROWS = 5, 5
_CHUNK = 512
_CELL_PX, _GAP_PX, _TEXT_PX, _LABEL_PX = 64, 10, 14, 46


class Nearest(NamedTuple):
    """Of each sample the `SHOWN` nearest real images, nearest first: (m, k) int64 ids and float64 distances."""

    ids: NDArray[np.int64]
    distances: NDArray[np.float64]


@dataclass(frozen=True)
class Neighbours:
    """Samples and the real images nearest to them.

    Attributes:
        samples: (m,) int64 ids.
        by_pixels: Euclidean, of pixels in [0, 1] averaged down to 16 px.
        by_features: Euclidean, of the extractor's features.
        memorised: (m,) bool: nearer to a real image, by pixels, than that image is to any other real one.
    """

    samples: NDArray[np.int64]
    by_pixels: Nearest
    by_features: Nearest
    memorised: NDArray[np.bool_]


@torch.no_grad()
def find_nearest(queries: Tensor, pool: Tensor, ids: NDArray[np.int64]) -> Nearest:
    """The nearest of (n, d) `pool`, whose images are `ids`, to each of (m, d) `queries`.

    Found by products of matrices in float64 and then measured again by differences, so that a copy is at 0.

    Example:
        >>> pool = torch.tensor([[0.0], [1.0], [5.0]])
        >>> nearest = find_nearest(torch.tensor([[4.0]]), pool, np.array([10, 20, 30]))
        >>> nearest.ids.tolist(), nearest.distances.tolist()
        ([[30, 20, 10]], [[1.0, 3.0, 4.0]])
    """
    pool, found = pool.double(), []
    for part in torch.split(queries.double(), _CHUNK):
        distances = torch.cdist(part, pool, compute_mode="use_mm_for_euclid_dist")
        places = distances.topk(min(SHOWN, len(pool)), largest=False).indices
        exact = (part[:, None] - pool[places]).square().sum(2).sqrt()
        order = exact.argsort(dim=1)
        found.append((places.gather(1, order), exact.gather(1, order)))
    places, exact = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Nearest(ids[places.numpy()], exact.numpy())


def table_rows(neighbours: Neighbours) -> list[Row]:
    """neighbours.csv: a line a sample with its nearest real image either way."""
    pixels, features = neighbours.by_pixels, neighbours.by_features
    return [
        {
            "sample": sample,
            "real_by_pixels": int(pixels.ids[place, 0]),
            "pixel_distance": f"{pixels.distances[place, 0]:.6g}",
            "real_by_features": int(features.ids[place, 0]),
            "feature_distance": f"{features.distances[place, 0]:.6g}",
            "memorised": int(neighbours.memorised[place]),
        }
        for place, sample in enumerate(neighbours.samples.tolist())
    ]


def draw_neighbours(neighbours: Neighbours, read_samples: ImageReader, read_real: ImageReader) -> Image.Image:
    """Each row a sample, its nearest real images by pixels, and those by features, with distances beneath.

    The upper rows are the samples nearest to a real image by pixels, where copies would stand; the others are evenly
    spread over all.
    """
    nearest_first = np.argsort(neighbours.by_pixels.distances[:, 0], kind="stable")[:_NEAREST_ROWS]
    others = [place for place in spread(len(neighbours.samples), _SPREAD_ROWS) if place not in nearest_first]
    rows = [*nearest_first.tolist(), *others]
    samples = read_samples(neighbours.samples[rows])[0].cpu().numpy()
    wanted = np.stack([np.stack((neighbours.by_pixels.ids[r], neighbours.by_features.ids[r])) for r in rows])
    real = read_real(wanted.ravel())[0].cpu().numpy().reshape(*wanted.shape, *samples.shape[1:])
    cells = [[_enlarge(sample), *(_enlarge(image) for side in sides for image in side)]
             for sample, sides in zip(samples, real, strict=True)]  # fmt: skip
    shown, size = wanted.shape[2], cells[0][0].width
    lefts = [_GAP_PX, *(_LABEL_PX + _GAP_PX + (size + _GAP_PX) * (1 + i) for i in range(shown))]
    lefts += [lefts[-1] + _LABEL_PX + (size + _GAP_PX) * (1 + i) for i in range(shown)]
    tall, title = size + _TEXT_PX + _GAP_PX, _TEXT_PX + _GAP_PX
    heads, font = 2 * _TEXT_PX + 2 * _GAP_PX, ImageFont.load_default(_TEXT_PX - 2)
    canvas = Image.new("RGB", (lefts[-1] + size + _GAP_PX, heads + tall * len(rows) + 2 * title), "white")
    pen = ImageDraw.Draw(canvas)
    for left, text in ((lefts[0], "sample"), (lefts[1], "nearest real images\nby pixels, distance"),
                       (lefts[1 + shown], "nearest real images\nby features, distance")):  # fmt: skip
        pen.multiline_text((left, _GAP_PX), text, fill="black", font=font)
    titles = {0: "samples nearest to a real image, by pixels", len(nearest_first): "evenly spread samples"}
    top = heads
    for line, (row, images) in enumerate(zip(rows, cells, strict=True)):
        if line in titles:
            pen.text((_GAP_PX, top), titles[line], fill="grey", font=font)
            top += title
        texts = [f"#{neighbours.samples[row]}" + (" copy?" if neighbours.memorised[row] else "")]
        for nearest in (neighbours.by_pixels, neighbours.by_features):
            texts += [f"{distance:.3g}" for distance in nearest.distances[row]]
        for left, image, text in zip(lefts, images, texts, strict=True):
            canvas.paste(image, (left, top))
            pen.text((left, top + size), text, fill="black", font=font)
        top += tall
    return canvas


def _enlarge(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(make_grid(image[None], 1, gap=1, least_px=_CELL_PX))
