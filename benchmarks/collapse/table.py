"""When a monitor leaves the band of the healthy runs; table and picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.plots import figure
from .faults import EVERY, FAULTS, MONITORS

Row = dict[str, Any]
WINDOW = 2
"""Lines before and after one whose healthy values count for its band."""
LASTING = 3
"""Lines outside of the band that count as having left it."""


def band(healthy: Sequence[Row], monitor: str, step: int) -> tuple[float, float]:
    """Lowest and highest value of the healthy runs around an update, or at their end, widened by their distance on
    either side, and by at least a twentieth of the value: few runs do not show the whole spread."""
    lines = [line for row in healthy for line in row["lines"]]
    step = min(step, max(line["step"] for line in lines))
    near = [line[monitor] for line in lines if abs(line["step"] - step) <= WINDOW * EVERY]
    low, high = min(near), max(near)
    margin = max(high - low, 0.05 * abs(low), 0.05 * abs(high))
    return low - margin, high + margin


def left_band(row: Row, healthy: Sequence[Row], monitor: str) -> int | None:
    """The update at which a monitor has left the band: the first of `LASTING` lines outside; None: it did not."""
    outside: list[int] = []
    for line in row["lines"]:
        low, high = band(healthy, monitor, line["step"])
        outside = [] if low <= line[monitor] <= high else [*outside, int(line["step"])]  # NaN is outside
        if len(outside) == LASTING:
            return outside[0]
    return outside[0] if outside and row["stop"] else None


def describe(values: Sequence[float | None]) -> str:
    """Least to most of the runs; "no": none did; how many did, where not all."""
    found = [int(v) for v in values if v is not None]
    if not found:
        return "no"
    ends = f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}"
    return ends if len(found) == len(values) else f"{ends} ({len(found)} of {len(values)})"


def loss_course(rows: Sequence[Row]) -> str:
    """Median over the runs of the last loss over the first one."""
    courses = [row["lines"][-1]["loss"] / row["lines"][0]["loss"] for row in rows if row["lines"]]
    return f"x {statistics.median(courses):.2f}" if courses else ""


def table(rows: Sequence[Row]) -> str:
    """A row a fault, over all recipes and seeds; updates at which each monitor has left the band, and of the stop."""
    healthy = [row for row in rows if not row["fault"]]
    names = [name for name in MONITORS if name != "grad_norm"]
    lines = [f"| fault | runs | loss | {' | '.join(f'`{n}`' for n in names)} | stop |",
             "|---" * (len(names) + 4) + "|"]  # fmt: skip
    for fault in FAULTS:
        own = [row for row in rows if row["fault"] == fault]
        if not own:
            continue
        left = {
            name: describe([left_band(r, [h for h in healthy if h["recipe"] == r["recipe"]], name) for r in own])
            for name in names
        }
        cells = [fault, str(len(own)), loss_course(own), *left.values(), describe([row["stop"] for row in own])]
        lines.append(f"| {' | '.join(cells)} |")
    stopped = describe([row["stop"] for row in healthy])
    lines.append(f"| none | {len(healthy)} | {loss_course(healthy)} | {' | '.join('' for _ in names)} | {stopped} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], recipe: str, path: Path, title: str) -> None:
    """A panel a monitor: healthy runs of a recipe as an area, each fault as a line."""
    own = [row for row in rows if row["recipe"] == recipe and row["lines"]]
    healthy = [row for row in own if not row["fault"]]
    steps = [line["step"] for line in healthy[0]["lines"] if line["step"] <= 200]
    with figure(path, title, (13, 6.0), 2, 4) as axes:
        for axis, monitor in zip(axes.flat, MONITORS, strict=True):
            edges = [band(healthy, monitor, step) for step in steps]
            axis.fill_between(steps, *zip(*edges, strict=True), color="0.85", label="healthy runs, widened")
            for number, fault in enumerate(FAULTS):
                for row in [r for r in own if r["fault"] == fault][:1]:
                    points = [(line["step"], line[monitor]) for line in row["lines"]]
                    axis.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=fault)
            axis.set(title=monitor, xlabel="update")
            axis.set_yscale("symlog" if monitor == "explained_variance" else "log")
            axis.grid(alpha=0.25)
        axes[0][0].legend(fontsize=7)
