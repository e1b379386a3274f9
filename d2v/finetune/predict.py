"""Predictions of a fine-tuned model on data without labels, and `d2v transcribe`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d2v.config.finetune import Decoding, FineTuneConfig
from d2v.data.sources import Rejected, Source, ending_of
from d2v.data.speech import SPEECH, Speech
from d2v.evaluate.multilabel import name_labels
from d2v.evaluate.pieces import Uncut, list_entries, list_missing
from d2v.finetune.decoding import Decoder, find_words, read_logits
from d2v.finetune.objective import run_model
from d2v.finetune.spelling import spelling_of
from d2v.model.finetuned import FineTuned
from d2v.runtime import Reporter
from d2v.saved import load_any

MEANT = ("classification", "regression", "multi-label", "ctc")


class SpokenWord(NamedTuple):
    """A word with its place in a recording."""

    word: str
    start: float
    """Seconds, of the first sample of the frame with its first letter."""
    end: float
    """Seconds, where the frame behind that of its last letter begins."""


class Prediction(NamedTuple):
    """Of one sample."""

    name: str
    """Path of the sample."""
    answer: str | float
    """Class, transcript or number; of labels those with a probability of 0.5 or more, between `; `."""
    confidence: float
    """Probability of the class, or of the most probable label; transcripts: mean log-probability of the best labels;
    numbers: nan."""


class Predictor:
    """A fine-tuned model that answers for samples of any length."""

    def __init__(
        self, checkpoint: str, *, decode: Decoding | None = None, device: str = "auto",
        max_seconds: float | None = None, max_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Raises `ValueError` for a model that was not fine-tuned for one of `MEANT`."""
        model, config, self.place = load_any(checkpoint, device)
        if not isinstance(model, FineTuned) or not isinstance(config, FineTuneConfig):
            raise ValueError(f"checkpoint: expected a fine-tuned model, got a pre-trained one at {checkpoint!r}")
        self.model, self.head = model, model.head.settings
        if self.head.task not in MEANT:
            raise ValueError(f"checkpoint: expected a head for {', '.join(MEANT)}, got {self.head.task}")
        self.decoder = None
        if self.head.task == "ctc":
            spelling = spelling_of(config.finetune.options.units, model.labels)
            self.decoder = Decoder(decode or Decoding(), spelling, self.head.blank)
        self.uncut = Uncut(config, max_seconds, max_tokens)

    @torch.no_grad()
    def run(
        self, source: Source, batch: int, option: str, report: Reporter | None = None
    ) -> Iterator[tuple[Prediction, list[SpokenWord]]]:
        """Answers for the samples of a source that can be decoded, in order, with the words of transcripts; the others,
        and what is cut, are named on standard error. report: of seconds of speech."""
        lost, cut, modality = list_missing(source), list[Rejected](), self.uncut.modality
        for part in self.uncut.batches(source, self.place, batch):
            notes = {note.sample_id: note for note in part.notes}
            values = sum(len(sample.value) for sample in part.samples) if report is not None else 0
            tell = None if report is None else lambda share, r=report, n=values: r.add(share * n / modality.rate)
            found = run_model(self.model, modality, part, self.place, tell)
            for sample, logits in zip(part.samples, found, strict=True):
                name, note = source.describe(sample.sample_id), notes.get(sample.sample_id)
                if note is not None:
                    (lost if note.kind == "bad" else cut).append(Rejected(name, note.text))
                if note is not None and note.kind == "bad":
                    continue
                if not bool(torch.isfinite(logits).all()):
                    lost.append(Rejected(name, "outputs that are not finite"))
                    continue
                answer, confidence, path = read_logits(logits, None, self.head.task, self.decoder)
                named = answer
                if self.head.task == "classification":
                    named = self.model.labels[answer]
                elif self.head.task == "multi-label":
                    named = name_labels(answer, self.model.labels)
                yield Prediction(name, named, confidence), self._place_words(path)
        for what, entries in (("left out", lost), ("cut", cut)):
            if entries:
                print(f"{option}: {what} {list_entries(entries, len(entries))}", file=sys.stderr)

    def _place_words(self, path: Sequence[int]) -> list[SpokenWord]:
        if self.decoder is None:
            return []
        frame = self.uncut.modality.stem.step / self.uncut.modality.rate
        words = find_words(path, self.decoder.spelling, self.head.blank)
        return [SpokenWord(word.text, word.first * frame, word.last * frame) for word in words]


def predict(
    checkpoint: str, path: str, *, decode: Decoding | None = None, batch: int = 16, device: str = "auto",
    max_seconds: float | None = None, max_tokens: int | None = None,
) -> Iterator[Prediction]:  # fmt: skip
    """Predictions for everything at `path`, in order: images, recordings, or documents of text.

    Samples that are longer than the model saw go through it in overlapping pieces, cut where `max_seconds` or
    `max_tokens` is given. Standard error says how many samples cannot be decoded, or are cut, and which. Raises
    `ValueError` as `Predictor` does, and for a path without samples.
    """
    predictor = Predictor(checkpoint, decode=decode, device=device, max_seconds=max_seconds, max_tokens=max_tokens)
    source = predictor.uncut.modality.open_whole(path, option="path")
    yield from (found for found, _ in predictor.run(source, batch, "path"))


def transcribe(
    checkpoint: str, files: Sequence[str], *, decode: Decoding | None = None, words: bool = False,
    as_json: bool = False, batch: int = 16, device: str = "auto", max_seconds: float | None = None,
) -> None:  # fmt: skip
    """Prints the text of recordings: a line FILE<TAB>TEXT for each; words: FILE<TAB>START<TAB>END<TAB>WORD for each
    word, in seconds; as_json: an object for each recording.

    files: recordings, or what holds such: folders, manifests, shards, parquet files. Raises `ValueError` for a model
    that writes no text, without files, and for what is no recording, before anything is printed.
    """
    if not files:
        raise ValueError("files: expected recordings, or folders, manifests, shards or parquet files of them, got none")
    predictor = Predictor(checkpoint, decode=decode, device=device, max_seconds=max_seconds)
    modality = predictor.uncut.modality
    if predictor.decoder is None or not isinstance(modality, Speech):
        kind = predictor.uncut.config.stem.modality
        raise ValueError(f"checkpoint: expected a model of speech-ctc, got {predictor.head.task} of {kind}")
    sources: list[Source] = []
    for single, group in groupby(files, lambda file: Path(file).is_file() and ending_of(file) in SPEECH.suffixes):
        paths = list(group)
        sources += [modality.open(p, option="files") for p in ([paths] if single else paths)]
    seconds = sum(int(source.lengths.sum()) for source in sources if source.lengths is not None) / modality.rate
    report = Reporter("transcribing", seconds, "s of speech")
    for source in sources:
        for found, said in predictor.run(source, batch, "files", report):
            write = _write_json if as_json else _write_lines
            print(write(found, said if words else None), end="", flush=True)
    report.finish()


def _write_json(found: Prediction, words: list[SpokenWord] | None) -> str:
    row: dict[str, Any] = {"file": found.name, "text": found.answer, "confidence": round(found.confidence, 4)}
    if words is not None:
        row["words"] = [{"word": w.word, "start": round(w.start, 3), "end": round(w.end, 3)} for w in words]
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_lines(found: Prediction, words: list[SpokenWord] | None) -> str:
    name = " ".join(found.name.split("\t"))
    if words is None:
        return f"{name}\t{found.answer}\n"
    return "".join(f"{name}\t{word.start:.3f}\t{word.end:.3f}\t{word.word}\n" for word in words)
