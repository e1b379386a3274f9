"""Targets of a teacher that stands still, kept on disk: its forward pass is needed once a sample.

A target belongs to the numbers that the model was given, not to a file name: the key is a hash of a row of inputs. What
is cropped or augmented differently each time is never found again. Files, in a folder named after the teacher's weights
and the settings of the targets: `<name>.bf16`, targets (T,C) one after the other, and `<name>.rows`, 32 bytes for each:
key, first number, tokens, checksum. Each process writes files of its own and reads those of all.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config

_ROW = np.dtype([("key", "V16"), ("start", "<u8"), ("tokens", "<u4"), ("sum", "<u4")])


class TargetCache:
    """Targets of one teacher, by inputs."""

    def __init__(self, folder: Path, config: Config, teacher: str, limit: int) -> None:
        """
        Args:
            folder: made where it is missing.
            config: of the run.
            teacher: digest of the teacher's weights.
            limit: bytes that this process writes at most.
        """
        of_targets = [teacher, config.target.source, config.target.top_k, config.target.norm, config.target.out_norm,
                      sorted(config.published), config.run.precision]  # fmt: skip
        self.folder = folder / hashlib.sha256(json.dumps(of_targets).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.width, self.limit, self.written = config.encoder.width, limit, 0
        self.hits = self.misses = 0
        self._is_full = False
        self._known: dict[bytes, tuple[Path, int, int, int]] = {}
        self._read: dict[Path, int] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._refresh()

    @staticmethod
    def keys(inputs: Tensor, lengths: Tensor | None) -> list[bytes]:
        """Keys of the rows of stacked inputs on the host, their padding left out."""
        rows = [row if lengths is None else row[: int(lengths[i])] for i, row in enumerate(inputs)]
        raw = [row.contiguous().reshape(-1).view(torch.uint8).numpy() for row in rows]
        return [hashlib.blake2b(data, digest_size=16, person=str(tuple(row.shape)).encode()[:16]).digest()
                for data, row in zip(raw, rows, strict=True)]  # fmt: skip

    def read(self, keys: list[bytes], tokens: int) -> Tensor | None:
        """(B,T,C) bfloat16 targets of all rows, 0 at padding; None where one is not there. tokens: T."""
        if not self._known.keys() >= set(keys):
            self._refresh()
        out = torch.zeros(len(keys), tokens, self.width, dtype=torch.bfloat16)
        for row, key in zip(out, keys, strict=True):
            part = self._load(key)
            if part is None:
                self.misses += 1
                return None
            row[: len(part)] = torch.from_numpy(part.view(np.int16)).view(torch.bfloat16)
        self.hits += 1
        return out

    def write(self, keys: list[bytes], targets: Tensor, lengths: Tensor | None) -> None:
        """Keeps (B,T,C) targets of rows; lengths: (B,) tokens before the padding. Up to the limit, then nothing."""
        host = targets.detach().to("cpu", torch.bfloat16)
        if self._files is None:
            name = self.folder / uuid.uuid4().hex
            self._files = name.with_suffix(".bf16").open("wb"), name.with_suffix(".rows").open("wb")
        numbers, rows = self._files
        for number, (key, row) in enumerate(zip(keys, host, strict=True)):
            value = row if lengths is None else row[: int(lengths[number])]
            data = value.contiguous().view(torch.int16).numpy()
            if key in self._known:
                continue
            if self.written + data.nbytes > self.limit:
                self._say_full()
                continue
            start, path = self.written // 2, Path(numbers.name)
            numbers.write(data.tobytes())
            self.written += data.nbytes
            record = np.array([(np.void(key), start, len(value), zlib.crc32(data))], _ROW)
            self._known[key] = path, start, len(value), int(record["sum"][0])
            numbers.flush()  # a row is never there before its numbers
            rows.write(record.tobytes())
        rows.flush()

    def _say_full(self) -> None:
        """Once: there are more different samples than there are samples."""
        if not self._is_full:
            found = f"{self.hits} of {self.hits + self.misses} batches were found"
            print(f"note: target.cache: full, {found}; what is cropped or augmented is never found", file=sys.stderr)
        self._is_full = True

    def _refresh(self) -> None:
        """Looks up what all processes have written since."""
        for path in self.folder.glob("*.rows"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            rows = np.frombuffer(data[: len(data) - len(data) % _ROW.itemsize], _ROW)
            self._read[path] = self._read.get(path, 0) + rows.nbytes
            numbers = path.with_suffix(".bf16")
            for row in rows:
                place = numbers, int(row["start"]), int(row["tokens"]), int(row["sum"])
                self._known.setdefault(row["key"].tobytes(), place)

    def _load(self, key: bytes) -> np.ndarray | None:
        """(T,C) 16-bit patterns; None where there are none, or not what was written."""
        if key not in self._known:
            return None
        path, start, tokens, checksum = self._known[key]
        stop = start + tokens * self.width
        if stop > len(self._maps.get(path, ())):
            try:
                self._maps[path] = np.memmap(path, np.uint16, "r")
            except (OSError, ValueError):  # gone, or empty
                self._maps[path] = np.empty(0, np.uint16)
        data: Any = self._maps[path][start:stop]
        if len(data) < tokens * self.width or zlib.crc32(data) != checksum:
            del self._known[key]
            return None
        return np.array(data).reshape(tokens, self.width)
