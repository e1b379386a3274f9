"""`d2v features`: features of a data set to one file, streamed, with an index beside it."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.data.dataset import Note
from d2v.data.sources import Rejected, for_example
from d2v.evaluate.layers import check_weights, parse_layers
from d2v.evaluate.pieces import Uncut, list_entries, list_missing, passed_over
from d2v.evaluate.probe import encode_pieces
from d2v.files import write_atomically
from d2v.runtime import Reporter
from d2v.saved import load_model
from d2v.train.objective import autocast

POOLS = ("tokens", "mean", "class")
SUFFIXES = (".npy", ".safetensors")


class RowWriter:
    """Appends float32 rows (n,C) or (n,K,C) to a file whose header is written last; the file appears whole or not at
    all.

    Nothing but one batch is held in memory.
    """

    def __init__(self, path: Path) -> None:
        """`path` ends in .npy (an array (rows, ...)) or .safetensors (a tensor "features")."""
        if path.suffix not in SUFFIXES:
            raise ValueError(f"output: expected a name that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self.shape = path, 0, tuple[int, ...]()
        self._rows_file = path.with_name(f".partial-{path.name}.rows")
        self._file = self._rows_file.open("wb")

    def append(self, rows: np.ndarray) -> None:
        """Rows float32; all of one shape."""
        self.rows, self.shape = self.rows + len(rows), rows.shape[1:]
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())

    def finish(self) -> None:
        """Writes the header and the rows behind it."""
        self._file.close()
        temporary = self.path.with_name(f".partial-{self.path.name}")
        with temporary.open("wb") as out, self._rows_file.open("rb") as rows:
            self._write_header(out)
            shutil.copyfileobj(rows, out, 16 << 20)
        temporary.replace(self.path)
        self._rows_file.unlink()

    def _write_header(self, out: Any) -> None:
        shape = (self.rows, *self.shape)
        if self.path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
            return
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}
        text = json.dumps({"features": entry}).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        self._rows_file.unlink(missing_ok=True)


class _Index:
    """Lines of the index beside the rows; what is left out, and what is cut."""

    def __init__(self, writer: RowWriter) -> None:
        self._writer, self.lines = writer, ["name\tfirst_row\trows\tnote"]
        self.lost: list[Rejected] = []
        self.cut: list[Rejected] = []

    def take(self, name: str, rows: Tensor, note: Note | None) -> None:
        """A sample with the rows that were made of it, and the first note about it."""
        if note is not None and note.kind == "bad":
            self.add(name, None, note.text)
        elif not bool(torch.isfinite(rows).all()):
            self.add(name, None, "features that are not finite")
        else:
            self.add(name, rows, "" if note is None else note.text)

    def add(self, name: str, rows: Tensor | None, note: str) -> None:
        """A sample and its rows; None: it has none, for the reason of the note."""
        if note:
            (self.lost if rows is None else self.cut).append(Rejected(name, note))
        place = f"{self._writer.rows}\t{0 if rows is None else len(rows)}"
        self.lines.append(f"{' '.join(name.splitlines()).replace(chr(9), ' ')}\t{place}\t{' '.join(note.split())}")
        if rows is not None:
            self._writer.append(rows.numpy())


@torch.no_grad()
def extract(
    checkpoint: str,
    input: str,
    output: str,
    *,
    weights: str = "teacher",
    layer: int | str | None = None,
    layer_weights: Sequence[float] = (),
    image_size: int | None = None,
    frames: int | None = None,
    pool: str = "tokens",
    batch: int = 16,
    device: str = "auto",
    precision: str = "fp32",
    max_seconds: float | None = None,
    max_tokens: int | None = None,
    allow_commands: bool = False,
) -> str:
    """Writes features of everything at `input`; returns a summary.

    The file holds float32 rows (rows, C): of every valid token ("tokens"), or one a sample: their mean ("mean"),
    or the class token ("class"); of several layers (`parse_layers`) (rows, K, C), or their sum with `layer_weights`.
    Samples that are longer than the model saw go through it in overlapping pieces (`d2v.evaluate.pieces`), cut where
    `max_seconds` or `max_tokens` is given. Beside the file, OUTPUT.index.tsv lists for each sample its name, its first
    row and its rows: none for one that cannot be used, with the reason in the last column. Those, and what is cut, are
    counted and named in the summary. image_size: side of the images in pixels; frames: length of spectrograms; None:
    that of the model.
    """
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    model, config, place = load_model(checkpoint, device, image_size, frames)
    config = config.change(data={"allow_commands": allow_commands})
    uncut = Uncut(config, max_seconds, max_tokens)
    modality = uncut.modality
    source = modality.open_whole(input, option="input")
    layers = parse_layers(layer, model)
    mix = torch.from_numpy(check_weights(layer_weights, layers)) if layer_weights else None
    encoder = model.teacher if weights == "teacher" else model
    index = _Index(writer := RowWriter(Path(output)))
    report = Reporter("features", len(source), modality.noun)

    try:
        for part in uncut.batches(source, place, batch):
            with autocast(precision, place):
                found = encode_pieces(encoder, modality, part, place, layers, pool == "class")
            for sample, made in zip(part.samples, found, strict=True):
                rows = made[None] if pool == "class" else made
                rows = rows if mix is None else torch.einsum("tkc,k->tc", rows, mix)
                rows = rows.mean(dim=0, keepdim=True) if pool == "mean" else rows
                index.take(source.describe(sample.sample_id), rows, next(iter(sample.notes), None))
            report.show(part.samples[-1].sample_id + 1)
        for entry in list_missing(source):
            index.add(entry.name, None, entry.reason)
        if writer.rows == 0:
            raise ValueError(f"input: expected {modality.noun} that can be decoded, got none{for_example(index.lost)}")
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    report.finish()
    index_file = writer.path.with_name(writer.path.name + ".index.tsv")
    write_atomically(index_file, "\n".join(index.lines) + "\n")
    named = (("left out", index.lost), ("cut", index.cut))
    notes = "".join(f"; {what} {list_entries(found)}" for what, found in named if found)
    notes += "".join(f"; left out {count} {reason}" for reason, count in passed_over(source).items())
    used, shape = len(index.lines) - 1 - len(index.lost), " x ".join(map(str, writer.shape))
    return f"{output}: {writer.rows} rows of {shape} of {used} {modality.noun}; {index_file}{notes}"
