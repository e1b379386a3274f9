"""What scanning files has found, kept for the next start; and lists of names in little memory.

A file of a cache folder is the SHA-256 of what follows it, then JSON: of each file that was scanned its size and time
of change, and what was in it. It may be deleted at any time. What is known of a file counts only while the file has the
size and time of change that it had then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2v.files import write_atomically
from d2v.runtime import Reporter

CACHE = "cache"
"""Folder inside a run folder."""
FORMAT = 4
LOOKS = 16
"""Files that are looked at at the same time: that waits for the storage most of the time."""


class NameTable(Sequence[str]):
    """Immutable list of strings in one byte string; millions of names stay cheap and forked workers share the pages."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])

    def __iter__(self) -> Iterator[str]:
        ends: list[int] = self._ends.tolist()
        return (os.fsdecode(self._bytes[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))

    def digest(self) -> str:
        """SHA-256 of the names and their lengths."""
        return hashlib.sha256(self._bytes + self._ends.tobytes()).hexdigest()


class Found(NamedTuple):
    """What is in one file; JSON values."""

    samples: list[list[Any]]
    """Of each sample: name, label ("": none), offset and size, offset and size of its transcript (-1: none), length, or
    a list that begins with it, or why it has none."""
    rejected: Sequence[Sequence[str]] = ()
    """(name, reason) of what cannot be used."""
    left_out: Mapping[str, int] = {}
    """What is passed over, by the ending of its name."""


class IndexCache:
    """A folder of such files: one that runs share, or that of a run, which is written once the run has its folder."""

    def __init__(self, folder: Path | None, shared: bool) -> None:
        self.folder, self.shared = folder, shared
        self._pending: dict[str, bytes] = {}

    def read(self, name: str) -> dict[str, Any]:
        """A file; empty where there is none. One that is damaged is mentioned and not used."""
        if self.folder is None or not (path := self.folder / name).is_file():
            return {}
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[64:]).hexdigest().encode() == data[:64]:
                return dict(json.loads(data[64:]))
            reason = "its checksum differs"
        except (ValueError, TypeError, OSError, MemoryError) as error:
            reason = type(error).__name__
        print(f"note: the index {path} is damaged ({reason}) and is made again", file=sys.stderr)
        return {}

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a file: at once in a shared folder, else when `write` is called."""
        data = json.dumps(value).encode()
        self._pending[name] = hashlib.sha256(data).hexdigest().encode() + data
        if self.shared and self.folder is not None:
            self.write(self.folder)

    def write(self, folder: Path) -> None:
        """Writes what is kept and not written yet. What cannot be written is mentioned: it costs time, no more."""
        try:
            for name, data in self._pending.items():
                folder.mkdir(parents=True, exist_ok=True)
                own = folder / f"{name}-{os.getpid()}"  # several processes may write the same file
                own.write_bytes(data)
                own.replace(folder / name)
        except OSError as error:
            print(
                f"note: cannot write the index {folder}: {error.strerror}; it is made at every start", file=sys.stderr
            )
        self._pending = {}


def stamp_of(path: str | Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds of a file; -1, -1 for what is not there."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):  # ValueError: a name that no file has
        return -1, -1
    return status.st_size, status.st_mtime_ns


def stamps_of(paths: Sequence[str]) -> np.ndarray:
    """(n,2) int64: `stamp_of` each path; "": -1."""
    step = max(1024, -(-len(paths) // LOOKS))
    parts = [paths[start : start + step] for start in range(0, len(paths), step)]
    with ThreadPoolExecutor(LOOKS) as pool:
        found = pool.map(lambda part: [stamp_of(path) if path else (-1, -1) for path in part], parts)
        return np.array([stamp for part in found for stamp in part], dtype=np.int64).reshape(-1, 2)


def describe_change(expected: Sequence[int], found: Sequence[int]) -> str | None:
    """How a file differs from what it was when it was indexed, by two stamps of it; None: not, or one is missing."""
    if tuple(expected) == tuple(found) or min(*expected, *found) < 0:
        return None
    old, new = (f"{size} bytes of {_show_time(nanoseconds)}" for size, nanoseconds in (expected, found))
    return f"changed since it was indexed: expected {old}, got {new}"


def _show_time(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{rest:09d}"


class Changed(NamedTuple):
    """A file that is not as it was."""

    number: int
    resized: bool
    text: str


class FileRecord:
    """Sizes and times of change of the files of one set as a run began with them, in a file of the run folder: the
    SHA-256 of what follows it, then that of the names (32 bytes), then (n,2) int64."""

    def __init__(self, file: Path, names: NameTable, stamps: np.ndarray) -> None:
        self.file, self.names, self.stamps = file, names, stamps

    def write(self) -> None:
        """Keeps what is there now."""
        data = bytes.fromhex(self.names.digest()) + self.stamps.astype("<i8").tobytes()
        write_atomically(self.file, hashlib.sha256(data).digest() + data)

    def find_changed(self) -> list[Changed]:
        """The files that are not as the record says. Without a record of these names there is nothing to compare."""
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:  # of an earlier version
            return []
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            print(f"note: {self.file} is damaged: whether files of the data changed is not known", file=sys.stderr)
            return []
        if data[32:64] != bytes.fromhex(self.names.digest()):
            return []
        before = np.frombuffer(data[64:], dtype="<i8").reshape(-1, 2)
        rows = np.flatnonzero((before != self.stamps).any(axis=1)).tolist()
        pairs = ((row, before[row].tolist(), self.stamps[row].tolist()) for row in rows)
        changes = ((row, old[0] != new[0], describe_change(old, new)) for row, old, new in pairs)
        return [Changed(row, resized, text) for row, resized, text in changes if text is not None]


def scan_files(
    files: Iterable[str], stamps: list[tuple[int, int]], scan: Callable[[int], Found], cache: IndexCache | None,
    scope: tuple[object, ...], threads: int = 1,
) -> list[Found]:  # fmt: skip
    """What is in each of some files, from the cache or by `scan`.

    Args:
        files: their names.
        stamps: size and time of change of each; -1: not to be kept.
        scan: number of a file -> what is in it; what it raises is raised.
        cache: None: no cache.
        scope: what the scans depend on besides the files; one file of the cache belongs to it.
        threads: scans at the same time.
    """
    name = f"index-{hashlib.sha256(json.dumps([FORMAT, *map(str, scope)]).encode()).hexdigest()[:16]}.json"
    known = cache.read(name) if cache is not None else {}
    names = list(files)
    entries = [known.get(file, [None]) for file in names]
    usable = [entry[0] == [*stamp] and stamp[0] >= 0 for entry, stamp in zip(entries, stamps, strict=True)]
    missing = [number for number, good in enumerate(usable) if not good]
    with ThreadPoolExecutor(threads) as pool:
        scanned = iter(list(pool.map(scan, missing) if threads > 1 else map(scan, missing)))
    found = [Found(*entry[1:]) if good else next(scanned) for entry, good in zip(entries, usable, strict=True)]
    if cache is not None and missing:
        cache.keep(name, {file: [stamp, *f] for file, stamp, f in zip(names, stamps, found, strict=True)})
    return found


def index_files(
    files: Sequence[Path], what: str, scan: Callable[[Path], Found], cache: IndexCache | None,
    scope: tuple[object, ...], threads: int = 1,
) -> tuple[np.ndarray, list[Found]]:  # fmt: skip
    """`stamps_of` container files and `scan_files` of them, which says how far it is; `what` they are is for that."""
    report = Reporter("indexing", len(files), what)

    def counted(number: int) -> Found:
        result = scan(files[number])
        report.add()
        return result

    paths = [str(file.absolute()) for file in files]
    stamps = stamps_of(paths)
    found = scan_files(paths, [(size, at) for size, at in stamps.tolist()], counted, cache, (*scope, *paths), threads)
    report.finish()
    return stamps, found
