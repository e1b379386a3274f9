"""Tokenised text on disk: made once, read through a memory map by every loader worker.

Files of a cache folder, all plain: `tokens.bin` (the ids of all documents in order, each document ended by `</s>`),
`ends.bin` (int64, where each document ends), `index.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2v.data.documents import DocumentReader
from d2v.data.progress import Reporter
from d2v.data.sources import Rejected
from d2v.data.tokenizer import END, BytePairs
from d2v.files import write_atomically

FORMAT = 1
TOKENS, ENDS, INDEX = "tokens.bin", "ends.bin", "index.json"
_PARTIAL = ".partial-"
GROUP_CHARACTERS = 1 << 20
"""Text that is tokenised at a time, by several threads."""


class Tokens(NamedTuple):
    """The tokens of a set of files."""

    ids: np.ndarray
    """(tokens,) uint16 or int32."""
    ends: np.ndarray
    """(documents,) int64: a document's tokens end here, `</s>` included; the next one's begin."""
    rejected: list[Rejected]
    digest: str
    """SHA-256 of ids and ends."""


def open_tokens(files: list[Path], tokenizer: BytePairs, folder: Path) -> Tokens:
    """The tokens of `files`, from a cache under `folder` that is made where it is missing or damaged.

    A cache belongs to the files' paths, sizes and times of change, and to the tokenizer. Two processes that make the
    same one do not disturb each other.
    """
    place = folder / _name(files, tokenizer)
    found = _read(place)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        _build(files, tokenizer, place)
        found = _read(place)
    if found is None:
        raise ValueError(f"data.cache: cannot read {str(place)!r} back after it was written")
    return found


def _name(files: list[Path], tokenizer: BytePairs) -> str:
    status = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else str(f) for f in files]
    return "tokens-" + hashlib.sha256(json.dumps([FORMAT, tokenizer.digest, status]).encode()).hexdigest()[:16]


def _read(place: Path) -> Tokens | None:
    """A whole cache, or None."""
    try:
        index: dict[str, Any] = json.loads((place / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT or not index["tokens"]:
            return None
        ids = np.memmap(place / TOKENS, dtype=index["dtype"], mode="r")
        ends = np.memmap(place / ENDS, dtype=np.int64, mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(ids) != index["tokens"] or len(ends) != index["documents"]:
        return None
    return Tokens(ids, ends, [Rejected(*entry) for entry in index["rejected"]], index["sha256"])


def _build(files: list[Path], tokenizer: BytePairs, place: Path) -> None:
    """Writes a cache; it appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{place.name}-", dir=place.parent))
    partial.chmod(0o755)  # others may share the cache
    try:
        reader = DocumentReader(files)
        dtype = np.dtype(np.uint16 if tokenizer.vocabulary <= 1 << 16 else np.int32)
        hashes = [hashlib.sha256(), hashlib.sha256()]
        total, documents = 0, 0
        report = Reporter("tokenising", reader.bytes / 1e6, "MB")
        with (partial / TOKENS).open("wb") as tokens, (partial / ENDS).open("wb") as ends:
            for group in group_documents(reader):
                lists = [[*ids, END] for ids in tokenizer.encode(group)]
                sizes = np.array([len(ids) for ids in lists], dtype=np.int64)
                pair = np.concatenate([np.array(ids, dtype=dtype) for ids in lists]), total + np.cumsum(sizes)
                for file, values, digest in zip((tokens, ends), pair, hashes, strict=True):
                    file.write(values.tobytes())
                    digest.update(values.tobytes())
                total, documents = total + int(sizes.sum()), documents + len(lists)
                report.show(reader.done / 1e6)
            for file in (tokens, ends):
                file.flush()
                os.fsync(file.fileno())
        report.finish(reader.done / 1e6)
        if not total:
            first = f", for example {reader.rejected[0].name}: {reader.rejected[0].reason}" if reader.rejected else ""
            raise ValueError(f"data.path: expected text in {len(files)} files, found none{first}")
        index = {
            "format": FORMAT, "dtype": dtype.name, "tokens": total, "documents": documents,
            "sha256": hashlib.sha256(hashes[0].digest() + hashes[1].digest()).hexdigest(), "rejected": reader.rejected,
        }  # fmt: skip
        write_atomically(partial / INDEX, json.dumps(index))
        _move(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, place: Path) -> None:
    """Takes the place of a damaged cache; where another process was quicker its cache stays."""
    try:
        partial.rename(place)
    except OSError:
        if _read(place) is None:
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)


def group_documents(reader: DocumentReader) -> Iterator[list[str]]:
    """Lists of documents to tokenise at a time."""
    group: list[str] = []
    characters = 0
    for text in reader:
        group.append(text)
        characters += len(text)
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
