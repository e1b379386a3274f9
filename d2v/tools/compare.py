"""`d2v compare`: what several runs reached, in which settings they differ, and whether that is more than chance."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2v.config.fields import flatten_config, shorten
from d2v.finetune.objective import CHOICE
from d2v.finetune.report import RESULT
from d2v.folder import CONFIG, load_json
from d2v.tools.figures import escape, new_figure, save_figure
from d2v.tools.plot import COLUMNS, LOGARITHMIC, PROBES, UNITS, choose_panels
from d2v.train.logging import read_metrics

SEED, NO_SETTING, NO_METRICS = "run.seed", "run.dir", ("valid_step", "probe_step", CHOICE)


@dataclass
class Run:
    """What a run folder says."""

    folder: Path
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    """Of metrics.jsonl."""
    values: dict[str, float]
    """Last value of each metric, NaN where it was not finite, and what evaluations found."""

    @property
    def step(self) -> int:
        """The last update with a line of metrics."""
        return int(self.lines[-1]["step"]) if self.lines else 0


def compare(
    runs: Sequence[Path], *, metrics: Sequence[str] = (), output: Path | None = None, as_json: bool = False
) -> str:
    """A text with a table of runs, means over seeds and tests of the differences between groups; or the same as JSON.

    Args:
        runs: folders of runs, or of sweeps.
        metrics: what is compared; empty: `loss`, what was measured on held-out data, and what evaluations found.
        output: file for a picture with the curves of all runs; None: none.

    Raises:
        ValueError: no run in a folder, no such metric, or a damaged file.
    """
    once: dict[Path, Path] = {}
    for path in itertools.chain.from_iterable(map(list_runs, runs)):
        once.setdefault(path.resolve(), path)
    found = [read_run(path) for path in once.values()]
    if not found:
        raise ValueError("runs: expected run folders, or the folder of a sweep, got nothing")
    known = list(dict.fromkeys(name for run in found for name in run.values))
    for name in metrics:
        if name not in known:
            raise ValueError(f"metrics: expected some of {', '.join(known)}, got {name!r}")
    of_lines = {name for run in found for line in run.lines for name in line} - {"loss"}
    metrics = metrics or [
        n for n in known if n not in of_lines or (n.startswith(("valid_", "probe_")) and n not in NO_METRICS)
    ]
    options = find_differences(found)
    groups = make_groups(found, options)
    if output is not None:
        draw(groups, output)
    tables = {
        "runs": [
            {"run": str(r.folder), "step": r.step}
            | {m: r.values.get(m) for m in metrics} | {n: r.settings.get(n) for n in options}
            for r in found
        ],
        "groups": [
            {"group": title, "runs": len(group), "seeds": count_seeds(group)}
            | {m: average([r.values[m] for r in group if m in r.values]) for m in metrics}
            for title, group in groups.items()
        ],
        "tests": [test for metric in metrics for test in compare_pairs(groups, metric)],
    }  # fmt: skip
    return json.dumps(_without_nan(tables)) if as_json else _describe(tables)


def list_runs(folder: Path) -> list[Path]:
    """A run folder, or the run folders inside that of a sweep; `ValueError` where there is neither."""
    inside = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise ValueError(f"runs: expected a run folder or the folder of a sweep, found none at {str(folder)!r}")
    return inside


def read_run(folder: Path) -> Run:
    """What a run folder says; `ValueError` names a damaged file."""
    lines = read_metrics(folder / "metrics.jsonl")
    values: dict[str, Any] = {}
    for line in lines:
        values |= {name: math.nan if value is None else value for name, value in line.items() if name != "step"}
    probe = load_json(file) if (file := folder / "probe.json").is_file() else {}
    values |= {n: part.get("pretrained") for n, _ in PROBES if isinstance(part := probe.get(n), dict)}
    for place in ("test", "evaluation"):
        scores = load_json(file) if (file := folder / place / RESULT).is_file() else {}
        values |= {f"{place}.{name}": value for name, value in scores.items() if f"{name}_low" in scores}
    settings = flatten_config(flatten_config(load_json(folder / CONFIG)))
    return Run(folder, settings, lines, {n: v for n, v in values.items() if isinstance(v, (int, float))})


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ; one that a run did not know yet counts as equal."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != NO_SETTING)
    texts = {name: {json.dumps(run.settings[name]) for run in runs if name in run.settings} for name in names}
    return [name for name, found in texts.items() if len(found) > 1]


def make_groups(runs: Sequence[Run], options: Sequence[str]) -> dict[str, list[Run]]:
    """Runs whose settings differ in the seed alone, together, by what the others have set otherwise."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        own = ",".join(f"{n.rpartition('.')[2]}={run.settings.get(n)}" for n in options if n != SEED)
        groups.setdefault(own or "all", []).append(run)
    return groups


def count_seeds(runs: Sequence[Run]) -> int:
    """Number of different seeds."""
    return len({run.settings.get(SEED) for run in runs})


def average(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and standard deviation (of a sample) of values; None for none, the deviation None for one."""
    if not values:
        return None
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def compare_pairs(groups: Mapping[str, Sequence[Run]], metric: str) -> list[dict[str, Any]]:
    """Differences of the means of pairs of groups, with p-values of Welch's t-test: single, and by Holm's method over
    the pairs. None with fewer than two seeds in a group, with a seed twice, without spread, or without scipy."""
    tests = []
    for first, second in itertools.combinations(groups, 2):
        a, b = ([run.values[metric] for run in groups[name] if metric in run.values] for name in (first, second))
        if a and b:
            fair = all(count_seeds(groups[name]) == len(groups[name]) > 1 for name in (first, second))
            p = _welch(a, b) if fair else None
            test: dict[str, Any] = {"metric": metric, "from": first, "to": second}
            tests.append({**test, "difference": float(np.mean(b) - np.mean(a)), "p": p, "p by Holm": None})
    largest, known = 0.0, sorted((test for test in tests if test["p"] is not None), key=lambda test: test["p"])
    for i, test in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - i) * test["p"]))
        test["p by Holm"] = largest
    return tests


def _welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    try:
        from scipy import stats
    except ModuleNotFoundError:
        return None
    if min(len(a), len(b)) < 2 or len({*a}) == len({*b}) == 1:
        return None
    p = float(stats.ttest_ind(a, b, equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = [_align(tables["runs"])]
    steps = {row["step"] for row in tables["runs"]}
    if len(steps) > 1:
        parts.append(f"note: the runs stand at different updates, {min(steps)} to {max(steps)}")
    if any(row["runs"] > 1 for row in tables["groups"]):
        parts.append(f"mean ± standard deviation over the runs of a group\n{_align(tables['groups'])}")
        if tables["tests"]:
            seeds = ", ".join(str(row["seeds"]) for row in tables["groups"])
            text = f"Welch's t-test over seeds ({seeds} in the groups); p also by Holm's method over a metric's pairs"
            parts.append(f"{text}; -: needs 2 seeds a group, each once, and scipy\n{_align(tables['tests'])}")
    return "\n\n".join(parts)


def _align(rows: Sequence[Mapping[str, Any]]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, dict):
            return show(value["mean"]) + ("" if value["deviation"] is None else f" ± {value['deviation']:.2g}")
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else shorten(value)

    texts = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return "\n".join("  ".join(f"{t:{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in texts)


def draw(groups: Mapping[str, Sequence[Run]], path: Path) -> None:
    """One picture with a panel for each metric and a curve for each run, those of a group in one colour."""
    lines = [line for group in groups.values() for run in group for line in run.lines]
    panels = [(title, keys, key) for title, keys in choose_panels(lines) for key in keys]
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = new_figure(15, 2.4 * rows + 0.4 + 0.25 * len(groups), "")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, keys, key) in zip(axes, panels, strict=False):
        for number, group in enumerate(groups.values()):
            for run in group:
                points = [(line["step"], line[key] * UNITS.get(key, 1.0)) for line in _with_number(run.lines, key)]
                if points:
                    marker = "." if len(points) < 4 else None
                    axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1.0, marker=marker)
        if title in LOGARITHMIC and all(line[key] > 0 for line in _with_number(lines, key)):
            axis.set_yscale("log")
        axis.set_title(title if len(keys) == 1 else key.replace("_", " "), fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for number, name in enumerate(groups):
        axes[0].plot([], [], color=f"C{number % 10}", label=escape(shorten(name)))
    figure.legend(fontsize=8, loc="outside lower center")
    save_figure(figure, path)


def _with_number(lines: Iterable[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    return [line for line in lines if line.get(key) is not None]
