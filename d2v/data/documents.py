"""Documents of plain text: blocks between blank lines of `.txt` files, and `text` fields of `.jsonl` files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from d2v.data.sources import Rejected, find_files, walk_files

SUFFIXES = (".txt", ".jsonl")
PLACES = "a .txt or .jsonl file, or a folder of them"
MAX_DOCUMENT_BYTES = 1 << 20
"""A longer block is cut, at the end of a line where it has any."""
MAX_LINE_BYTES = 64 << 20
"""Longest line of a .jsonl file."""
MAX_REJECTED = 1000
"""Documents of one file that may be undecodable before the rest of the file is left alone."""


def find_texts(path: str, option: str) -> list[Path]:
    """The `.txt` and `.jsonl` files that a path means; `ValueError`, beginning with `option`, where there are none."""
    if not path:
        raise ValueError(f"{option}: expected {PLACES}, got nothing")
    if path.startswith("pipe:"):
        raise ValueError(f"{option}: expected {PLACES}, got the shell command {path!r}")
    root = Path(path)
    if root.is_dir():
        names = sorted(walk_files(root))
        files = [root / name for name in names if Path(name).suffix.lower() in SUFFIXES]
        if not files:
            raise ValueError(f"{option}: expected {PLACES}, found none in {len(names)} files under {path!r}")
        return files
    files = find_files(path, PLACES, option)
    odd = next((f for f in files if f.suffix.lower() not in SUFFIXES or not f.is_file()), None)
    if odd is not None:
        raise ValueError(f"{option}: expected {PLACES}, got {str(odd)!r}")
    return files


class DocumentReader:
    """Iterates over the documents of files; `rejected` grows with what is not text."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.rejected: list[Rejected] = []
        self.bytes = sum(file.stat().st_size for file in files if file.exists())
        self.done = 0
        """Bytes of the files that were read."""

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            before, found = len(self.rejected), 0
            try:
                with file.open("rb") as stream:
                    pieces = _json_lines(stream) if file.suffix.lower() == ".jsonl" else _blocks(stream)
                    for line, data, reason in pieces:
                        self.done += len(data)
                        text = None
                        if reason is None:
                            text, reason = _decode(data, file.suffix.lower())
                        if reason is not None:
                            self.rejected.append(Rejected(f"{file}:{line}", reason))
                            if len(self.rejected) - before >= MAX_REJECTED:
                                self.rejected.append(Rejected(str(file), "too many such lines: the rest is not read"))
                                break
                        elif text:
                            found += 1
                            yield text
            except OSError as error:
                self.rejected.append(Rejected(str(file), error.strerror or str(error)))
            if not found and len(self.rejected) == before:
                self.rejected.append(Rejected(str(file), "no text"))


def _decode(data: bytes, suffix: str) -> tuple[str | None, str | None]:
    """A document's bytes -> (text, None), or (None, reason); an empty text is None without a reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 from byte {error.start}"
    if suffix == ".jsonl":
        try:
            value: Any = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return None, "not JSON"
        value = value.get("text") if isinstance(value, dict) else None
        if not isinstance(value, str):
            return None, "expected a JSON object with text"
        text = value
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return None, "not Unicode text: a surrogate by itself"
    return text.strip() or None, None


def _blocks(stream: BinaryIO) -> Iterator[tuple[int, bytes, str | None]]:
    """(line number, bytes, None) of the blocks between blank lines."""
    block: list[bytes] = []
    size = number = first = 0
    if stream.read(3) != b"\xef\xbb\xbf":  # a byte-order mark is not text
        stream.seek(0)
    rest = b""
    while line := rest + stream.readline(MAX_DOCUMENT_BYTES):
        rest = b""
        ended = line.endswith(b"\n")
        if not ended and len(line) >= MAX_DOCUMENT_BYTES:
            cut = _whole_characters(line)
            line, rest = line[:cut], line[cut:]
        number += ended
        blank = not line.strip()
        if block and (blank or size + len(line) > MAX_DOCUMENT_BYTES):
            yield first, b"".join(block), None
            block, size = [], 0
        if not blank:
            first = first if block else number or 1
            block.append(line)
            size += len(line)
    if block:
        yield first, b"".join(block), None


def _whole_characters(data: bytes) -> int:
    """Length of the longest beginning that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if back >= length else len(data) - back
    return len(data)


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, str | None]]:
    """(line number, bytes, reason not to use it or None) of the lines that are not blank."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        reason = None
        while not line.endswith(b"\n") and len(line) >= MAX_LINE_BYTES:
            reason = f"line is longer than {MAX_LINE_BYTES} bytes"
            line = stream.readline(MAX_LINE_BYTES)
        if reason or line.strip():
            yield number, line, reason
