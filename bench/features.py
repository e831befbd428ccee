"""Images a second through the feature networks on the CPU; our side resizes 8 px images too, peers get them resized.

`lite0_features`: `load_extractor("efficientnet_lite0")` against the same network in eager torch with its normalisations
apart, as efficientnet-lite-pytorch runs it; at least 4 times as fast. `inception_features`: the same for FID's
Inception with random weights against eager torch in contiguous memory, as pytorch-fid runs it; at least twice.
`lite0_torch` and `inception_torch` inform: our networks by torch itself (PIPELINE_FEATURES=torch). All sides take turns
in one process with all cores, 50 images a turn, pytorch-fid's batch.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.report import Row, num_cores, run
from bench.sampler_overhead import seconds_of, take_turns
from pipeline.engine import inception
from pipeline.engine.features import Extractor, load_extractor

IMAGES, ROUNDS = 50, 5


class NormalisedConvolution(nn.Module):
    """A convolution without bias and a batch normalisation: what our networks have folded into one. An even kernel was
    widened by zeros for TensorFlow's padding; here the input is padded, as implementations do."""

    def __init__(self, folded: nn.Conv2d) -> None:
        super().__init__()
        weight, (p, q) = folded.weight.contiguous(), folded.padding
        self.pad: nn.Module = nn.Identity()
        if weight.shape[2] % 2 == 0:
            weight, self.pad = weight[:, :, 1:, 1:].contiguous(), nn.ZeroPad2d((q - 1, q, p - 1, p))
            p = q = 0
        self.convolution = nn.Conv2d(
            folded.in_channels, folded.out_channels, (weight.shape[2], weight.shape[3]), folded.stride, (p, q),
            groups=folded.groups, bias=False,
        )  # fmt: skip
        self.convolution.weight = nn.Parameter(weight)
        self.norm = nn.BatchNorm2d(folded.out_channels, eps=1e-3)
        assert folded.bias is not None
        self.norm.bias = folded.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(self.pad(x)))  # type: ignore[no-any-return]


def unfold(network: nn.Module) -> nn.Module:
    """The network as its usual implementation runs it: same layers, normalisations apart, contiguous memory."""
    for name, child in network.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(network, name, NormalisedConvolution(child))
        else:
            unfold(child)
    return network.eval().requires_grad_(False)


def save_random_inception(path: Path) -> None:
    """A file of random weights under the published names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in inception_shapes().items():
        channels = shape[0]
        fan_in = shape[1] * shape[2] * shape[3]
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{name}.bn.{key}"] = torch.full((channels,), value)
    state |= {"fc.weight": torch.randn(1008, 2048, generator=generator), "fc.bias": torch.zeros(1008)}
    torch.save(state, path)


def inception_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Shapes of the convolutions of InceptionV3, by name."""
    shapes: dict[str, tuple[int, int, int, int]] = {
        "Conv2d_1a_3x3": (32, 3, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1), "Conv2d_4a_3x3": (192, 80, 3, 3),
    }  # fmt: skip

    def chain(at: str, c_in: int, *rows: tuple[str, int, int, int]) -> None:
        for name, c_out, height, width in rows:
            shapes[f"{at}.{name}"] = (c_out, c_in, height, width)
            c_in = c_out

    for letter, c_in, pooled in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
        at = f"Mixed_5{letter}"
        chain(at, c_in, ("branch1x1", 64, 1, 1))
        chain(at, c_in, ("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 5))
        chain(at, c_in, ("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
        chain(at, c_in, ("branch_pool", pooled, 1, 1))
    chain("Mixed_6a", 288, ("branch3x3", 384, 3, 3))
    chain("Mixed_6a", 288, ("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 3), ("branch3x3dbl_3", 96, 3, 3))
    for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        at, dbl = f"Mixed_6{letter}", "branch7x7dbl"
        chain(at, 768, ("branch1x1", 192, 1, 1))
        chain(at, 768, ("branch7x7_1", c, 1, 1), ("branch7x7_2", c, 1, 7), ("branch7x7_3", 192, 7, 1))
        chain(at, 768, (f"{dbl}_1", c, 1, 1), (f"{dbl}_2", c, 7, 1), (f"{dbl}_3", c, 1, 7), (f"{dbl}_4", c, 7, 1),
              (f"{dbl}_5", 192, 1, 7))  # fmt: skip
        chain(at, 768, ("branch_pool", 192, 1, 1))
    at, last = "Mixed_7a", "branch7x7x3"
    chain(at, 768, ("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 3))
    chain(
        at, 768, (f"{last}_1", 192, 1, 1), (f"{last}_2", 192, 1, 7), (f"{last}_3", 192, 7, 1), (f"{last}_4", 192, 3, 3)
    )
    for letter, c_in in (("b", 1280), ("c", 2048)):
        at = f"Mixed_7{letter}"
        chain(at, c_in, ("branch1x1", 320, 1, 1))
        chain(at, c_in, ("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, 1, 3))
        chain(at, 384, ("branch3x3_2b", 384, 3, 1))
        chain(at, c_in, ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 3), ("branch3x3dbl_3a", 384, 1, 3))
        chain(at, 384, ("branch3x3dbl_3b", 384, 3, 1))
        chain(at, c_in, ("branch_pool", 192, 1, 1))
    return shapes


def compare(name: str, quick: Extractor, eager: Extractor, peer_name: str, target: float) -> list[Row]:
    """One network by onnxruntime, by torch, and as its usual implementation runs it."""
    images = torch.randint(0, 256, (IMAGES, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x = eager.prepare(images).contiguous()
    expected = eager(images)
    difference = float((quick(images) - expected).abs().max() / expected.abs().max())
    peer = unfold(copy.deepcopy(eager.network))
    torch.testing.assert_close(peer(x), expected, rtol=1e-2, atol=1e-2 * float(expected.max()))  # norm: 1/sqrt(1.001)
    seconds = take_turns(
        {
            "quick": lambda: seconds_of(lambda: quick(images), 1),
            "eager": lambda: seconds_of(lambda: eager(images), 1),
            "peer": lambda: seconds_of(lambda: peer(x), 1),
        },
        ROUNDS,
    )
    rate = {side: IMAGES / statistics.median(taken) for side, taken in seconds.items()}
    note = f"{ROUNDS} turns; features differ by {difference:.1e} of the largest between onnxruntime and torch"
    return [
        Row(f"{name}_features", rate["quick"], rate["peer"], peer_name, "images/s", target, note),
        Row(f"{name}_torch", rate["eager"], rate["peer"], peer_name, "images/s"),
    ]


def measure() -> list[Row]:
    """Both networks."""
    torch.set_num_threads(num_cores())
    rows = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder, patch.object(inception, "_SHA256_PREFIX", ""):
        path = Path(folder) / "random.pth"
        save_random_inception(path)
        for short, name, peer, target in (
            ("lite0", "efficientnet_lite0", "eager EfficientNet-Lite0", 4.0),
            ("inception", "inception", "eager InceptionV3", 2.0),
        ):
            quick, eager = (
                load_extractor(name, "cpu", inception_weights=str(path), backend=b) for b in ("onnx", "torch")
            )
            rows += compare(short, quick, eager, f"{peer}, torch {torch.__version__}", target)
    return rows


if __name__ == "__main__":
    run(__file__, measure)
