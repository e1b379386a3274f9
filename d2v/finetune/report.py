"""What is written about the predictions on a labelled set: scores, classes, confusion matrix, worst samples."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2v.data.sources import Source
from d2v.evaluate.multilabel import name_labels, stack_labels
from d2v.files import write_atomically
from d2v.finetune.objective import Outcome
from d2v.finetune.scores import (
    count_confusions,
    count_errors,
    score_classes,
    score_each_class,
    score_each_label,
    score_labels,
    score_numbers,
    score_transcripts,
)

RESULT, CONFUSION, WORST = "result.json", "confusion.png", "worst.tsv"
CONFUSION_TABLE, CLASSES = "confusion.csv", "classes.csv"
MOST_CLASSES = 60
"""Classes that a picture of the confusion matrix can show."""
MOST_NAMED = 30


def score_outcomes(outcomes: Sequence[Outcome], task: str, labels: Sequence[str]) -> dict[str, Any]:
    """Scores of a task with their 95 % intervals, `samples`, and the mean `loss`."""
    truth, predicted = [o.truth for o in outcomes], [o.predicted for o in outcomes]
    if task == "ctc":
        scores: dict[str, Any] = score_transcripts(truth, predicted)
    elif task == "regression":
        scores = score_numbers(np.array(truth, dtype=np.float64), np.array(predicted, dtype=np.float64))
    elif task == "multi-label":
        scores = score_labels(*_stack(outcomes, labels))
        scores["classes"] = len(labels)
    else:
        scores = score_classes(np.array(truth), np.array(predicted), len(labels))
        scores["classes"] = len(labels)
    finite = [o.loss for o in outcomes if np.isfinite(o.loss)]  # not of transcripts that do not fit
    loss = float(np.mean(finite)) if finite else float("nan")
    return {"task": task, "samples": len(outcomes), **scores, "loss": round(loss, 6)}


def _stack(outcomes: Sequence[Outcome], labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    return stack_labels([o.truth for o in outcomes], len(labels)), np.stack([o.predicted for o in outcomes])


def describe_scores(result: dict[str, Any]) -> str:
    """Scores and intervals for people, a line each."""
    names = [name for name in result if f"{name}_low" in result]
    lines = [f"{'score':<10}{'value':>8}   95 % interval, {result['samples']} samples"]
    lines += [f"{n:<10}{result[n]:>8.3f}   {result[f'{n}_low']:.3f} to {result[f'{n}_high']:.3f}" for n in names]
    return "\n".join(lines)


def write_report(
    folder: Path, source: Source, outcomes: Sequence[Outcome], result: dict[str, Any], labels: Sequence[str],
    worst: int,
) -> None:  # fmt: skip
    """Writes worst.tsv, for classes classes.csv, confusion.csv and confusion.png, and last result.json into
    `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    task = result["task"]
    write_atomically(folder / WORST, _list_worst(source, outcomes, task, labels, worst))
    if task == "multi-label":
        classes = score_each_label(*_stack(outcomes, labels), labels)
        result = {**result, "per_class": classes}
        _write_csv(folder / CLASSES, [list(classes[0]), *(list(row.values()) for row in classes)])
    if task == "classification":
        table = count_confusions(
            np.array([o.truth for o in outcomes]), np.array([o.predicted for o in outcomes]), len(labels)
        )
        classes = score_each_class(table, labels)
        result = {**result, "per_class": classes}  # of the file only: there may be a thousand
        _write_csv(folder / CLASSES, [list(classes[0]), *(list(row.values()) for row in classes)])
        rows = ([label, *counts] for label, counts in zip(labels, table.tolist(), strict=True))
        _write_csv(folder / CONFUSION_TABLE, [["true class", *labels], *rows])
        if len(labels) <= MOST_CLASSES:
            draw_confusion(folder / CONFUSION, table, labels)
    write_atomically(folder / RESULT, json.dumps(result, indent=1) + "\n")


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue())


def _list_worst(source: Source, outcomes: Sequence[Outcome], task: str, labels: Sequence[str], count: int) -> str:
    """Tab-separated lines of the samples with the largest errors: what they are, truth, prediction, error."""
    if task == "ctc":
        table, rates = count_errors([o.truth for o in outcomes], [o.predicted for o in outcomes])
        order = np.lexsort((-np.array([o.loss for o in outcomes]), -rates))
        head, errors = "word_errors\twords", [f"{row[0]}\t{row[1]}" for row in table.tolist()]
    else:
        order = np.argsort([-o.loss for o in outcomes], kind="stable")
        head = "squared_error" if task == "regression" else "loss\tconfidence"
        errors = [f"{o.loss:.4g}" + ("" if task == "regression" else f"\t{o.confidence:.4g}") for o in outcomes]
    lines = [f"sample\ttruth\tpredicted\t{head}"]
    for i in order[:count].tolist():
        outcome = outcomes[i]
        shown = [_show(value, task, labels) for value in (outcome.truth, outcome.predicted)]
        name = " ".join(source.describe(outcome.row).split())
        lines.append("\t".join([name, *shown, errors[i]]))
    return "\n".join(lines) + "\n"


def _show(value: Any, task: str, labels: Sequence[str]) -> str:
    if task == "regression":
        return f"{value:.6g}"
    if task == "multi-label":
        return name_labels(value, labels)
    return " ".join(str(value if task == "ctc" else labels[value]).split())


def draw_confusion(path: Path, confusion: np.ndarray, labels: Sequence[str]) -> None:
    """Confusion matrix as a picture: shares of each true class, counts written in small ones."""
    from matplotlib.figure import Figure

    classes = len(labels)
    side = min(12.0, 2.5 + 0.42 * classes)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    if classes <= MOST_NAMED:
        axis.set_xticks(range(classes), labels, rotation=90, fontsize=8)
        axis.set_yticks(range(classes), labels, fontsize=8)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, str(confusion[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(f"accuracy {np.trace(confusion) / max(confusion.sum(), 1):.1%} of {confusion.sum()}", fontsize=10)
    figure.colorbar(image, shrink=0.8, label="share of the true class")
    temporary = path.with_name(f".partial-{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
