"""Scores of predictions with 95 % confidence intervals: accuracy, F1, Matthews, correlations, error rates of words.

Proportions have Wilson's interval; all others a percentile bootstrap over samples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from d2v.evaluate.multilabel import average_precision, mean_average_precision, stack_labels

DRAWS = 1000
"""Bootstrap draws."""


class Score(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def entries(self, name: str) -> dict[str, float]:
        """Under `name`, `name`_low and `name`_high, rounded."""
        return {f"{name}{end}": round(float(v), 6) for end, v in zip(("", "_low", "_high"), self, strict=True)}


def score_proportion(hits: int, samples: int) -> Score:
    """A share of samples with Wilson's interval (Wilson 1927)."""
    from scipy.stats import binomtest

    if samples < 1:
        return Score(math.nan, math.nan, math.nan)
    low, high = binomtest(hits, samples).proportion_ci(method="wilson")
    return Score(hits / samples, float(low), float(high))


def bootstrap(measure: Callable[[np.ndarray], float], samples: int, draws: int = DRAWS, seed: int = 0) -> Score:
    """`measure` of the rows 0 to samples - 1, and the 2.5 and 97.5 percentiles of its values on rows drawn with
    replacement; draws on which it is not defined do not count."""
    value = measure(np.arange(samples))
    rng = np.random.default_rng(seed)
    values = np.array([measure(rng.integers(samples, size=samples)) for _ in range(draws)])
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return Score(float(value), float(low), float(high))


def score_classes(truth: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy; f1 of class 1 where there are two classes, else the mean over classes; matthews.

    truth, predicted: int64 (n,). As the GLUE tasks ask for them; of two classes the second is the positive one.
    """
    result = score_proportion(int((truth == predicted).sum()), len(truth)).entries("accuracy")

    def of_table(measure: Callable[[np.ndarray], float]) -> Score:
        return bootstrap(lambda rows: measure(count_confusions(truth[rows], predicted[rows], classes)), len(truth))

    return result | of_table(measure_f1).entries("f1") | of_table(measure_matthews).entries("matthews")


def count_confusions(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(K,K) int64: samples of each true class (row) and predicted class (column)."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def measure_f1(confusion: np.ndarray) -> float:
    """F1 of a confusion matrix (K,K): of class 1 of two, else the mean over the classes that occur."""
    hits, sums = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
    scores = np.where(sums > 0, 2 * hits / np.maximum(sums, 1), 0.0)
    return float(scores[1]) if len(confusion) == 2 else float(scores[sums > 0].mean())


def score_each_class(confusion: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each class of a confusion matrix (K,K): label, samples, predicted, precision, recall and f1; 0 where there
    is nothing to divide by."""
    hits, true, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    shares = (hits / np.maximum(found, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(true + found, 1))
    columns = (labels, true.tolist(), found.tolist(), *(np.round(share, 6).tolist() for share in shares))
    names = ("label", "samples", "predicted", "precision", "recall", "f1")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def measure_matthews(confusion: np.ndarray) -> float:
    """Matthews correlation of a confusion matrix (K,K); 0 where all truths or all predictions are alike (Gorodkin
    2004)."""
    table = confusion.astype(np.float64)
    n, hits = table.sum(), np.trace(table)
    true, found = table.sum(1), table.sum(0)
    spread = math.sqrt(n * n - float(true @ true)) * math.sqrt(n * n - float(found @ found))
    return float((hits * n - true @ found) / spread) if spread > 0.0 else 0.0


def score_numbers(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """pearson, spearman, and the root mean squared error; float64 (n,)."""
    from scipy.stats import rankdata

    n = len(truth)
    result = bootstrap(lambda r: measure_pearson(truth[r], predicted[r]), n).entries("pearson")
    result |= bootstrap(lambda r: measure_pearson(rankdata(truth[r]), rankdata(predicted[r])), n).entries("spearman")
    error = bootstrap(lambda r: math.sqrt(float(np.mean((truth[r] - predicted[r]) ** 2))), n)
    return result | error.entries("rmse")


def score_labels(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """map: mean average precision; bool (n,L) and probabilities (n,L)."""
    draws = max(50, min(DRAWS, 20_000_000 // max(truth.size, 1)))  # of AudioSet a draw takes seconds
    return bootstrap(lambda rows: mean_average_precision(truth[rows], predicted[rows]), len(truth), draws).entries(
        "map"
    )


def score_each_label(truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each label: samples that have it, samples with a probability of 0.5 or more, average precision (None: no
    sample has it)."""
    counts = truth.sum(0).tolist(), (predicted >= 0.5).sum(0).tolist()
    scores = [None if math.isnan(ap) else round(ap, 6) for ap in average_precision(truth, predicted).tolist()]
    names = ("label", "samples", "predicted", "average_precision")
    return [dict(zip(names, row, strict=True)) for row in zip(labels, *counts, scores, strict=True)]


def measure_pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of two rows (n,); nan where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread > 0.0 else math.nan


def require_jiwer() -> Any:
    """The library that counts errors; `ValueError` with the way to install it."""
    try:
        import jiwer
    except ImportError as error:
        raise ValueError(
            f"speech-ctc: expected jiwer for word error rates (pip install 'd2v[finetune]'), got {error}"
        ) from None
    return jiwer


def count_errors(truth: Sequence[str], predicted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n,4) int64: word errors, words, character errors, characters of each transcript, and (n,) word error rates.

    Transcripts are not empty; a prediction may be. Counted by jiwer.
    """
    jiwer = require_jiwer()
    rows = []
    for expected, found in zip(truth, predicted, strict=True):
        words, letters = jiwer.process_words(expected, found), jiwer.process_characters(expected, found)
        rows.append([*_errors(words), *_errors(letters)])
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return table, table[:, 0] / np.maximum(table[:, 1], 1)


def _errors(output: Any) -> tuple[int, int]:
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions


def score_transcripts(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """wer and cer: errors over words or characters of all transcripts."""
    table, _ = count_errors(truth, predicted)

    def rate(column: int) -> Callable[[np.ndarray], float]:
        return lambda rows: float(table[rows, column].sum() / max(table[rows, column + 1].sum(), 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bootstrap(rate(0), len(table)).entries("wer") | bootstrap(rate(2), len(table)).entries("cer")


def headline(task: str) -> tuple[str, str]:
    """(metric that chooses a checkpoint, "lowest" or "highest") of a head's task."""
    names = {"ctc": ("wer", "lowest"), "regression": ("pearson", "highest"), "multi-label": ("map", "highest")}
    return names.get(task, ("accuracy", "highest"))


def quick_score(name: str, truth: Sequence[Any], predicted: Sequence[Any]) -> float:
    """A score without its interval: wer, accuracy, f1 (of class 1 of two), map, or pearson; 0 where that is not
    defined."""
    if name == "wer":
        table, _ = count_errors(truth, predicted)
        return float(table[:, 0].sum() / max(table[:, 1].sum(), 1))
    if name == "map":
        table = np.stack(predicted)
        return float(np.nan_to_num(mean_average_precision(stack_labels(truth, table.shape[1]), table)))
    x, y = np.array(truth), np.array(predicted)
    if name == "pearson":
        return float(np.nan_to_num(measure_pearson(x, y)))
    return measure_f1(count_confusions(x, y, 2)) if name == "f1" else float((x == y).mean())
