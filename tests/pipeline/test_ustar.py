"""Tar files written by hand: the bytes of webdataset's writer, read by the standard library and by tar(1)."""

import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.ustar import MAX_SIZE, UstarWriter, make_header
from pipeline.data.writer import ShardFile

CONTENTS = st.binary(max_size=1600)


def _write(members: list[tuple[str, bytes]]) -> tuple[bytes, list[int], str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        with UstarWriter(path) as tar:
            offsets = [offset for member in members for offset in tar.add([member])]
        data = path.read_bytes()
        assert tar.num_bytes == len(data)
        return data, offsets, tar.sha256


@settings(deadline=None)
@given(contents=st.lists(CONTENTS, max_size=12), suffix=st.sampled_from(["npy", "bmp", "jpg", "webp"]))
def test_the_bytes_are_those_of_webdatasets_writer(contents: list[bytes], suffix: str) -> None:
    from webdataset import TarWriter

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.tar", Path(folder) / "theirs.tar"
        with ShardFile(ours) as file:
            for key, content in enumerate(contents):
                file.add(key, content, suffix, key % 3 if key % 2 else None, {"path": "ü", "class": content.hex()})
        with (
            open(theirs, "wb") as stream,
            TarWriter(stream, user="", group="", mode=0o644, encoder=False, mtime=0) as tar,
        ):
            for key, content in enumerate(contents):
                meta = f'{{"class": "{content.hex()}", "path": "\\u00fc"}}'.encode()
                record = {"__key__": f"{key:08d}", suffix: content, "json": meta}
                tar.write({**record, "cls": b"%d" % (key % 3)} if key % 2 else record)
        data = ours.read_bytes()
        assert data == theirs.read_bytes()
        for (offset, size, *_), content in zip(file.rows.tolist(), contents, strict=True):
            assert data[offset : offset + size] == content


@settings(deadline=None)
@given(contents=st.lists(CONTENTS, max_size=12))
def test_the_standard_library_finds_what_the_offsets_say(contents: list[bytes]) -> None:
    data, offsets, _ = _write([(f"{number}.bin", content) for number, content in enumerate(contents)])
    assert len(data) % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
        assert [member.offset_data for member in members] == offsets
        for number, (member, content) in enumerate(zip(members, contents, strict=True)):
            file = tar.extractfile(member)
            assert file is not None
            assert (member.name, file.read()) == (f"{number}.bin", content)
            assert (member.mode, member.uid, member.gid, member.uname, member.mtime) == (0o644, 0, 0, "", 0)


def test_tar_reads_the_longest_name_and_the_hash_is_of_the_file(tmp_path: Path) -> None:
    name = "n" * 100
    data, _, sha256 = _write([(name, b"seven"), ("empty", b"")])
    (tmp_path / "a.tar").write_bytes(data)
    subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path], check=True)
    assert (tmp_path / name).read_bytes() == b"seven"
    assert (tmp_path / "empty").read_bytes() == b""
    listed = subprocess.run(["sha256sum", tmp_path / "a.tar"], capture_output=True, text=True, check=True).stdout
    assert listed.split()[0] == sha256


@pytest.mark.parametrize(("name", "size"), [("", 0), ("n" * 101, 0), ("n", -1), ("n", MAX_SIZE + 1)])
def test_what_the_form_has_no_room_for_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="no room"):
        make_header(name.encode(), size)
    header = make_header(b"n", MAX_SIZE)
    assert tarfile.TarInfo.frombuf(header, "ascii", "strict").size == MAX_SIZE
