"""Plots of stored rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .report import FORMS, curves_of, fit_exponent, kind_of, origin, series

Row = dict[str, Any]
COLOURS = {"plain": "C3", "d2v": "C0"}


@contextlib.contextmanager
def figure(path: Path, title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **more: Any) -> Iterator:
    """Axes (rows, columns) of a picture that is written at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=size)
    FigureCanvasAgg(picture)
    dpi = more.pop("dpi", 110)
    yield picture.subplots(rows, columns, squeeze=False, **more)
    picture.suptitle(title, fontsize=9)
    picture.tight_layout()
    picture.savefig(path, dpi=dpi)


def legend(axis: Any, colours: dict[str, str]) -> None:
    """Names of filled areas."""
    from matplotlib.patches import Patch

    axis.legend(handles=[Patch(color=colour, label=name) for name, colour in colours.items()], fontsize=8)


def roofline(rows: list[Row], path: Path) -> None:
    """Bytes per second of each case against its size: under the floor of the same run, a panel for each number of
    threads; on a GPU under the copy rate of the same run, and beside eager."""
    rows = [r for r in rows if not r.get("emulated")]
    copies = [r for r in rows if kind_of(r) == "copy"][-1:]
    rows = [r for r in rows if (kind_of(r) == "operator" and r["floor_s"])
            or (kind_of(r) == "measurement" and r["chosen"] and not r["flops"])]  # fmt: skip
    panels = sorted({r.get("threads", 0) for r in rows})
    with figure(path, origin(rows[0]["machine"]), (6.4 * len(panels), 5.0), 1, len(panels), sharey=True) as axes:
        for axis, threads in zip(axes[0], panels, strict=True):
            if not threads:
                for r in copies:
                    points = sorted((int(size) / 1e6, rate / 1e9) for size, rate in r["bytes_per_second"].items())
                    axis.plot(*zip(*points, strict=True), color="black", linewidth=1, label="copy of the same run")
            for i, op in enumerate(sorted({r["op"] for r in rows})):
                own = [r for r in rows if r["op"] == op and r.get("threads", 0) == threads]
                ours = [_rate(r, r.get("chosen", "d2v")) for r in own]
                rivals = [_rate(r, "floor" if threads else "eager") for r in own]
                axis.plot([x for x, _ in ours], [y for _, y in ours], "o", color=f"C{i}", label=op, markersize=5)
                axis.plot([x for x, _ in rivals], [y for _, y in rivals], "_" if threads else "x", color=f"C{i}")
            title = f"{threads} thread(s); bars: floor of the same run" if threads else "crosses: eager"
            axis.set(xscale="log", yscale="log", xlabel="bytes read once + written once (MB)", title=title)
            axis.grid(True, which="both", alpha=0.25)
        axes[0][0].set_ylabel("GB/s")
        axes[0][0].legend(fontsize=8)


def _rate(row: Row, name: str) -> tuple[float, float]:
    """Megabytes of a case, and gigabytes a second of a contender; nothing where it did not run."""
    on_gpu = kind_of(row) == "measurement"
    seconds = row["floor_s"] if name == "floor" else row["seconds"].get(name, {}).get("median" if on_gpu else "minimum")
    return row["bytes"] / 1e6, row["bytes"] / seconds / 1e9 if seconds else math.nan


def steps(rows: list[Row], path: Path) -> None:
    """Phases of every form, samples a second and memory, for each case."""
    names = [n for n in FORMS if any(n in row["forms"] for row in rows)]
    phases = list(next(iter(rows[0]["forms"].values()))["phases"])
    height, title = 0.8 / len(names), f"training steps on {rows[0]['device']}: {origin(rows[0]['machine'])}"
    with figure(path, title, (17, 0.7 + 0.75 * len(rows)), 1, 3, sharey=True) as ((times, speed, memory),):
        for i, row in enumerate(rows):
            plain = row["forms"].get("plain") or next(iter(row["forms"].values()))
            for j, name in enumerate(names):
                if name not in row["forms"]:
                    continue
                form, place, left = row["forms"][name], i + (j - (len(names) - 1) / 2) * height, 0.0
                total = sum(form["phases"].values())
                for k, phase in enumerate(phases):
                    width = form["phases"][phase] / total * form["minimum"] / plain["minimum"]
                    times.barh(place, width, height * 0.92, left=left, color=f"C{k}", alpha=1.0 - 0.18 * j)
                    left += width
                speed.barh(place, plain["minimum"] / form["minimum"], height * 0.92, color=f"C{j}")
                if "memory" in form:
                    memory.barh(place, form["memory"] / plain["memory"], height * 0.92, color=f"C{j}")
        times.set_yticks(range(len(rows)), [f"{row['case']}, {row['threads']} thread(s)" for row in rows])
        times.invert_yaxis()
        times.set(xlabel="time of a step over the plain form's (top to bottom: " + ", ".join(names) + ")")
        speed.set(xlabel="samples a second over the plain form's")
        memory.set(xlabel="peak memory over the plain form's")
        legend(times, {phase: f"C{k}" for k, phase in enumerate(phases)})
        legend(speed, {name: f"C{j}" for j, name in enumerate(names)})
        for axis in (times, speed, memory):
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.grid(axis="x", alpha=0.25)


def growth(rows: list[Row], path: Path) -> None:
    """A panel for each curve and quantity, both axes logarithmic, fitted exponents in the legends."""
    panels = []
    for curve, threads, own in curves_of(rows):
        rated = bool(series(own, curve, "d2v", "rate")[0])
        for value in ("rate", "memory") if rated else ("row" if curve == "masks" else "time", "memory"):
            if series(own, curve, "d2v", value)[0]:
                panels.append((own, curve, f"{curve}, {threads} thread(s)", value))
    if not panels:
        return
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    note = "dry run, no measurement: " if rows[0]["dry"] else ""
    title = f"{note}{rows[0]['device']}: {origin(rows[0]['machine'])}"
    with figure(path, title, (3.9 * columns, 3.1 * lines), lines, columns, dpi=90) as axes:
        for axis, panel in zip(axes.flat, panels, strict=False):
            _growth_panel(axis, *panel)
        for axis in list(axes.flat)[len(panels) :]:
            axis.axis("off")


def _growth_panel(axis: Any, rows: list[Row], curve: str, title: str, value: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    linear = curve in ("workers", "processes")
    factor, unit = {"time": (1e3, "ms a step"), "row": (1e6, "us a student row"), "memory": (1e-6, "MB at the peak"),
                    "rate": (1.0, "samples/s")}[value]  # fmt: skip
    places: set[float] = set()
    for form, colour in COLOURS.items():
        xs, ys = series(rows, curve, form, value)
        if not xs:
            continue
        places.update(xs)
        exponent = None if linear else fit_exponent(xs, ys)
        label = form if exponent is None else f"{form}: x^{exponent:.2f}"
        axis.plot(xs, [y * factor for y in ys], "o-", color=colour, label=label, markersize=4)
    scale, marks = "linear" if linear else "log", sorted(places)
    axis.set(xscale=scale, yscale=scale, ylabel=unit, xlabel=next(r["label"] for r in rows if r["kind"] == "point"))
    axis.set_xticks(marks, [f"{x:.3g}" if x < 1e4 else f"{x:.1e}" for x in marks], fontsize=7)
    axis.minorticks_off()
    if linear:
        axis.set_ylim(bottom=0.0)
    else:  # at least a decade, so that noise does not look like growth
        low, high = axis.get_ylim()
        wider = max(1.0, math.sqrt(10.0 / (high / low)))
        axis.set_ylim(low / wider, high * wider)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    stops = [r for r in rows if r["kind"] == "stop"]
    ends = "".join(f"\n{', '.join(r['forms'])} stopped before {r['x']:g}" for r in stops)
    axis.set_title(title + ends, fontsize=8)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=7)
