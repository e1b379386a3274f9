"""Predictions of a fine-tuned model on data without labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from d2v.config.finetune import Decoding, FineTuneConfig
from d2v.data.sources import Rejected
from d2v.evaluate.pieces import Uncut, list_entries, list_left_out
from d2v.finetune.decoding import Decoder, read_logits
from d2v.finetune.objective import run_model
from d2v.finetune.spelling import spelling_of
from d2v.model.finetuned import FineTuned
from d2v.saved import load_any


class Prediction(NamedTuple):
    """Of one sample."""

    name: str
    """Path of the sample."""
    answer: str | float
    """Class, transcript or number."""
    confidence: float
    """Probability of the class; transcripts: mean log-probability of the best labels; numbers: nan."""


@torch.no_grad()
def predict(
    checkpoint: str, path: str, *, decode: Decoding | None = None, batch: int = 16, device: str = "auto",
    max_seconds: float | None = None, max_tokens: int | None = None,
) -> Iterator[Prediction]:  # fmt: skip
    """Predictions for everything at `path`, in order: images, recordings, or documents of text.

    Samples that are longer than the model saw go through it in overlapping pieces, cut where `max_seconds` or
    `max_tokens` is given. Standard error says how many samples cannot be decoded, or are cut, and which. Raises
    `ValueError` for a model that was not fine-tuned for classification, regression or CTC, and for a path without
    samples.
    """
    model, config, place = load_any(checkpoint, device)
    if not isinstance(model, FineTuned) or not isinstance(config, FineTuneConfig):
        raise ValueError(f"checkpoint: expected a fine-tuned model, got a pre-trained one at {checkpoint!r}")
    settings = model.head.settings
    if settings.task not in ("classification", "regression", "ctc"):
        raise ValueError(f"checkpoint: expected a head for classification, regression or ctc, got {settings.task}")
    decoder = None
    if settings.task == "ctc":
        spelling = spelling_of(config.finetune.options.units, model.labels)
        decoder = Decoder(decode or Decoding(), spelling, settings.blank)
    uncut = Uncut(config, max_seconds, max_tokens)
    source = uncut.modality.open_whole(path, option="path")
    lost, cut = list_left_out(source), list[Rejected]()
    for part in uncut.batches(source, place, batch):
        notes = {note.sample_id: note for note in part.notes}
        for sample, logits in zip(part.samples, run_model(model, uncut.modality, part, place), strict=True):
            name, note = source.describe(sample.sample_id), notes.get(sample.sample_id)
            if note is not None:
                (lost if note.kind == "bad" else cut).append(Rejected(name, note.text))
            if note is not None and note.kind == "bad":
                continue
            if not bool(torch.isfinite(logits).all()):
                lost.append(Rejected(name, "outputs that are not finite"))
                continue
            answer, confidence = read_logits(logits, None, settings.task, decoder)
            named = model.labels[int(answer)] if settings.task == "classification" else answer
            yield Prediction(name, named, confidence)
    for what, entries in (("left out", lost), ("cut", cut)):
        if entries:
            print(f"path: {what} {list_entries(entries)}", file=sys.stderr)
