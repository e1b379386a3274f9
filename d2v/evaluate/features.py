"""`d2v features`: features of a data set to one file, streamed, with an index beside it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d2v.data import make_modality
from d2v.data.loader import evaluation_batches
from d2v.data.sources import Reporter
from d2v.files import write_atomically
from d2v.saved import load_model

POOLS = ("tokens", "mean")
SUFFIXES = (".npy", ".safetensors")


class RowWriter:
    """Appends float32 rows (n,C) to a file whose header is written last; the file appears whole or not at all.

    Nothing but one batch is held in memory.
    """

    def __init__(self, path: Path) -> None:
        """`path` ends in .npy (an array (rows, C)) or .safetensors (a tensor "features")."""
        if path.suffix not in SUFFIXES:
            raise ValueError(f"output: expected a name that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rows, self.width = path, 0, 0
        self._rows_file = path.with_name(f".partial-{path.name}.rows")
        self._file = self._rows_file.open("wb")

    def append(self, rows: np.ndarray) -> None:
        """Rows (n,C) float32."""
        self.rows, self.width = self.rows + len(rows), rows.shape[1]
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
        shape = (self.rows, self.width)
        if self.path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": shape})
            return
        entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * self.rows * self.width]}
        text = json.dumps({"features": entry}).encode()
        text += b" " * (-len(text) % 8)
        out.write(struct.pack("<Q", len(text)) + text)

    def abort(self) -> None:
        """Leaves nothing behind."""
        self._file.close()
        self._rows_file.unlink(missing_ok=True)


@torch.no_grad()
def extract(
    checkpoint: str,
    input: str,
    output: str,
    *,
    weights: str = "teacher",
    layer: int | None = None,
    pool: str = "tokens",
    batch: int = 16,
    device: str = "auto",
) -> str:
    """Writes features of everything at `input`; returns a summary.

    The file holds float32 rows (rows, C): of every valid token ("tokens"), or one mean a sample ("mean"). Beside it,
    OUTPUT.index.tsv lists for each sample its name, its first row and its rows. Samples that cannot be decoded are left
    out and named in the summary.
    """
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    model, config, place = load_model(checkpoint, device)
    modality = make_modality(config)
    source = modality.open_whole(input, option="input")
    encoder = model.teacher if weights == "teacher" else model
    target = Path(output)
    writer, index, bad = RowWriter(target), ["name\tfirst_row\trows"], []
    report = Reporter("features", len(source), modality.noun)
    sample = 0
    try:
        for part in evaluation_batches(config, source, place, batch=batch):
            encoded = encoder.encode(modality.prepare(part.inputs.to(place)), lengths=part.lengths, layer=layer)
            failed = {note.sample_id: note.text for note in part.notes if note.kind == "bad"}
            for features, valid in zip(encoded.features.float().cpu(), encoded.valid.cpu(), strict=True):
                name = source.describe(sample)
                if sample in failed:
                    bad.append(f"{name}: {failed[sample]}")
                else:
                    rows = features[valid]
                    rows = rows.mean(dim=0, keepdim=True) if pool == "mean" else rows
                    index.append(f"{name}\t{writer.rows}\t{len(rows)}")
                    writer.append(rows.numpy())
                sample += 1
            report.show(sample)
        if writer.rows == 0:
            raise ValueError(f"input: expected {modality.noun} that can be decoded, got none; for example {bad[0]}")
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    report.finish()
    index_file = target.with_name(target.name + ".index.tsv")
    write_atomically(index_file, "\n".join(index) + "\n")
    left_out = f"; left out {len(bad)} that cannot be decoded, for example {bad[0]}" if bad else ""
    return f"{target}: {writer.rows} rows of {writer.width} of {len(index) - 1} {modality.noun}; {index_file}{left_out}"
