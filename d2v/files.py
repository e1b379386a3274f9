"""Files that appear whole or not at all, and JSON that is not trusted."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"
"""Begins the names of what is not whole yet."""


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


@contextlib.contextmanager
def naming_bytes(path: Path, size: int) -> Iterator[None]:
    """An `OSError` of writing a file names it and the bytes that were wanted."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"{reason} ({size} bytes were to be written)", str(path)) from None


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object; `ValueError` for anything else, however deeply nested."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON object, got one that is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value
