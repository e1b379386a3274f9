"""`d2v data pack` of text: documents in random order in .jsonl files of even size, in little memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d2v.data.documents import DocumentReader, find_texts
from d2v.data.pack import FORMAT, RECORD, describe_pack
from d2v.data.progress import Reporter
from d2v.files import PARTIAL, flush, write_atomically

if TYPE_CHECKING:
    from d2v.data.pack import PackSettings

HELD_BYTES = 64 << 20
"""Text that is held in memory before it is appended to its files."""


def pack_text(path: str, output: Path, settings: PackSettings) -> str:
    """Writes the documents at `path` into `output/shard-000000.jsonl` and so on; returns a summary.

    Every document goes to a file drawn at random, and each file is permuted: a random order that needs no more memory
    than a file takes.
    """
    reader = DocumentReader(find_texts(path, "input"))
    partial = output.with_name(f"{PARTIAL}{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rng = np.random.default_rng(settings.seed)
        count = max(1, -(-reader.bytes // settings.shard_bytes))
        spread = _Spread(partial, count)
        report = Reporter("packing", reader.bytes / 1e6, "MB")
        for text in reader:
            where = min(reader.done * count // max(reader.bytes, 1), count - 1)
            spread.add(int(where if settings.in_order else rng.integers(count)), text)
            report.show(reader.done / 1e6)
        spread.write()
        shards = [] if not spread.documents else _settle(spread.files(), rng, settings.in_order)
        report.finish(reader.done / 1e6)
        bad = [{"path": name, "reason": reason} for name, reason in reader.rejected]
        if not shards:
            first = f", for example {bad[0]['path']}: {bad[0]['reason']}" if bad else ""
            raise ValueError(f"input: expected text, got {len(bad)} documents that cannot be used{first}")
        record = {"settings": {"format": FORMAT, **asdict(settings)}, "shards": shards, "bad": bad}
        write_atomically(partial / RECORD, json.dumps(record, indent=1))
        if output.exists():
            output.rmdir()
        partial.rename(output)
        flush(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return describe_pack(output, shards, bad)


class _Spread:
    """Files that grow at the same time, written in large pieces."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.documents = folder, 0
        self._count, self._held, self._size = count, dict[int, list[bytes]](), 0

    def add(self, number: int, text: str) -> None:
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        self._held.setdefault(number, []).append(line)
        self._size += len(line)
        self.documents += 1
        if self._size >= HELD_BYTES:
            self.write()

    def write(self) -> None:
        for number, lines in self._held.items():
            with (self.folder / f"{PARTIAL}{number:06d}").open("ab") as file:
                file.writelines(lines)
        self._held, self._size = {}, 0

    def files(self) -> list[Path]:
        """Those that hold something, in order."""
        found = (self.folder / f"{PARTIAL}{number:06d}" for number in range(self._count))
        return [file for file in found if file.exists()]


def _settle(files: list[Path], rng: np.random.Generator, in_order: bool) -> list[dict[str, Any]]:
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
