"""Scores against cases whose answer is plain."""

import numpy as np
import pytest

from pipeline.engine.score import class_accuracy, halves, memorised_share


def test_copies_are_memorised_and_far_images_are_not() -> None:
    real = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    assert memorised_share(real[:10] + 1e-4, real) == 1.0
    assert memorised_share(real[:10] + 5, real) == 0.0
    mixed = np.concatenate((real[:3] + 1e-4, real[:9] + 5))
    assert memorised_share(mixed, real) == pytest.approx(3 / 12)


def test_a_copy_of_an_image_that_is_there_twice_is_a_copy() -> None:
    real = np.random.default_rng(0).random((10, 6)).astype(np.float32)
    assert memorised_share(real, np.concatenate((real, real))) == 1.0


def test_one_class_gives_no_accuracy() -> None:
    images, labels = np.zeros((6, 2), dtype=np.float32), np.ones(6, dtype=np.int64)
    assert class_accuracy(images, labels, images, labels) == (None, None)


def test_the_share_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    real, samples = rng.random((50, 4), np.float32), rng.random((30, 4), np.float32)
    whole = memorised_share(samples, real)
    monkeypatch.setattr("pipeline.engine.score._CHUNK", 7)
    assert memorised_share(samples, real) == whole
    assert 0 < whole < 1


def test_accuracy_counts_agreement_with_the_asked_label() -> None:
    rng = np.random.default_rng(0)
    centres, labels = np.eye(3, dtype=np.float32), np.arange(90) % 3
    real = centres[labels] + rng.normal(0, 0.05, (90, 3)).astype(np.float32)
    asked = np.array([0, 1, 2, 2])
    agreement, known = class_accuracy(real, labels, centres[[0, 1, 2, 0]], asked)
    assert (agreement, known) == (0.75, 1.0)


def test_halves_are_disjoint_and_always_the_same() -> None:
    one, other = halves(11, 5)
    assert len(set(one) | set(other)) == 10
    assert halves(11, 5)[0].tolist() == one.tolist()
