"""fetch: what is in the source arrives as files, and a damaged source is named."""

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from sklearn.datasets import load_sample_images

from pipeline import paths
from pipeline.errors import UserError
from pipeline.fetch import IDX_IMAGES, IDX_LABELS, load_idx, load_idx_pair, main

PARAMS = Path(__file__).parents[2] / "params.yaml"


def _idx(values: np.ndarray) -> bytes:
    """An IDX file by the format's definition."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([7, 0, 7, 10, 2], np.uint8)


@pytest.fixture
def idx_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    (folder / IDX_IMAGES).write_bytes(_idx(IMAGES))
    (folder / f"{IDX_LABELS}.gz").write_bytes(gzip.compress(_idx(LABELS)))
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose params.yaml lets fetch run. Without flushing: that takes milliseconds a file."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)
    _set(raw=str(paths.RAW))
    return tmp_path


def _set(**changes: str) -> None:
    text = PARAMS.read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^  {key}: \S+", f"  {key}: {value}", text)
        assert count == 1
    Path("params.yaml").write_text(text)


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digits_are_those_of_sklearn(workspace: Path) -> None:
    main()
    files = _tree(paths.RAW)
    values, labels = sklearn_digits(return_X_y=True)
    assert len(files) == len(values) == 1797
    for place in (0, 1000, 1796):
        pixels = np.asarray(Image.open(paths.RAW / str(labels[place]) / f"{place:04d}.png"))
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.round(values[place].reshape(8, 8) * 255 / 16))
    assert {int(v) for v in np.unique(np.asarray(Image.open(paths.RAW / "0/0000.png")))} <= {
        round(value * 255 / 16) for value in range(17)
    }


def test_a_folder_of_your_own_is_left_alone(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workspace / "mine").mkdir()
    _set(raw="mine")
    main()
    assert list(_tree(paths.RAW)) == ["NOTE.txt"]
    assert list((workspace / "mine").iterdir()) == []
    assert capsys.readouterr().out == "data.raw in params.yaml is mine, a folder of your own, so nothing was fetched.\n"


def test_the_same_folder_by_another_name_is_filled(workspace: Path, idx_dir: Path) -> None:
    _set(raw=str(paths.RAW), source="idx", idx_dir=str(idx_dir))
    main()
    first = _tree(paths.RAW)
    _set(raw=str(workspace / "data" / ".." / paths.RAW), source="idx", idx_dir=str(idx_dir))
    main()
    assert _tree(paths.RAW) == first  # and a second run gives the same bytes


def test_idx_files_become_images(workspace: Path, idx_dir: Path) -> None:
    _set(raw=str(paths.RAW), source="idx", idx_dir=str(idx_dir))
    main()
    assert sorted(_tree(paths.RAW)) == ["0/0001.png", "10/0003.png", "2/0004.png", "7/0000.png", "7/0002.png"]
    assert np.array_equal(np.asarray(Image.open(paths.RAW / "10/0003.png")), IMAGES[3])


def test_plain_and_gzipped_are_the_same(idx_dir: Path) -> None:
    images, labels = load_idx_pair(idx_dir)
    assert np.array_equal(images, IMAGES)
    assert np.array_equal(labels, LABELS)
    (idx_dir / f"{IDX_IMAGES}.gz").write_bytes(gzip.compress((idx_dir / IDX_IMAGES).read_bytes()))
    assert np.array_equal(load_idx(idx_dir / f"{IDX_IMAGES}.gz", 3), IMAGES)


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def _no_images(folder: Path) -> None:
    (folder / IDX_IMAGES).write_bytes(_idx(IMAGES[:0]))
    (folder / IDX_LABELS).write_bytes(_idx(LABELS[:0]))


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing", lambda f: (f / IDX_IMAGES).unlink(), f"neither {IDX_IMAGES} nor {IDX_IMAGES}.gz; set fetch.idx_dir"),
    ("cut", _rewrite(IDX_IMAGES, lambda b: b[:-1]), r"less data than its header \(5, 4, 3\)"),
    ("cut in the header", _rewrite(IDX_IMAGES, lambda b: b[:10]), "less data"),
    ("empty", _rewrite(IDX_IMAGES, lambda b: b""), "begins with nothing"),
    ("longer", _rewrite(IDX_IMAGES, lambda b: b + b"x"), "more data"),
    ("other type", _rewrite(IDX_IMAGES, lambda b: b"\0\0\x0d" + b[3:]), "begins with 00000d03, but .* 00000803"),
    ("labels for images", _rewrite(IDX_IMAGES, lambda b: _idx(LABELS)), "begins with 00000801"),
    ("cut gzip", _rewrite(f"{IDX_LABELS}.gz", lambda b: b[:-9]), r"\.gz: damaged \("),
    ("flipped gzip", _rewrite(f"{IDX_LABELS}.gz", lambda b: b[:-6] + b"\xff\xff" + b[-4:]), r"\.gz: damaged \("),
    ("flipped deflate", _rewrite(f"{IDX_LABELS}.gz", lambda b: b[:10] + b"\xff\xff" + b[12:]), r"\.gz: damaged \("),
    ("no gzip", _rewrite(f"{IDX_LABELS}.gz", lambda b: b"plain text"), r"\.gz: damaged \("),
    ("fewer labels", _rewrite(f"{IDX_LABELS}.gz", lambda b: gzip.compress(_idx(LABELS[:3]))), "5 images but 3 labels"),
    ("none", _no_images, "no images"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_source_is_named(idx_dir: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(idx_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_idx_pair(idx_dir)
    assert "\n" not in str(caught.value)


def test_photo_tiles_are_pieces_of_the_photographs(workspace: Path) -> None:
    _set(raw=str(paths.RAW), source="photo_tiles")
    main()
    files = _tree(paths.RAW)
    photos = load_sample_images().images
    assert len(files) == 2 * 25 * 39
    for name, photo, row, column in (("0/0000.png", 0, 0, 0), ("0/0040.png", 0, 16, 16), ("1/1949.png", 1, 384, 608)):
        tile = np.asarray(Image.open(paths.RAW / name))
        assert np.array_equal(tile, photos[photo][row : row + 32, column : column + 32]), name


def test_a_failed_fetch_leaves_no_folder(workspace: Path, idx_dir: Path) -> None:
    (idx_dir / IDX_IMAGES).unlink()
    _set(raw=str(paths.RAW), source="idx", idx_dir=str(idx_dir))
    with pytest.raises(UserError, match="neither"):
        main()
    assert not paths.RAW.exists()


def test_auto_takes_the_folder_where_it_is_and_says_so(
    workspace: Path, idx_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _set(raw=str(paths.RAW), source="auto", idx_dir=str(idx_dir))
    main()
    text = f"fetch.source is auto: idx, as {idx_dir} is a folder here.\n"
    assert (paths.RAW / "SOURCE.txt").read_text() == text
    assert text in capsys.readouterr().out
    assert len(_tree(paths.RAW)) == 1 + len(IMAGES)
    _set(raw=str(paths.RAW), source="auto", idx_dir=str(workspace / "nowhere"), max_images="20")
    main()
    text = f"fetch.source is auto: digits, as {workspace / 'nowhere'} is absent here.\n"
    assert (paths.RAW / "SOURCE.txt").read_text() == text
    assert text in capsys.readouterr().out
    assert len(_tree(paths.RAW)) == 1 + 20


def test_auto_takes_no_refuge_in_digits_from_a_damaged_folder(workspace: Path, idx_dir: Path) -> None:
    (idx_dir / IDX_IMAGES).unlink()
    _set(raw=str(paths.RAW), source="auto", idx_dir=str(idx_dir))
    with pytest.raises(UserError, match="neither"):
        main()


def test_auto_needs_to_know_where_to_look(workspace: Path) -> None:
    _set(raw=str(paths.RAW), source="auto")
    with pytest.raises(UserError, match="source is auto, so idx_dir must name"):
        main()


@pytest.mark.parametrize(("most", "places"), [("3", [0, 1, 3]), ("4", [0, 1, 2, 3]), ("5", range(5)), ("9", range(5))])
def test_fewer_images_are_spread_over_the_set(workspace: Path, idx_dir: Path, most: str, places) -> None:
    _set(raw=str(paths.RAW), source="idx", idx_dir=str(idx_dir), max_images=most)
    main()
    kept = [np.asarray(Image.open(path)) for path in sorted(paths.RAW.rglob("*.png"), key=lambda path: path.name)]
    assert np.array_equal(kept, IMAGES[list(places)])
