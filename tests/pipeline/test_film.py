"""The denoising film shows the very chain that makes the samples."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.build.sampling import build_sampler
from pipeline.data.pixels import make_grid, to_uint8
from pipeline.engine.film import draw_film
from pipeline.engine.generate import ImageSampler
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.sections import SampleParams
from tests.pipeline.test_models import make_model


def make_sampler(folder: Path, name: str, steps: int) -> ImageSampler:
    model = make_model(folder, ("a", "b"))
    params = SampleParams(
        seed=3, num_samples=2, sampler=name, steps=steps, spacing="trailing", eta=0.0, guidance=1.0,
        guidance_interval=None, autoguidance=1.0, classifier_scale=0.0, dynamic_threshold=None,
    )  # fmt: skip
    return build_sampler(params, model.spec, model.network, model.schedule)


def cell(film: np.ndarray, row: int, column: int) -> np.ndarray:
    """One 8 px image of the grid, which enlarges it to 32 px, with gaps of 2."""
    top, left = 2 + 34 * row, 2 + 34 * column
    return film[top : top + 32 : 4, left : left + 32 : 4, 0]


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver", "heun"])
def test_it_begins_in_the_noise_and_ends_in_the_sample(tmp_path: Path, name: str) -> None:
    sampler, seeds = make_sampler(tmp_path / "m", name, 9), torch.tensor([0, 1, 5])
    before = sampler(seeds)
    film = draw_film(sampler, seeds, 4)
    assert film.shape == (6 * 34 + 2, 4 * 34 + 2, 3)
    noise = to_uint8(draw_normal(3, Stream.SAMPLE, seeds, (1, 8, 8))).numpy()
    for i in range(3):
        assert np.array_equal(cell(film, 2 * i, 0), noise[i, 0])
        assert np.abs(cell(film, 2 * i + 1, 3).astype(int) - before[i, 0].numpy()).max() <= 1
        assert not np.array_equal(cell(film, 2 * i, 3), cell(film, 2 * i + 1, 3))
    assert torch.equal(sampler(seeds), before)  # watching changes nothing


def test_what_is_above_is_what_the_network_saw(tmp_path: Path) -> None:
    sampler, seen = make_sampler(tmp_path / "m", "ddim", 5), []
    network = sampler.method.args[0]
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    film = draw_film(sampler, torch.arange(2), 12)  # more columns than steps: all are shown
    assert np.array_equal(film[:36], make_grid(np.stack([to_uint8(x[0]).numpy() for x in seen]), 5))
