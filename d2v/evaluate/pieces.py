"""Samples of any length for a model that was trained on shorter ones: overlapping pieces, joined at the seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.config.finetune import FineTuneConfig
from d2v.data import make_modality
from d2v.data.dataset import Batch, EvaluationSamples, Modality, Note, Sample
from d2v.data.loader import load_pass
from d2v.data.sources import Rejected, Source, Subset
from d2v.data.tokenizer import END, START
from d2v.model.stems.speech import SAMPLE_RATE

OVERLAP = 4
"""A piece shares one part in so many with the next; the seam is in the middle, so that no token near an end counts."""
ENDLESS_SECONDS, ENDLESS_TOKENS = 1e9, 1 << 24
"""Longer than recordings that are read; the longest text that a configuration allows, where a note says so."""


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

    def run(self, forward: Callable[[Tensor, Tensor | None], list[Tensor]]) -> list[Tensor]:
        """What `forward` makes of each sample.

        Args:
            forward: inputs of some rows and their lengths -> for each row (T,...) of its valid tokens, which are joined
                at the seams, or (K,) of the whole, of which a sample has the mean over its pieces, weighted by tokens.
        """
        made: list[Tensor] = []
        for start in range(0, len(self.inputs), self.rows):
            part = slice(start, start + self.rows)
            made += forward(self.inputs[part], None if self.lengths is None else self.lengths[part])
        parts: list[list[tuple[Tensor, Piece]]] = [[] for _ in self.samples]
        for row, piece in zip(made, self.pieces, strict=True):
            parts[piece.sample].append((row, piece))
        return [_join(part) for part in parts]


def _join(parts: list[tuple[Tensor, Piece]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][0]
    if parts[0][0].dim() > 1:
        return torch.cat([row[piece.first : piece.last] for row, piece in parts])
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
        kind = config.stem.modality
        for option, value, fits in (("max-seconds", max_seconds, "speech"), ("max-tokens", max_tokens, "text")):
            if value is not None and kind != fits:
                raise ValueError(f"{option}: expected nothing but for {fits}, got {value} for a model of {kind}")
        trained: Any = make_modality(config)
        data, stem = config.data, config.stem
        self.longest, self.limit, self.step = None, None, 1
        if kind == "speech":
            self.longest = trained.count_tokens(trained.longest)
            self.step = int(np.prod([stride for _, _, stride in trained.stem.spec]))
            if max_seconds is not None:
                self.limit = _check_limit("max-seconds", max_seconds, trained.shortest / SAMPLE_RATE, SAMPLE_RATE)
            data = replace(data, max_seconds=ENDLESS_SECONDS, speed=0.0)
        elif kind == "text":
            # Pre-training knows the positions of its blocks only, fine-tuning all.
            self.longest = stem.max_tokens if isinstance(config, FineTuneConfig) else trained.block_tokens
            if max_tokens is not None:
                self.limit = _check_limit("max-tokens", max_tokens, 4, 1)
            stem = replace(stem, max_tokens=ENDLESS_TOKENS)
        self.config = replace(config, data=data, stem=stem)
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
        value = sample.value
        if self.config.stem.modality == "text" and len(value) >= ENDLESS_TOKENS:
            note = Note(sample.sample_id, 0, "cut", f"cut to {len(value)} tokens")
            sample = sample._replace(notes=(*sample.notes, note))
        if self.limit is None or len(value) <= self.limit:
            return sample
        kept = value[: self.limit]
        if self.config.stem.modality == "text":
            kept, text = np.append(kept[:-1], END), f"cut to {self.limit} of {len(value)} tokens"
        else:
            text = f"cut to {len(kept) / SAMPLE_RATE:g} of {len(value) / SAMPLE_RATE:g} s"
        return sample._replace(value=kept, notes=(*sample.notes, Note(sample.sample_id, 0, "cut", text)))

    def split(self, value: np.ndarray) -> list[tuple[np.ndarray, int, int | None]]:
        """Pieces of a sample and which of their tokens count: all tokens of the sample, each once.

        Pieces of speech begin at the first sample of a token, so that their tokens are those of the whole. Pieces of
        text begin with `<s>` and end with `</s>`, as in training.
        """
        text = self.config.stem.modality == "text"
        longest, tokens = self.longest or 0, 0
        if longest:
            tokens = len(value) if text else self.modality.count_tokens(len(value))
        if tokens <= longest:
            return [(value, 0, None)]
        shared = max(2, longest // OVERLAP)
        count = -(-(tokens - shared) // (longest - shared))
        starts = [number * (tokens - longest) // (count - 1) for number in range(count)]
        seams = [0, *((a + longest + b) // 2 for a, b in pairwise(starts)), tokens]
        length = longest if text else self.modality.stem.samples_needed() + (longest - 1) * self.step
        parts: list[tuple[np.ndarray, int, int | None]] = []
        for number, start in enumerate(starts):
            stop = start * self.step + length
            part = value[start * self.step : stop if number < count - 1 else None]
            if text:
                part = part.copy()
                part[0], part[-1] = START, END
            parts.append((part, seams[number] - start, seams[number + 1] - start))
        return parts


def _check_limit(option: str, value: float, least: float, factor: int) -> int:
    if not least <= value:
        raise ValueError(f"{option}: expected at least {least:g}, got {value:g}")
    return round(value * factor)


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
