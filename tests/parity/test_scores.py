"""Scores against torchmetrics, prdc and torch-fidelity, each where it can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import Moments, frechet_distance, frechet_distance_of_features, kernel_distance, neighbour_scores
from pipeline.engine.features import load_extractor
from pipeline.engine.inception import resize_tf1

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


def random_inception_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights of a size that keeps activations of order one, and statistics that no normalisation leaves at 1."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in network.state_dict().items():
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif name.endswith("running_var"):
            state[name] = 0.5 + draw.abs()
        elif value.ndim > 1:
            state[name] = draw * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 1 + 0.1 * draw if name.endswith("bn.weight") else 0.1 * draw
    return state


@pytest.fixture(scope="module")
def peer_inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """torch-fidelity's network with random weights, and the file they lie in."""
    peer = import_peer("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:  # its constructor asks for a file before there is one
        patch.setattr(peer, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        blank = peer("blank", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(random_inception_state(blank), path)
    return peer("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)), path


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("size", [32, 299, 331])
def test_inception_is_that_of_torch_fidelity(
    peer_inception: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, backend: str, size: int
) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime")
    peer, path = peer_inception
    monkeypatch.setattr("pipeline.engine.inception._SHA256_PREFIX", "")
    ours = load_extractor("inception", "cpu", inception_weights=str(path), backend=backend)
    images = torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = images // torch.tensor([1, 2, 5])[:, None, None, None]  # noise is all alike but for its strength
    images = images.to(torch.uint8)
    features, logits = peer(images)
    assert features.std(0).mean() > 0.01  # images differ, or this would show nothing
    torch.testing.assert_close(ours(images), features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))
    found = ours.logits(ours(images))
    torch.testing.assert_close(found.float(), logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("size", [8, 32, 299, 300, 641])
def test_the_legacy_resize_is_that_of_torch_fidelity_bit_for_bit(size: int) -> None:
    peer = import_peer("torch_fidelity.interpolate_compat_tensorflow")
    images = torch.randint(0, 256, (2, 3, size, size + 5), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    expected = peer.interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    assert torch.equal(resize_tf1(images), (expected - 128) / 128)
