"""FID's network: its two resizes, its weights' file, and onnxruntime's copy of it. Parity is in tests/parity."""

import hashlib
import io
import itertools
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.engine import inception
from pipeline.engine.blocks import Branches, Pool, Residual, make_convolution
from pipeline.engine.features import load_extractor
from pipeline.engine.inception import WEIGHTS_FILE, build_inception, load_inception_weights, resize_clean, resize_tf1
from pipeline.engine.onnx import OnnxNetwork, write_onnx
from pipeline.errors import UserError
from pipeline.runtime import download


def draw_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that counts as the published one."""
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.ones(2, 2)}, path)
    monkeypatch.setattr(inception, "_SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (500, 410)])
def test_the_clean_resize_is_pillows(size: tuple[int, int]) -> None:
    image = draw_images(1, 3, *size)
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in image[0]]
    resized = [np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for plane in planes]
    expected = (torch.from_numpy(np.stack(resized)) - 128) / 128
    torch.testing.assert_close(resize_clean(image)[0], expected, rtol=0, atol=0.01 / 128)


def test_the_legacy_resize_takes_corners_and_aliases() -> None:
    assert torch.equal(resize_tf1(draw_images(1, 3, 299, 299)), (draw_images(1, 3, 299, 299).float() - 128) / 128)
    stripes = torch.tensor([255, 0], dtype=torch.uint8).repeat(299, 299)[None, None].repeat(1, 1, 2, 1)
    assert bool((resize_tf1(stripes) == 127 / 128).all())  # every second column is never looked at
    assert float(resize_clean(stripes)[..., 5:-5].abs().max()) < 0.02


def test_grey_is_three_equal_channels() -> None:
    grey = draw_images(2, 1, 16, 16)
    for resize in (resize_tf1, resize_clean):
        assert torch.equal(resize(grey), resize(grey.expand(-1, 3, -1, -1)))


def test_no_weights_is_an_error_and_never_another_extractor(tmp_path: Path) -> None:
    for name in ("inception", "inception_clean"):
        with pytest.raises(UserError, match=f"inception_weights is null.*path or URL of {WEIGHTS_FILE}"):
            load_extractor(name, "cpu")
    with pytest.raises(UserError, match="No such file or directory"):
        load_extractor("inception", "cpu", inception_weights=str(tmp_path / "none.pth"))


def test_another_file_is_refused(tmp_path: Path, weights: Path) -> None:
    state, digest = load_inception_weights(str(weights), tmp_path)
    assert (list(state), digest) == (["fc.weight"], hashlib.sha256(weights.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"the file lacks 'Conv2d_1a_3x3\.bn\.weight'"):
        build_inception(state)
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"has sha256 .* expected .*\.\.\.: scores would compare with nothing"):
        load_inception_weights(str(weights), tmp_path)


def test_what_is_no_plain_weights_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "_SHA256_PREFIX", "")
    torch.save({"fc.weight": Path("x")}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("code.pth", "text.pth"):
        with pytest.raises(UserError, match="can't be read as weights") as caught:
            load_inception_weights(str(tmp_path / name), tmp_path)
        assert "\n" not in str(caught.value)


def test_a_url_is_fetched_once_and_kept_whole(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b"half", weights.read_bytes(), URLError("no route")]
    monkeypatch.setattr(download, "urlopen", lambda url, timeout: io.BytesIO(answers.pop(0)))
    cache, url = tmp_path / "cache", "https://example.org/weights.pth"
    with pytest.raises(UserError, match="has sha256"):
        load_inception_weights(url, cache)
    assert not cache.exists()
    for _ in range(2):
        assert list(load_inception_weights(url, cache)[0]) == ["fc.weight"]
    assert len(answers) == 1
    (cache / WEIGHTS_FILE).write_bytes(b"damaged")

    def fail(url: str, timeout: float) -> None:
        raise answers.pop()  # type: ignore[misc]

    monkeypatch.setattr(download, "urlopen", fail)
    with pytest.raises(UserError, match=r"can't be fetched \(no route\)"):
        load_inception_weights(url, cache)


def random_network() -> nn.Module:
    """Every kind of layer that can be written down, with strides, groups and padding that differ by axis."""
    seeds = itertools.count()

    def convolution(c_out: int, c_in: int, h: int, w: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        generator = torch.Generator().manual_seed(next(seeds))
        weight = torch.randn(c_out, c_in // groups, h, w, generator=generator) / (c_in // groups * h * w) ** 0.5
        bias = torch.randn(c_out, generator=generator)
        return make_convolution(weight, bias, stride, (h // 2, w // 2), groups)

    branches = Branches(
        nn.Sequential(convolution(4, 8, 1, 5), nn.ReLU(), Branches(convolution(3, 4, 1, 1), convolution(5, 4, 3, 1))),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.MaxPool2d(3, stride=1, padding=1),
    )
    body = Residual(convolution(8, 8, 3, 3, groups=8), nn.ReLU6(), convolution(8, 8, 1, 1))
    stem = nn.Sequential(convolution(8, 3, 3, 3, stride=2), nn.ReLU6(), nn.MaxPool2d(3, stride=2))
    return nn.Sequential(stem, body, branches, Pool()).eval().requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_computes_the_same(batch: int) -> None:
    pytest.importorskip("onnxruntime")
    network, x = random_network(), 3 * torch.randn(batch, 3, 21, 30, generator=torch.Generator().manual_seed(0))
    copy = OnnxNetwork(network)
    torch.testing.assert_close(copy(x), network(x.clone()), rtol=1e-5, atol=1e-5)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(copy(strided), copy(x))
    assert copy(x[:0]).shape == (0, 24)


def test_the_model_is_valid_to_the_onnx_package() -> None:
    onnx = pytest.importorskip("onnx", reason="extra `export`")
    model = onnx.load_model_from_string(write_onnx(random_network()))
    onnx.checker.check_model(model, full_check=True)


def test_another_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="Sigmoid can't be written as ONNX here"):
        write_onnx(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid()))


def test_both_backends_give_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    images = draw_images(6, 1, 8, 8)
    monkeypatch.setenv("PIPELINE_FEATURES", "torch")
    eager = load_extractor("efficientnet_lite0", "cpu")
    monkeypatch.setenv("PIPELINE_FEATURES", "auto")
    quick = load_extractor("efficientnet_lite0", "cpu")
    assert isinstance(quick.network, OnnxNetwork)
    assert not isinstance(eager.network, OnnxNetwork)
    assert quick.protocol == eager.protocol
    expected = eager(images)
    torch.testing.assert_close(quick(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_without_onnxruntime_auto_is_torch_and_onnx_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.features.has_onnxruntime", lambda: False)
    assert not isinstance(load_extractor("efficientnet_lite0", "cpu", backend="auto").network, OnnxNetwork)
    with pytest.raises(UserError, match="PIPELINE_FEATURES is onnx, but onnx or onnxruntime is missing"):
        load_extractor("efficientnet_lite0", "cpu", backend="onnx")


def test_threads_follow_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert OnnxNetwork(random_network()).session.get_session_options().intra_op_num_threads == 3
