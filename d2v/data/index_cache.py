"""What was learned by scanning data, kept for the next start: members of shards, lengths of speech.

Files of a cache folder are safetensors: arrays, and JSON in the header with the SHA-256 of both. They may be deleted at
any time. An entry counts only while the file that it is about has the size and time of change that it had then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2v.data.string_table import NameTable
from d2v.files import write_atomically

CACHE = "cache"
"""Folder inside a run folder."""
FORMAT = 1
SCANS = 8
"""Shards that are scanned at the same time: scanning waits for the storage most of the time."""
Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds; -1, -1 for what is not there."""


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


class IndexCache:
    """A folder of index files: one that runs share, or that of a run, which is written once the run has its folder."""

    def __init__(self, folder: Path | None, shared: bool) -> None:
        self.folder, self.shared = folder, shared
        self._pending: dict[str, bytes] = {}

    def read(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """(arrays, JSON) of a file; None where there is none. One that is damaged is mentioned and not used."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        if self.folder is None or not (path := self.folder / name).is_file():
            return None
        try:
            data = path.read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            arrays, text = load(data), header["index"]
            if header["sha256"] == _digest(arrays, text):
                return arrays, json.loads(text)
            reason = "its checksum differs"
        except (SafetensorError, ValueError, KeyError, TypeError, OSError, MemoryError, OverflowError) as error:
            reason = type(error).__name__
        print(f"note: the index {path} is damaged ({reason}) and is made again", file=sys.stderr)
        return None

    def keep(self, name: str, arrays: dict[str, np.ndarray], index: dict[str, Any]) -> None:
        """Keeps a file: at once in a shared folder, else when `write` is called."""
        from safetensors.numpy import save

        text = json.dumps(index)
        arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        self._pending[name] = save(arrays, metadata={"index": text, "sha256": _digest(arrays, text)})
        if self.shared and self.folder is not None:
            self.write(self.folder)

    def write(self, folder: Path) -> None:
        """Writes what is kept and not written yet. What cannot be written is mentioned: it costs time, no more."""
        try:
            for name, data in self._pending.items():
                folder.mkdir(parents=True, exist_ok=True)
                _write_alone(folder / name, data)
        except OSError as error:
            print(
                f"note: cannot write the index {folder}: {error.strerror}; it is made at every start", file=sys.stderr
            )
        self._pending = {}


def _write_alone(path: Path, data: bytes) -> None:
    """Atomic also where several processes write the same file: each has a part file of its own."""
    own = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
    try:
        write_atomically(own, data)
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _digest(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _file_name(kind: str, *parts: object) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps([FORMAT, *map(str, parts)]).encode()).hexdigest()[:16]}.safetensors"


# ---- shards -----------------------------------------------------------------------------------------------------


class ShardIndex(NamedTuple):
    """What is in one shard."""

    names: Sequence[str]
    """Names of the members that are samples."""
    places: np.ndarray
    """(n,2) int64: offset and size of each."""
    labels: Sequence[str]
    """Class of each; "" where there is none."""
    texts: np.ndarray
    """(n,2) int64: offset and size of its transcript; -1 where there is none."""
    rejected: list[tuple[str, str]]
    """(name, reason) of what cannot be used."""


def index_shards(
    files: list[Path], scan: Callable[[Path], ShardIndex], cache: IndexCache | None, *scope: object
) -> list[ShardIndex]:
    """The index of each shard, from the cache or by `scan`, several at a time.

    Args:
        files: the shards.
        scan: reads the index of one; what it raises is raised.
        cache: None: no cache.
        scope: what else an index depends on.
    """
    paths = [str(file.absolute()) for file in files]
    stamps = [stamp_of(file) for file in files]
    name = _file_name("shards", *scope, *paths)
    known = _read_shards(cache, name, paths) if cache is not None else {}
    missing = [file for file, path, stamp in zip(files, paths, stamps, strict=True) if (path, stamp) not in known]
    with ThreadPoolExecutor(max_workers=SCANS) as pool:
        scanned = dict(zip(missing, pool.map(scan, missing), strict=True))
    found = [
        scanned[file] if file in scanned else known[path, stamp]
        for file, path, stamp in zip(files, paths, stamps, strict=True)
    ]
    if cache is not None and missing:
        _keep_shards(cache, name, found, list(zip(paths, stamps, strict=True)))
    return found


def _read_shards(cache: IndexCache, name: str, paths: list[str]) -> dict[tuple[str, Stamp], ShardIndex]:
    if (found := cache.read(name)) is None:
        return {}
    arrays, index = found
    names, labels = list(NameTable.of(arrays, "names")), list(NameTable.of(arrays, "labels"))
    result, start = {}, 0
    for path, (size, time, samples), rejected in zip(paths, index["shards"], index["rejected"], strict=True):
        part = slice(start, start + samples)
        result[path, (size, time)] = ShardIndex(
            names[part], arrays["places"][part], labels[part], arrays["texts"][part],
            [(member, reason) for member, reason in rejected],
        )  # fmt: skip
        start = part.stop
    return result


def _keep_shards(cache: IndexCache, name: str, found: list[ShardIndex], files: list[tuple[str, Stamp]]) -> None:
    names = NameTable([n for shard in found for n in shard.names])
    labels = NameTable([n for shard in found for n in shard.labels])
    arrays = names.arrays("names") | labels.arrays("labels")
    arrays["places"] = np.concatenate([shard.places for shard in found])
    arrays["texts"] = np.concatenate([shard.texts for shard in found])
    shards = [[*stamp, len(shard.names)] for (_, stamp), shard in zip(files, found, strict=True)]
    cache.keep(name, arrays, {"shards": shards, "rejected": [shard.rejected for shard in found]})


# ---- lengths ----------------------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """Lengths of samples by their headers."""

    values: np.ndarray
    """(samples,) int64; -1 where a header is damaged."""
    reasons: dict[int, str]
    """Why, for each of those."""


def index_lengths(
    names: NameTable, place: str, stamps: np.ndarray, measure: Callable[[int], int | str], cache: IndexCache | None
) -> Lengths:
    """Lengths of samples, from the cache or by `measure`.

    Args:
        names: of the samples.
        place: where they are; one cache file belongs to it.
        stamps: (samples,2) int64 stamp of the file of each; -1: not to be kept.
        measure: number of a sample -> its length, or why it has none.
        cache: None: no cache.
    """
    file = _file_name("lengths", place)
    values, reasons = np.full(len(names), -1, dtype=np.int64), dict[int, str]()
    known = _match(cache.read(file) if cache is not None else None, names, stamps)
    missing = np.ones(len(names), dtype=bool)
    for row, (length, reason) in known.items():
        missing[row] = False
        values[row] = length
        if reason is not None:
            reasons[row] = reason
    for row in np.flatnonzero(missing).tolist():
        measured = measure(row)
        if isinstance(measured, str):
            reasons[row] = measured
        else:
            values[row] = measured
    if cache is not None and missing.any():
        arrays = names.arrays("names") | {"stamps": stamps, "lengths": values}
        cache.keep(file, arrays, {"reasons": {str(row): reason for row, reason in reasons.items()}})
    return Lengths(values, dict(sorted(reasons.items())))


def _match(
    found: tuple[dict[str, np.ndarray], dict[str, Any]] | None, names: NameTable, stamps: np.ndarray
) -> dict[int, tuple[int, str | None]]:
    """Number of a sample -> (length, reason) as they are known, of files that have not changed."""
    if found is None:
        return {}
    arrays, index = found
    old = NameTable.of(arrays, "names")
    rows = np.arange(len(names))
    if old.digest() != names.digest():
        numbers = {name: number for number, name in enumerate(old)}
        if len(numbers) != len(old):
            return {}  # two shards of one name
        rows = np.array([numbers.get(name, -1) for name in names])
    usable = (rows >= 0) & (stamps[:, 0] >= 0)
    usable[usable] &= (arrays["stamps"][rows[usable]] == stamps[usable]).all(axis=1)
    return {
        row: (int(arrays["lengths"][rows[row]]), index["reasons"].get(str(int(rows[row]))))
        for row in np.flatnonzero(usable).tolist()
    }
