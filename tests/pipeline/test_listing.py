"""What lies in a folder: classes, links, hidden files, strangers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.data.listing import list_images
from pipeline.errors import UserError
from tests.image_files import fill


def test_classes_are_first_level_folders_in_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(
        tmp_path,
        "b/2.png",
        "b/10.png",
        "b/deep/er/1.png",
        "a b/x.y.z.png",
        "ü/\u732b.png",
        "a/1.JPEG",
        f"a/{'n' * 240}.png",
    )
    listing = list_images(tmp_path)
    assert listing.classes == ("a", "a b", "b", "ü")
    assert [found.class_name for found in listing.images] == ["a", "a", "a b", "b", "b", "b", "ü"]
    assert [found.path for found in listing.images[3:6]] == ["b/10.png", "b/2.png", "b/deep/er/1.png"]
    scan = os.scandir

    @contextmanager
    def backwards(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scan(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

    monkeypatch.setattr(os, "scandir", backwards)
    assert list_images(tmp_path) == listing


def test_links_hidden_files_and_strangers(tmp_path: Path) -> None:
    raw, outside = tmp_path / "raw", tmp_path / "outside"
    fill(outside, "secret.png")
    fill(raw, "a/1.png", "a/.hidden.png", ".git/2.png", "a/._1.png")
    for name in ("a/captions.txt", "README", "Thumbs.db", "a/LICENSE.md"):
        (raw / name).touch()
    (raw / "a/photo.heic").touch()
    (raw / "a/no-suffix").touch()
    (raw / "a/out.png").symlink_to(outside / "secret.png")
    (raw / "a/in.png").symlink_to(raw / "a/1.png")
    (raw / "a/broken.png").symlink_to(raw / "nowhere.png")
    (raw / "a/loop.png").symlink_to(raw / "a/loop.png")
    (raw / "b").symlink_to(outside)
    (raw / "a/again").symlink_to(raw / "a")
    os.mkfifo(raw / "a/pipe.png")
    listing = list_images(raw)
    assert [found.path for found in listing.images] == ["a/1.png", "a/in.png"]
    assert {path: reason.split(";")[0].split(":")[0] for path, reason in listing.refused} == {
        "a/photo.heic": ".heic",
        "a/no-suffix": "no suffix",
        "a/out.png": "link that leaves the folder",
        "a/broken.png": "link to nothing",
        "a/loop.png": "link to nothing",
        "a/again": "link to a folder",
        "a/pipe.png": "not a regular file",
        "b": "link that leaves the folder",
    }
    assert (listing.num_hidden, listing.num_other) == (3, 4)
    assert listing.classes == ("a",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "not found: put your images there, or set data.raw"),
        ([], "no images"),
        (["a/notes.txt"], "no images"),
        (["b.png", "a.png", "a/1.png"], r"beside sub-folders \(a.png\) and inside them \(a/1.png\)"),
    ],
)
def test_a_folder_without_a_plain_meaning_is_an_error(tmp_path: Path, names: list[str] | None, message: str) -> None:
    raw = tmp_path / "raw"
    if names is not None:
        raw.mkdir()
        fill(raw, *names)
    with pytest.raises(UserError, match=message):
        list_images(raw)
