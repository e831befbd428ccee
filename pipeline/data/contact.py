"""The contact sheet: some images of each class on one picture, for a person to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.audit import read_file
from pipeline.data.examine import Form, read_pixels
from pipeline.data.listing import Found

SHEET_CLASSES, SHEET_COLUMNS = 20, 10
TILE_PX, TEXT_PX, GAP = 72, 16, 4
Item = TypeVar("Item")


def draw_contact_sheet(raw: str, form: Form, images: Sequence[Found], title: str) -> Image.Image:
    """The sheet of a set under a title; the images are read from their files, as they go into the shards."""
    examples = []
    for name, places in choose_examples(images):
        datas = (read_file(os.path.join(raw, images[place].path)) for place in places)
        examples.append((name, [read_pixels(data, form)[0] for data in datas]))
    return draw_sheet(title, examples)


def choose_examples(images: Sequence[Found]) -> list[tuple[str, list[int]]]:
    """Places of up to ten evenly spaced images of each of up to twenty evenly spaced classes, with name and count."""
    places: dict[str, list[int]] = {}
    for place, found in enumerate(images):
        places.setdefault(found.class_name or "", []).append(place)
    # Without classes, or with one, there is room for more of it.
    most = SHEET_COLUMNS * (5 if len(places) == 1 else 1)
    return [
        (f"{name or 'all'}: {len(places[name]):,}", _spread(places[name], most))
        for name in _spread(sorted(places), SHEET_CLASSES)
    ]


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    if len(items) <= most:
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def draw_sheet(title: str, examples: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]]) -> Image.Image:
    """A contact sheet: the title, then the images of each class under its name, small ones enlarged pixel by pixel.

    Args:
        title: becomes a line for each part between semicolons.
        examples: name and images `(s, s, 1 | 3)` of each class.
    """
    font, lines = ImageFont.load_default(12), title.split("; ")
    heights = [TEXT_PX + -(-len(images) // SHEET_COLUMNS) * (TILE_PX + GAP) for _, images in examples]
    top = len(lines) * TEXT_PX + GAP
    sheet = Image.new("RGB", (SHEET_COLUMNS * (TILE_PX + GAP) + GAP, top + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((GAP, number * TEXT_PX), _printable(line), fill="black", font=font)
    for (name, images), height in zip(examples, heights, strict=True):
        draw.text((GAP, top), _printable(name), fill="black", font=font)
        for place, pixels in enumerate(images):
            left = GAP + place % SHEET_COLUMNS * (TILE_PX + GAP)
            sheet.paste(_to_tile(pixels), (left, top + TEXT_PX + place // SHEET_COLUMNS * (TILE_PX + GAP)))
        top += height
    return sheet


def _printable(text: str) -> str:
    """Bytes of a file's name that are no text become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _to_tile(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if image.width > TILE_PX:
        return image.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    factor = TILE_PX // image.width
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
