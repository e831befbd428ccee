"""Statistics files of other programs: what they hold comes back, and what they lack is said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import Moments, frechet_distance
from pipeline.engine.statistics import read_statistics, write_statistics
from pipeline.errors import UserError


def make_moments(seed: int = 0) -> Moments:
    moments = Moments(4)
    moments.add(torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) + seed)
    return moments


def test_what_is_written_comes_back_and_is_the_usual_form(tmp_path: Path) -> None:
    moments, other = make_moments(), make_moments(1)
    write_statistics(tmp_path / "real.npz", moments)
    back = read_statistics(tmp_path / "real.npz", 4)
    assert back.n == 50
    assert frechet_distance(back, other) == pytest.approx(frechet_distance(moments, other), rel=1e-10)
    with np.load(tmp_path / "real.npz") as content:
        np.testing.assert_array_equal(content["mu"], moments.mean().numpy())
        np.testing.assert_array_equal(content["sigma"], moments.covariance().numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_statistics_hold_no_count(tmp_path: Path, dtype: type) -> None:
    moments, other = make_moments(), make_moments(1)
    mean, covariance = moments.mean().numpy().astype(dtype), moments.covariance().numpy().astype(dtype)
    np.savez_compressed(tmp_path / "real.npz", mu=mean, sigma=covariance)
    found = frechet_distance(read_statistics(tmp_path / "real.npz", 4), other)
    assert found == pytest.approx(frechet_distance(moments, other), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"mu": np.zeros(3), "sigma": np.eye(3)},
            r"mu is \(3,\) and sigma \(3, 3\), but the extractor gives 4",
        ),
        ({"mu": np.zeros(4), "sigma": np.ones(4)}, r"sigma \(4,\)"),
        ({"mu": np.zeros(4)}, "no sigma in it"),
        ({"mu": np.zeros(4), "sigma": np.eye(4) * np.nan}, "sigma is not finite"),
        ({"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))}, "symmetric"),
        ({"mu": np.full(4, np.inf), "sigma": np.eye(4)}, "not finite"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "n": 1}, "n is below 2"),
        ({"mu": np.array([{}] * 4), "sigma": np.eye(4)}, "not a readable .npz"),
    ],
)
def test_other_files_are_errors_of_one_line(tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "real.npz"
    np.savez(path, allow_pickle=True, **content)
    with pytest.raises(UserError, match=message) as caught:
        read_statistics(path, 4)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_npz_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("mu")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "array.npy", "missing.npz"):
        with pytest.raises(UserError, match="not a readable"):
            read_statistics(tmp_path / name, 4)
