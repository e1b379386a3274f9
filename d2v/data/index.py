"""Where encoded samples come from: folders, lists of files, or members of uncompressed .tar shards read in place.

A source is a fixed, sorted index with random access, so that the order of a run is a function of the seed and a resumed
run continues at the very sample where it stopped. Nothing is ever extracted or written beside the data.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, features

from d2v.data.cache import FileRecord, Found, NameTable, scan_files, stamps_of
from d2v.data.shards import ShardSource, open_command
from d2v.data.sources import (
    Kind,
    Measure,
    NoSamples,
    NoTranscript,
    Rejected,
    Source,
    Wanted,
    check_size,
    count_endings,
    ending_of,
    find_files,
    is_header,
    list_left_out,
    measure_length,
    number_classes,
    printable,
    read_lines,
    read_text_file,
    read_transcripts,
    walk_files,
)
from d2v.data.storage.folders import KEPT_FROM, Tree, walk_tree
from d2v.data.storage.lists import read_plain
from d2v.data.storage.remote import find_remote
from d2v.data.tables.metadata import METADATA, SPOKEN, Known, read_known
from d2v.data.tables.parquet import ParquetSource
from d2v.files import is_url, open_regular
from d2v.runtime import Reporter


def _image_suffixes() -> frozenset[str]:
    """Endings of what the installed Pillow decodes, of formats that d2v/data/vision.py takes."""
    plain = ".jpg .jpeg .jpe .jfif .jif .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm"
    more = {"avif": ".avif", "jpg_2000": ".jp2 .j2k .j2c .jpc .jpf .jpx"}
    Image.init()
    jxl = ".jxl" if "JXL" in Image.OPEN else ""
    return frozenset(" ".join([plain, jxl, *(names for name, names in more.items() if features.check(name))]).split())


IMAGES = Kind(
    "images", _image_suffixes(), "a folder of images or .tar shards",
    readers={".npy": "read where no other images are, or by models of other than 1 or 3 channels"},
)  # fmt: skip
ARRAYS = IMAGES._replace(suffixes=frozenset({".npy"}))
BANDS = IMAGES._replace(suffixes=IMAGES.suffixes | ARRAYS.suffixes)
MAX_DIGITS = 19
"""A count with more of them is none."""
MEASURED = 4
"""Files that are measured at the same time, some of which are decoded."""
_PART = re.compile(r"(.+):(\d+):(\d+)")
"""archive:offset:length, an uncompressed member of an archive; recording:start:length, frames of it."""
ARCHIVES = frozenset({".zip", ".tar"})
PARQUET = ".parquet"


def open_source(path: str | Sequence[str], kind: Kind = IMAGES, **options: Any) -> Source:
    """Opens a folder of files of a kind, one .tar shard, a glob or brace pattern of shards, of .parquet files or of
    files of the kind, a list of files, or shards or .parquet files at URLs.

    Several paths are files by name. `options` are those of `Wanted`. Raises `ValueError` where the path is empty,
    missing or holds no such file.
    """
    wanted = Wanted(kind, **options)
    if not path:
        raise ValueError(f"{wanted.option}: expected {kind.places}, got nothing")
    if not isinstance(path, str):
        return open_files([Path(file) for file in path], wanted)
    if path.startswith("pipe:"):
        return open_command(path, wanted)
    if is_url(path):
        remote = find_remote(path, wanted.option)
        return (ParquetSource if remote[0].suffix == PARQUET else ShardSource)(remote, wanted)
    if Path(path).is_dir():
        return _open_folder(Path(path), wanted)
    files = find_files(path, kind.places, wanted.option)
    if path.endswith(".tsv") and kind.lists:
        if len(files) != 1:
            raise ValueError(f"{wanted.option}: expected one manifest, got {len(files)} at {path!r}")
        return _open_list(files[0], wanted)
    if all(file.suffix == PARQUET for file in files):
        return ParquetSource(files, wanted)
    if not wanted.labelled and all(ending_of(file.name) in kind.suffixes for file in files):
        return open_files(files, wanted)
    odd = next((f for f in files if f.suffix != ".tar" or not f.is_file()), None)
    if odd is not None:
        raise ValueError(
            f"{wanted.option}: expected .tar shards, .parquet files or one folder, got {str(odd)!r}; {kind.describe()}"
        )
    return ShardSource(files, wanted)


def open_images(opener: Callable[[Kind], Source]) -> Source:
    """What `opener` makes of images in Pillow's formats; where there are none, of arrays, which beside such images are
    something else, such as features."""
    try:
        return opener(IMAGES)
    except NoSamples as error:
        try:
            return opener(ARRAYS)
        except NoSamples:
            raise error from None


# ---- files ------------------------------------------------------------------------------------------------------


class FileSource(Source):
    """Files under `root` by name: those of a folder, or those of a list.

    A name in a list may also be `archive.zip:offset:length` of a stored member, `a.wav:start:length` of a recording, in
    its frames, or `COMMAND |`, whose output is the file. Transcripts are the `.txt` files beside the samples, or what
    `tables` in the folder say; those of a list are the lines of the `.ltr` file beside it: letters separated by spaces,
    `|` between words; or of a `.wrd` file of words.
    """

    counts: np.ndarray | None = None
    """Lengths (n,) as a list gives them."""
    threads_may_read = True

    def __init__(
        self, root: Path, names: NameTable | list[str], wanted: Wanted, file: Path | None = None,
        stamps: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.names = names if isinstance(names, NameTable) else NameTable(names)
        self.root, self.cache, self.file = root, wanted.cache, file
        self._endings, self._cut = " ".join(sorted(wanted.kind.suffixes)), wanted.kind.cut
        self.rejected, self.left_out = [], {}
        self.lines = np.arange(len(names), dtype=np.int32)
        """Line of each sample in the list, without that of the root."""
        self._transcripts: list[str] | None = None
        self.tables: Sequence[str] = ()
        """Paths under the root of files that `read_known` reads."""
        self._known: Known | None = None
        self.stamps = stamps_of([self._file_of(name) for name in names]) if stamps is None else stamps

    def file_path(self, number: int) -> str:
        return self.describe(number)

    def record_files(self, file: Path) -> FileRecord:
        return FileRecord(file, self.names, self.stamps)

    def describe(self, index: int) -> str:
        name = self.names[index]
        return printable(name if is_command(name) else str(self.root / name))

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
        match = self._part_of(name)
        if match is None:
            return self._check(open_regular(self.root / name), index)
        offset, size = int(match[2]), int(match[3])
        check_size(size, "part")
        with self._check(open_regular(self.root / match[1]), index) as archive:
            if self._cut is not None and ending_of(match[1]) not in ARCHIVES:
                return io.BytesIO(self._cut(archive, offset, size))
            archive.seek(offset)
            data = archive.read(size)
        if len(data) != size:
            raise ValueError(f"cut off: the archive ends after {len(data)} of {size} bytes of this member")
        return io.BytesIO(data)

    def _check(self, file: BinaryIO, index: int) -> BinaryIO:
        """A file that was opened, unless it is not the one that was indexed."""
        try:
            self.check_unchanged(index, os.fstat(file.fileno()))
        except ValueError:
            file.close()
            raise
        return file

    def read_transcript(self, index: int) -> str:
        if self.file is None:
            beside = (self.root / self.names[index]).with_suffix(".txt")
            if not self.tables or beside.exists():
                return read_text_file(beside)
            if (text := self.known().texts.get(self.names[index])) is None:
                told = f"{self.tables[0]}{' or another table' if len(self.tables) > 1 else ''}"
                raise NoTranscript(f"{self.describe(index)}: expected {beside.name} or a line in {told}, found none")
            return text
        if self._transcripts is None:
            self._transcripts = read_transcripts(self.file)
        return self._transcripts[int(self.lines[index])]

    def known(self) -> Known:
        """What the tables say, read once; what of them is not used is then in `left_out`."""
        if self._known is None:
            self._known = read_known(self.root, self.tables, self.names)
            self.left_out |= self._known.left_out
        return self._known

    def read_lengths(self, measure: Measure, rows: Sequence[int] | None = None) -> np.ndarray:
        """(n,) int64: lengths of the samples `rows` (None: all) by their files; -1 where one is damaged, which goes to
        `rejected`."""
        part = "" if rows is None else "long"
        rows = range(len(self)) if rows is None else rows
        report = Reporter("measuring", len(rows), "files")

        def scan(number: int) -> Found:
            result = measure_length(measure, lambda: self.open_file(rows[number]))
            report.add()
            return Found([["", "", -1, -1, -1, -1, result]])

        place = (self.file or self.root).absolute()
        names = [self.names[row] for row in rows]
        stamps = self.stamps[rows] if len(self.stamps) else stamps_of([self._file_of(name) for name in names])
        # Another decoder may read what this one could not.
        scope = ("lengths", self._endings, place, part)
        found = scan_files(names, stamps, scan, self.cache, scope, MEASURED)
        report.finish()
        return self._note_measured(found.lengths, rows, found.others)

    def _file_of(self, name: str) -> str:
        """Path of the file that holds a sample; "" for the output of a command."""
        if is_command(name):
            return ""
        match = self._part_of(name)
        return os.path.join(self.root, name if match is None else match[1])  # noqa: PTH118

    def _part_of(self, name: str) -> re.Match[str] | None:
        """What a name says where it means a part of a file."""
        match = _PART.fullmatch(name)
        if match is None or (self._cut is None and ending_of(match[1]) not in ARCHIVES):
            return None
        return None if os.path.exists(os.path.join(self.root, name)) else match  # noqa: PTH110, PTH118


def is_command(name: str) -> bool:
    """Whether a sample of this name is the output of a shell command."""
    return name.rstrip().endswith("|")


def _read_whole(file: BinaryIO) -> bytes:
    """All bytes of a file that is not absurdly large, else `ValueError`."""
    try:
        size = os.fstat(file.fileno()).st_size
    except OSError:  # no file of the system
        return file.read()
    check_size(size, "file")
    # A read of more than is there costs a buffer of that size, which took longer than decoding a small image.
    return file.read(size + 1)


def open_files(files: Sequence[Path], wanted: Wanted) -> FileSource:
    """Files by name."""
    folders = {file.parent for file in files}
    root = folders.pop() if len(folders) == 1 else Path()
    return FileSource(root, [str(file.relative_to(root)) for file in files], wanted)


def _open_folder(root: Path, wanted: Wanted) -> Source:
    """Files of a kind at any depth under `root`; with labels, what `metadata.csv` or `.jsonl` in it say, else the first
    folder level names the class. Where there is nothing but .parquet files, these."""
    kind, option = wanted.kind, wanted.option
    beside = [os.sep + name for name in METADATA] + [SPOKEN] * (".txt" in kind.beside)
    tree = walk_tree(root, kind, tuple(sorted(beside)), wanted.cache)
    left, left_out = tree.left, count_endings(tree.left, "files", kind.readers)
    if not tree.names and left[PARQUET]:
        files = sorted(name for name in walk_files(root) if ending_of(name) == PARQUET)
        source = ParquetSource([root / name for name in files], wanted)
        del left[PARQUET]
        source.left_out = count_endings(left, "files", kind.readers)
        return source
    if not tree.names:
        others = sum(1 for _ in walk_files(root)) - len(tree.beside)
        shards = left[".tar"]
        hint = f"; for its {shards} .tar shards pass {str(root / '*.tar')!r}" if shards else ""
        place = f"under {str(root)!r}"
        raise NoSamples(
            f"{option}: expected {kind.noun} {place}, found none in {others} files{list_left_out(left_out)}; "
            f"{kind.describe()}{hint}"
        )
    return _open_found(root, tree, left_out, wanted)


def _open_found(root: Path, tree: Tree, left_out: dict[str, int], wanted: Wanted) -> Source:
    """The files that a folder holds, and their labels."""
    kind, option, found = wanted.kind, wanted.option, tree.names
    source = FileSource(root, found, wanted, stamps=tree.stamps)
    source.tables, source.left_out = tree.beside, left_out
    if wanted.labelled and (labels := source.known().labels):
        known, kept = source.known(), [name for name in found if name in labels]
        lost = [
            Rejected(source.describe(i), "no label in the metadata") for i, n in enumerate(found) if n not in labels
        ]
        source = FileSource(root, kept, wanted)
        source.tables, source.left_out, source._known = tree.beside, left_out, known
        source.rejected, source.incomplete = lost, list(lost)
        source.labels, source.classes = number_classes([labels[name] for name in kept])
    elif wanted.labelled:
        if loose := [name for name in found if os.sep not in name]:
            count = f"{len(loose)} of {len(found)} {kind.noun} outside any"
            raise ValueError(f"{option}: expected class folders under {str(root)!r}, got {loose[0]!r} ({count})")
        source.labels, source.classes = number_classes([name.split(os.sep, 1)[0] for name in found])
    return source


def _open_list(file: Path, wanted: Wanted) -> FileSource:
    """A `.tsv`: the root folder in the first line, then `path<TAB>samples`; or, labelled, `path<TAB>label`.

    A relative path that leads out of the root is rejected; an absolute one is taken as it stands. A table without a
    root line is relative to its own folder. Commands among the paths are refused unless they are allowed. The files of
    a long list are not looked at.
    """
    if not wanted.labelled and (plain := read_plain(file)) is not None:
        root, names, counts = plain
        many = np.zeros((0, 2), np.int64) if len(names) > KEPT_FROM else None
        source = FileSource(file.parent / root, names, wanted, file, many)
        source.counts = counts
        return source
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
                f"{option}: expected paths of {noun}, got a shell command in {where}; "
                "--data.allow-commands runs it (features and evaluate: --allow-commands)"
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
    source = FileSource(file.parent / (lines[0].strip() if first else ""), paths, wanted, file)
    source.rejected, source.lines = rejected, np.array(numbers)
    source.left_out = {f"line of column names, {where}": 1 for where in headers}
    if wanted.labelled:
        source.labels, source.classes = number_classes(values)
    elif all(value.isdecimal() and len(value) < MAX_DIGITS for value in values):
        source.counts = np.array([int(value) for value in values], dtype=np.int64)
    return source


def _describe_escape(path: str) -> str | None:
    """Why a path of a manifest is not used, or None."""
    if not path.strip():
        return "no path"
    if os.path.isabs(path):  # noqa: PTH117
        return None
    return f"{path!r} leads out of the root" if os.path.normpath(path).startswith(os.pardir + os.sep) else None
