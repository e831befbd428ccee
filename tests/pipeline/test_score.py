"""Scores against cases whose answer is plain."""

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.index import ShardIndex
from pipeline.data.store import read_meta
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.reference import halves
from pipeline.engine.score import Pixels, class_agreement, context_psnr, memorised_share
from pipeline.errors import UserError


def test_copies_are_memorised_and_far_images_are_not() -> None:
    real = np.random.default_rng(0).random((40, 6)).astype(np.float32)
    assert memorised_share(real[:10] + 1e-4, real) == 1.0
    assert memorised_share(real[:10] + 5, real) == 0.0
    mixed = np.concatenate((real[:3] + 1e-4, real[:9] + 5))
    assert memorised_share(mixed, real) == pytest.approx(3 / 12)


def test_a_copy_of_an_image_that_is_there_twice_is_a_copy() -> None:
    real = np.random.default_rng(0).random((10, 6)).astype(np.float32)
    assert memorised_share(real, np.concatenate((real, real))) == 1.0


def as_pixels(vectors: np.ndarray, labels: np.ndarray) -> Pixels:
    return Pixels(np.arange(len(vectors)), vectors, labels)


def test_one_class_gives_no_accuracy() -> None:
    images = as_pixels(np.zeros((6, 2), dtype=np.float32), np.ones(6, dtype=np.int64))
    assert class_agreement(images, images) == (None, None, None, {})


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
    real = as_pixels(centres[labels] + rng.normal(0, 0.05, (90, 3)).astype(np.float32), labels)
    found = class_agreement(real, as_pixels(centres[[0, 1, 2, 0]], np.array([0, 1, 2, 2])))
    assert (found.class_accuracy, found.class_accuracy_real) == (0.75, 1.0)
    assert found.by_class == {0: 1.0, 1: 1.0, 2: 0.5}


def test_a_classifier_trained_on_samples_that_lack_a_class_never_finds_it() -> None:
    rng = np.random.default_rng(0)
    centres, labels = np.eye(3, dtype=np.float32), np.arange(300) % 3
    real = as_pixels(centres[labels] + rng.normal(0, 0.05, (300, 3)).astype(np.float32), labels)
    whole = class_agreement(real, as_pixels(centres[labels], labels))
    assert (whole.class_accuracy, whole.cas) == (1.0, 1.0)
    lacking = class_agreement(real, as_pixels(centres[labels % 2], labels % 2))
    assert lacking.class_accuracy == 1.0  # of what was asked for, all is right
    assert lacking.cas == pytest.approx(2 / 3, abs=0.1)  # and a third of the real images is unknown


def test_halves_are_disjoint_and_always_the_same() -> None:
    one, other = halves(11, 5)
    assert len(set(one) | set(other)) == 10
    assert halves(11, 5)[0].tolist() == one.tolist()


def shards(folder: Path, images: np.ndarray, notes: list[dict]) -> ShardIndex:
    samples = [Sample(image, None, note) for image, note in zip(images, notes, strict=True)]
    return write_shards(folder, samples, image_size=4, channels=1, encoding="raw", classes=(), shard_images=3)


@pytest.mark.parametrize("chunk", [512, 3])
def test_the_psnr_counts_predicted_pixels_against_the_image_of_each_context(tmp_path: Path, monkeypatch, chunk) -> None:
    monkeypatch.setattr("pipeline.engine.score._CHUNK", chunk)
    real = np.repeat(np.arange(6, dtype=np.uint8) * 10, 16).reshape(6, 4, 4, 1)
    ids = [4, 0, 3, 3, 5]
    made = real[ids].copy()
    made[:, 1:3, 0:2] += 2  # an error of two levels in the hole
    made[0, 3, 3] = 99  # and one outside of it, which nobody predicted
    holes = [{"image": i, "hole": [1, 0, 2, 2]} for i in ids]
    index = shards(tmp_path / "real", real, [{}] * 6)
    scores = context_psnr(index, shards(tmp_path / "holes", made, holes))
    others = np.array([ids[(n + 1) % 5] for n in range(5)])
    error = np.mean((real[ids][:, 0, 0, 0].astype(float) + 2 - real[others][:, 0, 0, 0]) ** 2)
    assert scores["context_psnr"] == pytest.approx(10 * math.log10(255**2 / 4))
    assert scores["context_psnr_other"] == pytest.approx(10 * math.log10(255**2 / error))
    whole = context_psnr(index, shards(tmp_path / "whole", made, [{"image": i} for i in ids]))
    assert whole["context_psnr"] == pytest.approx(10 * math.log10(255**2 / ((5 * 4 * 4 + 59**2) / 80)))


def test_samples_that_equal_their_images_have_no_psnr(tmp_path: Path) -> None:
    real = np.zeros((3, 4, 4, 1), dtype=np.uint8)
    index = shards(tmp_path / "real", real, [{"image": i} for i in range(3)])
    assert context_psnr(index, index) == {"context_psnr": None, "context_psnr_other": None}


@pytest.mark.parametrize("note", [{}, {"image": 3}])
def test_samples_that_do_not_name_their_images_are_refused(tmp_path: Path, note: dict) -> None:
    real = np.zeros((3, 4, 4, 1), dtype=np.uint8)
    with pytest.raises(UserError, match="does not say which images"):
        context_psnr(shards(tmp_path / "real", real, [{}] * 3), shards(tmp_path / "made", real, [note] * 3))


def test_notes_of_a_damaged_tar_are_an_error_of_one_line(tmp_path: Path) -> None:
    index = shards(tmp_path / "real", np.zeros((3, 4, 4, 1), dtype=np.uint8), [{"seed": i} for i in range(3)])
    assert read_meta(index) == [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    path = index.folder / index.shards[0].name
    path.write_bytes(b"x" * 2048)
    with pytest.raises(UserError, match=r"00000\.tar: cannot be read"):
        read_meta(index)
