"""Samples of any length for a model that was trained on shorter ones: overlapping pieces, joined at the seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data import make_modality
from d2v.data.dataset import Batch, EvaluationSamples, Modality, Note, Sample
from d2v.data.loader import load_pass
from d2v.data.sources import Rejected, Source, Subset

OVERLAP = 4
"""A piece shares one part in so many with the next; the seam is in the middle, so that no token near an end counts."""


class Piece(NamedTuple):
    """A row of a `PieceBatch`."""

    sample: int
    """Number of its sample in the batch."""
    first: int
    """First token of the row that counts."""
    last: int | None
    """Token behind the last that counts; None: all, the sample is in one piece."""


@dataclass(frozen=True)
class PieceBatch(Batch):
    """Whole samples: a row for each of their pieces."""

    samples: tuple[Sample, ...]
    pieces: tuple[Piece, ...]
    """One a row, those of a sample adjacent."""
    rows: int
    """Most rows of a forward pass."""

    def __len__(self) -> int:
        return len(self.samples)

    def run(
        self, forward: Callable[[Tensor, Tensor | None], list[Tensor]], seam: Seam | None = None,
        report: Callable[[float], object] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """What `forward` makes of each sample.

        Args:
            forward: inputs of some rows and their lengths -> for each row (T,...) of its valid tokens, which are joined
                at the seams, or (K,) of the whole, of which a sample has the mean over its pieces, weighted by tokens.
            seam: where two pieces are joined; None: in the middle of what they share.
            report: called with the share of the rows that was made since it was last called.
        """
        made: list[Tensor] = []
        for start in range(0, len(self.inputs), self.rows):
            part = slice(start, start + self.rows)
            made += forward(self.inputs[part], None if self.lengths is None else self.lengths[part])
            if report is not None:
                report(len(self.inputs[part]) / len(self.inputs))
        parts: list[list[tuple[Tensor, Piece]]] = [[] for _ in self.samples]
        for row, piece in zip(made, self.pieces, strict=True):
            parts[piece.sample].append((row, piece))
        return [_join(part, seam) for part in parts]


Seam = Callable[[Tensor, Tensor], int]
"""Of two pieces the rows (W,...) of the same W tokens -> the first of these that is the second piece's."""


def _join(parts: list[tuple[Tensor, Piece]], seam: Seam | None) -> Tensor:
    if len(parts) == 1:
        return parts[0][0]
    if parts[0][0].dim() > 1:
        cuts = [[piece.first, len(row) if piece.last is None else piece.last] for row, piece in parts]
        for number, ((a, _), (b, _)) in enumerate(pairwise(parts)):
            if seam is None:
                break
            end, start = cuts[number][1], cuts[number + 1][0]
            before, behind = start // 2, (len(a) - end) // 2  # of what they share no more than the middle
            shift = seam(a[end - before : end + behind], b[start - before : start + behind]) - before
            cuts[number][1], cuts[number + 1][0] = end + shift, start + shift
        return torch.cat([row[first:last] for (row, _), (first, last) in zip(parts, cuts, strict=True)])
    weights = torch.tensor([float((piece.last or 0) - piece.first) for _, piece in parts])
    rows = torch.stack([row for row, _ in parts])
    return (weights.to(rows) @ rows) / weights.sum()


class Uncut:
    """How whole samples are read, whatever their length, for a model of a configuration.

    Attributes: config, modality (that cut nothing: sources are opened with it), longest (tokens of a piece).
    """

    def __init__(self, config: Config, max_seconds: float | None = None, max_tokens: int | None = None) -> None:
        """
        Args:
            config: as the model was trained.
            max_seconds, max_tokens: of speech and of text: longer samples are cut, which a note of kind "cut" says;
                None: none is.

        Raises:
            ValueError: a limit of another kind of data, or one that no sample can keep.
        """
        kind, trained = config.stem.modality, make_modality(config)
        self.limit = None
        for option, value, word in (("max-seconds", max_seconds, "waveform"), ("max-tokens", max_tokens, "ids")):
            if value is None:
                continue
            if word not in config.traits:
                fits = "speech and signals" if word == "waveform" else "text"
                raise ValueError(f"{option}: expected nothing but for {fits}, got {value} for a model of {kind}")
            if not (least := trained.shortest / trained.rate) <= value:
                raise ValueError(f"{option}: expected at least {least:g}, got {value:g}")
            self.limit = round(value * trained.rate)
        self.longest = trained.longest_piece()
        self.config = trained.lift_limits()
        self.modality = make_modality(self.config)

    def batches(
        self, source: Source, device: torch.device, size: int, *, modality: Modality | None = None, workers: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Iterator[PieceBatch]:  # fmt: skip
        """One pass over the source, or its samples `rows`, in order, `size` a batch and `size` rows a forward pass.

        modality: whose values may be pairs of the own modality's value and a target; None: the own.
        """
        samples, collate = EvaluationSamples(source, modality or self.modality), partial(self.collate, rows=size)
        batches: Any = load_pass(self.config, samples, collate, device, size, workers=workers, rows=rows)
        return batches

    def collate(self, samples: list[Sample], rows: int) -> PieceBatch:
        """Samples -> batch of their pieces."""
        whole = tuple(self._cut(s._replace(value=s.value[0]) if isinstance(s.value, tuple) else s) for s in samples)
        parts = [(number, *part) for number, sample in enumerate(whole) for part in self.split(sample.value)]
        inputs, lengths = self.modality.stack([whole[n]._replace(value=value) for n, value, *_ in parts], False)
        valid = self.modality.measure(inputs, lengths)[1]
        notes = tuple(note for sample in whole for note in sample.notes)
        pieces = tuple(Piece(number, first, last) for number, _, first, last in parts)
        return PieceBatch(inputs, lengths, valid, None, None, notes, whole, pieces, rows)

    def _cut(self, sample: Sample) -> Sample:
        """A sample of at most the limit, with a note where something was cut off."""
        found, rate = len(sample.value), self.modality.rate
        if self.limit is None or found <= self.limit:
            return sample
        ids = "ids" in self.config.traits
        text = f"{self.limit} of {found} tokens" if ids else f"{self.limit / rate:g} of {found / rate:g} s"
        notes = (*sample.notes, Note(sample.sample_id, 0, "cut", f"cut to {text}"))
        return sample._replace(value=self.modality.take(sample.value, 0, self.limit), notes=notes)

    def split(self, value: np.ndarray) -> list[tuple[np.ndarray, int, int | None]]:
        """Pieces of a sample and which of their tokens count: all tokens of the sample, each once."""
        longest, stem = self.longest, self.modality.stem
        tokens = 0 if longest is None else self.modality.count_tokens(len(value))
        if longest is None or tokens <= longest:
            return [(value, 0, None)]
        shared = max(2, longest // OVERLAP)
        count = -(-(tokens - shared) // (longest - shared))
        starts = [number * (tokens - longest) // (count - 1) for number in range(count)]
        seams = [0, *((a + longest + b) // 2 for a, b in pairwise(starts)), tokens]
        parts: list[tuple[np.ndarray, int, int | None]] = []
        for number, start in enumerate(starts):
            # The first value of its first token, so that its tokens are those of the whole.
            first = start * stem.step
            stop = first + stem.samples_needed() + (longest - 1) * stem.step if number < count - 1 else None
            parts.append((self.modality.take(value, first, stop), seams[number] - start, seams[number + 1] - start))
        return parts


def list_missing(source: Source) -> list[Rejected]:
    """What the index of a source found and does not hold, with the reason: damaged entries, and what is too short."""
    missing = list(source.rejected)
    named = {entry.name for entry in missing}
    while isinstance(source, Subset):
        gone = np.setdiff1d(np.arange(len(source.base)), source.rows).tolist()
        reason = next((text for text in source.left_out if text.startswith("shorter than")), "not used")
        missing += [Rejected(name, reason) for i in gone if (name := source.base.describe(i)) not in named]
        source = source.base
    return missing


def passed_over(source: Source) -> dict[str, int]:
    """Counts of what the index left out and `list_missing` does not name: files of other endings, for instance."""
    return {text: count for text, count in source.left_out.items() if not text.startswith("shorter than")}


def list_entries(entries: Sequence[Rejected], shown: int = 3) -> str:
    """Their number and the first of them."""
    rest = f"; {len(entries) - shown} more" if len(entries) > shown else ""
    return f"{len(entries)}: " + "; ".join(f"{e.name}: {e.reason}" for e in entries[:shown]) + rest
