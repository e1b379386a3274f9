"""Tables and plots of stored benchmark rows: `python -m benchmarks.report FILE.jsonl... [--markdown] [--plot PNG]`.

Takes CPU runs (benchmarks.kernels), training steps (benchmarks.step) and GPU runs (benchmarks.gpu) together, one table
for each kind. Emulated records
are counted and left out: they are no measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import gpu_report, step_report
from .tables import markdown, origin

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def missed_goals(row: Row) -> list[str]:
    """Goals of this row that were not reached, as text."""
    missed = []
    for name, goal in row["goals"].items():
        if name == "floor":
            # Two threads share what one cannot hide: the published goal is tighter there.
            limit = min(goal, 2.0) if row["threads"] > 1 else goal
            if row["over_floor"] > limit:
                missed.append(f"{row['over_floor']:.2f} of floor > {limit:g}")
        elif row["ratios"][name] < goal:
            missed.append(f"{row['ratios'][name]:.2f}x {name} < {goal:g}")
    return missed


def text_row(row: Row) -> str:
    """One line for the terminal."""
    ours = row["seconds"]["d2v"]["minimum"]
    ratios = "  ".join(f"{v:5.2f}x {k}" for k, v in row["ratios"].items())
    floor = f"{row['over_floor']:5.2f} of floor" if row["over_floor"] else " " * 14
    missed = missed_goals(row)
    return (
        f"{row['op']:<23} {row['case']:<46} {row['dtype']:<8} {row['threads']}t  {row['bytes'] / 1e6:7.1f} MB "
        f"{ours * 1e3:8.3f} ms  {floor}  {ratios}" + (f"   missed: {'; '.join(missed)}" if missed else "")
    )


def summary(rows: list[Row]) -> str:
    """Last line of a run: goals reached, and where the numbers come from."""
    with_goals = [row for row in rows if row["goals"]]
    reached = sum(not missed_goals(row) for row in with_goals)
    backends = sorted({row["backend"] for row in rows})
    where = origin(rows[0]["machine"])
    return f"goals reached in {reached} of {len(with_goals)} rows; backend {', '.join(backends)}, {where}"


def markdown_table(rows: list[Row]) -> str:
    """The README's table."""
    head = ("operator", "case", "dtype", "threads", "MB", "ms", "time / floor", "faster than")
    return markdown(head, map(_cells, rows))


def _cells(row: Row) -> tuple[object, ...]:
    ratios = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in row["ratios"].items())
    floor = f"{row['over_floor']:.2f}" if row["over_floor"] else ""
    ours = row["seconds"]["d2v"]["minimum"] * 1e3
    return (
        f"`{row['op']}`", row["case"], row["dtype"], row["threads"], f"{row['bytes'] / 1e6:.1f}", f"{ours:.3f}", floor,
        ratios,
    )  # fmt: skip


def roofline_plot(rows: list[Row], path: Path) -> None:
    """Bytes per second of each case against its size, with the measured floor of the same run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = sorted({row["threads"] for row in rows})
    figure, axes = plt.subplots(1, len(threads), figsize=(6.4 * len(threads), 4.8), squeeze=False, sharey=True)
    colours = {op: f"C{i}" for i, op in enumerate(sorted({row["op"] for row in rows}))}
    for axis, count in zip(axes[0], threads, strict=True):
        for row in (r for r in rows if r["threads"] == count and r["floor_s"]):
            size = row["bytes"] / 1e6
            ours = row["bytes"] / row["seconds"]["d2v"]["minimum"] / 1e9
            floor = row["bytes"] / row["floor_s"] / 1e9
            axis.plot([size, size], [ours, floor], color=colours[row["op"]], alpha=0.4, linewidth=1)
            axis.plot(size, floor, "_", color="black", markersize=9)
            axis.plot(size, ours, "o" if row["dtype"] == "float32" else "s", color=colours[row["op"]], markersize=5)
        axis.set(xscale="log", yscale="log", xlabel="bytes read once + written once (MB)", title=f"{count} thread(s)")
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel("GB/s")
    handles = [plt.Line2D([], [], color=c, marker="o", linestyle="", label=op) for op, c in colours.items()]
    handles.append(plt.Line2D([], [], color="black", marker="_", linestyle="", label="floor of the same run"))
    axes[0][0].legend(handles=handles, fontsize=8)
    figure.suptitle(origin(rows[0]["machine"]), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row], int]:
    """Rows of CPU runs, records of GPU runs, and how many emulated records were left out."""
    measured = [row for row in rows if not row.get("emulated")]
    on_cpu = [row for row in measured if "kind" not in row]
    return on_cpu, [row for row in measured if "kind" in row], len(rows) - len(measured)


def main(arguments: list[str] | None = None) -> None:
    """Prints stored runs again, as text or Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="JSON lines of benchmark runs")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables, as the README has them")
    parser.add_argument("--plot", type=Path, help="draw the GPU run's roofline plot into this file")
    options = parser.parse_args(arguments)
    on_cpu, on_gpu, emulated = split_rows([row for path in options.files for row in read_rows(path)])
    if on_cpu:
        print(markdown_table(on_cpu) if options.markdown else "\n".join([*map(text_row, on_cpu), summary(on_cpu)]))
    steps = [row for row in on_gpu if row["kind"] == "step"]
    if steps:
        lines = [*map(step_report.text_row, steps), step_report.summary(steps)]
        print(step_report.markdown_table(steps) if options.markdown else "\n".join(lines))
    measured = gpu_report.measurements(on_gpu)
    if measured:
        print(gpu_report.table(measured))
        if options.plot:
            gpu_report.roofline_plot(on_gpu, options.plot)
    if emulated:
        print(f"left out: {emulated} emulated records, which are no measurements", file=sys.stderr)


if __name__ == "__main__":
    main()
