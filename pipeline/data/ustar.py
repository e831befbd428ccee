"""Tar files in the plain ustar form, written by hand: fixed owner, mode and time, so that equal content is equal bytes.

`webdataset.TarWriter` gives the same bytes (a test compares them) at a tenth of the rate: bench/sharding.py.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

BLOCK = 512
RECORD = 20 * BLOCK  # tar(1) pads a file to whole records
MAX_SIZE = 8**11 - 1  # what eleven octal digits hold

# name 100, mode 8, uid 8, gid 8 | size 12 | mtime 12 | checksum 8 | type 1, link name 100, magic 8, the rest empty
_OWNER = b"0000644\0" + b"0000000\0" * 2
_MTIME = b"00000000000\0"
_TAIL = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(BLOCK - 265)
_SUM = sum(_OWNER) + sum(_MTIME) + sum(_TAIL) + 8 * ord(" ")  # the checksum's own field counts as blanks


def make_header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a regular file: mode 0644, owner and group 0 without names, time 0.

    Args:
        name: up to 100 bytes.
        size: of the file, in [0, 8 GiB).

    Raises:
        ValueError: the form has no room for the name or the size.
    """
    if not 0 < len(name) <= 100 or not 0 <= size <= MAX_SIZE:
        raise ValueError(f"a ustar header has no room for the name {name!r} or the size {size}")
    digits = b"%011o" % size
    checksum = b"%06o\0 " % (_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(100, b"\0"), _OWNER, digits, b"\0", _MTIME, checksum, _TAIL))


class UstarWriter:
    """A tar file that is written from beginning to end; `sha256` and `num_bytes` are right after the with-block.

    Example:
        >>> import tarfile, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.tar"
        >>> with UstarWriter(path) as tar:
        ...     offsets = tar.add([("0.cls", b"7"), ("0.txt", b"seven")])
        >>> with tarfile.open(path) as file:
        ...     [(member.name, member.offset_data) for member in file], offsets
        ([('0.cls', 512), ('0.txt', 1536)], [512, 1536])
    """

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.sha256 = ""

    def add(self, members: list[tuple[str, bytes]]) -> list[int]:
        """Append files `(name, content)`; returns where the content of each begins."""
        parts = []
        offsets = []
        for name, content in members:
            size = len(content)
            offsets.append(self.num_bytes + BLOCK)
            padding = -size % BLOCK
            parts += [make_header(name.encode("ascii"), size), content, bytes(padding)]
            self.num_bytes += BLOCK + size + padding
        self._write(b"".join(parts))
        return offsets

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def __enter__(self) -> UstarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            end = 2 * BLOCK
            end += -(self.num_bytes + end) % RECORD
            self._write(bytes(end))
            self.num_bytes += end
            self.sha256 = self._digest.hexdigest()
        self._file.close()
