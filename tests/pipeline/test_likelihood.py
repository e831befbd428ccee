"""Bits per dimension as a stage: the engine against a closed form, and what the stage writes."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddpm_core import register_schedule
from pipeline import likelihood, paths
from pipeline.config import load_params
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.store import ShardStore
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.likelihood import Likelihood, measure_likelihood, spread_ids
from pipeline.errors import UserError
from pipeline.likelihood import measure, publish, summary
from pipeline.runtime.files import load_json
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.sections import LikelihoodParams
from tests.core.test_likelihood import LearnedWorld
from tests.pipeline.test_models import make_model
from tests.projects import make_project, stage

MEAN, DEVIATION = 0.3, 0.2


class Rank:
    """One of several ranks in one process: what each adds is kept, and the last to add gives out the sum."""

    def __init__(self, rank: int, world_size: int, shared: list[list[torch.Tensor]]) -> None:
        self.rank, self.world_size, self.is_main, self.device = rank, world_size, rank == 0, torch.device("cpu")
        self.mine: list[torch.Tensor] = []
        shared.append(self.mine)
        self.shared = shared

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        self.mine.append(values.clone())
        if len(self.shared) == self.world_size and all(len(m) >= len(self.mine) for m in self.shared):
            values.copy_(sum(m[len(self.mine) - 1] for m in self.shared))
        return values


def grey_set(folder: Path, num_images: int, *, labelled: bool = False, size: int = 16) -> ShardIndex:
    """Grey levels of a Gaussian of this mean and deviation in [-1, 1]."""
    levels = (np.random.default_rng(0).normal(MEAN, DEVIATION, (num_images, size, size, 1)) + 1) * 127.5
    pixels = levels.round().clip(0, 255).astype(np.uint8)
    samples = [Sample(image, i % 2 if labelled else None, {}) for i, image in enumerate(pixels)]
    return write_shards(folder, samples, image_size=size, channels=1, encoding="raw", shard_images=7,
                        classes=("a", "b") if labelled else ())  # fmt: skip


def exact_network(schedule):
    world = LearnedWorld(schedule, MEAN, DEVIATION).network("v")

    def denoiser(x_t, t, condition):
        flat = world(x_t.flatten(2), t, condition)
        return flat.reshape(len(x_t), 2, *x_t.shape[2:])

    return denoiser


def run(index: ShardIndex, schedule, topology, *, ids=None, **changes) -> Likelihood:
    ids = np.arange(index.num_images) if ids is None else ids
    settings = {"seed": 0, "set_number": 0, "batch_size": 5, "parameterization": "v", "learned_variance": True}
    return measure_likelihood(exact_network(schedule), schedule, index, ids, topology, **{**settings, **changes})


def alone() -> Rank:
    return Rank(0, 1, [])


def test_with_the_exact_denoiser_the_bits_are_those_of_the_gaussian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-log2 of the density at each grey level times a level's width; the chain ends in the prior. The noise of an image
    is made such that its means are 0, its squares 1 and its products with the image and each other 0: what is quadratic
    in them, which is all but the bins of the last step, has no Monte Carlo error."""
    index = grey_set(tmp_path / "set", 12)
    x0 = torch.from_numpy(ShardStore(index).read(np.arange(12))[0]).double().flatten(1) / 127.5 - 1
    schedule = register_schedule(beta_schedule="linear", timesteps=50, zero_terminal_snr=True)

    def matched(seed: int, stream: Stream, positions: torch.Tensor, shape: torch.Size, *, draw: int) -> torch.Tensor:
        rows = []
        for place in positions.tolist():
            free = draw_normal(seed, stream, torch.tensor([place]), (256, 50))[0].double()
            basis = torch.linalg.qr(torch.cat((torch.ones(256, 1), x0[place, :, None], free), dim=1)).Q
            rows.append(16 * basis[:, 2 + draw].reshape(shape))
        return torch.stack(rows).float()

    monkeypatch.setattr("pipeline.engine.likelihood.draw_normal", matched)
    found = run(index, schedule, alone())
    log_density = -0.5 * ((x0 - MEAN) / DEVIATION) ** 2 - math.log(DEVIATION * math.sqrt(2 * math.pi))
    expected = -(log_density.mean(dim=1) + math.log(1 / 127.5)) / math.log(2)
    np.testing.assert_allclose(found.total, expected.numpy(), rtol=0, atol=1e-3)
    assert found.terms.sum() + found.prior.mean() == pytest.approx(found.bits_per_dim, rel=1e-6)
    assert found.terms.shape == (50,)
    assert found.standard_error == pytest.approx(float(np.std(found.total, ddof=1)) / 12**0.5)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_ranks_finds_the_same(tmp_path: Path, world_size: int) -> None:
    index = grey_set(tmp_path / "set", 17, size=8)
    schedule = register_schedule(beta_schedule="cosine", timesteps=20)
    one = run(index, schedule, alone())
    shared: list[list[torch.Tensor]] = []
    found = [run(index, schedule, Rank(rank, world_size, shared)) for rank in range(world_size)][-1]
    for name in ("total", "prior", "terms"):
        np.testing.assert_allclose(getattr(found, name), getattr(one, name), rtol=1e-9, atol=1e-12)
    assert all(np.isfinite(one.total)) and all(one.total > 0)  # noqa: PT018


def test_an_image_has_its_own_noise_in_its_own_set(tmp_path: Path) -> None:
    index = grey_set(tmp_path / "set", 9, size=8)
    schedule = register_schedule(beta_schedule="cosine", timesteps=20)
    whole = run(index, schedule, alone())
    part = run(index, schedule, alone(), ids=np.array([2, 7]), batch_size=1)
    np.testing.assert_allclose(part.total, whole.total[[2, 7]], rtol=1e-5)
    for change in ({"seed": 1}, {"set_number": 1}):
        other = run(index, schedule, alone(), **change)
        assert np.abs(other.total - whole.total).min() > 1e-4
        assert other.prior == pytest.approx(whole.prior)


def test_labels_reach_the_network_where_there_are_classes(tmp_path: Path) -> None:
    schedule, seen = register_schedule(beta_schedule="cosine", timesteps=2), []

    def denoiser(x_t, t, condition):
        seen.append(None if condition is None else condition.tolist())
        return torch.zeros_like(x_t)

    for name, labelled in (("with", True), ("without", False)):
        index = grey_set(tmp_path / name, 3, labelled=labelled, size=4)
        measure_likelihood(denoiser, schedule, index, np.array([0, 1, 2]), alone(), seed=0, set_number=0, batch_size=3,
                           parameterization="v")  # fmt: skip
    assert seen == [[0, 1, 0], [0, 1, 0], None, None]


def of(total: list[float], terms: list[float]) -> Likelihood:
    return Likelihood(np.arange(len(total)), np.array(total), np.zeros(len(total)), np.array(terms))


def test_the_gap_is_held_out_less_train_with_its_error() -> None:
    scores = summary({"train": of([1.0, 2.0, 3.0], [2.0]), "held_out": of([2.0, 4.0], [3.0])})
    assert (scores["bits_per_dim_train"], scores["bits_per_dim_held_out"], scores["gap"]) == (2.0, 3.0, 1.0)
    assert scores["standard_error_gap"] == pytest.approx(math.sqrt(1 / 3 + 2 / 2))
    assert (scores["num_train"], scores["num_held_out"]) == (3, 2)
    only = summary({"train": of([1.0], [1.0])})
    assert {k: v for k, v in only.items() if v is not None} == {"bits_per_dim_train": 1.0, "num_train": 1}


def test_what_is_not_measured_is_no_zero_in_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish({"train": of([1.0, 2.0], [0.25, 1.25])}, {"images": 2})
    assert paths.LIKELIHOOD_CURVE.read_text() == "t,train,held_out\n0,0.25,nan\n1,1.25,nan\n"
    assert (paths.LIKELIHOOD / "images.csv").read_text().splitlines()[1] == "train,0,1.0,0.0"
    publish({}, {"images": 0})
    assert paths.LIKELIHOOD_CURVE.read_text() == "t,train,held_out\n"


def test_a_model_of_other_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make_model(tmp_path / "model", ()).spec
    params = LikelihoodParams(images=2, seed=0)
    with pytest.raises(UserError, match=r"1 x 16 px, but the model is one of 1 x 8 px"):
        measure(params, spec, {"train": grey_set(tmp_path / "set", 3)}, alone(), 2)
    needy = {**spec, "network": {**spec["network"], "context_channels": 1}}
    with pytest.raises(UserError, match="context channels"):
        measure(params, needy, {"train": grey_set(tmp_path / "small", 3, size=8)}, alone(), 2)


def test_images_are_chosen_by_position() -> None:
    assert spread_ids(1000, 3).tolist() == [0, 499, 999]
    assert spread_ids(5, 1).tolist() == [0]


def test_it_is_off_by_default_and_then_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    assert params.likelihood.images == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(likelihood, "load_params", lambda: params)
    monkeypatch.setattr(likelihood, "load_machine", lambda: SimpleNamespace())
    likelihood.main()
    scores = load_json(paths.LIKELIHOOD_METRICS)
    assert (scores["images"], scores["gap"], scores["bits_per_dim_train"]) == (0, None, None)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_stage_measures_both_sets_alike_on_one_rank_and_on_two(tmp_path: Path) -> None:
    folder = make_project(tmp_path, schedule__timesteps=40, sample__steps=4, likelihood__images=9)
    stage(folder, "shard")
    stage(folder, "train")
    assert "held_out" not in stage(folder, "likelihood", PIPELINE_SAMPLE_BATCH="4")
    write_shards(
        folder / paths.HELD_OUT, [Sample(np.full((8, 8, 1), 9 * i, np.uint8), i % 3, {}) for i in range(11)],
        image_size=8, channels=1, encoding="raw", classes=load_index(folder / paths.SHARDS).classes, shard_images=50,
    )  # fmt: skip
    stage(folder, "likelihood", PIPELINE_SAMPLE_BATCH="4")
    one = load_json(folder / paths.LIKELIHOOD_METRICS)
    stage(folder, "likelihood", processes=2, PIPELINE_SAMPLE_BATCH="4")
    two = load_json(folder / paths.LIKELIHOOD_METRICS)
    assert one.pop("train_key") == two.pop("train_key")
    assert one == pytest.approx(two, rel=1e-9)
    assert (one["num_train"], one["num_held_out"]) == (9, 9)
    assert one["gap"] == pytest.approx(one["bits_per_dim_held_out"] - one["bits_per_dim_train"])
    with open(folder / paths.LIKELIHOOD_CURVE) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    for name in ("train", "held_out"):
        assert sum(float(row[name]) for row in rows) == pytest.approx(one[f"bits_per_dim_{name}"], abs=1e-4)
