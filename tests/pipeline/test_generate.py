"""Blocks of samples: dealt to ranks, kept when whole, complete in the end."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.engine.generate import ImageSampler, generate_blocks, read_blocks
from pipeline.errors import UserError


class Counted(ImageSampler):
    """Images that show their seed, and a list of the seeds that were drawn."""

    def __init__(self) -> None:
        super().__init__(lambda *_, **__: None, seed=0, classes=(0, 1, 2), shape=(1, 2, 2))
        self.drawn: list[int] = []

    def __call__(self, seeds):
        self.drawn += seeds.tolist()
        return seeds[:, None, None, None].expand(-1, 1, 2, 2).to(torch.uint8)


def world(rank: int = 0, size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, world_size=size, is_main=rank == 0, device="cpu", barrier=lambda: None)


def test_ranks_share_the_blocks_and_the_result_is_in_the_order_of_seeds(tmp_path: Path) -> None:
    samplers = [Counted(), Counted()]
    with pytest.raises(UserError, match="folder shared by all nodes"):  # rank 0 has drawn nothing that this one can see
        generate_blocks(samplers[1], tmp_path, 23, 5, world(1, 2))
    blocks = generate_blocks(samplers[0], tmp_path, 23, 5, world(0, 2))
    assert samplers[0].drawn == [*range(5), *range(10, 15), *range(20, 23)]
    assert samplers[1].drawn == [*range(5, 10), *range(15, 20)]
    assert [int(image[0, 0, 0]) for image in read_blocks(blocks)] == list(range(23))


def test_a_second_start_draws_only_what_is_missing(tmp_path: Path) -> None:
    blocks = generate_blocks(Counted(), tmp_path, 20, 5, world())
    before = [path.read_bytes() for path in blocks]
    blocks[2].unlink()
    again = Counted()
    generate_blocks(again, tmp_path, 20, 5, world())
    assert again.drawn == list(range(10, 15))
    assert [path.read_bytes() for path in blocks] == before


def test_labels_go_round_the_classes() -> None:
    assert Counted().labels(torch.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    unconditional = ImageSampler(lambda *_, **__: None, seed=0, classes=(), shape=(1, 2, 2))
    assert unconditional.labels(torch.arange(3)) is None
