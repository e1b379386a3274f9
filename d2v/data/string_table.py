"""Many names in little memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np


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

    def __iter__(self) -> Iterator[str]:
        ends: list[int] = self._ends.tolist()
        return (os.fsdecode(self._bytes[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True))

    def digest(self) -> str:
        """SHA-256 of the names and their lengths."""
        return hashlib.sha256(self._bytes + self._ends.tobytes()).hexdigest()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The table as arrays `name` (uint8) and `name`_ends (int64)."""
        return {name: np.frombuffer(self._bytes, dtype=np.uint8), f"{name}_ends": self._ends}

    @staticmethod
    def of(arrays: dict[str, np.ndarray], name: str) -> NameTable:
        """The table that `arrays` were made of; `ValueError` where they are none."""
        table = NameTable(())
        table._bytes, table._ends = arrays[name].tobytes(), arrays[f"{name}_ends"]
        if (table._ends[-1] if len(table) else 0) != len(table._bytes):
            raise ValueError(f"{name}: expected names of {len(table._bytes)} bytes")
        return table
