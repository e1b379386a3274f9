"""Files at URLs, read by `fsspec`: the protocols, their packages and their credentials are its own matter.

A URL comes from a setting of the user alone. Nothing that is read names another one: no wrapping protocols, no pages of
links.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np

from d2v.data.sources import ShardLost, describe_error, expand_braces

TRIES = 4
"""Attempts to read something, a failing network included."""
WAIT_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one."""
BLOCK_BYTES = 4 << 20
"""Read at a time by what reads a file from its beginning."""
WRAPPERS = frozenset(
    "simplecache filecache blockcache cached reference dir zip tar libarchive generic dask git jupyter data".split()  # noqa: SIM905
)
"""Protocols that lead elsewhere, or keep copies on this machine."""
_HTTP = ("http://", "https://")
_T = TypeVar("_T")


class RemoteFile:
    """A file at a URL: what the sources of shards need of `Path`, and its reading."""

    def __init__(self, url: str) -> None:
        self.url = url
        path = PurePosixPath(urlsplit(url).path if url.startswith(_HTTP) else url)
        self.name, self.suffix = path.name, path.suffix
        self.parent = url[: url.rindex("/")] if "/" in url else ""

    def __str__(self) -> str:
        return self.url

    def absolute(self) -> RemoteFile:
        """Itself."""
        return self

    def open(self) -> BinaryIO:
        """For reading from the beginning on; `ShardLost` where it is not there."""

        def opened() -> Any:
            system, path = find_system(self.url)
            file = system.open(path, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
            if not file.seekable() or file.size is None:
                raise ValueError(f"{self.url}: expected a server that sends parts of files, got one that does not")
            return file

        return cast(BinaryIO, io.BufferedReader(_Steady(self, self.attempt(opened)), BLOCK_BYTES // 64))

    def read_at(self, offset: int, size: int) -> bytes:
        """Some of its bytes; `ShardLost` where they cannot be had."""

        def read() -> bytes:
            system, path = find_system(self.url)
            data = bytes(system.cat_file(path, start=offset, end=offset + size))
            if len(data) > size:
                raise ValueError(f"{self.url}: expected a server that sends parts of files, got one that does not")
            return data

        return self.attempt(read)

    def stamp(self) -> tuple[int, int]:
        """Size (bytes) and time of change (ns), in place of which a number of its own stands for another mark of its
        content; -1: not known."""

        def look() -> Any:
            system, path = find_system(self.url)
            return system.info(path)

        info = self.attempt(look)
        times = ("mtime", "LastModified", "last_modified", "updated", "created")
        changed = next((info[key] for key in times if info.get(key)), None)
        if isinstance(changed, str):
            with contextlib.suppress(ValueError):
                changed = datetime.fromisoformat(changed.replace("Z", "+00:00"))
        if isinstance(changed, datetime):
            changed = changed.timestamp()
        mark = info.get("ETag") or info.get("etag") or info.get("md5Hash")
        if not isinstance(changed, (int, float)) and mark:
            return int(info["size"]), int.from_bytes(hashlib.sha256(str(mark).encode()).digest()[:7], "big")
        return int(info.get("size") or -1), int(changed * 1e9) if isinstance(changed, (int, float)) else -1

    def attempt(self, action: Callable[[], _T]) -> _T:
        """What an action returns, which a failing network does not end at once."""
        for number in range(TRIES):
            try:
                return action()
            except (ValueError, ImportError):
                raise
            except Exception as error:  # each protocol has its own
                if number + 1 == TRIES or isinstance(error, (FileNotFoundError, PermissionError)):
                    reason, tries = describe_error(error), number + 1
                    break
                time.sleep(WAIT_SECONDS * 2**number)
        raise ShardLost(f"{self.url} cannot be read ({tries} {'try' if tries == 1 else 'tries'}): {reason}")


class _Steady(io.RawIOBase):
    """An open file whose reads are attempted as often as others."""

    def __init__(self, remote: RemoteFile, file: Any) -> None:
        self._remote, self._file, self._place = remote, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: int(self._file.size)}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        def read() -> bytes:
            self._file.seek(self._place)
            return bytes(self._file.read(len(buffer)))

        data = self._remote.attempt(read)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def find_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, of this process, and the path in it."""
    import fsspec

    return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))


def find_remote(url: str, option: str) -> list[RemoteFile]:
    """The files that a URL means, with `{0000..0012}` and, where folders can be listed, with `*`.

    `ValueError`, beginning with `option`, for protocols that are not read, missing packages and where nothing is.
    """
    protocol = url.partition("://")[0]
    if "::" in url or protocol in WRAPPERS:
        raise ValueError(f"{option}: expected the URL of files themselves, got one that wraps another: {url!r}")
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{option}: {url!r} needs fsspec: pip install 'd2v[remote]'") from None
    try:
        system, _ = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{option}: {url!r}: {describe_error(ValueError(str(error)))}") from None
    found: list[str] = []
    for name in expand_braces(url, option):
        if name.startswith(_HTTP):
            if "*" in name:
                raise ValueError(f"{option}: expected no * at {protocol}, but for example {{0000..0012}}, got {url!r}")
            found.append(name)
        elif glob.has_magic(name):
            try:
                found += sorted(system.unstrip_protocol(path) for path in system.glob(name))
            except Exception as error:  # each protocol has its own
                raise ValueError(f"{option}: {name!r} cannot be listed: {describe_error(error)}") from None
        else:
            found.append(name)
    files = [RemoteFile(name) for name in found]
    odd = next((file for file in files if file.suffix not in (".tar", ".parquet")), None)
    if odd is not None or not files or len({file.suffix for file in files}) > 1:
        got = "nothing" if not files else repr(odd.url) if odd is not None else "both"
        raise ValueError(f"{option}: expected .tar shards or .parquet files at {url!r}, got {got}")
    return files


def stamps_of_remote(files: list[RemoteFile], threads: int, option: str) -> np.ndarray:
    """(n,2) int64: `RemoteFile.stamp` of each; `ValueError` where one is not there."""
    try:
        with ThreadPoolExecutor(threads) as pool:
            return np.array(list(pool.map(RemoteFile.stamp, files)), dtype=np.int64).reshape(-1, 2)
    except OSError as error:
        raise ValueError(f"{option}: {error}") from None
