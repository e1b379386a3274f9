"""Where encoded samples come from: folders, or members of uncompressed .tar shards read in place.

A source is a fixed, sorted index with random access, so that the order of a run is a function of the seed and a resumed
run continues at the very sample where it stopped. Nothing is ever extracted or written beside the data.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from d2v.data.index_cache import CACHE, IndexCache, ShardIndex, index_shards, stamp_of
from d2v.data.progress import Reporter
from d2v.data.shards import scan_shard
from d2v.data.string_table import NameTable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
MAX_ENCODED_BYTES = 256 << 20
"""Largest encoded sample that is read; a bigger file or tar member counts as a bad sample."""
MAX_OPEN_SHARDS = 32
FETCH_BYTES = 4 << 20
"""Read-ahead fetches aligned blocks of this size."""
MAX_FETCHED = 4096
"""Blocks that a process remembers to have fetched."""


class Kind(NamedTuple):
    """What files of a kind of data look like."""

    noun: str
    """For messages, plural."""
    suffixes: frozenset[str]
    """Lower case, with the dot."""
    places: str = "a folder of images or .tar shards"
    """What a path may name, for messages."""


IMAGES = Kind("images", IMAGE_SUFFIXES)


class Rejected(NamedTuple):
    """Something the index could not use."""

    name: str
    reason: str


class ShardLost(OSError):
    """A shard cannot be read any more: all of its samples are gone, which no replacement makes good."""


class Source:
    """Indexed encoded samples.

    `labels` (int64, one per sample) and `classes` are None for unlabelled data, `lengths` (int64, in the modality's
    unit) where all samples are alike, `shards` (int64, ascending, the shard of each) where there are none. `left_out`
    counts, by reason, what is sound but not used.
    """

    names: NameTable
    labels: np.ndarray | None = None
    classes: list[str] | None = None
    lengths: np.ndarray | None = None
    shards: np.ndarray | None = None
    cache: IndexCache | None = None
    rejected: list[Rejected]
    left_out: dict[str, int]
    incomplete: Sequence[Rejected] = ()
    """Those of `rejected` that could be read but have no text or no label."""

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> str:
        """Path of a sample for messages."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Encoded bytes of a sample; `OSError` or `ValueError` where they cannot be had."""
        raise NotImplementedError

    def read_ahead(self) -> None:
        """Samples will be read with their neighbours: what lies around one that is read may be fetched, too."""

    def open_file(self, index: int) -> BinaryIO:
        """The same bytes as a file, to read only a header of."""
        return io.BytesIO(self.read(index))

    def read_transcript(self, index: int) -> str:
        """The text that goes with a sample; `ValueError` or `OSError` where there is none."""
        raise ValueError(f"{self.describe(index)}: expected a transcript, this kind of source has none")

    def stamps(self) -> np.ndarray:
        """(samples,2) int64: size and time of change of the file of each sample; -1 where that says nothing."""
        return np.full((len(self), 2), -1, dtype=np.int64)

    @property
    def place(self) -> str:
        """Where the samples are: a name for their cache."""
        return ""

    @property
    def indexed(self) -> int:
        """What the index looked at, rejected things included."""
        return len(self) + len(self.rejected)

    def prepare(self, folder: Path, fresh: bool) -> None:
        """Writes what must exist before samples can be read into `folder`, the run's: for most sources only what the
        next start need not look up again.

        fresh: the run begins, and this is the data that it trains on.
        """
        if self.cache is not None:
            self.cache.write(folder / CACHE)

    def digest(self) -> str:
        """Identity of the index: a resumed run must see the same samples in the same order."""
        return self.names.digest()


class Subset(Source):
    """Some samples of another source, in its order."""

    def __init__(self, base: Source, rows: np.ndarray) -> None:
        self.base, self.rows = base, rows
        self.rejected, self.left_out = base.rejected, base.left_out
        self.labels = None if base.labels is None else base.labels[rows]
        self.classes = base.classes
        self.lengths = None if base.lengths is None else base.lengths[rows]
        self.shards = None if base.shards is None else base.shards[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        return self.base.read(int(self.rows[index]))

    def read_ahead(self) -> None:
        self.base.read_ahead()

    def open_file(self, index: int) -> BinaryIO:
        return self.base.open_file(int(self.rows[index]))

    def read_transcript(self, index: int) -> str:
        return self.base.read_transcript(int(self.rows[index]))

    def prepare(self, folder: Path, fresh: bool) -> None:
        self.base.prepare(folder, fresh)

    def digest(self) -> str:
        lengths = b"" if self.lengths is None else self.lengths.tobytes()
        return hashlib.sha256(self.base.digest().encode() + self.rows.tobytes() + lengths).hexdigest()


def read_whole(file: BinaryIO) -> bytes:
    """All bytes of a file that is not absurdly large, else `ValueError`."""
    try:
        size = os.fstat(file.fileno()).st_size
    except OSError:  # no file of the system
        size = MAX_ENCODED_BYTES
    # A read of more than is there costs a buffer of that size, which took longer than decoding a small image.
    data = file.read(min(size, MAX_ENCODED_BYTES) + 1)
    if len(data) > MAX_ENCODED_BYTES:
        raise ValueError(f"file is larger than {MAX_ENCODED_BYTES} bytes")
    return data


class FolderSource(Source):
    """Files of a kind at any depth under `root`; with labels, the first folder level names the class."""

    def __init__(self, root: Path, kind: Kind, *, labelled: bool, option: str, cache: IndexCache | None = None) -> None:
        self.root, self.cache = root, cache
        self.rejected, self.left_out = [], {}
        files = sorted(walk_files(root))
        found = [name for name in files if Path(name).suffix.lower() in kind.suffixes]
        if not found:
            shards = sum(name.endswith(".tar") for name in files)
            hint = f"; for its {shards} .tar shards pass {str(root / '*.tar')!r}" if shards else ""
            place = f"under {str(root)!r}"
            raise ValueError(f"{option}: expected {kind.noun} {place}, found none in {len(files)} files{hint}")
        if labelled:
            if loose := [name for name in found if os.sep not in name]:
                count = f"{len(loose)} of {len(found)} {kind.noun} outside any"
                raise ValueError(f"{option}: expected class folders under {str(root)!r}, got {loose[0]!r} ({count})")
            folders = [name.split(os.sep, 1)[0] for name in found]
            self.labels, self.classes = number_classes(folders)
        self.names = NameTable(found)

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])

    @property
    def place(self) -> str:
        return str(self.root.absolute())

    def stamps(self) -> np.ndarray:
        return np.asarray([stamp_of(self.root / name) for name in self.names], dtype=np.int64)

    def read(self, index: int) -> bytes:
        with self.open_file(index) as file:
            return read_whole(file)

    def open_file(self, index: int) -> BinaryIO:
        return (self.root / self.names[index]).open("rb")

    def read_transcript(self, index: int) -> str:
        """The `.txt` file beside the sample."""
        return read_text_file((self.root / self.names[index]).with_suffix(".txt"))


def read_text_file(path: Path) -> str:
    """A short UTF-8 text without surrounding space; `ValueError` or `OSError` otherwise."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


class ShardSource(Source):
    """Members of a kind of uncompressed .tar shards in webdataset naming: `key.jpg` and, with labels, `key.cls`;
    transcripts are members `key.txt`."""

    def __init__(
        self, shards: Sequence[Path], kind: Kind, *, labelled: bool, option: str, cache: IndexCache | None = None
    ) -> None:
        self.files, self.kind, self.cache = [Path(s) for s in shards], kind, cache
        self.rejected, self.left_out = [], {}
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        self._ahead, self._fetched = False, OrderedDict[tuple[int, int], None]()
        suffixes, singular = kind.suffixes, kind.noun.removesuffix("s")
        report = Reporter("indexing", len(self.files), "shards")

        def scan(shard: Path) -> ShardIndex:
            found = scan_shard(shard, suffixes, singular, labelled=labelled, option=option)
            report.add(1)
            return found

        indices = index_shards(self.files, scan, cache, kind.noun, labelled)
        report.finish(report.done)
        self.rejected = [Rejected(*entry) for index in indices for entry in index.rejected]
        sizes = [len(index.names) for index in indices]
        if not sum(sizes):
            raise ValueError(f"{option}: expected {kind.noun} in {len(self.files)} .tar shards, found none")
        pairs = zip(self.files, indices, strict=True)
        self.names = NameTable([f"{shard.name}:{name}" for shard, index in pairs for name in index.names])
        self._places = np.concatenate([index.places for index in indices])
        self._texts = np.concatenate([index.texts for index in indices])
        self.shards = np.repeat(np.arange(len(self.files)), sizes)
        self._stamps = [stamp_of(file) for file in self.files]
        if labelled:
            self.labels, self.classes = number_classes([label for index in indices for label in index.labels])

    def describe(self, index: int) -> str:
        return f"{self._file_of(index).parent / self.names[index]}"

    def _file_of(self, index: int) -> Path:
        assert self.shards is not None
        return self.files[int(self.shards[index])]

    @property
    def place(self) -> str:
        return "\n".join(str(file.absolute()) for file in self.files)

    def stamps(self) -> np.ndarray:
        return np.asarray(self._stamps, dtype=np.int64)[self.shards]

    def read(self, index: int) -> bytes:
        offset, size = (int(v) for v in self._places[index])
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"tar member of {size} bytes is larger than {MAX_ENCODED_BYTES}")
        return self._read_at(index, offset, size)

    def read_ahead(self) -> None:
        self._ahead = hasattr(os, "posix_fadvise")

    def _fetch(self, index: int, offset: int, size: int) -> None:
        """Asks the system for the blocks that a sample lies in, as wholes: its neighbours are wanted next."""
        assert self.shards is not None
        number = int(self.shards[index])
        for block in range(offset // FETCH_BYTES, (offset + size - 1) // FETCH_BYTES + 1):
            if (number, block) not in self._fetched:
                self._fetched[number, block] = None
                os.posix_fadvise(
                    self._descriptor(index), block * FETCH_BYTES, FETCH_BYTES, os.POSIX_FADV_WILLNEED
                )  # fmt: skip
                if len(self._fetched) > MAX_FETCHED:
                    self._fetched.popitem(last=False)

    def _read_at(self, index: int, offset: int, size: int) -> bytes:
        if self._ahead:
            self._fetch(index, offset, size)
        data = os.pread(self._descriptor(index), size, offset)
        if len(data) != size:
            raise ShardLost(f"the shard {self._file_of(index)} is cut off: {size} bytes at {offset}, got {len(data)}")
        return data

    def open_file(self, index: int) -> BinaryIO:
        offset, size = (int(v) for v in self._places[index])
        return FileSlice(self._descriptor(index), offset, size)  # type: ignore[return-value]

    def read_transcript(self, index: int) -> str:
        offset, size = (int(v) for v in self._texts[index])
        if offset < 0:
            raise ValueError(f"{self.describe(index)}: expected a .txt member beside it, found none")
        return self._read_at(index, offset, min(size, MAX_ENCODED_BYTES)).decode("utf-8").strip()

    def _descriptor(self, index: int) -> int:
        assert self.shards is not None
        number = int(self.shards[index])
        if self._owner != os.getpid():  # a forked worker must not close its parent's files
            self._open, self._owner = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = self._open_shard(number)
            if len(self._open) > MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[number]

    def _open_shard(self, number: int) -> int:
        file, expected = self.files[number], self._stamps[number][0]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardLost(f"the shard {file} cannot be opened: {error.strerror}") from None
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            raise ShardLost(f"the shard {file} has changed: {expected} bytes when it was indexed, now {size}")
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "cache": None}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)


class FileSlice(io.RawIOBase):
    """Part of an open file as a file of its own; the descriptor stays its owner's."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self._size, self._place = descriptor, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._place))
        data = os.pread(self._descriptor, wanted, self._offset + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def open_source(
    path: str,
    kind: Kind = IMAGES,
    *,
    labelled: bool = False,
    option: str = "data.path",
    commands: bool = False,
    cache: IndexCache | None = None,
) -> Source:
    """Opens a folder of files of a kind, one .tar shard, or a glob or brace pattern of shards.

    `option` begins every error message. `commands`: `pipe:COMMAND` may be run by the shell; its output is one shard.
    `cache` keeps what the index learns.
    Raises `ValueError` where the path is empty, missing or holds no such file.
    """
    if not path:
        raise ValueError(f"{option}: expected {kind.places}, got nothing")
    if path.startswith("pipe:"):
        if not commands:
            raise ValueError(
                f"{option}: expected a folder or .tar shards, got the shell command {path!r}; "
                "--data.allow-commands runs it"
            )
        return open_command(path.removeprefix("pipe:"), kind, labelled=labelled, option=option)
    if Path(path).is_dir():
        return FolderSource(Path(path), kind, labelled=labelled, option=option, cache=cache)
    files = find_files(path, kind.places, option)
    odd = next((f for f in files if f.suffix != ".tar" or not f.is_file()), None)
    if odd is not None:
        raise ValueError(f"{option}: expected .tar shards or one folder, got {str(odd)!r}")
    return ShardSource(files, kind, labelled=labelled, option=option, cache=cache)


def find_files(path: str, places: str, option: str) -> list[Path]:
    """Paths that a name, glob or brace pattern means; `ValueError` where one of its parts means nothing."""
    files: list[Path] = []
    for pattern in expand_braces(path, option):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        if not found or not Path(found[0]).exists():
            raise ValueError(f"{option}: expected {places}, found nothing at {pattern!r}")
        files.extend(Path(f) for f in found)
    return files


def open_command(command: str, kind: Kind, *, labelled: bool, option: str) -> Source:
    """The tar archive that a shell command writes, kept in a temporary file for as long as the source lives."""
    folder = tempfile.mkdtemp(prefix="d2v-pipe-")
    # The name is part of the identity of a sample: the same command, the same name.
    shard = Path(folder) / f"pipe-{hashlib.sha256(command.encode()).hexdigest()[:16]}.tar"
    try:
        with shard.open("wb") as file:
            done = subprocess.run(command, shell=True, stdout=file, check=False)
        if done.returncode:
            raise ValueError(f"{option}: expected exit code 0 of {command!r}, got {done.returncode}")
        source = ShardSource([shard], kind, labelled=labelled, option=option)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(source, _remove_folder, folder, os.getpid())
    return source


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a forked worker
        shutil.rmtree(folder, ignore_errors=True)


def expand_braces(pattern: str, option: str = "data.path", limit: int = 1_000_000) -> list[str]:
    """Expands `{0000..0012}` (zero padding kept) and `{a,b}`, left to right; at most `limit` results."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        low, high = int(first), int(last)
        if not 0 <= high - low < limit:
            raise ValueError(f"{option}: expected a rising range of at most {limit} numbers, got {match.group(0)!r}")
        choices = [str(n).zfill(len(first)) for n in range(low, high + 1)]
    head, tail = pattern[: match.start()], expand_braces(pattern[match.end() :], option, limit)
    if len(choices) * len(tail) > limit:
        raise ValueError(f"{option}: expected at most {limit} names, got {len(choices) * len(tail)} from {pattern!r}")
    return [f"{head}{choice}{rest}" for choice in choices for rest in tail]


def walk_files(root: Path) -> Iterator[str]:
    """Paths of the files under `root`, relative to it; links are followed, each folder once, hidden names skipped."""
    seen: set[tuple[int, int]] = set()
    stack = [str(root)]
    while stack:
        folder = stack.pop()
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back to a folder above
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as scan:
            entries = sorted((e for e in scan if not e.name.startswith(".")), key=lambda e: e.name)
        stack.extend(e.path for e in reversed(entries) if e.is_dir())
        # A dangling link stays in: it is reported when it is read. Pipes and devices are not files.
        files = (e for e in entries if e.is_file() or (e.is_symlink() and not e.is_dir()))
        yield from (os.path.relpath(e.path, root) for e in files)


def number_classes(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Class texts -> (labels int64 (n,), sorted class names); names that are all integers sort by value."""
    distinct = set(texts)
    numeric = all(re.fullmatch(r"-?\d+", t) for t in distinct)
    classes = sorted(distinct, key=lambda t: (int(t), t)) if numeric else sorted(distinct)
    numbers = {name: i for i, name in enumerate(classes)}
    return np.asarray([numbers[t] for t in texts], dtype=np.int64), classes
