"""Predictions of a fine-tuned model on data without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from d2v.config.finetune import Decoding, FineTuneConfig
from d2v.data import make_modality
from d2v.data.loader import evaluation_batches
from d2v.finetune.decoding import Decoder, read_logits
from d2v.finetune.objective import token_lengths
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
    checkpoint: str, path: str, *, decode: Decoding | None = None, batch: int = 16, device: str = "auto"
) -> Iterator[Prediction]:
    """Predictions for everything at `path`, in order: images, recordings, or documents of text.

    Samples that cannot be decoded are left out. Raises `ValueError` for a model that was not fine-tuned for
    classification, regression or CTC, and for a path without samples.
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
    config = replace(config, data=replace(config.data, unequal="pad"))
    modality = make_modality(config)
    source = modality.open_whole(path, option="path")
    row = 0
    for part in evaluation_batches(config, source, place, batch=batch):
        logits = model(modality.prepare(part.inputs.to(place)), part.lengths).float().cpu()
        bad = {note.sample_id for note in part.notes if note.kind == "bad"}
        lengths = token_lengths(part, logits) if decoder is not None else None
        for i in range(len(part)):
            if row not in bad:
                frames = None if lengths is None else int(lengths[i])
                answer, confidence = read_logits(logits[i], frames, settings.task, decoder)
                named = model.labels[int(answer)] if settings.task == "classification" else answer
                yield Prediction(source.describe(row), named, confidence)
            row += 1
