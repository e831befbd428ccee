"""Bytes to numbers and back, and pictures of many images."""

import numpy as np
import torch

from pipeline.data.pixels import make_grid, to_uint8, to_unit_range


def test_the_range_is_minus_one_to_one_and_out_of_range_is_clipped() -> None:
    assert to_unit_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]


def test_a_grid_holds_every_image_in_its_place() -> None:
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * 100 * np.ones((1, 1, 8, 8), dtype=np.uint8)
    grid = make_grid(images, columns=2)
    assert grid.shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    assert [grid[10, 10, 0], grid[10, 44, 0], grid[44, 10, 0], grid[44, 44, 0]] == [0, 100, 200, 255]
    assert make_grid(np.zeros((2, 3, 64, 64), dtype=np.uint8), columns=1).shape == (2 * 66 + 2, 68, 3)
