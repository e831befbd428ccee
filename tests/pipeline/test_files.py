"""Files are whole or absent."""

from pathlib import Path

import pytest

from pipeline.runtime.files import load_json, save_json, whole_file, whole_folder


def test_an_interrupted_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    save_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.json") as aside:  # noqa: PT012
        aside.write_text("{half")
        raise KeyboardInterrupt
    assert load_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_and_never_mixed(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with whole_folder(tmp_path / "out") as aside:
            (aside / name).write_text(name)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_unfinished_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.abc.part").mkdir()
    with whole_folder(tmp_path / "out") as aside:
        (aside / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nan_is_refused_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
