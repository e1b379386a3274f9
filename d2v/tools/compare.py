"""`d2v compare`: what several runs reached, in which settings they differ, and whether that is more than chance."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v.config.fields import shorten
from d2v.finetune.report import RESULT
from d2v.folder import CONFIG, load_json
from d2v.tools.figures import new_figure, save_figure
from d2v.tools.plot import COLUMNS, LOGARITHMIC, PROBES, UNITS, choose_panels
from d2v.train.logging import read_metrics
from d2v.train.resume import flatten_config

SEED, NO_SETTING = "run.seed", ("run.dir",)
TEST = "Welch's t-test, p-values by Holm's method over the pairs of a metric"


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


@dataclass
class Group:
    """Runs that differ in their seeds alone."""

    options: dict[str, Any]
    runs: list[Run]

    @property
    def title(self) -> str:
        """Settings in which the groups differ."""
        return ",".join(f"{n.rpartition('.')[2]}={shorten(v)}" for n, v in self.options.items()) or "all"

    @property
    def seeds(self) -> int:
        """Number of different seeds."""
        return len({run.settings.get(SEED) for run in self.runs})

    def values(self, metric: str) -> list[float]:
        """Of the runs that have it."""
        return [run.values[metric] for run in self.runs if metric in run.values]


def compare(
    runs: Sequence[Path], *, metrics: Sequence[str] = (), output: Path | None = None, as_json: bool = False
) -> str:
    """A text with a table of runs, means over seeds and tests of the differences between groups; or the same as JSON.

    Args:
        runs: folders of runs, or of sweeps.
        metrics: what is compared; empty: `loss`, what was measured on held-out data, and what evaluations found.
        output: file for a picture with the curves of all runs; None: none.

    Raises:
        ValueError: no run in a folder, or no such metric.
    """
    found = [read_run(path) for folder in runs for path in list_runs(folder)]
    if not found:
        raise ValueError("runs: expected run folders or the folder of a sweep, got none")
    known = list(dict.fromkeys(name for run in found for name in run.values))
    for name in metrics:
        if name not in known:
            raise ValueError(f"metrics: expected some of {', '.join(known)}, got {name!r}")
    of_lines = {name for run in found for line in run.lines for name in line}
    metrics = metrics or [
        name for name in known
        if name == "loss" or name not in of_lines or (name.startswith("valid_") and name != "valid_step")
    ]  # fmt: skip
    options = find_differences(found)
    groups = make_groups(found, options)
    tests = [test for metric in metrics for test in compare_pairs(groups, metric)]
    if output is not None:
        draw(groups, output)
    if as_json:
        return json.dumps(_as_json(found, groups, options, metrics, tests))
    parts = [_table_of_runs(found, options, metrics), _table_of_groups(groups, metrics), _text_of_tests(groups, tests)]
    return "\n\n".join(part for part in parts if part) + (f"\n\n{output}" if output is not None else "")


def list_runs(folder: Path) -> list[Path]:
    """A run folder, or the run folders inside that of a sweep; `ValueError` where there is neither."""
    if (folder / CONFIG).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not inside:
        raise ValueError(f"runs: expected a run folder or the folder of a sweep, found none at {str(folder)!r}")
    return inside


def read_run(folder: Path) -> Run:
    """What a run folder says; `ValueError` names a damaged file."""
    lines = read_metrics(folder / "metrics.jsonl")
    values: dict[str, float] = {}
    for line in lines:
        values |= {k: math.nan if v is None else v for k, v in line.items() if v is None or isinstance(v, (int, float))}
    values.pop("step", None)
    probe = load_json(file) if (file := folder / "probe.json").is_file() else {}
    for name, _ in PROBES:
        if isinstance(result := probe.get(name), dict) and isinstance(value := result.get("pretrained"), (int, float)):
            values[name] = value
    for place in ("test", "evaluation"):
        scores = load_json(file) if (file := folder / place / RESULT).is_file() else {}
        values |= {f"{place}.{n}": v for n, v in scores.items() if f"{n}_low" in scores and isinstance(v, (int, float))}
    settings = flatten_config(flatten_config(load_json(folder / CONFIG)))
    return Run(folder, settings, lines, values)


def find_differences(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs differ; one that a run did not know yet counts as equal."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in NO_SETTING)
    texts = {name: {json.dumps(run.settings[name]) for run in runs if name in run.settings} for name in names}
    return [name for name, found in texts.items() if len(found) > 1]


def make_groups(runs: Sequence[Run], options: Sequence[str]) -> list[Group]:
    """Runs whose settings differ in the seed alone, together, in the order of the runs."""
    groups: dict[str, Group] = {}
    for run in runs:
        own = {name: run.settings.get(name) for name in options if name != SEED}
        groups.setdefault(json.dumps(own), Group(own, [])).runs.append(run)
    return list(groups.values())


def compare_pairs(groups: Sequence[Group], metric: str) -> list[dict[str, Any]]:
    """Difference of the means of each pair of groups and its p-values, single and by Holm's method over the pairs; None
    with fewer than two seeds in a group, without spread, or without scipy."""
    tests: list[dict[str, Any]] = []
    for first, second in itertools.combinations(groups, 2):
        a, b = first.values(metric), second.values(metric)
        if a and b:
            p = _welch(a, b) if min(first.seeds, second.seeds) > 1 else None
            difference = statistics.fmean(b) - statistics.fmean(a)
            tests.append({"metric": metric, "groups": [first.title, second.title], "difference": difference, "p": p})
    largest, known = 0.0, sorted((test for test in tests if test["p"] is not None), key=lambda test: test["p"])
    for i, test in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - i) * test["p"]))
        test["p_holm"] = largest
    return tests


def _welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    try:
        from scipy import stats
    except ModuleNotFoundError:
        return None
    if len(a) < 2 or len(b) < 2 or len({*a}) == len({*b}) == 1:
        return None
    p = float(stats.ttest_ind(a, b, equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _as_json(
    runs: Sequence[Run], groups: Sequence[Group], options: Sequence[str], metrics: Sequence[str], tests: Sequence[Any]
) -> dict[str, Any]:  # fmt: skip
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    of_groups = [
        {
            "options": group.options, "runs": [str(run.folder) for run in group.runs], "seeds": group.seeds,
            "metrics": {
                m: plain({"mean": statistics.fmean(v), "deviation": _spread(v), "runs": len(v)})
                for m in metrics if (v := group.values(m))
            },
        }
        for group in groups
    ]  # fmt: skip
    of_runs = [
        {
            "run": str(run.folder), "step": run.step, "values": plain(run.values),
            "options": {name: run.settings.get(name) for name in options},
        }
        for run in runs
    ]  # fmt: skip
    return {"runs": of_runs, "groups": of_groups, "tests": [plain(test) for test in tests]}


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{t:{w}}" for t, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _table_of_runs(runs: Sequence[Run], options: Sequence[str], metrics: Sequence[str]) -> str:
    def show(run: Run) -> list[str]:
        numbers = [f"{run.values[m]:.4g}" if m in run.values else "-" for m in metrics]
        return [str(run.folder), str(run.step), *numbers, *(shorten(run.settings.get(name, "-")) for name in options)]

    return _align([["run", "step", *metrics, *options], *map(show, runs)])


def _table_of_groups(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """Mean and standard deviation over the runs of each group; nothing where no group has several."""
    if all(len(group.runs) == 1 for group in groups):
        return ""

    def show(values: Sequence[float]) -> str:
        spread = _spread(values)
        return (
            "-"
            if not values
            else f"{statistics.fmean(values):.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
        )

    rows = [[g.title, str(len(g.runs)), str(g.seeds), *(show(g.values(m)) for m in metrics)] for g in groups]
    steps = {run.step for group in groups for run in group.runs}
    note = f"\nnote: the runs stand at different updates, {min(steps)} to {max(steps)}" if len(steps) > 1 else ""
    return _align([["mean ± standard deviation", "runs", "seeds", *metrics], *rows]) + note


def _text_of_tests(groups: Sequence[Group], tests: Sequence[Mapping[str, Any]]) -> str:
    if len(groups) < 2 or all(len(group.runs) == 1 for group in groups):
        return ""
    rows = [["metric", "from", "to", "difference", "p", "Holm"]]
    for test in tests:
        ps = ["-" if test.get(key) is None else f"{test[key]:.2g}" for key in ("p", "p_holm")]
        rows.append([test["metric"], *test["groups"], f"{test['difference']:+.3g}", *ps])
    seeds = ", ".join(str(group.seeds) for group in groups)
    return f"{TEST}; seeds in the groups: {seeds}; -: needs 2 seeds a group, and scipy\n{_align(rows)}"


def draw(groups: Sequence[Group], path: Path) -> None:
    """One picture with a panel for each metric and a curve for each run, those of a group in one colour."""
    lines = [line for group in groups for run in group.runs for line in run.lines]
    panels = [(title, key) for title, keys in choose_panels(lines) for key in keys]
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = new_figure(15, 2.4 * rows + 0.4 + 0.25 * len(groups), "")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (title, key) in zip(axes, panels, strict=False):
        for number, group in enumerate(groups):
            for run in group.runs:
                points = [
                    (line["step"], line[key] * UNITS.get(key, 1.0)) for line in run.lines if line.get(key) is not None
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), color=f"C{number % 10}", linewidth=1.0, label=group.title)
        if title in LOGARITHMIC and all((line.get(key) or 1) > 0 for line in lines):
            axis.set_yscale("log")
        axis.set_title(key.replace("_", " "), fontsize=10)
        axis.set_xlabel("update", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center")
    save_figure(figure, path)
