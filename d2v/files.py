"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

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
    temporary = path.with_name(f"{PARTIAL}{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)
