"""Lists of speech files: fairseq manifests, and tables of path and label. Paths stay inside their root."""

from __future__ import annotations

import io
import os
import re
import subprocess
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d2v.data.index_cache import IndexCache, Stamp, stamp_of
from d2v.data.sources import MAX_ENCODED_BYTES, FileSlice, Kind, NameTable, Rejected, Source, number_classes, read_whole

_STORED = re.compile(r"(.+\.(?:zip|tar)):(\d+):(\d+)")
"""archive:offset:length, an uncompressed member of an archive."""


class ManifestSource(Source):
    """A `.tsv`: the root folder in the first line, then `path<TAB>samples`; or, labelled, `path<TAB>label`.

    A relative path that leads out of the root is rejected; an absolute one is taken as it stands. A table without a
    root line is relative to its own folder. `path` may be `archive.zip:offset:length` of a stored member, and, where
    commands are allowed, `COMMAND |`, whose output is the file. Transcripts are the lines of the `.ltr` file beside the
    manifest: letters separated by spaces, `|` between words.
    """

    def __init__(
        self, file: Path, kind: Kind, *, labelled: bool, option: str, commands: bool, cache: IndexCache | None = None
    ) -> None:
        self.rejected, self.left_out = [], {}
        self.file, self.kind, self.commands, self.cache = file, kind, commands, cache
        self.counts: np.ndarray | None = None
        self._letters: list[str] | None = None
        lines = _read_lines(file, option)
        first = 0 if "\t" in lines[0] else 1
        self.root = file.parent / (lines[0].strip() if first else "")
        rows = self._parse(lines, first, labelled, option)
        if not rows:
            raise ValueError(f"{option}: expected {kind.noun} in {str(file)!r}, found none")
        self.names = NameTable([path for path, _, _ in rows])
        self._lines = np.array([number for _, _, number in rows], dtype=np.int64)
        if labelled:
            self.labels, self.classes = number_classes([value for _, value, _ in rows])
        elif all(value.isdecimal() for _, value, _ in rows):
            self.counts = np.array([int(value) for _, value, _ in rows], dtype=np.int64)

    def _parse(self, lines: list[str], first: int, labelled: bool, option: str) -> list[tuple[str, str, int]]:
        """(path, second field, line after the root's) of every usable line."""
        rows = []
        unlabelled: list[tuple[str, str]] = []
        for number, line in enumerate(lines[first:]):
            if not line.strip():
                continue
            where = f"{self.file}:{number + first + 1}"
            path, _, value = line.partition("\t")
            value = value.split("\t")[0].strip()
            if labelled and not value:
                unlabelled.append((line, where))
                continue
            if path.rstrip().endswith("|") and not self.commands:
                raise ValueError(
                    f"{option}: expected paths of {self.kind.noun}, got a shell command in {where}; "
                    "--data.allow-commands runs it"
                )
            reason = None if path.rstrip().endswith("|") else _describe_escape(path)
            if reason is not None:
                self.rejected.append(Rejected(where, reason))
            else:
                rows.append((path, value, number))
        if unlabelled:
            line, where = unlabelled[0]
            count = f"{len(unlabelled)} of {len(unlabelled) + len(rows)} without a label"
            raise ValueError(f"{option}: expected path<TAB>label, got {line!r} in {where} ({count})")
        return rows

    def describe(self, index: int) -> str:
        name = self.names[index]
        return name if self.is_command(index) else str(self.root / name)

    @property
    def place(self) -> str:
        return str(self.file.absolute())

    def is_command(self, index: int) -> bool:
        """Whether a sample is the output of a command."""
        return bool(self.names[index].rstrip().endswith("|"))

    def stamps(self) -> np.ndarray:
        rows = [self._stamp(index) for index in range(len(self))]
        return np.asarray(rows, dtype=np.int64).reshape(-1, 2)

    def _stamp(self, index: int) -> Stamp:
        if self.is_command(index):
            return -1, -1
        stamp, match = stamp_of(self.root / self.names[index]), _STORED.fullmatch(self.names[index])
        return stamp_of(self.root / match.group(1)) if stamp[0] < 0 and match is not None else stamp

    def read(self, index: int) -> bytes:
        with self.open_file(index) as file:
            return read_whole(file)

    def open_file(self, index: int) -> BinaryIO:
        name = self.names[index]
        if self.is_command(index):
            done = subprocess.run(name.rstrip()[:-1], shell=True, stdout=subprocess.PIPE, check=False)
            if done.returncode:
                raise ValueError(f"command ended with exit code {done.returncode}")
            return io.BytesIO(done.stdout)
        path = self.root / name
        match = _STORED.fullmatch(name)
        if match is None or path.exists():
            return path.open("rb")
        offset, size = int(match.group(2)), int(match.group(3))
        if size > MAX_ENCODED_BYTES:
            raise ValueError(f"member of {size} bytes is larger than {MAX_ENCODED_BYTES}")
        with (self.root / match.group(1)).open("rb") as archive:
            return io.BytesIO(io.BufferedReader(FileSlice(archive.fileno(), offset, size)).read())

    def read_transcript(self, index: int) -> str:
        if self._letters is None:
            self._letters = _read_lines(self.file.with_suffix(".ltr"), "transcripts")
        line = int(self._lines[index])
        if line >= len(self._letters):
            file = self.file.with_suffix(".ltr")
            raise ValueError(f"{file}: expected a line for each of the manifest, got {len(self._letters)}")
        return "".join(self._letters[line].split()).replace("|", " ").strip()


def _read_lines(file: Path, option: str) -> list[str]:
    try:
        lines = [line.rstrip("\r") for line in file.read_bytes().decode("utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: expected UTF-8 in {str(file)!r}, got other bytes at {error.start}") from None
    if not any(lines):
        raise ValueError(f"{option}: expected lines in {str(file)!r}, found none")
    return lines


def _describe_escape(path: str) -> str | None:
    """Why a path of a manifest is not used, or None."""
    if not path.strip():
        return "no path"
    if os.path.isabs(path):  # noqa: PTH117
        return None
    return f"{path!r} leads out of the root" if os.path.normpath(path).startswith(os.pardir + os.sep) else None
