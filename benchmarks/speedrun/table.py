"""Tables and plots of what was learned."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.plots import figure
from ..harness.report import markdown
from .methods import METHODS

PROBES = {"linear_probe": "linear", "knn": "kNN", "few_label": "10 labels a class"}
FEATURES = {
    "random_init": "the same network, untrained", "pixels": "raw pixels", "sorted_pixels": "sorted pixels",
    "power_spectrum": "log power spectrum", "log_mel": "log-mel, mean and deviation", "bag_of_words": "bag of words",
}  # fmt: skip


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and each kind of raw features: accuracies of all seeds, and what the training cost."""
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, title: str, scores: dict[str, float], result: dict[str, Any] | None) -> None:
        row = rows.setdefault(name, {"name": name, "title": title, "scores": {k: [] for k in PROBES}})
        for key in PROBES:
            row["scores"][key].append(scores[key])
        if result is None:
            return
        row |= {key: result.get(key) for key in ("rate", "flops", "steps")}
        row.setdefault("cpu_seconds", []).append(result["cpu_seconds"])
        if "during" in result:
            row.setdefault("during", []).append(
                [{"cpu_seconds": s, **p} for s, p in zip(result["quarters"], result["during"], strict=True)]
            )

    for result in results:
        method = result["method"]
        for name, scores in result["scores"].items():
            if name in ("pretrained", method):
                add(method, METHODS[method], scores, result)
            else:
                add(name, FEATURES[name], scores, None)
    return list(rows.values())


def show(values: list[float]) -> str:
    """Mean and range in percent."""
    finite = [100 * v for v in values if v == v]
    if not finite:
        return ""
    spread = f" ({min(finite):.1f}–{max(finite):.1f})" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):.1f}{spread}"


def plot_range(axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Means over the values at each x, with their range."""
    means = [statistics.mean(v) for v in values]
    low, high = ([abs(m - f(v)) for m, v in zip(means, values, strict=True)] for f in (min, max))
    axis.errorbar(x, means, (low, high), fmt="o-", capsize=4, **style)


def table(record: dict[str, Any]) -> str:
    """The table of one task."""
    lines = []
    for row in record["rows"]:
        cost = f"{statistics.mean(row['cpu_seconds']):.0f}" if "cpu_seconds" in row else ""
        flops = f"{row['flops'] / 1e12:.1f}" if row.get("flops") else ""
        lines.append((row["title"], *(show(row["scores"][key]) for key in PROBES), cost, flops))
    return markdown(("test accuracy, %", *PROBES.values(), "CPU seconds", "TFLOP"), lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Accuracy against compute, a panel for each probe: after each quarter of a pre-training; raw features as lines."""
    machine = record["machine"]
    title = f"{record['title']}; {machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}"
    with figure(path, title, (14, 4.2), 1, len(PROBES), sharey=True) as (axes,):
        for axis, (key, words) in zip(axes, PROBES.items(), strict=True):
            for i, row in enumerate(record["rows"]):
                values = [100 * v for v in row["scores"][key] if v == v]
                if not values:
                    continue
                mean = statistics.mean(values)
                if "cpu_seconds" not in row:
                    axis.axhline(mean, color=f"C{i}", linestyle=":", label=row["title"])
                    continue
                quarters = list(zip(*row.get("during", []), strict=True))  # one of all seeds each
                x = [statistics.mean(p["cpu_seconds"] for p in q) for q in quarters]
                x.append(statistics.mean(row["cpu_seconds"]))
                all_seeds = [*([100 * p[key] for p in q] for q in quarters), values]
                plot_range(axis, x, all_seeds, color=f"C{i}", label=row["title"])
            axis.set(title=words, xlabel="CPU seconds of training")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("test accuracy, %")
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
