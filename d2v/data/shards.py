"""Samples that are members of uncompressed .tar shards, read in place through an index of their offsets."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import weakref
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from d2v.data.cache import Found, NameTable, Scanned, index_files
from d2v.data.sources import (
    NoSamples,
    NoTranscript,
    Rejected,
    ShardLost,
    Source,
    Wanted,
    check_size,
    count_endings,
    decode_text,
    describe_error,
    list_left_out,
    measure_length,
    number_classes,
    printable,
)
from d2v.data.storage.remote import RemoteFile, stamps_of_remote

RECORD = "pack.json"
"""What `d2v data pack` writes beside its shards."""
MAX_LABEL_BYTES = 4096
MAX_TAR_HEADER_BYTES = 1 << 20
MAX_OPEN_SHARDS = 32
FETCH_BYTES = 4 << 20
"""Read-ahead fetches aligned blocks of this size."""
MAX_FETCHED = 4096
"""Blocks that a process remembers to have fetched."""
SCANS = 8
"""Shards that are scanned at the same time: scanning waits for the storage most of the time."""

_HEADER = re.compile(
    rb"(?s)([^\0]{1,99}\0+)(?<=^.{100})(?:[0-7]{7}[ \0]){3}([0-7]{11})[ \0][0-7]{11}[ \0]"
    rb"([0-7]{6}\0 )0\0{100}(?:ustar\x0000|ustar  \0).{80}\0{155}.{12}"
)
"""A regular member whose name fits its place: name, size, checksum."""


class ContainerSource(Source):
    """Samples inside of other files."""

    files: Sequence[Path | RemoteFile]

    def _take_samples(self, found: Scanned, wanted: Wanted) -> None:
        """Names, places, labels and lengths of what was found: at least one sample."""
        self._numbers, self._places = np.repeat(np.arange(len(self.files)), found.counts), found.places
        files = (file.name for file, count in zip(self.files, found.counts.tolist(), strict=True) for _ in range(count))
        self.names = NameTable(f"{file}:{name}" for file, name in zip(files, found.names, strict=True))
        if wanted.labelled:
            self.labels, self.classes = number_classes(list(found.labels))
        if wanted.measure is not None:
            self.lengths = self._note_measured(found.lengths, range(len(found.lengths)), found.others)

    def file_path(self, number: int) -> str:
        return printable(str(self.files[number]))

    def describe(self, index: int) -> str:
        return printable(f"{self.files[int(self._numbers[index])].parent}/{self.names[index]}")


class ShardSource(ContainerSource):
    """Members of a kind of uncompressed .tar shards in webdataset naming: `key.jpg` and, with labels, `key.cls`;
    transcripts are members `key.txt`. A key may have dots (`scene.3.jpg`) unless they tell the parts of a sample apart
    (`scene.jpg` and `scene.mask.jpg`, of which the first is read). With `measure` the index has their lengths."""

    def __init__(self, files: Sequence[Path] | Sequence[RemoteFile], wanted: Wanted) -> None:
        self.files, self.cache = list(files), wanted.cache
        self._open, self._fetched = OrderedDict[int, int](), OrderedDict[tuple[int, int], None]()
        self._ahead = False
        endings = " ".join(sorted(wanted.kind.suffixes))
        scope = ("shards", wanted.kind.noun, endings, wanted.labelled, wanted.measure is not None)
        scan = functools.partial(scan_shard, wanted=wanted)
        remote = [file for file in self.files if isinstance(file, RemoteFile)]
        stamps = stamps_of_remote(remote, SCANS, wanted.option) if remote else None
        self.stamps, found = index_files(files, "shards", scan, wanted.cache, scope, SCANS, stamps)
        self.threads_may_read = bool(remote)
        self.rejected = [Rejected(*entry) for rejected, _ in found.rest.values() for entry in rejected]
        self.rejected += _find_short(files, found.counts.tolist())
        left = sum((Counter(left_out) for _, left_out in found.rest.values()), Counter[str]())
        self.left_out = count_endings(left, "members", wanted.kind.readers)
        if not len(found.names):
            raise NoSamples(
                f"{wanted.option}: expected {wanted.kind.noun} in {len(files)} .tar shards, found none"
                f"{list_left_out(self.left_out)}; {wanted.kind.describe()}"
            )
        self._take_samples(found, wanted)
        self.shards = self._numbers

    def read(self, index: int) -> bytes:
        offset, size = self._places[index, :2].tolist()
        check_size(size, "tar member")
        return self._read_at(index, offset, size)

    def read_ahead(self) -> None:
        self._ahead = hasattr(os, "posix_fadvise")

    def read_transcript(self, index: int) -> str:
        offset, size = self._places[index, 2:].tolist()
        if offset < 0:
            raise NoTranscript(f"{self.describe(index)}: expected a .txt member beside it, found none")
        check_size(size, "transcript")
        try:
            return decode_text(self._read_at(index, offset, size)).strip()
        except ValueError as error:
            raise ValueError(f"the .txt member beside {self.describe(index)}: {error}") from None

    def _read_at(self, index: int, offset: int, size: int) -> bytes:
        number = int(self._numbers[index])
        if isinstance(file := self.files[number], RemoteFile):
            return self._read_remote(file, offset, size)
        descriptor = self._descriptor(number)
        self._check(number, descriptor)
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

    def _read_remote(self, file: RemoteFile, offset: int, size: int) -> bytes:
        data = file.read_at(offset, size)
        if len(data) != size:
            raise ShardLost(f"the shard {file} is cut off: {size} bytes at {offset}, got {len(data)}")
        return data

    def _descriptor(self, number: int) -> int:
        """Of a shard, which is opened where it is not; few are open at a time."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        file = self.files[number]
        try:
            descriptor = os.open(str(file), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ShardLost(f"the shard {file} cannot be opened: {error.strerror}") from None
        self._open[number] = descriptor
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _check(self, number: int, descriptor: int) -> None:
        """`ShardLost` where a shard has another size than when it was indexed; `ValueError`: a bad sample, for a shard
        that was overwritten since."""
        status, expected = os.fstat(descriptor), int(self.stamps[number, 0])
        if status.st_size != expected >= 0:
            file = self.files[number]
            raise ShardLost(f"the shard {file} has changed: {expected} bytes when it was indexed, now {status.st_size}")
        self.check_unchanged(number, status)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "cache": None}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _find_short(files: Sequence[Path | RemoteFile], counts: Sequence[int]) -> Iterator[Rejected]:
    """Shards with fewer samples than the record of their pack lists."""
    known: dict[Path, dict[str, int]] = {}
    for file, samples in zip(files, counts, strict=True):
        if isinstance(file, RemoteFile):
            continue
        if file.parent not in known:
            try:
                listed = json.loads((file.parent / RECORD).read_text(encoding="utf-8"))["shards"]
                known[file.parent] = {shard["name"]: int(shard["samples"]) for shard in listed}
            except (OSError, ValueError, KeyError, TypeError):  # none, or a file of something else
                known[file.parent] = {}
        if samples < (count := known[file.parent].get(file.name, 0)):
            yield Rejected(str(file), f"holds {samples} of the {count} samples that {RECORD} lists")


_Read = Callable[[int, int], bytes]
"""(size, offset) -> bytes of a file, as many as there are."""


def _reader(file: BinaryIO) -> _Read:
    """Reads a file at any place; of a file of this machine, tarfile's place in it stays as it is."""
    with contextlib.suppress(OSError, AttributeError):
        return functools.partial(os.pread, file.fileno())

    def read(size: int, offset: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read


def scan_shard(shard: Path | RemoteFile, wanted: Wanted) -> Found:
    """The samples of a shard by key, with their class (`key.cls`), text (`key.txt`) and length.

    Raises `ValueError` where the file is not an uncompressed archive, or a sample has no class.
    """
    labels: dict[str, str] = {}
    texts: dict[str, tuple[int, int]] = {}
    members: list[_Named] = []
    option, rejected, left_out = wanted.option, list[list[str]](), Counter[str]()
    with shard.open() if isinstance(shard, RemoteFile) else shard.open("rb") as file:
        read = _reader(file)
        try:
            archive = tarfile.open(None, "r:", file, tarinfo=_Member)  # noqa: SIM115
        except ShardLost:
            raise
        except Exception as error:  # damaged headers raise many kinds
            raise ValueError(f"{option}: expected an uncompressed tar archive, got {str(shard)!r} ({error})") from None
        for member in _members(shard, read, archive, rejected):
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.rpartition(".")
            key, extension = f"{folder}{slash}{stem}", f".{extension.lower()}" if stem else ""
            if base.startswith("."):
                left_out["hidden names"] += 1
            elif extension in wanted.kind.suffixes:
                members.append(_Named(key, f"{folder}{slash}{base.partition('.')[0]}", member))
            elif extension == ".cls" and wanted.labelled:
                data = read(min(member.size, MAX_LABEL_BYTES), member.offset_data)
                labels[key] = data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff").strip()
            elif extension == ".txt":
                texts[key] = member.offset_data, member.size
            elif extension != ".cls":
                left_out[extension] += 1
        found = _choose_members(shard, members, wanted, rejected, left_out)
        if wanted.labelled and (missing := [n.key for n in found if not {n.key, n.plain} & labels.keys()]):
            count = f"{len(missing)} of {len(found)} without a label"
            raise ValueError(f"{option}: expected {missing[0]}.cls in {str(shard)!r}, found none ({count})")
        samples: list[list[Any]] = []
        for key, plain, member in found:
            text, label = texts.get(key) or texts.get(plain, (-1, -1)), labels.get(key, labels.get(plain, ""))
            opened = functools.partial(archive.extractfile, member)
            length = -1 if wanted.measure is None else measure_length(wanted.measure, opened)
            samples.append([member.name, label, member.offset_data, member.size, *text, length])
    return Found(samples, rejected, left_out)


class _Named(NamedTuple):
    """What may be a sample; key: its name without the ending; plain: up to the base name's first dot, as webdataset."""

    key: str
    plain: str
    member: tarfile.TarInfo

    @property
    def field(self) -> str:
        """What stands behind webdataset's key, such as `.mask.jpg`."""
        return self.member.name[len(self.plain) :].lower()


def _choose_members(
    shard: Path | RemoteFile, members: list[_Named], wanted: Wanted, rejected: list[list[str]], left_out: Counter[str]
) -> list[_Named]:
    """The samples, sorted by key.

    Where one sample has `key.jpg` and `key.mask.jpg`, members `.mask.jpg` of the whole shard are other views of samples
    and not samples; elsewhere a dot is a part of the key.
    """
    known = {named.key for named in members if named.key == named.plain}
    fields = {named.field for named in members if named.key != named.plain and named.plain in known}
    found, second = dict[str, _Named](), list[list[str]]()
    for named in members:
        if named.key != named.plain and named.field in fields:
            left_out[named.field] += 1
        elif named.key in found:
            kind = wanted.kind.noun.removesuffix("s")
            second.append([f"{shard}:{named.member.name}", f"second {kind} of key {named.key!r}"])
        else:
            found[named.key] = named
    rejected[:0] = second
    return [found[key] for key in sorted(found)]


def _members(
    shard: Path | RemoteFile, read: _Read, archive: tarfile.TarFile, rejected: list[list[str]]
) -> Iterator[tarfile.TarInfo]:
    """Regular, whole, unpacked members; what is cut off or damaged goes to `rejected`.

    An archive ends with blocks of zeros. tarfile, like webdataset, takes the end of the file, and a part of a header,
    for as good an end: without these blocks nobody knows what is missing.
    """
    file: Any = archive.fileobj
    here, total, before = file.tell(), file.seek(0, os.SEEK_END), -1
    file.seek(here)
    reason, cut = None, False
    while True:
        try:
            member = _next_plain(read, archive) or archive.next()
        except tarfile.TarError:
            break  # cut off inside the last member, which is rejected below by its size
        except ShardLost:
            raise
        except Exception as error:  # numbers and names in headers may be anything
            reason = describe_error(error)
            break
        if member is None:
            break
        vars(archive)["members"] = []  # tarfile would keep every header of a large shard
        if member.size < 0 or archive.offset <= before:
            rejected.append([f"{shard}:{member.name}", f"a size of {member.size} bytes"])
            return
        before = archive.offset
        if not member.isreg() or member.sparse is not None:
            if not member.isdir():
                rejected.append([f"{shard}:{member.name}", "not a regular file"])
        elif member.offset_data + member.size > total:
            rejected.append([f"{shard}:{member.name}", "cut off: the shard ends inside this member"])
            cut = True
        else:
            yield member
    end = read(tarfile.BLOCKSIZE, archive.offset) if archive.offset < total else b""
    if not reason and not end and not cut:
        rejected.append([str(shard), f"cut off: the shard ends at byte {total} without the zeros that end an archive"])
    elif reason or end.strip(b"\0"):
        rejected.append([str(shard), f"damaged from byte {archive.offset}: {reason or 'what follows is not read'}"])


def _next_plain(read: _Read, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """What `archive.next()` would return, in a fifth of the time; None: the header is not as most are."""
    header = read(tarfile.BLOCKSIZE, archive.offset)
    match = None if vars(archive)["firstmember"] is not None or archive.pax_headers else _HEADER.fullmatch(header)
    # The low half of an Adler-32 is one more than the sum of all bytes, modulo 65521, in a tenth of the time of `sum`.
    if match is None or (int(match[3][:6], 8) + sum(match[3]) - 255) % 65521 != zlib.adler32(header) & 0xFFFF:
        return None
    member = tarfile.TarInfo(match[1].rstrip(b"\0").decode("utf-8", "surrogateescape"))
    member.size, member.offset_data = int(match[2], 8), archive.offset + tarfile.BLOCKSIZE
    archive.offset = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return member


class _Member(tarfile.TarInfo):
    """Refuses extended headers of absurd size, which tarfile would read into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if not member.isfile() and not member.isdir() and member.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.HeaderError(f"extended header of {member.size} bytes")
        return member


def open_command(path: str, wanted: Wanted) -> ShardSource:
    """The tar archive that a shell command writes, kept in a temporary file for as long as the source lives."""
    if not wanted.commands:
        raise ValueError(
            f"{wanted.option}: expected a folder or .tar shards, got the shell command {path!r}; "
            "--data.allow-commands runs it (features and evaluate: --allow-commands)"
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
    source.stamps[:] = -1  # of a file that every start makes anew
    weakref.finalize(source, _remove_folder, folder, os.getpid())
    return source


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a forked worker
        shutil.rmtree(folder, ignore_errors=True)
