"""The Inception score against its definition, from sums in any order."""

import math

import pytest
import torch

from ddpm_core import ClassSums

LOGITS = 2 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
PARTS = torch.arange(40) % 4


def sums_of(*rows: slice) -> ClassSums:
    sums = ClassSums(5, 4)
    for row in rows:
        sums.add(LOGITS[row], PARTS[row])
    return sums


def test_it_is_its_definition() -> None:
    values = []
    for part in range(4):
        p = LOGITS[part == PARTS].double().softmax(1)
        values.append(math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean())))
    mean = sum(values) / 4
    found = sums_of(slice(None)).score()
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.deviation == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 4), rel=1e-9)


def test_batches_and_merging_change_nothing() -> None:
    whole, first, last = sums_of(slice(None)), sums_of(slice(0, 7), slice(7, 15)), sums_of(slice(15, None))
    first.merge(last)
    torch.testing.assert_close(first.sums, whole.sums, rtol=1e-13, atol=1e-13)


def test_alike_images_score_one_and_empty_parts_are_left_out() -> None:
    sums = ClassSums(5, 4)
    sums.add(LOGITS[:1].expand(6, 5), torch.tensor([0, 0, 0, 2, 2, 2]))
    assert sums.score() == pytest.approx((1, 0), abs=1e-12)


def test_what_has_no_score_is_refused() -> None:
    sums = ClassSums(5, 4)
    with pytest.raises(ValueError, match="of 0 images is undefined"):
        sums.score()
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected \(b, 5\)"):
        sums.add(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        sums.add(torch.full((1, 5), math.nan), torch.zeros(1, dtype=torch.int64))
