"""Samples with any number of labels: names of them in one text, and mean average precision."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np


def split_labels(texts: Sequence[str], known: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The labels in each text, between `;` where any text has one, else between `,`: names may then hold commas. A text
    that is a `known` name is one label."""
    mark = ";" if any(";" in text for text in texts) else ","
    parts = [[text] if text in known else [part.strip() for part in text.split(mark)] for text in texts]
    return [tuple(dict.fromkeys(part for part in row if part)) for row in parts]


def stack_labels(labels: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    """Numbers of labels of each sample -> bool (n,L)."""
    table = np.zeros((len(labels), classes), dtype=bool)
    for row, own in zip(table, labels, strict=True):
        row[list(own)] = True
    return table


def name_labels(value: Sequence[int] | np.ndarray, labels: Sequence[str]) -> str:
    """Numbers of labels, or probabilities (L,) of which those of 0.5 or more count -> their names between `; `."""
    numbers = np.flatnonzero(value >= 0.5).tolist() if isinstance(value, np.ndarray) else value
    return "; ".join(labels[i] for i in numbers)


def average_precision(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(L,) float64: sum over the distinct scores of precision times gain of recall, of each label; nan: none has it.

    truth: bool (n,L); scores: (n,L). As scikit-learn's `average_precision_score`.
    """
    found = np.full(truth.shape[1], np.nan)
    for label in np.flatnonzero(truth.any(axis=0)):
        order = np.argsort(-scores[:, label], kind="stable")
        ranked = scores[order, label]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # equal scores are one threshold
        hits = np.cumsum(truth[order, label])[ends]
        found[label] = (hits / (ends + 1)) @ np.diff(hits, prepend=0) / hits[-1]
    return found


def mean_average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean over the labels that occur; nan where none does."""
    found = average_precision(truth, scores)
    return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")
