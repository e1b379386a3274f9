"""`d2v data pack`: samples of a folder, a manifest or shards -> .tar shards of even size, in random order; documents ->
.jsonl files, in little memory.

The same input and settings give the same bytes. Shards are whole or absent; an interrupted pack of images or speech
goes on after its last whole shard when it is started again. The output folder appears when all of them are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import tarfile
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from d2v.data.decoding.sound import decode_audio
from d2v.data.index import BANDS, open_images, open_source
from d2v.data.shards import RECORD, ShardSource
from d2v.data.sources import Kind, NoTranscript, ShardLost, Source, check_output, describe_error, list_left_out
from d2v.data.speech import SPEECH
from d2v.data.tokenizer import DocumentReader, find_texts
from d2v.data.vision import check_image
from d2v.files import PARTIAL, flush, write_atomically
from d2v.runtime import Reporter

CONTENTS = "contents.jsonl"
FORMAT = 1
AHEAD = 8
"""Samples that each thread may be ahead of the shard that is written."""
HELD_BYTES = 64 << 20
"""Text that is held in memory before it is appended to its files."""
KINDS = {"images": BANDS, "speech": SPEECH}
_SIGNATURES = (
    (b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"FORM", ".aiff"), (b".snd", ".au"), (b"caff", ".caf"),
    (b"ID3", ".mp3"), (b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"),
)  # fmt: skip
"""How files begin whose names do not say what they are."""


@dataclass(frozen=True)
class PackSettings:
    """What the bytes of a pack depend on, besides the samples."""

    kind: Literal["images", "speech", "text"]
    labelled: bool = False
    """Take class folders, or the labels of shards and tables, as classes."""
    shard_bytes: int = 256 << 20
    """Most bytes of a shard, unless a single sample has more."""
    shard_samples: int | None = None
    """Most samples of a shard; None: any number."""
    seed: int = 0
    in_order: bool = False
    """Keep the order of the input."""
    unchecked: bool = False
    """Take samples without decoding them."""

    def check(self) -> None:
        """Raises `ValueError` for what cannot be packed."""
        if self.shard_bytes < 1 or (self.shard_samples is not None and self.shard_samples < 1):
            raise ValueError(
                f"shard: expected at least 1 byte and 1 sample, got {self.shard_bytes} and {self.shard_samples}"
            )
        if self.kind == "text" and (self.labelled or self.shard_samples is not None):
            name = "labelled" if self.labelled else "shard_samples"
            raise ValueError(f"{name}: expected images or speech, got text; labelled text is one .tsv file")


class Packed(NamedTuple):
    """One sample as it is written, or why it is not."""

    sample: int
    members: tuple[tuple[str, bytes], ...]
    """(extension with its dot, content)."""
    reason: str | None

    @property
    def size(self) -> int:
        """Bytes in a shard."""
        return sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for _, data in self.members)


def pack(path: str, output: Path, settings: PackSettings, *, workers: int = 2, commands: bool = False) -> str:
    """Writes the samples at `path` as shards into the folder `output`; returns a summary.

    Args:
        path: images or speech: what --data.path takes; text: files or a folder of them.
        output: absent or empty.
        settings: what to write.
        workers: threads that read and decode; the result does not depend on them.
        commands: whether shell commands in the path or a manifest may be run.

    Raises:
        ValueError: settings, path or output that cannot be used, or not one good sample.
    """
    settings.check()
    output = output.resolve()
    check_output(output)
    partial = output.with_name(f"{PARTIAL}{output.name}")
    with _alone(partial):
        if settings.kind == "text":
            return _pack_text(path, partial, output, settings)
        kind = KINDS[settings.kind]

        def opened(kind: Kind) -> Source:
            return open_source(path, kind, labelled=settings.labelled, option="input", commands=commands)

        source = open_images(opened) if kind is BANDS else opened(kind)
        with contextlib.closing(_Writer(partial, source, settings)) as writer:
            writer.write_all(workers)
            return _finish(partial, output, writer.record, kind.noun, "that")


def _finish(partial: Path, output: Path, record: dict[str, Any], expected: str, found: str) -> str:
    """Moves a pack to its place; one line for the user."""
    shards, bad = record["shards"], record["bad"]
    first = f", for example {bad[0]['path']}: {bad[0]['reason']}" if bad else ""
    if not shards:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"input: expected {expected}, got {len(bad)} {found} cannot be used{first}")
    write_atomically(partial / RECORD, json.dumps(record, indent=1))
    for part in partial.glob(f"{PARTIAL}*"):  # of a pack that was killed
        part.unlink()
    if output.exists():
        output.rmdir()
    partial.rename(output)
    flush(output.parent)
    samples, size = sum(s["samples"] for s in shards), sum(s["bytes"] for s in shards)
    left_out = f"; {len(bad)} left out ({output / RECORD}){first}" if bad else ""
    left_out += list_left_out(record["left_out"]).replace(",", "; left out:", 1)
    return f"{output}: {samples} samples in {len(shards)} shards, {size / 1e6:.1f} MB{left_out}"


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keeps a second process from the same unfinished pack; the lock goes with the process, however that ends."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = partial.with_name(f"{partial.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"output: another process is writing {str(partial)!r}") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


class _Writer:
    """A pack on its way. `record` is what it says about itself, and all that is needed to go on with it."""

    def __init__(self, partial: Path, source: Source, settings: PackSettings) -> None:
        self.partial, self.source, self.settings = partial, source, settings
        order = np.arange(len(source))
        self.order = order if settings.in_order else np.random.default_rng(settings.seed).permutation(order)
        identity = {"format": FORMAT, **asdict(settings), "samples": len(source), "names": source.digest()}
        self.record: dict[str, Any] = {"settings": identity, "position": 0, "contents_bytes": 0, "shards": []}
        self.record["bad"] = [{"path": name, "reason": reason} for name, reason in source.rejected]
        self.record["left_out"] = source.left_out
        self._archive: tarfile.TarFile | None = None
        self._rows: list[str] = []
        self._size = 0
        self._take_up()

    def _take_up(self) -> None:
        """Goes on with what an interrupted pack with the same settings has left, else begins."""
        try:
            record: Any = json.loads((self.partial / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            record = None
        if isinstance(record, dict) and record.get("settings") == self.record["settings"]:
            self.record = {**record, "left_out": self.record["left_out"]}
            os.truncate(self.partial / CONTENTS, record["contents_bytes"])
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        (self.partial / CONTENTS).touch()

    def write_all(self, workers: int) -> None:
        """Writes what is not there yet."""
        report, done = Reporter("packing", len(self.order), self.settings.kind), self.record["position"]
        with contextlib.closing(read_ahead(self.source, self.order[done:], self.settings, workers)) as found:
            for packed in found:
                if packed.reason is None:
                    self._add(packed, done)
                else:
                    self.record["bad"].append({"path": self.source.describe(packed.sample), "reason": packed.reason})
                done += 1
                report.show(done)
        if self._rows:
            self._close_shard(done)
        report.finish()

    @property
    def _name(self) -> str:
        return f"shard-{len(self.record['shards']):06d}.tar"

    def _add(self, packed: Packed, position: int) -> None:
        full = self._size + packed.size > self.settings.shard_bytes or len(self._rows) == self.settings.shard_samples
        if self._rows and full:
            self._close_shard(position)
        if self._archive is None:
            # A format without times and owners of its own; names are short.
            self._archive = tarfile.open(self.partial / f"{PARTIAL}{self._name}", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key = f"{sum(s['samples'] for s in self.record['shards']) + len(self._rows):09d}"
        for extension, data in packed.members:
            info = tarfile.TarInfo(f"{key}{extension}")
            info.size, info.mode = len(data), 0o644
            self._archive.addfile(info, io.BytesIO(data))
        row = {"shard": self._name, "key": key, "path": self.source.describe(packed.sample)}
        if self.source.labels is not None and self.source.classes is not None:
            row["label"] = self.source.classes[self.source.labels[packed.sample]]
        self._rows.append(json.dumps(row) + "\n")
        self._size += packed.size

    def _close_shard(self, position: int) -> None:
        """Makes a shard whole; everything before `position` of the order is in this one or those before."""
        assert self._archive is not None
        self._archive.close()
        self._archive = None
        part, final = self.partial / f"{PARTIAL}{self._name}", self.partial / self._name
        flush(part)
        part.replace(final)
        text = "".join(self._rows).encode()
        with (self.partial / CONTENTS).open("ab") as file:
            file.write(text)
        flush(self.partial / CONTENTS)
        record = self.record
        record["shards"].append({"name": final.name, "samples": len(self._rows), "bytes": final.stat().st_size})
        record["position"], record["contents_bytes"] = position, record["contents_bytes"] + len(text)
        self._rows, self._size = [], 0
        write_atomically(self.partial / RECORD, json.dumps(record, indent=1))

    def close(self) -> None:
        """Removes a shard that is not whole; whole ones stay for the next start."""
        if self._archive is not None:
            self._archive.fileobj.close()
            (self.partial / f"{PARTIAL}{self._name}").unlink(missing_ok=True)


def read_ahead(
    source: Source, order: np.ndarray, settings: PackSettings, workers: int
) -> Generator[Packed, None, None]:
    """The samples in order, read and decoded by some threads ahead of the one that takes them."""
    waiting: deque[Future[Packed]] = deque()
    # Shards share a few open files, of which one thread might close what another reads.
    one = threading.Lock() if isinstance(source, ShardSource) else contextlib.nullcontext()
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        try:
            for index in order.tolist():
                waiting.append(pool.submit(read_packed, source, index, settings, one))
                if len(waiting) >= AHEAD * max(workers, 1):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_packed(
    source: Source, index: int, settings: PackSettings, one: contextlib.AbstractContextManager[Any]
) -> Packed:
    """One sample with its class and its transcript; `one` is held while the source is read."""
    speech = settings.kind == "speech"
    try:
        with one:
            data, text = source.read(index), read_text(source, index) if speech else None
        if not settings.unchecked:
            decode_audio(data) if speech else check_image(data)
        suffix, known = Path(source.describe(index)).suffix.lower(), KINDS[settings.kind].suffixes
        fitting = [suffix, *(s for start, s in _SIGNATURES if data.startswith(start))]
        if not (fitting := [s for s in fitting if s in known]):
            raise ValueError(f"expected one of {', '.join(sorted(known))}, got a name that ends in {suffix!r}")
        members = [(fitting[0], data)]
    except ShardLost:
        raise
    except Exception as error:  # whatever is wrong with one sample stays with it
        return Packed(index, (), describe_error(error))
    if source.labels is not None and source.classes is not None:
        members.append((".cls", source.classes[source.labels[index]].encode("utf-8", "surrogateescape")))
    if text is not None:
        members.append((".txt", text.encode()))
    return Packed(index, tuple(members), None)


def read_text(source: Source, index: int) -> str | None:
    """The transcript of a recording; not every one has one. `ValueError` for one that cannot be read."""
    try:
        return source.read_transcript(index)
    except (NoTranscript, FileNotFoundError):
        return None


# ---- text -------------------------------------------------------------------------------------------------------


def _pack_text(path: str, partial: Path, output: Path, settings: PackSettings) -> str:
    """Writes the documents at `path` into `output/shard-000000.jsonl` and so on.

    Every document goes to a file drawn at random, and each file is permuted: a random order that needs no more memory
    than a file takes.
    """
    left_out: dict[str, int] = {}
    reader = DocumentReader(find_texts(path, "input", left_out))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        rng = np.random.default_rng(settings.seed)
        count = max(1, -(-reader.bytes // settings.shard_bytes))
        files = [partial / f"{PARTIAL}{number:06d}" for number in range(count)]
        held: dict[int, list[bytes]] = {}
        size = 0
        report = Reporter("packing", reader.bytes / 1e6, "MB")
        for text in reader:
            where = min(reader.done * count // max(reader.bytes, 1), count - 1)
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            held.setdefault(int(where if settings.in_order else rng.integers(count)), []).append(line)
            size += len(line)
            if size >= HELD_BYTES:
                _append(files, held)
                held, size = {}, 0
            report.show(reader.done / 1e6)
        _append(files, held)
        shards = _permute([file for file in files if file.exists()], rng, settings.in_order)
        report.finish()
        bad = [{"path": name, "reason": reason} for name, reason in reader.rejected]
        record = {
            "settings": {"format": FORMAT, **asdict(settings)},
            "shards": shards,
            "bad": bad,
            "left_out": left_out,
        }
        return _finish(partial, output, record, "text", "documents that")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _append(files: list[Path], held: dict[int, list[bytes]]) -> None:
    """Appends lines to files by their number."""
    for number, lines in held.items():
        with files[number].open("ab") as file:
            file.writelines(lines)


def _permute(files: list[Path], rng: np.random.Generator, in_order: bool) -> list[dict[str, Any]]:
    """Permutes the lines of each file and gives it its name."""
    shards = []
    for number, file in enumerate(files):
        lines = file.read_bytes().splitlines(keepends=True)
        order = range(len(lines)) if in_order else rng.permutation(len(lines)).tolist()
        final = file.with_name(f"shard-{number:06d}.jsonl")
        write_atomically(final, b"".join(lines[i] for i in order))
        file.unlink()
        shards.append({"name": final.name, "samples": len(lines), "bytes": final.stat().st_size})
    return shards
