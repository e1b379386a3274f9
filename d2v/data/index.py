"""Where encoded samples come from: folders, lists of files, or members of uncompressed .tar shards read in place.

A source is a fixed, sorted index with random access, so that the order of a run is a function of the seed and a resumed
run continues at the very sample where it stopped. Nothing is ever extracted or written beside the data.
"""

from __future__ import annotations

import functools
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from d2v.data.cache import Found, IndexCache, NameTable, scan_files, stamp_of
from d2v.data.sources import (
    Rejected,
    Reporter,
    ShardLost,
    Source,
    describe_error,
    find_files,
    is_header,
    number_classes,
    read_lines,
    read_text_file,
    read_transcripts,
    walk_files,
)  # fmt: skip

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
MAX_ENCODED_BYTES = 256 << 20
"""Largest encoded sample that is read; a bigger file or tar member counts as a bad sample."""
MAX_LABEL_BYTES = 4096
MAX_TAR_HEADER_BYTES = 1 << 20
MAX_OPEN_SHARDS = 32
FETCH_BYTES = 4 << 20
"""Read-ahead fetches aligned blocks of this size."""
MAX_FETCHED = 4096
"""Blocks that a process remembers to have fetched."""
SCANS = 8
"""Shards that are scanned at the same time: scanning waits for the storage most of the time."""
_STORED = re.compile(r"(.+\.(?:zip|tar)):(\d+):(\d+)")
"""archive:offset:length, an uncompressed member of an archive."""


class Kind(NamedTuple):
    """What files of a kind of data look like."""

    noun: str
    """For messages, plural."""
    suffixes: frozenset[str]
    """Lower case, with the dot."""
    places: str
    """What a path may name, for messages."""
    lists: bool = False
    """Whether that may be a `.tsv` list."""


IMAGES = Kind("images", IMAGE_SUFFIXES, "a folder of images or .tar shards")
Measure = Callable[[BinaryIO], int]
"""Length of a sample by the header of its file; `ValueError` or `OSError` where it has none."""


class Wanted(NamedTuple):
    """What is opened, and how."""

    kind: Kind
    labelled: bool = False
    option: str = "data.path"
    """Begins every error message."""
    commands: bool = False
    """Whether shell commands may be run: `pipe:COMMAND`, whose output is one shard, and those in lists."""
    cache: IndexCache | None = None
    """Keeps what the index learns."""
    measure: Measure | None = None
    """With it the index of shards has lengths."""


def open_source(path: str, kind: Kind = IMAGES, **options: Any) -> Source:
    """Opens a folder of files of a kind, one .tar shard, a glob or brace pattern of shards, or a list of files.

    `options` are those of `Wanted`. Raises `ValueError` where the path is empty, missing or holds no such file.
    """
    wanted = Wanted(kind, **options)
    if not path:
        raise ValueError(f"{wanted.option}: expected {kind.places}, got nothing")
    if path.startswith("pipe:"):
        return _open_command(path, wanted)
    if Path(path).is_dir():
        return _open_folder(Path(path), wanted)
    files = find_files(path, kind.places, wanted.option)
    if path.endswith(".tsv") and kind.lists:
        if len(files) != 1:
            raise ValueError(f"{wanted.option}: expected one manifest, got {len(files)} at {path!r}")
        return _open_list(files[0], wanted)
    odd = next((f for f in files if f.suffix != ".tar" or not f.is_file()), None)
    if odd is not None:
        raise ValueError(f"{wanted.option}: expected .tar shards or one folder, got {str(odd)!r}")
    return ShardSource(files, wanted)


# ---- files ------------------------------------------------------------------------------------------------------


class FileSource(Source):
    """Files under `root` by name: those of a folder, or those of a list.

    A name in a list may also be `archive.zip:offset:length` of a stored member, or `COMMAND |`, whose output is the
    file. Transcripts are the `.txt` files beside the samples; those of a list are the lines of the `.ltr` file beside
    it: letters separated by spaces, `|` between words; or of a `.wrd` file of words.
    """

    counts: np.ndarray | None = None
    """Lengths (n,) as a list gives them."""

    def __init__(self, root: Path, names: list[str], cache: IndexCache | None, file: Path | None = None) -> None:
        self.root, self.names, self.cache, self.file = root, NameTable(names), cache, file
        self.rejected, self.left_out = [], {}
        self.lines = np.arange(len(names))
        """Line of each sample in the list, without that of the root."""
        self._transcripts: list[str] | None = None

    def describe(self, index: int) -> str:
        name = self.names[index]
        return name if is_command(name) else str(self.root / name)

    def read(self, index: int) -> bytes:
        with self.open_file(index) as file:
            return _read_whole(file)

    def open_file(self, index: int) -> BinaryIO:
        """The encoded sample as a file."""
        name = self.names[index]
        if is_command(name):
            done = subprocess.run(name.rstrip()[:-1], shell=True, stdout=subprocess.PIPE, check=False)
            if done.returncode:
                raise ValueError(f"command ended with exit code {done.returncode}")
            return io.BytesIO(done.stdout)
        path = self.root / name
        match = _STORED.fullmatch(name)
        if match is None or path.exists():
            return path.open("rb")
        offset, size = int(match[2]), int(match[3])
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"member of {size} bytes is larger than {MAX_ENCODED_BYTES}")
        with (self.root / match[1]).open("rb") as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size))

    def read_transcript(self, index: int) -> str:
        if self.file is None:
            return read_text_file((self.root / self.names[index]).with_suffix(".txt"))
        if self._transcripts is None:
            self._transcripts = read_transcripts(self.file)
        return self._transcripts[int(self.lines[index])]

    def read_lengths(self, measure: Measure) -> np.ndarray:
        """(n,) int64: lengths by the headers; -1 where a header is damaged, which goes to `rejected`."""
        report = Reporter("reading headers", len(self), "files")

        def scan(index: int) -> Found:
            report.add()
            return Found([["", "", -1, -1, -1, -1, _measure(measure, lambda: self.open_file(index))]])

        stamps, place = [self._stamp(name) for name in self.names], (self.file or self.root).absolute()
        found = scan_files(self.names, stamps, scan, self.cache, ("lengths", place))
        report.finish()
        return self._note_damaged([one.samples[0][-1] for one in found])

    def _stamp(self, name: str) -> tuple[int, int]:
        if is_command(name):
            return -1, -1
        stamp = stamp_of(os.path.join(self.root, name))  # noqa: PTH118
        match = _STORED.fullmatch(name) if stamp[0] < 0 else None
        return stamp_of(self.root / match[1]) if match is not None else stamp


def is_command(name: str) -> bool:
    """Whether a sample of this name is the output of a shell command."""
    return name.rstrip().endswith("|")


def _read_whole(file: BinaryIO) -> bytes:
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


def _measure(measure: Measure, open_file: Callable[[], Any]) -> int | str:
    """The length of a sample, or why it has none."""
    try:
        with open_file() as file:
            return measure(file)
    except (ValueError, OSError) as error:
        return describe_error(error)


def _open_folder(root: Path, wanted: Wanted) -> FileSource:
    """Files of a kind at any depth under `root`; with labels, the first folder level names the class."""
    kind, option, files = wanted.kind, wanted.option, sorted(walk_files(root))
    found = [name for name in files if os.path.splitext(name)[1].lower() in kind.suffixes]  # noqa: PTH122
    if not found:
        shards = sum(name.endswith(".tar") for name in files)
        hint = f"; for its {shards} .tar shards pass {str(root / '*.tar')!r}" if shards else ""
        place = f"under {str(root)!r}"
        raise ValueError(f"{option}: expected {kind.noun} {place}, found none in {len(files)} files{hint}")
    source = FileSource(root, found, wanted.cache)
    if wanted.labelled:
        if loose := [name for name in found if os.sep not in name]:
            count = f"{len(loose)} of {len(found)} {kind.noun} outside any"
            raise ValueError(f"{option}: expected class folders under {str(root)!r}, got {loose[0]!r} ({count})")
        source.labels, source.classes = number_classes([name.split(os.sep, 1)[0] for name in found])
    return source


def _open_list(file: Path, wanted: Wanted) -> FileSource:
    """A `.tsv`: the root folder in the first line, then `path<TAB>samples`; or, labelled, `path<TAB>label`.

    A relative path that leads out of the root is rejected; an absolute one is taken as it stands. A table without a
    root line is relative to its own folder. Commands among the paths are refused unless they are allowed.
    """
    option, noun, lines = wanted.option, wanted.kind.noun, read_lines(file, wanted.option)
    first = 0 if "\t" in lines[0] else 1
    rows: list[tuple[str, str, int]] = []
    unlabelled, rejected, headers = [], [], []
    for number, line in enumerate(lines[first:]):
        if not line.strip():
            continue
        where = f"{file}:{number + first + 1}"
        path, _, value = line.partition("\t")
        value = value.split("\t")[0].strip()
        if wanted.labelled and not rows and is_header([path, value]) and not (file.parent / path).exists():
            headers.append(where)
        elif wanted.labelled and not value:
            unlabelled.append((line, where))
        elif is_command(path) and not wanted.commands:
            raise ValueError(
                f"{option}: expected paths of {noun}, got a shell command in {where}; --data.allow-commands runs it"
            )
        elif (reason := _describe_escape(path)) is not None and not is_command(path):
            rejected.append(Rejected(where, reason))
        else:
            rows.append((path, value, number))
    if unlabelled:
        line, where = unlabelled[0]
        count = f"{len(unlabelled)} of {len(unlabelled) + len(rows)} without a label"
        raise ValueError(f"{option}: expected path<TAB>label, got {line!r} in {where} ({count})")
    if not rows:
        raise ValueError(f"{option}: expected {noun} in {str(file)!r}, found none")
    paths, values, numbers = (list(column) for column in zip(*rows, strict=True))
    source = FileSource(file.parent / (lines[0].strip() if first else ""), paths, wanted.cache, file)
    source.rejected, source.lines = rejected, np.array(numbers)
    source.left_out = {f"line of column names, {where}": 1 for where in headers}
    if wanted.labelled:
        source.labels, source.classes = number_classes(values)
    elif all(value.isdecimal() for value in values):
        source.counts = np.array([int(value) for value in values], dtype=np.int64)
    return source


def _describe_escape(path: str) -> str | None:
    """Why a path of a manifest is not used, or None."""
    if not path.strip():
        return "no path"
    if os.path.isabs(path):  # noqa: PTH117
        return None
    return f"{path!r} leads out of the root" if os.path.normpath(path).startswith(os.pardir + os.sep) else None


# ---- shards -----------------------------------------------------------------------------------------------------


class ShardSource(Source):
    """Members of a kind of uncompressed .tar shards in webdataset naming: `key.jpg` and, with labels, `key.cls`;
    transcripts are members `key.txt`. With `measure` the index has their lengths."""

    def __init__(self, files: Sequence[Path], wanted: Wanted) -> None:
        self.files, self.cache, self.left_out = list(files), wanted.cache, {}
        self._open, self._fetched = OrderedDict[int, int](), OrderedDict[tuple[int, int], None]()
        self._ahead = False
        report = Reporter("indexing", len(files), "shards")

        def scan(number: int) -> Found:
            result = scan_shard(files[number], wanted)
            report.add()
            return result

        paths, stamps = [str(file.absolute()) for file in files], [stamp_of(file) for file in files]
        scope = ("shards", wanted.kind.noun, wanted.labelled, wanted.measure is not None, *paths)
        found = scan_files(paths, stamps, scan, wanted.cache, scope, SCANS)
        report.finish()
        self.rejected = [Rejected(*entry) for one in found for entry in one.rejected]
        rows = [(number, *sample) for number, one in enumerate(found) for sample in one.samples]
        if not rows:
            raise ValueError(f"{wanted.option}: expected {wanted.kind.noun} in {len(files)} .tar shards, found none")
        numbers, names, labels, *places, lengths = zip(*rows, strict=True)
        self.shards, self._sizes = np.array(numbers), [size for size, _ in stamps]
        self.names = NameTable(f"{files[number].name}:{name}" for number, name in zip(numbers, names, strict=True))
        self._places = np.array(places, dtype=np.int64).T
        if wanted.labelled:
            self.labels, self.classes = number_classes(labels)
        if wanted.measure is not None:
            self.lengths = self._note_damaged(lengths)

    def describe(self, index: int) -> str:
        assert self.shards is not None
        return f"{self.files[int(self.shards[index])].parent / self.names[index]}"

    def read(self, index: int) -> bytes:
        offset, size = self._places[index, :2].tolist()
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"tar member of {size} bytes is larger than {MAX_ENCODED_BYTES}")
        return self._read_at(index, offset, size)

    def read_ahead(self) -> None:
        self._ahead = hasattr(os, "posix_fadvise")

    def read_transcript(self, index: int) -> str:
        offset, size = self._places[index, 2:].tolist()
        if offset < 0:
            raise ValueError(f"{self.describe(index)}: expected a .txt member beside it, found none")
        return self._read_at(index, offset, min(size, MAX_ENCODED_BYTES)).decode("utf-8").strip()

    def _read_at(self, index: int, offset: int, size: int) -> bytes:
        assert self.shards is not None
        number = int(self.shards[index])
        descriptor = self._descriptor(number)
        if self._ahead:  # asks the system for whole blocks: the sample's neighbours are wanted next
            for block in range(offset // FETCH_BYTES, (offset + size - 1) // FETCH_BYTES + 1):
                if (number, block) not in self._fetched:
                    self._fetched[number, block] = None
                    os.posix_fadvise(descriptor, block * FETCH_BYTES, FETCH_BYTES, os.POSIX_FADV_WILLNEED)
                    if len(self._fetched) > MAX_FETCHED:
                        self._fetched.popitem(last=False)
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise ShardLost(f"the shard {self.files[number]} is cut off: {size} bytes at {offset}, got {len(data)}")
        return data

    def _descriptor(self, number: int) -> int:
        """Of a shard, which is opened where it is not; few are open at a time."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        file, expected = self.files[number], self._sizes[number]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardLost(f"the shard {file} cannot be opened: {error.strerror}") from None
        size = os.fstat(descriptor).st_size
        if size != expected:
            os.close(descriptor)
            raise ShardLost(f"the shard {file} has changed: {expected} bytes when it was indexed, now {size}")
        self._open[number] = descriptor
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "cache": None}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def scan_shard(shard: Path, wanted: Wanted) -> Found:
    """The samples of a shard by key, with their class (`key.cls`), text (`key.txt`) and length.

    Raises `ValueError` where the file is not an uncompressed archive, or a sample has no class.
    """
    found: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, str] = {}
    texts: dict[str, tuple[int, int]] = {}
    option, singular, rejected = wanted.option, wanted.kind.noun.removesuffix("s"), list[list[str]]()
    with shard.open("rb") as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)  # noqa: SIM115
        except tarfile.TarError as error:
            raise ValueError(f"{option}: expected an uncompressed tar archive, got {str(shard)!r} ({error})") from None
        for member in _members(shard, file.fileno(), archive, rejected):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if f".{extension.lower()}" in wanted.kind.suffixes:
                if key in found:
                    rejected.append([f"{shard}:{member.name}", f"second {singular} of key {key!r}"])
                found.setdefault(key, member)
            elif wanted.labelled and extension == "cls":
                data = os.pread(file.fileno(), min(member.size, MAX_LABEL_BYTES), member.offset_data)
                labels[key] = data.decode("utf-8", errors="replace").strip()
            elif extension == "txt":
                texts[key] = member.offset_data, member.size
        if wanted.labelled and (missing := [key for key in sorted(found) if key not in labels]):
            count = f"{len(missing)} of {len(found)} without a label"
            raise ValueError(f"{option}: expected {missing[0]}.cls in {str(shard)!r}, found none ({count})")
        samples: list[list[Any]] = []
        for key, member in sorted(found.items()):
            places = member.offset_data, member.size, *texts.get(key, (-1, -1))
            opened = functools.partial(archive.extractfile, member)
            length = -1 if wanted.measure is None else _measure(wanted.measure, opened)
            samples.append([member.name, labels.get(key, ""), *places, length])
    return Found(samples, rejected)


def _members(
    shard: Path, descriptor: int, archive: tarfile.TarFile, rejected: list[list[str]]
) -> Iterator[tarfile.TarInfo]:
    """Regular, whole, unpacked members; what is cut off or damaged goes to `rejected`."""
    total = os.fstat(descriptor).st_size
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
                rejected.append([f"{shard}:{member.name}", "not a regular file"])
        elif member.offset_data + member.size > total:
            rejected.append([f"{shard}:{member.name}", "cut off: the shard ends inside this member"])
        else:
            yield member
    if os.pread(descriptor, tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
        rejected.append([str(shard), f"damaged from byte {archive.offset}: what follows is not read"])


class _Member(tarfile.TarInfo):
    """Refuses extended headers of absurd size, which tarfile would read into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if not member.isfile() and not member.isdir() and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.HeaderError(f"extended header of {member.size} bytes")
        return member


def _open_command(path: str, wanted: Wanted) -> ShardSource:
    """The tar archive that a shell command writes, kept in a temporary file for as long as the source lives."""
    if not wanted.commands:
        raise ValueError(
            f"{wanted.option}: expected a folder or .tar shards, got the shell command {path!r}; "
            "--data.allow-commands runs it"
        )
    command = path.removeprefix("pipe:")
    folder = tempfile.mkdtemp(prefix="d2v-pipe-")
    # The name is part of the identity of a sample: the same command, the same name.
    shard = Path(folder) / f"pipe-{hashlib.sha256(command.encode()).hexdigest()[:16]}.tar"
    try:
        with shard.open("wb") as file:
            done = subprocess.run(command, shell=True, stdout=file, check=False)
        if done.returncode:
            raise ValueError(f"{wanted.option}: expected exit code 0 of {command!r}, got {done.returncode}")
        source = ShardSource([shard], wanted._replace(cache=None))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(source, _remove_folder, folder, os.getpid())
    return source


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a forked worker
        shutil.rmtree(folder, ignore_errors=True)
