"""InceptionV3 of December 2015 as FID uses it, from the published PyTorch file of its weights.

It is not today's InceptionV3: average pools do not count their padding, Mixed_7c pools by the maximum, and there are
1008 classes. **Source**: Szegedy et al. 2016; Heusel et al. 2017; pytorch-fid for the names in the file.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.engine.blocks import Branches, Pool, fold, make_convolution
from pipeline.errors import UserError
from pipeline.runtime.download import is_url, read_source
from pipeline.runtime.files import whole_file

INPUT_PX = 299
WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
_SHA256_PREFIX = "6726825d"  # all that is published of the hash: the end of the file's name


def resize_tf1(images: Tensor) -> Tensor:
    """Resize to 299 px as TensorFlow 1 did, the legacy protocol: pixel i of the result lies at i * scale of the image,
    corner on corner and not centre on centre, and nothing is low-pass filtered, so that shrinking aliases.

    Args:
        images: (b, c, h, w) uint8, c of 1 or 3.

    Returns:
        (b, 3, 299, 299) float32 (x - 128) / 128 in channels_last order.
    """
    x = images.float()
    for dim in (3, 2):  # the order decides last bits; the reference blends along x first
        size = x.shape[dim]
        place = torch.arange(INPUT_PX, device=x.device, dtype=torch.float32) * torch.tensor(size / INPUT_PX)
        below = place.long()
        share = (place - below).view(-1, *[1] * (3 - dim))
        low, high = x.index_select(dim, below), x.index_select(dim, (below + 1).clamp_max(size - 1))
        x = low + (high - low) * share
    return _scale(x)


def resize_clean(images: Tensor) -> Tensor:
    """Resize to 299 px by antialiased bicubic interpolation in float32, clipped to [0, 255], nothing rounded: what
    clean-fid does with Pillow, the same filter (a = -0.5) to a hundredth of a grey level.

    **Source**: Parmar et al. 2022, section 3. Args and Returns as :func:`resize_tf1`.
    """
    size = (INPUT_PX, INPUT_PX)
    x = functional.interpolate(images.float(), size, mode="bicubic", align_corners=False, antialias=True)
    return _scale(x.clamp(0, 255))


def _scale(x: Tensor) -> Tensor:
    return ((x - 128) / 128).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def load_inception_weights(source: str | None, cache: Path) -> tuple[Mapping[str, Tensor], str]:
    """The published weights, as data and never as code, after comparing their hash.

    Args:
        source: a path, or a URL whose file is then kept in `cache`.
        cache: a folder.

    Returns:
        the state under the names of pytorch-fid, and the file's sha256.

    Raises:
        UserError: no source is given, it can't be read, or it is another file.
    """
    if not source:
        raise UserError(
            f"reference.inception_weights is null, but reference.extractor asks for inception: set it to the path or "
            f"URL of {WEIGHTS_FILE}, or use efficientnet_lite0"
        )
    path = cache / WEIGHTS_FILE
    content = path.read_bytes() if is_url(source) and path.exists() else b""
    if not hashlib.sha256(content).hexdigest().startswith(_SHA256_PREFIX) or not content:
        content = read_source(source, key="reference.inception_weights", name=WEIGHTS_FILE)
        _check(content, source)
        if is_url(source):
            with whole_file(path) as aside:
                aside.write_bytes(content)
    digest = _check(content, source)
    try:
        state: Mapping[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"reference.inception_weights: {source} can't be read as weights: {reason}") from None
    return state, digest


def _check(content: bytes, source: str) -> str:
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(_SHA256_PREFIX):
        raise UserError(
            f"reference.inception_weights: {source} has sha256 {digest[:12]}..., expected {_SHA256_PREFIX}...: scores "
            f"would compare with nothing; it must be {WEIGHTS_FILE}"
        )
    return digest


class _Builder:
    """Convolutions by their names in the file, normalisation folded in, each followed by ReLU."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def one(self, name: str, stride: int = 1, *, valid: bool = False) -> nn.Sequential:
        """Padded so that the size stays, unless `valid` or strided."""
        weight, bias = fold(self.state, f"{name}.conv.weight", f"{name}.bn")
        same = (weight.shape[2] // 2, weight.shape[3] // 2)
        convolution = make_convolution(weight, bias, stride, 0 if valid or stride > 1 else same)
        return nn.Sequential(convolution, nn.ReLU(inplace=True))

    def row(self, name: str, last: int, stride: int = 1, first: int = 1) -> nn.Sequential:
        """`name_1` to `name_last`; the stride is that of the last."""
        names = [f"{name}_{i}" for i in range(first, last + 1)]
        return nn.Sequential(*(self.one(n, stride if n == names[-1] else 1) for n in names))

    def pooled(self, at: str, pool: nn.Module | None = None) -> nn.Sequential:
        """The pooling branch."""
        pool = pool or nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        return nn.Sequential(pool, self.one(f"{at}.branch_pool"))

    def mixed_5(self, at: str) -> Branches:
        """35 px."""
        parts = self.row(f"{at}.branch5x5", 2), self.row(f"{at}.branch3x3dbl", 3)
        return Branches(self.one(f"{at}.branch1x1"), *parts, self.pooled(at))

    def mixed_6a(self, at: str) -> Branches:
        """35 to 17 px."""
        strided = self.one(f"{at}.branch3x3", 2), self.row(f"{at}.branch3x3dbl", 3, 2)
        return Branches(*strided, nn.MaxPool2d(3, stride=2))

    def mixed_6(self, at: str) -> Branches:
        """17 px."""
        parts = self.row(f"{at}.branch7x7", 3), self.row(f"{at}.branch7x7dbl", 5)
        return Branches(self.one(f"{at}.branch1x1"), *parts, self.pooled(at))

    def mixed_7a(self, at: str) -> Branches:
        """17 to 8 px."""
        strided = self.row(f"{at}.branch3x3", 2, 2), self.row(f"{at}.branch7x7x3", 4, 2)
        return Branches(*strided, nn.MaxPool2d(3, stride=2))

    def mixed_7(self, at: str, pool: nn.Module | None = None) -> Branches:
        """8 px."""
        short, long = f"{at}.branch3x3", f"{at}.branch3x3dbl"
        return Branches(
            self.one(f"{at}.branch1x1"),
            nn.Sequential(self.one(f"{short}_1"), Branches(self.one(f"{short}_2a"), self.one(f"{short}_2b"))),
            nn.Sequential(self.row(long, 2), Branches(self.one(f"{long}_3a"), self.one(f"{long}_3b"))),
            self.pooled(at, pool),
        )


def build_inception(state: Mapping[str, Tensor]) -> nn.Module:
    """The network up to pool3.

    Args:
        state: as :func:`load_inception_weights` returns it.

    Returns:
        float32 (b, 3, 299, 299) -> (b, 2048), frozen, in channels_last order.

    Raises:
        UserError: a weight is missing.
    """
    build = _Builder(state)
    try:
        layers = [
            build.one("Conv2d_1a_3x3", 2),
            build.one("Conv2d_2a_3x3", valid=True),
            build.one("Conv2d_2b_3x3"),
            nn.MaxPool2d(3, stride=2),
            build.one("Conv2d_3b_1x1"),
            build.one("Conv2d_4a_3x3", valid=True),
            nn.MaxPool2d(3, stride=2),
            *(build.mixed_5(f"Mixed_5{letter}") for letter in "bcd"),
            build.mixed_6a("Mixed_6a"),
            *(build.mixed_6(f"Mixed_6{letter}") for letter in "bcde"),
            build.mixed_7a("Mixed_7a"),
            build.mixed_7("Mixed_7b"),
            build.mixed_7("Mixed_7c", nn.MaxPool2d(3, stride=1, padding=1)),
            Pool(),
        ]
    except KeyError as error:
        raise UserError(f"reference.inception_weights: the file lacks {error}; it must be {WEIGHTS_FILE}") from None
    return nn.Sequential(*layers).eval().requires_grad_(False)
