"""Small files that params.yaml names by path or URL."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from pipeline.errors import UserError

_MOST_BYTES = 1 << 28
_TIMEOUT_S = 60


def is_url(source: str) -> bool:
    """Whether this is the address of a file elsewhere.

    Example:
        >>> is_url("https://example.org/a.npz"), is_url("data/a.npz")
        (True, False)
    """
    return urlsplit(source).scheme in ("http", "https")


def read_source(source: str, *, key: str, name: str) -> bytes:
    """The bytes of a file.

    Args:
        source: a path or a URL.
        key: of params.yaml that names it, for errors.
        name: of what it should be, for errors.

    Raises:
        UserError: it can't be read, or has more than 256 MiB.
    """
    if not is_url(source):
        try:
            return Path(source).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{key}: {source}: {error.strerror}; put {name} there, or name its URL") from None
    try:
        with urlopen(source, timeout=_TIMEOUT_S) as answer:
            content: bytes = answer.read(_MOST_BYTES + 1)
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{key}: {source} can't be fetched ({reason}); fetch {name} by hand and name its path"
        ) from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{key}: {source} has more than {_MOST_BYTES >> 20} MiB: it is not {name}")
    return content
