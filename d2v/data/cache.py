"""What scanning files has found, kept for the next start; and lists of names in little memory.

A file of a cache folder is the SHA-256 of what follows it, a line of JSON that names arrays, and these arrays as they
are: of each file that was scanned its size and time of change, and what was in it. It may be deleted at any time. What
is known of a file counts only while the file has the size and time of change that it had then.
"""

from __future__ import annotations

import hashlib
import json
import math
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
FORMAT = 5
LOOKS = 16
"""Files that are looked at at the same time: that waits for the storage most of the time."""


class NameTable(Sequence[str]):
    """Immutable list of strings in one byte string; millions of names stay cheap and forked workers share the pages."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))

    @staticmethod
    def of(data: bytes, ends: np.ndarray) -> NameTable:
        """The table of names that lie one behind the other and end at the places `ends` (n,) int64."""
        table = NameTable()
        table._bytes, table._ends = data, ends
        return table

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Itself for `IndexCache.keep`."""
        return {name: np.frombuffer(self._bytes, np.uint8), f"{name}_ends": self._ends}

    @staticmethod
    def taken(arrays: Mapping[str, np.ndarray], name: str) -> NameTable:
        """What `arrays` gave."""
        return NameTable.of(arrays[name].tobytes(), arrays[f"{name}_ends"])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])

    def __iter__(self) -> Iterator[str]:
        ends: list[int] = self._ends.tolist()
        return (os.fsdecode(self._bytes[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NameTable) and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

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


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays of int64 and uint8, of any shape, behind a line of JSON that names them."""
    wide = sorted(arrays.items(), key=lambda pair: -pair[1].itemsize)  # each begins at a multiple of its item size
    line = json.dumps([[name, array.dtype.name, *array.shape] for name, array in wide]).encode()
    return b"".join([line, b" " * (-(len(line) + 1) % 8), b"\n", *(array.tobytes() for _, array in wide)])


def unpack_arrays(data: bytes, start: int) -> dict[str, np.ndarray]:
    """The arrays, which are views of `data`; `ValueError` or another where they are not what `pack_arrays` made."""
    place, found = data.index(b"\n", start) + 1, {}
    for name, kind, *shape in json.loads(data[start:place]):
        dtype, count = np.dtype({"int64": np.int64, "uint8": np.uint8}[kind]), math.prod(shape)
        found[name] = np.frombuffer(data, dtype, count, place).reshape(shape)
        place += count * dtype.itemsize
    return found


class IndexCache:
    """A folder of such files: one that runs share, or that of a run, which is written once the run has its folder.

    `pending`: what is not written yet, or, of several ranks, what another one has found.
    """

    def __init__(self, folder: Path | None, shared: bool) -> None:
        self.folder, self.shared = folder, shared
        self.pending: dict[str, bytes] = {}

    def read(self, name: str) -> dict[str, np.ndarray]:
        """A file; empty where there is none. One that is damaged is mentioned and not used."""
        path = (self.folder or Path()) / name
        if name not in self.pending and (self.folder is None or not path.is_file()):
            return {}
        try:
            data = self.pending[name] if name in self.pending else path.read_bytes()
            if hashlib.sha256(memoryview(data)[64:]).hexdigest().encode() == data[:64]:
                return unpack_arrays(data, 64)
            reason = "its checksum differs"
        except (ValueError, TypeError, KeyError, OSError, MemoryError, RecursionError) as error:
            reason = type(error).__name__
        print(f"note: the index {path} is damaged ({reason}) and is made again", file=sys.stderr)
        return {}

    def keep(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a file: at once in a shared folder, else when `write` is called."""
        data = pack_arrays(arrays)
        self.pending[name] = hashlib.sha256(data).hexdigest().encode() + data
        if self.shared and self.folder is not None:
            self.write(self.folder)

    def write(self, folder: Path) -> None:
        """Writes what is kept and not written yet. What cannot be written is mentioned: it costs time, no more."""
        try:
            for name, data in self.pending.items():
                folder.mkdir(parents=True, exist_ok=True)
                own = folder / f"{name}-{os.getpid()}"  # several processes may write the same file
                own.write_bytes(data)
                own.replace(folder / name)
        except OSError as error:
            print(
                f"note: cannot write the index {folder}: {error.strerror}; it is made at every start", file=sys.stderr
            )
        self.pending = {}


def name_index(kind: str, scope: Iterable[object]) -> str:
    """Name of the file of a cache that belongs to what something depends on."""
    return f"{kind}-{hashlib.sha256(json.dumps([FORMAT, *map(str, scope)]).encode()).hexdigest()[:16]}.bin"


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


class Scanned(NamedTuple):
    """What is in several files: `Found` of each, in little memory."""

    counts: np.ndarray
    """(files,) int64: samples of each."""
    names: NameTable
    labels: NameTable
    places: np.ndarray
    """(samples,4) int64: offset and size, offset and size of its transcript."""
    lengths: np.ndarray
    """(samples,) int64; -1 for those of `others`."""
    others: dict[int, str | list[Any]]
    """What stands for a length where it is no number, by sample."""
    rest: dict[int, tuple[Sequence[Sequence[str]], Mapping[str, int]]]
    """What is rejected and left out, by file, where there is something."""

    @staticmethod
    def of(found: Sequence[Found]) -> Scanned:
        """The same of lists."""
        rows = [sample for one in found for sample in one.samples]
        numbers = np.array([(*row[2:6], row[6] if isinstance(row[6], int) else -1) for row in rows], dtype=np.int64)
        numbers = numbers.reshape(-1, 5)
        return Scanned(
            np.array([len(one.samples) for one in found], dtype=np.int64),
            NameTable(row[0] for row in rows), NameTable(row[1] for row in rows), numbers[:, :4], numbers[:, 4],
            {number: row[6] for number, row in enumerate(rows) if not isinstance(row[6], int)},
            {n: (one.rejected, one.left_out) for n, one in enumerate(found) if one.rejected or one.left_out},
        )  # fmt: skip

    def list_found(self) -> list[Found]:
        """The lists of all files."""
        numbers = zip(self.places.tolist(), self.lengths.tolist(), strict=True)
        rows = zip(self.names, self.labels, numbers, strict=True)
        every = [[name, label, *four, self.others.get(i, n)] for i, (name, label, (four, n)) in enumerate(rows)]
        ends = np.cumsum(self.counts).tolist()
        parts = zip([0, *ends], ends, strict=False)
        return [Found(every[start:end], *self.rest.get(n, ((), {}))) for n, (start, end) in enumerate(parts)]

    def arrays(self) -> dict[str, np.ndarray]:
        """Itself for `IndexCache.keep`."""
        more = json.dumps([list(self.others.items()), list(self.rest.items())]).encode()
        arrays = {"counts": self.counts, "places": self.places, "lengths": self.lengths}
        arrays |= {**self.names.arrays("names"), **self.labels.arrays("labels")}
        return {**arrays, "more": np.frombuffer(more, np.uint8)}

    @staticmethod
    def taken(arrays: Mapping[str, np.ndarray]) -> Scanned:
        """What `arrays` gave."""
        others, rest = (dict(pairs) for pairs in json.loads(arrays["more"].tobytes()))
        names, labels = (NameTable.taken(arrays, name) for name in ("names", "labels"))
        rest = {number: (rejected, left_out) for number, (rejected, left_out) in rest.items()}
        return Scanned(arrays["counts"], names, labels, arrays["places"], arrays["lengths"], others, rest)


def scan_files(
    files: Sequence[str], stamps: np.ndarray, scan: Callable[[int], Found], cache: IndexCache | None,
    scope: tuple[object, ...], threads: int = 1,
) -> Scanned:  # fmt: skip
    """What is in each of some files, from the cache or by `scan`.

    Args:
        files: their names.
        stamps: (files,2) int64, size and time of change of each; -1: not to be kept.
        scan: number of a file -> what is in it; what it raises is raised.
        cache: None: no cache.
        scope: what the scans depend on besides the files; one file of the cache belongs to it.
        threads: scans at the same time.
    """
    name = name_index("index", scope)
    arrays = cache.read(name) if cache is not None else {}
    known: dict[str, tuple[list[int], Found]] = {}
    if arrays:
        before, table = Scanned.taken(arrays), NameTable.taken(arrays, "files")
        if np.array_equal(arrays["stamps"], stamps) and stamps.min(initial=0) >= 0 and table == NameTable(files):
            return before
        known = {f: (s, one) for f, s, one in zip(table, arrays["stamps"].tolist(), before.list_found(), strict=True)}
    found: list[Found | None] = []
    for file, stamp in zip(files, stamps.tolist(), strict=True):
        old, one = known.get(file, ([], None))
        found.append(one if old == stamp and stamp[0] >= 0 else None)
    missing = [number for number, one in enumerate(found) if one is None]
    with ThreadPoolExecutor(threads) as pool:
        scanned = iter(list(pool.map(scan, missing) if threads > 1 else map(scan, missing)))
    result = Scanned.of([next(scanned) if one is None else one for one in found])
    if cache is not None and (missing or len(known) != len(files)):
        cache.keep(name, {**result.arrays(), **NameTable(files).arrays("files"), "stamps": stamps})
    return result


def index_files(
    files: Sequence[Any], what: str, scan: Callable[[Any], Found], cache: IndexCache | None,
    scope: tuple[object, ...], threads: int = 1, stamps: np.ndarray | None = None,
) -> tuple[np.ndarray, Scanned]:  # fmt: skip
    """`stamps_of` container files (or those given) and `scan_files` of them, which says how far it is; `what` they are
    is for that."""
    report = Reporter("indexing", len(files), what)

    def counted(number: int) -> Found:
        result = scan(files[number])
        report.add()
        return result

    paths = [str(file.absolute()) for file in files]
    stamps = stamps_of(paths) if stamps is None else stamps
    found = scan_files(paths, stamps, counted, cache, (*scope, *paths), threads)
    report.finish()
    return stamps, found
