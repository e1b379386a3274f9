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
import tarfile
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
MAX_ENCODED_BYTES = 256 << 20
"""Largest encoded sample that is read; a bigger file or tar member counts as a bad sample."""
MAX_LABEL_BYTES = 4096
MAX_TAR_HEADER_BYTES = 1 << 20
MAX_OPEN_SHARDS = 32


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

    def digest(self) -> str:
        """SHA-256 of the names and their lengths."""
        return hashlib.sha256(self._bytes + self._ends.tobytes()).hexdigest()


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
    rejected: list[Rejected]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, index: int) -> str:
        """Path of a sample for messages."""
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        """Encoded bytes of a sample; `OSError` or `ValueError` where they cannot be had."""
        raise NotImplementedError

    def open_file(self, index: int) -> BinaryIO:
        """The same bytes as a file, to read only a header of."""
        return io.BytesIO(self.read(index))

    def read_transcript(self, index: int) -> str:
        """The text that goes with a sample; `ValueError` or `OSError` where there is none."""
        raise ValueError(f"{self.describe(index)}: expected a transcript, this kind of source has none")

    @property
    def indexed(self) -> int:
        """What the index looked at, rejected things included."""
        return len(self) + len(self.rejected)

    def prepare(self, folder: Path, fresh: bool) -> None:
        """Writes what must exist before samples can be read into `folder`, the run's; nothing for most sources.

        fresh: the run begins, and this is the data that it trains on.
        """

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

    def open_file(self, index: int) -> BinaryIO:
        return self.base.open_file(int(self.rows[index]))

    def read_transcript(self, index: int) -> str:
        return self.base.read_transcript(int(self.rows[index]))

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

    def __init__(self, root: Path, kind: Kind, *, labelled: bool, option: str) -> None:
        self.root = root
        self.rejected, self.left_out = [], {}
        files = sorted(walk_files(root))
        found = [name for name in files if Path(name).suffix.lower() in kind.suffixes]
        if not found:
            shards = sum(name.endswith(".tar") for name in files)
            hint = f"; for its {shards} .tar shards pass {str(root / '*.tar')!r}" if shards else ""
            place = f"under {str(root)!r}"
            raise ValueError(f"{option}: expected {kind.noun} {place}, found none in {len(files)} files{hint}")
        if labelled:
            loose = next((name for name in found if os.sep not in name), None)
            if loose is not None:
                raise ValueError(f"{option}: expected class folders under {str(root)!r}, got {loose!r} outside any")
            folders = [name.split(os.sep, 1)[0] for name in found]
            self.labels, self.classes = number_classes(folders)
        self.names = NameTable(found)

    def describe(self, index: int) -> str:
        return str(self.root / self.names[index])

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

    def __init__(self, shards: Sequence[Path], kind: Kind, *, labelled: bool, option: str) -> None:
        self.files, self.kind = [Path(s) for s in shards], kind
        self.rejected, self.left_out = [], {}
        self._open: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()
        names: list[str] = []
        texts: list[str] = []
        rows: list[tuple[int, int, int]] = []
        self._transcripts: dict[int, tuple[int, int, int]] = {}
        for number, shard in enumerate(self.files):
            for key, member, label, text in self._index_shard(shard, labelled, option):
                if text is not None:
                    self._transcripts[len(rows)] = number, text.offset_data, text.size
                rows.append((number, member.offset_data, member.size))
                names.append(f"{shard.name}:{member.name}")
                if label is None and labelled:
                    raise ValueError(f"{option}: expected {key}.cls in {str(shard)!r}, found none")
                texts.append(label or "")
        if not rows:
            raise ValueError(f"{option}: expected {kind.noun} in {len(self.files)} .tar shards, found none")
        self.names = NameTable(names)
        self._rows = np.asarray(rows, dtype=np.int64)
        self.shards = self._rows[:, 0]
        if labelled:
            self.labels, self.classes = number_classes(texts)

    def describe(self, index: int) -> str:
        return f"{self.files[int(self._rows[index, 0])].parent / self.names[index]}"

    def read(self, index: int) -> bytes:
        number, offset, size = (int(v) for v in self._rows[index])
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"tar member of {size} bytes is larger than {MAX_ENCODED_BYTES}")
        return self._read_at(number, offset, size)

    def _read_at(self, number: int, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor(number), size, offset)
        if len(data) != size:
            raise ValueError(f"expected {size} bytes in the shard, got {len(data)}")
        return data

    def open_file(self, index: int) -> BinaryIO:
        number, offset, size = (int(v) for v in self._rows[index])
        return FileSlice(self._descriptor(number), offset, size)  # type: ignore[return-value]

    def read_transcript(self, index: int) -> str:
        if index not in self._transcripts:
            raise ValueError(f"{self.describe(index)}: expected a .txt member beside it, found none")
        number, offset, size = self._transcripts[index]
        return self._read_at(number, offset, min(size, MAX_ENCODED_BYTES)).decode("utf-8").strip()

    def _descriptor(self, number: int) -> int:
        if self._owner != os.getpid():  # a forked worker must not close its parent's files
            self._open, self._owner = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > MAX_OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def _index_shard(
        self, shard: Path, labelled: bool, option: str
    ) -> list[tuple[str, tarfile.TarInfo, str | None, tarfile.TarInfo | None]]:
        """(key, member, label, transcript) of the samples of a shard, by key."""
        found: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, str] = {}
        texts: dict[str, tarfile.TarInfo] = {}
        singular = self.kind.noun.removesuffix("s")
        with shard.open("rb") as file:
            for member in self._members(shard, file, option):
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if f".{extension.lower()}" in self.kind.suffixes:
                    if key in found:
                        self.rejected.append(Rejected(f"{shard}:{member.name}", f"second {singular} of key {key!r}"))
                    else:
                        found[key] = member
                elif labelled and extension == "cls":
                    labels[key] = self._read_label(file, member)
                elif extension == "txt":
                    texts[key] = member
        return [(key, found[key], labels.get(key), texts.get(key)) for key in sorted(found)]

    def _members(self, shard: Path, file: Any, option: str) -> Iterator[tarfile.TarInfo]:
        """Regular, whole, unpacked members; what is cut off or damaged goes to `rejected`."""
        total = os.fstat(file.fileno()).st_size
        try:
            archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)  # noqa: SIM115
        except tarfile.TarError as error:
            raise ValueError(f"{option}: expected an uncompressed tar archive, got {str(shard)!r} ({error})") from None
        while True:
            try:
                member = archive.next()
            except tarfile.TarError:
                break  # cut off inside the last member, which is rejected below by its size
            if member is None:
                break
            vars(archive)["members"] = []  # tarfile would keep every header of a large shard
            if not member.isreg() or member.sparse is not None:
                if not member.isdir():
                    self.rejected.append(Rejected(f"{shard}:{member.name}", "not a regular file"))
            elif member.offset_data + member.size > total:
                self.rejected.append(Rejected(f"{shard}:{member.name}", "cut off: the shard ends inside this member"))
            else:
                yield member
        block = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
        if block.strip(b"\0"):
            self.rejected.append(Rejected(str(shard), f"damaged from byte {archive.offset}: what follows is not read"))

    @staticmethod
    def _read_label(file: Any, member: tarfile.TarInfo) -> str:
        data = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data)
        return data.decode("utf-8", errors="replace").strip()


class _Member(tarfile.TarInfo):
    """Refuses extended headers of absurd size, which tarfile would read into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if not member.isfile() and not member.isdir() and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.HeaderError(f"extended header of {member.size} bytes")
        return member


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
    path: str, kind: Kind = IMAGES, *, labelled: bool = False, option: str = "data.path", commands: bool = False
) -> Source:
    """Opens a folder of files of a kind, one .tar shard, or a glob or brace pattern of shards.

    `option` begins every error message. `commands`: `pipe:COMMAND` may be run by the shell; its output is one shard.
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
        return FolderSource(Path(path), kind, labelled=labelled, option=option)
    files = find_files(path, kind.places, option)
    odd = next((f for f in files if f.suffix != ".tar" or not f.is_file()), None)
    if odd is not None:
        raise ValueError(f"{option}: expected .tar shards or one folder, got {str(odd)!r}")
    return ShardSource(files, kind, labelled=labelled, option=option)


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
