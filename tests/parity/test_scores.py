"""Scores against torchmetrics, prdc and torch-fidelity, each where it can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import Moments, frechet_distance, frechet_distance_of_features, kernel_distance, neighbour_scores

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::UserWarning")]
DIM = 24


def import_peer(name: str) -> ModuleType:
    """A module of a peer. torch_fidelity's `__init__`, which torchmetrics calls too, needs torchvision for what nobody
    asks for here: an empty package with the same path stands in for it."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.find_spec("torch_fidelity") if "torch_fidelity" not in sys.modules else None
    if spec is not None:
        stand_in = ModuleType("torch_fidelity")
        stand_in.__path__, stand_in.__spec__ = list(spec.submodule_search_locations or []), spec
        sys.modules["torch_fidelity"] = stand_in
    return importlib.import_module(name)


class AsFeatures(nn.Module):
    """Images that are their features, for metrics that ask for a network."""

    num_features = DIM

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def draw_sets(n: int = 200, m: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) / DIM**0.5
    x, y = (torch.randn(size, DIM, generator=generator, dtype=torch.float64) @ mix for size in (n, m))
    return x, 0.8 * y + 0.1


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    fid = import_peer("torchmetrics.image.fid")
    x, y = draw_sets()
    metric = fid.FrechetInceptionDistance(feature=AsFeatures(), normalize=True, antialias=False)
    metric.set_dtype(torch.float64)
    metric.update(x[:, :, None, None], real=True)
    metric.update(y[:, :, None, None], real=False)
    expected = float(metric.compute())
    moments = []
    for features in (x, y):
        moments.append(Moments(DIM))
        moments[-1].add(features)
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    kid = import_peer("torchmetrics.image.kid")
    x, y = draw_sets(150, 150)
    metric = kid.KernelInceptionDistance(feature=AsFeatures(), subsets=2, subset_size=150, normalize=True)
    metric.update(x[:, :, None, None], real=True)
    metric.update(y[:, :, None, None], real=False)
    assert kernel_distance(x, y) == pytest.approx(float(metric.compute()[0]), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_are_those_of_prdc(k: int) -> None:
    prdc = import_peer("prdc")
    x, y = draw_sets()
    expected = prdc.compute_prdc(x.numpy(), y.numpy(), k)
    assert neighbour_scores(x, y, k)._asdict() == pytest.approx(expected, rel=1e-6)
