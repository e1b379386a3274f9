"""What all sources of encoded samples share, and the paths that name them."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from d2v.data.cache import CACHE, FileRecord, IndexCache, NameTable, describe_change
from d2v.files import open_regular

MAX_ENCODED_BYTES = 256 << 20
"""Largest encoded sample that is read; a bigger file or tar member counts as a bad sample."""
LISTED = 6
"""Endings that are counted by themselves; others are counted together."""
HEADERS = frozenset(
    "label labels class target category score similarity sentiment gold_label quality".split()  # noqa: SIM905
)
"""What the column of the labels is called in the first line of a table."""
DISTINCT = 10
"""So many classes with one sample each, and none with more, are no classes."""


class Rejected(NamedTuple):
    """Something the index could not use."""

    name: str
    reason: str


def for_example(rejected: Sequence[Rejected]) -> str:
    """The first of what was rejected, for the end of a message."""
    return f", for example {rejected[0].name}: {rejected[0].reason}" if rejected else ""


class NoSamples(ValueError):
    """Nothing of the kind is there."""


class NoTranscript(ValueError):
    """A sample has no text: none is there, where one that cannot be read is damage."""


class ShardLost(OSError):
    """A shard cannot be read any more: all of its samples are gone, which no replacement makes good."""


def describe_error(error: Exception) -> str:
    """One sentence for a list of bad samples."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if not text or not isinstance(error, (ValueError, OSError)):  # what a library did not mean to say to users
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return printable(text)


def printable(name: str) -> str:
    """A file name that any console and any text file takes: bytes in another encoding become `\\xe9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


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
    beside: frozenset[str] = frozenset()
    """Endings of files that belong to the samples."""
    readers: Mapping[str, str] = {}
    """What would read files of other endings, in words, by ending."""
    cut: Callable[[BinaryIO, int, int], bytes] | None = None
    """Makes an encoded file of a part of one, from a place on and so long, where lists may name such parts."""

    def describe(self) -> str:
        """The endings that count."""
        return f"{self.noun} end in {', '.join(sorted(self.suffixes))}"


Measure = Callable[[BinaryIO], int | Sequence[Any]]
"""Length of a sample of a file, or that and more JSON values; `ValueError` or `OSError` where it has none."""


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
    measured: Mapping[int, Sequence[Any]] = {}
    """What is known of samples besides their length, which comes first."""
    stamps: np.ndarray = np.zeros((0, 2), np.int64)
    """(files,2) int64: size (bytes) and time of change (ns) of each file when it was indexed; -1: unknown."""
    rejected: list[Rejected]
    left_out: dict[str, int]
    threads_may_read = False
    """Whether `read` may be called by several threads."""
    cut: Mapping[int, str] = {}
    """What was cut when it was indexed, by sample."""
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

    def open_file(self, index: int) -> BinaryIO:
        """The same as a file."""
        return io.BytesIO(self.read(index))

    def read_ahead(self) -> None:
        """Samples will be read with their neighbours: what lies around one that is read may be fetched, too."""

    def read_transcript(self, index: int) -> str:
        """The text that goes with a sample; `ValueError` or `OSError` where there is none."""
        raise NoTranscript(f"{self.describe(index)}: expected a transcript, this kind of source has none")

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

    def file_path(self, number: int) -> str:
        """Path of a file, by its place in `stamps`, for messages."""
        raise NotImplementedError

    def record_files(self, file: Path) -> FileRecord:
        """What a later start compares the files with, kept in `file`; data that was moved as a whole is the same."""
        names = [os.path.basename(self.file_path(number)) for number in range(len(self.stamps))]  # noqa: PTH119
        return FileRecord(file, NameTable(names), self.stamps)

    def check_unchanged(self, number: int, status: os.stat_result) -> None:
        """`ValueError` where the file of a number is not the one that was indexed."""
        if not len(self.stamps):  # of a long list
            return
        found = status.st_size, status.st_mtime_ns
        if (text := describe_change(self.stamps[number].tolist(), found)) is not None:
            raise ValueError(text)

    def digest(self) -> str:
        """Identity of the index: a resumed run must see the same samples in the same order."""
        return self.names.digest()

    def _note_measured(
        self, lengths: np.ndarray, rows: Iterable[int], others: Mapping[int, str | Sequence[Any]]
    ) -> np.ndarray:
        """Lengths (n,) int64 of the samples `rows`, of what `measure_length` found: numbers, or `others` by place.

        Reasons go to `rejected`, and -1 stands for them; what else is known goes to `measured`."""
        lengths, places, known = lengths.copy(), list(rows) if others else [], dict(self.measured)
        for place, one in others.items():
            if isinstance(one, str):
                self.rejected.append(Rejected(self.describe(places[place]), one))
            else:
                known[places[place]], lengths[place] = one, one[0]
        self.measured = known
        return lengths


class Subset(Source):
    """Some samples of another source, in its order."""

    def __init__(self, base: Source, rows: np.ndarray) -> None:
        self.base, self.rows, self.threads_may_read = base, rows, base.threads_may_read
        self.rejected, self.left_out, self.incomplete = base.rejected, base.left_out, base.incomplete
        self.classes, columns = base.classes, (base.labels, base.lengths, base.shards)
        self.labels, self.lengths, self.shards = (None if c is None else c[rows] for c in columns)
        if base.measured:
            self.measured = {i: base.measured[r] for i, r in enumerate(rows.tolist()) if r in base.measured}

    def __len__(self) -> int:
        return len(self.rows)

    def describe(self, index: int) -> str:
        return self.base.describe(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        return self.base.read(int(self.rows[index]))

    def open_file(self, index: int) -> BinaryIO:
        return self.base.open_file(int(self.rows[index]))

    def read_ahead(self) -> None:
        self.base.read_ahead()

    def read_transcript(self, index: int) -> str:
        return self.base.read_transcript(int(self.rows[index]))

    def prepare(self, folder: Path, fresh: bool) -> None:
        self.base.prepare(folder, fresh)

    def file_path(self, number: int) -> str:
        return self.base.file_path(number)

    def record_files(self, file: Path) -> FileRecord:
        return self.base.record_files(file)

    def digest(self) -> str:
        lengths = b"" if self.lengths is None else self.lengths.tobytes()
        return hashlib.sha256(self.base.digest().encode() + self.rows.tobytes() + lengths).hexdigest()


# ---- files ------------------------------------------------------------------------------------------------------


def check_size(size: int, what: str) -> None:
    """`ValueError` for a sample of more encoded bytes than any is read with."""
    if not 0 <= size <= MAX_ENCODED_BYTES:
        raise ValueError(f"{what} of {size} bytes is larger than {MAX_ENCODED_BYTES}")


def measure_length(measure: Measure, open_file: Callable[[], Any]) -> int | str | Sequence[Any]:
    """What `measure` finds of a sample, or why it has no length."""
    try:
        with open_file() as file:
            return measure(file)
    except ShardLost:
        raise
    except Exception as error:  # whatever is wrong with one sample stays with it
        return describe_error(error)


def check_encoding(start: bytes) -> None:
    """`ValueError` for the beginning of a text that is UTF-16 by its byte-order mark."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("UTF-16, expected UTF-8 (`iconv -f UTF-16 -t UTF-8` converts it)")


def decode_text(data: bytes) -> str:
    """UTF-8 without its byte-order mark; `ValueError` otherwise."""
    check_encoding(data)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def read_text_file(path: Path) -> str:
    """A short UTF-8 text without surrounding space; `ValueError` or `OSError` otherwise."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_ENCODED_BYTES + 1)
        check_size(len(data), "text")
        return decode_text(data).strip()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def ending_of(name: str) -> str:
    """Lower case, with the dot; of a hidden file none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def count_endings(left: Counter[str], what: str, readers: Mapping[str, str] | None = None) -> dict[str, int]:
    """{reason: count} of files or members that are left out, by ending ("": none), or by another reason. Endings that
    something would read (`readers`) come first, together with it."""
    readers = readers or {}
    reasons = {name: count for name, count in left.items() if name and not name.startswith(".")}
    for ending in sorted(left.keys() & readers):
        reasons[f"{what} that end in {ending} ({readers[ending]})"] = left[ending]
    endings = [(n, e) for e, n in left.items() if e not in reasons and e not in readers]
    endings.sort(key=lambda pair: (-pair[0], pair[1]))
    for count, ending in endings[:LISTED]:
        reasons[f"{what} that end in {ending}" if ending else f"{what} without an ending"] = count
    if rest := sum(count for count, _ in endings[LISTED:]):
        reasons[f"{what} with {len(endings) - LISTED} other endings"] = rest
    return {printable(reason): count for reason, count in reasons.items()}


def list_left_out(left_out: dict[str, int]) -> str:
    """For the end of a message."""
    return "".join(f", {count} {reason}" for reason, count in left_out.items())


# ---- paths ------------------------------------------------------------------------------------------------------


def find_files(path: str, places: str, option: str) -> list[Path]:
    """Paths that a name, glob or brace pattern means; `ValueError` where one of its parts means nothing."""
    files: list[Path] = []
    fixed, rest = split_existing(path)
    for pattern in [fixed + name for name in expand_braces(rest, option)]:
        wild = glob.has_magic(pattern[len(fixed) :]) and not Path(pattern).exists()
        found = sorted(glob.glob(glob.escape(fixed) + pattern[len(fixed) :])) if wild else [pattern]  # noqa: PTH207
        if not found or not Path(found[0]).exists():
            raise ValueError(f"{option}: expected {places}, found nothing at {pattern!r}")
        files.extend(Path(f) for f in found)
    return files


def split_existing(path: str) -> tuple[str, str]:
    """The longest beginning of a path that exists, which is no pattern whatever its characters, and the rest."""
    if Path(path).exists():
        return path, ""
    fixed = path
    while (end := fixed.rfind(os.sep)) >= 0:
        if Path(fixed[: end + 1]).is_dir():
            return path[: end + 1], path[end + 1 :]
        fixed = fixed[:end]
    return "", path


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


def walk_files(
    root: Path, left: Counter[str] | None = None, folders: dict[str, tuple[int, int]] | None = None
) -> Iterator[str]:
    """Paths of the files under `root`, relative to it; links are followed, each folder once.

    Hidden names, pipes, sockets and devices are passed over, and counted in `left`. `folders` gets the number and time
    of change of each folder by its path, before it was read.
    """
    seen: set[tuple[int, int]] = set()
    left = Counter() if left is None else left
    stack, start = [str(root)], len(os.path.join(root, ""))  # noqa: PTH118
    while stack:
        folder = stack.pop()
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link back to a folder above
        seen.add((status.st_dev, status.st_ino))
        if folders is not None:
            folders[folder[start:]] = status.st_ino, status.st_mtime_ns
        with os.scandir(folder) as scan:
            found = sorted(scan, key=lambda e: e.name)
        entries = [e for e in found if not e.name.startswith(".")]
        left["hidden names"] += len(found) - len(entries)
        stack.extend(e.path for e in reversed(entries) if e.is_dir())
        for entry in (e for e in entries if not e.is_dir()):
            # A dangling link stays in: it is reported when it is read.
            if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry)):  # noqa: PTH110
                yield entry.path[start:]
            else:
                left["pipes, sockets and devices"] += 1


def read_lines(file: Path, option: str) -> list[str]:
    """Lines of a UTF-8 file; `ValueError` where it is not one, or empty."""
    try:
        with open_regular(file) as stream:
            lines = [line.rstrip("\r") for line in decode_text(stream.read()).split("\n")]
    except ValueError as error:
        raise ValueError(f"{option}: expected a list in UTF-8, got {str(file)!r}: {error}") from None
    if not any(lines):
        raise ValueError(f"{option}: expected lines in {str(file)!r}, found none")
    return lines


def read_transcripts(manifest: Path) -> list[str]:
    """A transcript for each line of a manifest; `ValueError` where the file beside it has another number of lines."""
    file = manifest.with_suffix(".ltr")
    if not file.exists() and manifest.with_suffix(".wrd").exists():
        file = manifest.with_suffix(".wrd")
    lines, listed = read_lines(file, "transcripts"), "\n".join(read_lines(manifest, "transcripts")).rstrip()
    count = listed.count("\n") + ("\t" in listed.split("\n", 1)[0])
    if not lines[-1]:  # behind the last newline
        lines.pop()
    while len(lines) > count and not lines[-1].strip():
        lines.pop()
    if len(lines) != count:
        raise ValueError(f"expected {count} lines in {str(file)!r}, as in {str(manifest)!r}, got {len(lines)}")
    items = [line.split() for line in lines]
    # Words under the name of letters keep their spaces: without a mark between words, letters would be one each.
    marked, letters = any("|" in line for line in lines), all(len(item) == 1 for row in items for item in row)
    if file.suffix == ".wrd" or not (marked or letters):
        return [" ".join(row) for row in items]
    return ["".join(row).replace("|", " ").strip() for row in items]


def check_output(output: Path) -> None:
    """Raises `ValueError` where `output` is something else than an absent or empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: expected an absent or empty folder, got {str(output)!r}")


def is_header(columns: Sequence[str]) -> bool:
    """Whether the first line of a table names its columns: the last as labels are called, each other in one word."""
    names = [column.strip().casefold() for column in columns]
    return names[-1] in HEADERS and all(len(name.split()) == 1 for name in names)


def check_classes(source: Source, option: str) -> None:
    """Raises `ValueError` for labels of a training set that cannot be meant: numbers of samples, or all different."""
    assert source.labels is not None and source.classes is not None
    count, classes = len(source.labels), source.classes
    if source.lengths is not None and len(classes) > 1 and all(name.isdecimal() for name in classes):
        values = np.array([int(name) for name in classes], dtype=np.float64)[source.labels]
        factor = float(np.median(source.lengths / np.maximum(values, 1.0)))  # files may have another sample rate
        expected = np.minimum(values * factor, source.lengths.max())
        if values.min() >= 100 and bool((np.abs(source.lengths - expected) <= factor + 1.0).all()):
            raise ValueError(
                f"{option}: expected labels, got numbers of samples: {source.describe(0)} has the label "
                f"{classes[source.labels[0]]}, its length (a manifest is no table of labels)"
            )
    if count == len(classes) >= DISTINCT:
        raise ValueError(
            f"{option}: expected several samples of a class, got {count} samples of {count} classes, for example "
            f"{', '.join(repr(name) for name in classes[:3])}"
        )


def describe_rare(labels: Sequence[int], classes: Sequence[str], names: Callable[[int], str]) -> list[str]:
    """A sentence about classes with one sample, which may be a misspelt label or a line of column names; or nothing."""
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes))
    rare = np.flatnonzero(counts == 1).tolist()
    if not rare:
        return []
    shown = ", ".join(f"{classes[c]!r} ({names(list(labels).index(c))})" for c in rare[:3])
    return [f"note: {len(rare)} of {len(classes)} classes have one sample: {shown}{', ...' if len(rare) > 3 else ''}"]


def number_classes(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Class texts -> (labels int64 (n,), sorted class names); names that are all integers sort by value."""
    distinct = set(texts)
    numeric = all(re.fullmatch(r"-?\d+", t) for t in distinct)
    classes = sorted(distinct, key=lambda t: (int(t), t)) if numeric else sorted(distinct)
    numbers = {name: i for i, name in enumerate(classes)}
    return np.asarray([numbers[t] for t in texts], dtype=np.int64), [printable(name) for name in classes]
