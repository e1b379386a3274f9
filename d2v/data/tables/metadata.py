"""What files in a folder say of the samples in it: LibriSpeech's `*.trans.txt`, Hugging Face's `metadata.csv` and
`metadata.jsonl`.

Names in these files are compared with those of the samples that the folder holds; none is ever opened.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from d2v.data.sources import describe_error, printable, read_text_file
from d2v.files import parse_json

METADATA = frozenset({"metadata.csv", "metadata.jsonl"})
SPOKEN = ".trans.txt"
TEXTS, LABELS = ("transcription", "text", "sentence"), ("label", "labels")
"""Columns in the order in which they are looked for."""


class Known(NamedTuple):
    """What tables say of samples, by their names."""

    texts: dict[str, str]
    labels: dict[str, str]
    left_out: dict[str, int]
    """Lines that are not used, and tables that cannot be read, by reason."""


def read_known(root: Path, tables: Iterable[str], samples: Iterable[str]) -> Known:
    """Reads tables in a folder; what they say of a sample first counts.

    Args:
        root: the folder.
        tables: their paths in it.
        samples: the paths of all samples in it.
    """
    names: dict[str, list[str]] = {}
    for sample in samples:
        names.setdefault(sample, []).append(sample)
        names.setdefault(os.path.splitext(sample)[0] + SPOKEN, []).append(sample)  # noqa: PTH122
    known, left, first = Known({}, {}, {}), Counter[str](), dict[str, str]()
    for table in tables:
        seen = set[str]()
        try:
            for name, row in _read_rows(root / table):
                key = os.path.normpath(os.path.join(os.path.dirname(table), name))  # noqa: PTH118, PTH120
                reason = "without a file" if key not in names else "second ones of a file" if key in seen else ""
                if reason:
                    kind = f"*{SPOKEN}" if table.endswith(SPOKEN) else os.path.basename(table)  # noqa: PTH119
                    reason = f"lines of {kind} {reason}"
                    left[reason] += 1
                    first.setdefault(reason, f"{table}: {name.removesuffix(SPOKEN)}")
                    continue
                seen.add(key)
                for sample in names[key]:
                    for columns, found in ((TEXTS, known.texts), (LABELS, known.labels)):
                        if (told := find_value(row, columns)) is not None:
                            found.setdefault(sample, told)
        except (ValueError, OSError, csv.Error) as error:
            left[f"table that cannot be read, {printable(str(root / table))}: {describe_error(error)}"] = 1
    known.left_out.update({f"{r}, first {printable(first[r])}" if r in first else r: n for r, n in left.items()})
    return known


def _read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path of a sample beside the file, columns) of each line; `ValueError` for a line without a path."""
    lines = io.StringIO(read_text_file(file))
    if file.name.endswith(SPOKEN):
        for line in lines:
            name, *text = line.split(None, 1)[:2] or [""]
            if name:
                yield name + SPOKEN, {TEXTS[0]: "".join(text)}
        return
    parse = csv.DictReader(lines) if file.suffix == ".csv" else (parse_json(line) for line in lines if line.strip())
    for number, row in enumerate(parse, 1):
        given = row.get("file_name")
        if not isinstance(given, str) or not given:
            raise ValueError(f"expected a file_name in every line, got none in sample {number}")
        yield given, row


def find_value(row: dict[str, Any], columns: Iterable[str]) -> str | None:
    """The first of some columns that a row has, as text; several labels end in `;` each. None: none, or empty."""
    value = next((row[name] for name in columns if row.get(name) is not None), None)
    if isinstance(value, list):
        return "".join(f"{one};" for one in value) or None
    return None if value is None or not (text := str(value).strip()) else text
