"""Files that lie elsewhere, by URL: read in pieces, tried again when the network fails, never with secrets in messages.

The only importer of fsspec and, for `dvc://`, of dvc. Credentials are found by the libraries behind fsspec, in their
usual environment variables and files (`AWS_ACCESS_KEY_ID`, `~/.aws`, `GOOGLE_APPLICATION_CREDENTIALS`, `~/.netrc`,
`FSSPEC_S3`, `.dvc/config.local`); nothing here takes, keeps or prints them.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeline.errors import UserError

log = logging.getLogger(__name__)
for library in ("botocore", "aiobotocore"):  # they tell at INFO where they found which credentials
    logging.getLogger(library).setLevel(logging.WARNING)
T = TypeVar("T")

PIECE_BYTES = 16 << 20
NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "NoAuthError")
)
PASSING_STATUS = frozenset((408, 425, 429))  # of the 4xx, those that another try may heal


class RemoteError(UserError):
    """A file elsewhere could not be had; the message names it and the cause."""


@dataclass(frozen=True)
class Patience:
    """How long to go on. `tries` without any progress are made, `seconds` is what one piece may take; between tries
    the pause doubles from `pause_seconds` to `longest_pause_seconds`, times a random factor in [0.5, 1.5)."""

    tries: int = 5
    seconds: float = 60.0
    pause_seconds: float = 0.5
    longest_pause_seconds: float = 30.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row. Random, so that a thousand readers don't come back at
        the same moment; it decides no result."""
        wait = min(self.pause_seconds * 2.0 ** (failures - 1), self.longest_pause_seconds)
        return wait * random.uniform(0.5, 1.5)


def redact(text: str) -> str:
    """A text without the user names, passwords and query strings (signatures, tokens) of the URLs in it.

    Example:
        >>> redact("GET https://me:secret@host/a.tar?X-Amz-Signature=1 failed")
        'GET https://host/a.tar failed'
    """
    return re.sub(r"(\w://[^\s?'\"<>]*)\?[^\s'\"<>]*", r"\1", re.sub(r"(\w://)[^/\s]*@", r"\1", text))


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path: `s3://`, `gs://`, `https://`, `file://`, `dvc://`."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", place) is not None


def join(url: str, name: str) -> str:
    """The URL of a file in a folder; a query string stays behind it.

    Example:
        >>> join("https://host/set/?token=1", "a.tar")
        'https://host/set/a.tar?token=1'
    """
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


class RemoteFile(NamedTuple):
    """A file on some file system of fsspec. `shown` is what messages say of it; `md5` is known of DVC's files."""

    files: Any
    path: str
    shown: str
    md5: str | None = None


def open_remote(url: str) -> RemoteFile:
    """The file behind a URL; nothing is read yet.

    Raises:
        RemoteError: the protocol is unknown, or the library for it is not installed.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        hint = "; pip install 'ddpm-pipeline[s3]'" if url.startswith("s3:") else ""
        raise RemoteError(f"{redact(url)}: {redact(str(error))}{hint}") from None
    except Exception as error:
        raise RemoteError(f"{redact(url)}: {_judge(error)[1]}") from None
    return RemoteFile(files, path, redact(url))


def read_whole(file: RemoteFile, patience: Patience = Patience()) -> bytes:
    """All bytes of a small file, compared with its md5 where that is known.

    Raises:
        RemoteError: not to be had, or not what its md5 says.
    """
    data = _try_again(lambda: _read(file, None, None, patience.seconds), file.shown, patience)
    if file.md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != file.md5:
        raise RemoteError(f"{file.shown}: differs from its md5 in DVC; push it again (`dvc push --force`)")
    return data


def size_of(file: RemoteFile, patience: Patience = Patience()) -> int:
    """Length in bytes, as the server says.

    Raises:
        RemoteError: not to be had, or the server does not say.
    """
    size = _try_again(lambda: _ask(file.files.size, file, patience.seconds), file.shown, patience)
    if size is None:
        raise RemoteError(f"{file.shown}: the server does not say how long it is; copy it to a server that does")
    return int(size)


def list_remote(url: str, pattern: str, patience: Patience = Patience()) -> list[str]:
    """URLs of the files in a folder elsewhere whose names match, sorted.

    Raises:
        RemoteError: the folder can't be listed.
    """
    folder = open_remote(url)

    def ask() -> list[str]:
        return sorted(map(str, folder.files.glob(f"{folder.path.rstrip('/')}/{pattern}")))

    return [str(folder.files.unstrip_protocol(path)) for path in _try_again(ask, folder.shown, patience)]


def read_pieces(
    file: RemoteFile,
    num_bytes: int,
    patience: Patience = Patience(),
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[bytes]:
    """A file's bytes by ranged requests. A failure costs one piece, not the file; every piece has its own tries.

    Where a server knows no ranges and sends the whole file, that is taken as it comes.

    Raises:
        RemoteError: a piece was not to be had, or the file is shorter than `num_bytes`.
    """
    done = 0
    while done < num_bytes:
        stop = min(done + piece_bytes, num_bytes)

        def read(start: int = done, stop: int = stop) -> bytes:
            data = _read(file, start, stop, patience.seconds)
            if len(data) == num_bytes:
                return data[start:]
            if len(data) != stop - start:
                raise EOFError(f"{len(data):,} bytes came where {stop - start:,} were asked for")
            return data

        data = _try_again(read, file.shown, patience)
        done += len(data)
        yield data


def _read(file: RemoteFile, start: int | None, stop: int | None, seconds: float) -> bytes:
    return bytes(_ask(file.files.cat_file, file, seconds, start=start, end=stop))


def _ask(call: Callable[..., Any], file: RemoteFile, seconds: float, **arguments: Any) -> Any:
    # Only what fsspec runs in its event loop can be given up; the others (file://, sftp://) have limits of their own.
    limit = {"timeout": seconds} if getattr(file.files, "async_impl", False) else {}
    return call(file.path, **arguments, **limit)


def _try_again(call: Callable[[], T], shown: str, patience: Patience) -> T:
    for failures in range(1, patience.tries + 1):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # what a dozen client libraries raise has no common class
            final, reason = _judge(error)
        if final:
            raise RemoteError(f"{shown}: {reason}")
        if failures < patience.tries:
            wait = patience.pause(failures)
            log.info("%s: %s; trying again in %.1f s", shown, reason, wait)
            time.sleep(wait)
    raise RemoteError(f"{shown}: {reason}; given up after {patience.tries} tries: check the network and run again")


def _judge(error: Exception) -> tuple[bool, str]:
    """Whether another try is of no use, and the cause in words. Never the error's own text where it may hold a URL
    with a secret in another form than :func:`redact` knows."""
    if type(error).__name__ in NO_CREDENTIALS:
        return True, "no credentials found; set them in the environment or in the provider's usual file"
    if isinstance(error, FileNotFoundError):
        return True, "not found"
    if isinstance(error, PermissionError):
        return True, "no access (403); check the credentials in the environment and the rights they give"
    if isinstance(error, TimeoutError):
        return False, "no answer in time"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        final = 400 <= status < 500 and status not in PASSING_STATUS
        words = {401: "no access", 403: "no access", 404: "not found", 416: "shorter than the index says"}
        hint = "; check the credentials in the environment and the rights they give" if status in (401, 403) else ""
        return final, f"{words.get(status, 'the server failed')} ({status}){hint}"
    if isinstance(error, EOFError) or "Payload" in type(error).__name__ or "Incomplete" in type(error).__name__:
        return False, "the body was cut short"
    text = redact(" ".join(str(error).split()))[:200]
    return isinstance(error, (ImportError, NotImplementedError)), f"{type(error).__name__}: {text}" if text else type(
        error
    ).__name__


class Folder(Protocol):
    """Where the files of a set lie. Can be pickled."""

    shown: str

    def file(self, name: str) -> RemoteFile:
        """One of its files."""
        ...


class UrlFolder:
    """A folder by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.shown = redact(url)

    def file(self, name: str) -> RemoteFile:
        """`name` below the URL."""
        return open_remote(join(self._url, name))


class DvcFolder:
    """An output of `dvc.lock` as it lies in the DVC remote, file by file under its hash: no `dvc pull`, no copy in the
    cache. The remote and its credentials are those of `.dvc/config` and `.dvc/config.local`.

    Args:
        output: path of a folder that a stage puts out, such as `shards`.
        remote: name of the remote; the default one if empty.

    Raises:
        RemoteError: no repository, no such remote, no such output, or its list of files is not in the remote.
    """

    def __init__(self, output: str, remote: str = "") -> None:
        self.shown = f"dvc://{remote}/{output}" if remote else f"dvc://{output}"
        self._files: dict[str, RemoteFile] = {}
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc_data.index import DataIndexDirError, StorageKeyError

        try:
            with Repo.open(".", remote=remote or None) as repo:
                index, entry = repo.get_data_index_entry(output)
                for key, item in index.iteritems(entry.key):
                    if item.hash_info is not None and not item.hash_info.isdir:
                        files, path = index.storage_map.get_remote(item)
                        name = "/".join(key[len(entry.key) :])
                        self._files[name] = RemoteFile(files.fs, path, f"{self.shown}/{name}", item.hash_info.value)
        except (StorageKeyError, ValueError):
            raise RemoteError(
                f"{self.shown}: DVC knows no such remote; add one (`dvc remote add -d NAME URL`)"
            ) from None
        except (DataIndexDirError, FileNotFoundError):
            raise RemoteError(f"{self.shown}: its list of files is not in the remote; push it (`dvc push`)") from None
        except DvcException as error:
            raise RemoteError(f"{self.shown}: {redact(str(error))}") from None
        except Exception as error:
            raise RemoteError(f"{self.shown}: {_judge(error)[1]}") from None

    def file(self, name: str) -> RemoteFile:
        """The object that holds `name`."""
        try:
            return self._files[name]
        except KeyError:
            raise RemoteError(f"{self.shown}: holds no {name}; run `dvc repro` and `dvc push`") from None


def open_folder(url: str, output: str) -> Folder:
    """The folder behind a URL; `dvc://` is `output` in the default DVC remote, `dvc://NAME` in another."""
    if url.startswith("dvc://"):
        return DvcFolder(output, remote=url.removeprefix("dvc://").strip("/"))
    return UrlFolder(url)
