"""Table and plot of `benchmarks.growth`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import origin

Row = dict[str, Any]
COLOURS = {"plain": "C3", "d2v": "C0"}


def fit_exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Exponent e of the power law y = a x^e by least squares of the logarithms; None for fewer than two positive x."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x > 0 and y > 0]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def text_row(row: Row) -> str:
    """One line for the terminal."""
    if row["kind"] == "stop":
        return f"{row['curve']:<11}{row['x']:>10g}  stopped ({', '.join(row['forms'])}): {row['reason']}"
    parts = []
    for name, form in row["forms"].items():
        memory = f", {form['memory'] / 1e6:.0f} MB" if "memory" in form else ""
        parts.append(f"{name} {form['minimum'] * 1e3:.2f} ms{memory}")
        if "samples_per_second" in form:
            parts[-1] = f"{form['samples_per_second']:.1f} samples/s"
        if "exposed_share" in form:
            parts[-1] += f", exposed exchange of gradients {form['exposed_share']:.0%}"
    return f"{row['curve']:<11}{row['x']:>10g}  {'; '.join(parts)}   {row['case']}"


def series(rows: list[Row], curve: str, form: str, value: str) -> tuple[list[float], list[float]]:
    """Places and values of a curve, in ascending order.

    value: "time" (seconds of a step), "row" (seconds of a step over student rows), "memory" (bytes) or "rate" (samples
    a second).
    """
    points = []
    for r in rows:
        if r["kind"] != "point" or r["curve"] != curve or form not in r["forms"]:
            continue
        found = r["forms"][form]
        if value in ("time", "row"):
            points.append((float(r["x"]), found["minimum"] / (r["rows"] if value == "row" else 1)))
        elif (key := "samples_per_second" if value == "rate" else "memory") in found:
            points.append((float(r["x"]), found[key]))
    points.sort()
    return [x for x, _ in points], [y for _, y in points]


def curves_of(rows: list[Row]) -> list[tuple[str, int, list[Row]]]:
    """Name, threads and records of every curve, in the order they were measured."""
    names = dict.fromkeys((r["curve"], r["threads"]) for r in rows)
    return [(c, t, [r for r in rows if (r["curve"], r["threads"]) == (c, t)]) for c, t in names]


def curve_line(own: list[Row], curve: str, threads: int) -> str:
    """A curve in one line: its range, exponents of time and memory, the ratio of the forms, where it stopped."""
    points = sorted((r for r in own if r["kind"] == "point"), key=lambda r: r["x"])
    parts = []
    if points:
        low, high = points[0]["x"], points[-1]["x"]
        parts.append(f"{points[0]['label']} {low:g} to {high:g}")
        if any("samples_per_second" in r["forms"]["d2v"] for r in points):
            parts += [f"{r['forms']['d2v']['samples_per_second']:.1f} samples/s at {r['x']:g}" for r in points]
            last = points[-1]["forms"]["d2v"]
            if "exposed_share" in last:
                parts.append(f"exposed exchange of gradients {last['exposed_share']:.0%} at {high:g}")
        else:
            for value, word in (("time", "time"), ("memory", "memory")):
                for form in COLOURS:
                    exponent = fit_exponent(*series(own, curve, form, value))
                    if exponent is not None:
                        parts.append(f"{form} {word} ~ x^{exponent:.2f}")
            both = [r["forms"]["plain"]["minimum"] / r["forms"]["d2v"]["minimum"]
                    for r in points if {"plain", "d2v"} <= set(r["forms"])]  # fmt: skip
            if both:
                parts.append(f"plain/d2v {min(both):.2f} to {max(both):.2f}")
    parts += [f"{', '.join(r['forms'])} stopped before {r['x']:g}: {r['reason']}" for r in own if r["kind"] == "stop"]
    return f"{curve:<11}{threads} thread(s): {'; '.join(parts)}"


def table(rows: list[Row]) -> str:
    """One line a curve, in the order they were measured."""
    return "\n".join(curve_line(own, curve, threads) for curve, threads, own in curves_of(rows))


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each curve and quantity, both axes logarithmic, fitted exponents in the legends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = []
    for curve, threads, own in curves_of(rows):
        for value in ("time", "memory", "rate"):
            hidden = value == "time" and series(own, curve, "d2v", "rate")[0]
            if series(own, curve, "d2v", value)[0] and not hidden:
                shown = "row" if curve == "masks" and value == "time" else value
                panels.append((own, curve, f"{curve}, {threads} thread(s)", shown))
    if not panels:
        return
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.9 * columns, 3.1 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, *panel)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    note = "dry run, no measurement: " if rows[0]["dry"] else ""
    figure.suptitle(f"{note}{rows[0]['device']}: {origin(rows[0]['machine'])}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_panel(axis: Any, rows: list[Row], curve: str, title: str, value: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    linear = curve in ("workers", "processes")
    factor, unit = {"time": (1e3, "ms a step"), "row": (1e6, "us a student row"), "memory": (1e-6, "MB at the peak"),
                    "rate": (1.0, "samples/s")}[value]  # fmt: skip
    for form, colour in COLOURS.items():
        xs, ys = series(rows, curve, form, value)
        if not xs:
            continue
        exponent = None if linear else fit_exponent(xs, ys)
        label = form if exponent is None else f"{form}: x^{exponent:.2f}"
        axis.plot(xs, [y * factor for y in ys], "o-", color=colour, label=label, markersize=4)
    axis.set(xscale="linear" if linear else "log", yscale="linear" if linear else "log", ylabel=unit,
             xlabel=next(r["label"] for r in rows if r["kind"] == "point"))  # fmt: skip
    places = sorted({x for form in COLOURS for x in series(rows, curve, form, value)[0]})
    axis.set_xticks(places, [f"{x:.3g}" if x < 1e4 else f"{x:.1e}" for x in places], fontsize=7)
    axis.minorticks_off()
    if linear:
        axis.set_ylim(bottom=0.0)
    else:
        # At least a decade, so that noise does not look like growth.
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
