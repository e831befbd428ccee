"""The position-keyed generator: published answers, and independence of batch and order."""

import pytest
import torch

from pipeline.runtime.rng import Stream, draw_normal, draw_uniform, philox


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_answers_published_with_random123(word: int, expected: tuple[int, ...]) -> None:
    counter = torch.tensor([word], dtype=torch.int64)
    assert tuple(int(w) for w in philox((counter,) * 4, (word, word))) == expected


def test_a_positions_numbers_do_not_depend_on_its_batch() -> None:
    together = draw_normal(3, Stream.NOISE, torch.arange(100), (3, 5, 5))
    assert torch.equal(together[42:43], draw_normal(3, Stream.NOISE, torch.tensor([42]), (3, 5, 5)))


def test_seed_stream_position_and_draw_each_change_the_numbers() -> None:
    place = torch.tensor([7])
    draws = [
        draw_normal(0, Stream.NOISE, place, (4,)),
        draw_normal(1, Stream.NOISE, place, (4,)),
        draw_normal(0, Stream.SAMPLE, place, (4,)),
        draw_normal(0, Stream.NOISE, place + 1, (4,)),
        draw_normal(0, Stream.NOISE, place + 2**32, (4,)),
        draw_normal(0, Stream.NOISE, place, (4,), draw=1),
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == len(draws)


def test_several_uniform_numbers_of_one_position_differ_and_the_first_is_the_only_one_of_old() -> None:
    places = torch.arange(5)
    first, second = (draw_uniform(0, Stream.CONTEXT, places, draw=k) for k in (0, 1))
    assert torch.equal(first, draw_uniform(0, Stream.CONTEXT, places))
    assert not (first == second).any()


def test_normal_moments_within_four_standard_errors() -> None:
    x = draw_normal(0, Stream.NOISE, torch.arange(1000), (501,)).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_uniform_fills_its_interval_evenly() -> None:
    counts = torch.histc(draw_uniform(0, Stream.FLIP, torch.arange(100_000)), bins=10, min=0, max=1)
    assert counts.sum() == 100_000
    assert (counts - 10_000).abs().max() < 4 * (10_000 * 0.9) ** 0.5
