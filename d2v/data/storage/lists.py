"""`.tsv` lists of millions of files, in little memory and without an object for each line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from d2v.data.cache import NameTable
from d2v.files import open_regular

PIECE = 32 << 20
"""Bytes that are parsed at a time, and the rest of their last line."""
DIGITS = 18
"""A count with more of them is none."""
ODD = (b"|", b"../", b"..\t", b"\r", b"\n\n", b"\n\t")
"""What makes a list no plain one, but one for a reader of single lines: commands, ways out of the root, blank lines."""


def read_plain(file: Path) -> tuple[str, NameTable, np.ndarray] | None:
    """(root, paths, counts (n,) int64) of a list: a line of the root, then `path<TAB>count`; None where a line is
    anything else, or the file is not UTF-8."""
    names, ends, counts, total = list[bytes](), list[np.ndarray](), list[np.ndarray](), 0
    with open_regular(file) as stream:
        root = stream.readline()
        for piece in _read_pieces(stream):
            parsed = _parse(piece)
            if parsed is None:
                return None
            names.append(parsed[0])
            ends.append(parsed[1] + total)
            counts.append(parsed[2])
            total += len(parsed[0])
    try:
        text = root.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        return None
    if not ends or "\t" in text or "\r" in text:
        return None
    return text.strip(), NameTable.of(b"".join(names), np.concatenate(ends)), np.concatenate(counts)


def _read_pieces(stream: object) -> Iterator[bytes]:
    """Whole lines; none of them empty at the end of the file."""
    read, readline = stream.read, stream.readline  # type: ignore[attr-defined]
    while piece := read(PIECE):
        piece += readline()
        if len(piece) < PIECE or not piece.endswith(b"\n"):
            piece = piece.rstrip(b"\n") + b"\n"
        yield piece


def _parse(piece: bytes) -> tuple[bytes, np.ndarray, np.ndarray] | None:
    """(paths one behind the other, their ends (n,), counts (n,)) of lines; None where one is not plain."""
    if any(odd in piece for odd in ODD) or piece[:1] in (b"\t", b"\n"):
        return None
    try:
        piece.decode()
    except UnicodeDecodeError:
        return None
    values = np.frombuffer(piece, np.uint8)
    stops, tabs = np.flatnonzero(values == ord("\n")), np.flatnonzero(values == ord("\t"))
    starts = np.concatenate([[0], stops[:-1] + 1])
    if len(tabs) != len(stops) or (tabs < starts).any() or (tabs > stops).any():
        return None
    sizes = stops - tabs - 1
    if sizes.min() < 1 or sizes.max() > DIGITS:
        return None
    counts = np.zeros(len(stops), dtype=np.int64)
    for place in range(int(sizes.max())):
        rows = np.flatnonzero(sizes > place)
        digits = values[tabs[rows] + 1 + place].astype(np.int64) - ord("0")
        if digits.min() < 0 or digits.max() > 9:
            return None
        counts[rows] = 10 * counts[rows] + digits
    edges = np.zeros(len(values) + 1, dtype=np.int8)
    edges[starts], edges[tabs] = 1, -1
    paths = values[np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)]
    if piece[:1].isspace() or (values[starts] <= ord(" ")).any():
        return None
    return paths.tobytes(), np.cumsum(tabs - starts), counts
