"""Images to squares of one size and one number of channels."""

import numpy as np
import pytest
from PIL import Image

from pipeline.data.audit import is_grey, to_pixels
from tests.image_files import NOISE


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (16, 41), (33, 50), (5, 9), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_square_of_the_size_asked_for(size: tuple[int, int], channels: int) -> None:
    for mode in ("L", "RGB"):
        pixels = to_pixels(Image.new(mode, size, "white"), 16, channels)
        assert pixels.shape == (16, 16, channels)
        assert pixels.dtype == np.uint8
        assert (pixels == 255).all()


def test_the_right_size_is_not_resampled_and_the_crop_is_central() -> None:
    assert np.array_equal(to_pixels(Image.fromarray(NOISE), 48, 3), NOISE)
    wide = np.concatenate([np.zeros((48, 10, 3), np.uint8), NOISE, np.zeros((48, 11, 3), np.uint8)], axis=1)
    assert np.array_equal(to_pixels(Image.fromarray(wide), 48, 3), NOISE)
    tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
    assert np.array_equal(to_pixels(Image.fromarray(tall), 48, 3), NOISE.transpose(1, 0, 2))


def test_shrinking_does_not_alias() -> None:
    """Single-pixel stripes shrink to their mean; a filter of fixed width would keep black or white."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(to_pixels(Image.fromarray(stripes), 8, 1).astype(int) - 127.5).max() < 8


def test_colour_to_one_channel_is_luma_and_equal_channels_are_kept() -> None:
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_pixels(Image.fromarray(greys).convert("RGB"), 16, 1)[..., 0], greys)
    assert np.array_equal(to_pixels(Image.fromarray(greys), 16, 3), np.stack([greys] * 3, axis=-1))
    lumas = [to_pixels(Image.new("RGB", (4, 4), name), 4, 1)[0, 0, 0] for name in ("#ff0000", "#00ff00", "#0000ff")]
    assert lumas == [76, 150, 29]  # round(255 * (0.299, 0.587, 0.114))


def test_grey_in_an_rgb_file_is_grey() -> None:
    assert is_grey(Image.new("RGB", (4, 4), (9, 9, 9)))
    assert not is_grey(Image.new("RGB", (4, 4), (9, 9, 10)))
    assert not is_grey(Image.new("RGB", (4, 4), (8, 9, 9)))
