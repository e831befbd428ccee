"""One image file: opened as grey or RGB, or refused with a reason."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.audit import Refused, open_image
from pipeline.errors import UserError
from tests.image_files import BAD, GOOD


@pytest.mark.parametrize(("name", "make", "mode", "pixels"), GOOD, ids=[case[0] for case in GOOD])
def test_an_image_is_opened_as_grey_or_rgb(
    tmp_path: Path, name: str, make: Callable[[Path], None], mode: str, pixels: object
) -> None:
    make(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == mode
    if pixels is not None:
        found, expected = np.asarray(image).astype(int), np.asarray(pixels)
        assert found.shape == expected.shape
        # JPEG alone is lossy.
        assert np.abs(found - expected).max() <= (2 if name.startswith("cmyk.j") else 0)


@pytest.mark.parametrize(("name", "make", "reason"), BAD, ids=[case[0] for case in BAD])
def test_a_broken_file_is_refused_with_a_reason_that_repeats(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / name)
    reasons = []
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            open_image(tmp_path / name)
        reasons.append(str(caught.value))
    assert re.search(reason, reasons[0])
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


@pytest.mark.parametrize("limit", [2000, 1000], ids=["Pillow warns", "Pillow raises"])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    Image.new("L", (48, 48)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Refused, match=f"^more than {limit:,} pixels$"):
            open_image(tmp_path / "bomb.png")


def test_a_failing_disk_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UserError, match=r"a\.png: Input/output error"):
        open_image(tmp_path / "a.png")
