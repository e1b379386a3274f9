"""Files that appear whole or not at all, and JSON that is not trusted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SWEEP = "sweep.json"
"""In the folder of a sweep: its runs, how each was begun and how it ended."""
PARTIAL = ".partial-"
"""Begins the names of what is not whole yet."""
_ROW = 8192


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) beside its place, flushes it and renames it."""
    data = content.encode() if isinstance(content, str) else content
    with naming_bytes(path, len(data)):
        temporary = path.with_name(f"{PARTIAL}{path.name}")
        temporary.write_bytes(data)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)


def open_regular(path: str | Path) -> BinaryIO:
    """A file for reading; `ValueError` for a pipe, socket or device, on which a reader might wait for ever."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file")
    return file


@contextlib.contextmanager
def naming_bytes(path: Path, size: int, other: type[Exception] = OSError) -> Iterator[None]:
    """An `OSError` of writing a file (or an `other`) becomes one that names it and the bytes that were wanted."""
    try:
        yield
    except (OSError, other) as error:
        number, reason = getattr(error, "errno", None) or errno.EIO, getattr(error, "strerror", None) or str(error)
        raise OSError(number, f"{reason} ({size} bytes were to be written)", str(path)) from None


def checksum(data: bytes | np.ndarray) -> int:
    """A number that another bit changes, at the speed of memory: CRC-32 of the sums of 8-byte columns of 8 KB rows."""
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    whole = len(raw) - len(raw) % _ROW
    columns = raw[:whole].view(np.uint64).reshape(-1, _ROW // 8).sum(0, dtype=np.uint64)
    return zlib.crc32(raw[whole:].tobytes(), zlib.crc32(columns.tobytes()))


def is_url(text: str) -> bool:
    """Whether a setting names something by a protocol, wrapped ones (`a::b://c`) included."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)", text) is not None


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object; `ValueError` for anything else, however deeply nested."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON object, got one that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value
