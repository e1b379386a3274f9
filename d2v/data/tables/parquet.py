"""Samples in parquet files as Hugging Face's `datasets` writes them: a column of encoded bytes, or of {bytes, path}.

A row group is the least that can be read: a few are kept, and `shards` numbers them, so that `data.shuffle shards`
reads each once.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2v.data.cache import Found, index_files
from d2v.data.shards import ContainerSource
from d2v.data.sources import (
    NoTranscript,
    Rejected,
    Wanted,
    check_size,
    describe_error,
    measure_length,
    printable,
)
from d2v.data.storage.remote import RemoteFile, stamps_of_remote
from d2v.data.tables.metadata import LABELS, TEXTS, find_value

KEPT_BYTES = 1 << 28
"""Row groups that a process keeps, decoded; at least one."""
MAX_GROUP_BYTES = 1 << 32
"""Largest row group, decoded."""
NO_LABEL = "no label"
ROWS = 64
"""Rows that are measured at a time."""


class ParquetSource(ContainerSource):
    """Rows of parquet files. Labels are the column `label` or `labels`, with the names that `datasets` gives numbers;
    transcripts `transcription`, `text` or `sentence`."""

    def __init__(self, files: Sequence[Path] | Sequence[RemoteFile], wanted: Wanted) -> None:
        self.files, self.cache, self.left_out = list(files), wanted.cache, {}
        self._groups = OrderedDict[int, Any]()
        self._texts: list[str | None] | None = None
        scope = ("parquet", wanted.kind.noun, wanted.labelled, wanted.measure is not None)
        scan = functools.partial(scan_table, wanted=wanted)
        remote = [file for file in self.files if isinstance(file, RemoteFile)]
        stamps = stamps_of_remote(remote, 1, wanted.option) if remote else None
        self.stamps, found = index_files(files, "parquet files", scan, wanted.cache, scope, stamps=stamps)
        self.rejected = [Rejected(*entry) for rejected, _ in found.rest.values() for entry in rejected]
        self.incomplete = [entry for entry in self.rejected if entry.reason == NO_LABEL]
        if not len(found.names):
            where = f"{len(files)} parquet files, the first {printable(str(files[0]))!r}"
            raise ValueError(f"{wanted.option}: expected rows of {wanted.kind.noun}, found none in {where}")
        self._take_samples(found, wanted)
        groups = np.stack([self._numbers, self._places[:, 0]], axis=1)
        self.shards = np.unique(groups, axis=0, return_inverse=True)[1].reshape(-1)

    def read(self, index: int) -> bytes:
        number, (group, row) = int(self._numbers[index]), self._places[index, :2].tolist()
        assert self.shards is not None
        key = int(self.shards[index])
        if key not in self._groups:
            if isinstance(path := self.files[number], Path):
                self.check_unchanged(number, path.stat())
            file = _open_table(path)
            column = find_column(file.schema_arrow, "")
            self._groups[key] = _bytes_of(_read_group(file, group, [column[1]]), column[0])
            while len(self._groups) > 1 and sum(one.nbytes for one in self._groups.values()) > KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        if (data := self._groups[key][row].as_py()) is None:
            raise ValueError("no bytes in its row: files that a table names are not read")
        check_size(len(data), "sample")
        return bytes(data)

    def read_transcript(self, index: int) -> str:
        if self._texts is None:
            every = [_read_texts(_open_table(file)) for file in self.files]
            lines = self._places[:, 2].tolist()
            self._texts = [every[number][line] for number, line in zip(self._numbers.tolist(), lines, strict=True)]
        if (text := self._texts[index]) is None:
            raise NoTranscript(f"{self.describe(index)}: expected a column {', '.join(TEXTS)}, found none")
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "cache": None}


def _open_table(file: Path | RemoteFile) -> Any:
    """An open parquet file; `ValueError` where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file if isinstance(file, Path) else file.open())
    except pyarrow.ArrowException as error:
        raise ValueError(f"expected a parquet file, got {str(file)!r}: {error}") from None


def find_column(schema: Any, noun: str) -> tuple[str, str]:
    """(column with encoded samples, its leaf with the bytes): the one that is called audio or image, else the only one
    there is; `ValueError` otherwise."""
    import pyarrow.types as kinds

    def is_bytes(kind: Any) -> bool:
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    def holds(kind: Any) -> bool:
        return kinds.is_struct(kind) and any(f.name == "bytes" and is_bytes(f.type) for f in kind)

    found = {f.name: f"{f.name}.bytes" for f in schema if holds(f.type)}
    found |= {f.name: f.name for f in schema if is_bytes(f.type)}
    names = [name for name in found if name in ("audio", "image")] or list(found)
    if len(names) != 1:
        raise ValueError(f"expected one column of bytes of {noun}, got {names} in the columns {schema.names}")
    return names[0], found[names[0]]


def _read_group(file: Any, group: int, columns: Sequence[str]) -> Any:
    if (size := file.metadata.row_group(group).total_byte_size) > MAX_GROUP_BYTES:
        raise ValueError(f"row group {group} of {size} bytes is larger than {MAX_GROUP_BYTES}")
    return file.read_row_group(group, columns=list(columns), use_threads=False)


def _bytes_of(table: Any, column: str) -> Any:
    values = table.column(column).combine_chunks()
    return values.field("bytes") if hasattr(values, "field") else values


def _read_rows(file: Any, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The values of some columns, a row at a time."""
    for batch in file.iter_batches(ROWS, groups, list(columns), use_threads=False):
        yield from batch.to_pylist() if columns else ({} for _ in range(batch.num_rows))


def _read_texts(file: Any) -> list[str | None]:
    columns = [name for name in TEXTS if name in file.schema_arrow.names]
    return [find_value(row, columns) for row in _read_rows(file, columns)]


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Names of the numbers in a column, as `datasets` keeps them (`ClassLabel`, or a sequence of them)."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: features[name] for name in LABELS if name in features}
        found = {name: one[0] if isinstance(one, list) else one.get("feature", one) for name, one in found.items()}
        return {name: [str(n) for n in one["names"]] for name, one in found.items() if "names" in one}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):  # written by something else
        return {}


def _name_label(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_name_label(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def scan_table(path: Path | RemoteFile, wanted: Wanted) -> Found:
    """The rows of a parquet file, with their class and length; rows without a class are rejected.

    `ValueError` where it is no such file, or has no column of encoded samples or, labelled, of labels.
    """
    try:
        file = _open_table(path)
        schema = file.schema_arrow
        column, leaf = find_column(schema, wanted.kind.noun)
        labels = [name for name in LABELS if name in schema.names] if wanted.labelled else []
        if wanted.labelled and not labels:
            raise ValueError(f"expected a column {' or '.join(LABELS)}, got {schema.names}")
    except ValueError as error:
        raise ValueError(f"{wanted.option}: {path}: {error}") from None
    where = f"{column}.path" if leaf != column and "path" in [f.name for f in schema.field(column).type] else ""
    measure, known = wanted.measure, _label_names(schema)
    columns = [*labels, *([where] if where else []), *([leaf] if measure is not None else [])]
    found, rejected, first = list[list[Any]](), list[list[str]](), 0
    for group in range(file.num_row_groups):
        try:
            for place, row in enumerate(_read_rows(file, columns, [group])):
                sample = {"bytes": row.get(column)} if leaf == column else row.get(column) or {}
                label = find_value({key: _name_label(row[key], known.get(key, ())) for key in labels}, labels)
                told = os.path.basename(" ".join(str(sample.get("path") or "").split()))[:200]  # noqa: PTH119
                name = f"{first + place}:{told}" if told else str(first + place)
                if wanted.labelled and label is None:
                    rejected.append([f"{path}:{name}", NO_LABEL])
                    continue
                length: Any = -1
                if measure is not None:
                    opened = functools.partial(io.BytesIO, sample.get("bytes") or b"")
                    length = measure_length(measure, opened) if sample.get("bytes") else "no bytes in its row"
                found.append([name, label or "", group, place, first + place, -1, length])
        except Exception as error:  # of damaged bytes, of many kinds
            rejected.append([f"{path}: row group {group}", describe_error(error)])
        first += file.metadata.row_group(group).num_rows
    return Found(found, rejected)
