"""The closing table of `make bench`, and stored rows again: `python -m benchmarks.summary [--files FILE.jsonl...]`.

Reads JSON lines only and measures nothing. Without `--files`: what `--results` has of operators
(`benchmarks.operators`), training steps (`benchmarks.step`) and growth (`benchmarks.growth`), on the CPU and, where
there are records, on a GPU, with plots; every section says on what, from which commit and by which command it was
measured, and a file that is missing is named with the command that makes it. With them: every row, a table for each
kind. Emulated records are counted and left out: they are no measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import plots, report
from .harness.record import RESULTS, newest, parse, read_rows

Row = dict[str, Any]
SECTIONS: dict[str, tuple[str, str, Callable[[list[Row]], str], Callable[[list[Row], Path], None]]] = {
    "cpu": ("Operators", "operators", report.operators_table, plots.roofline),
    "step-cpu": ("Training steps", "step", report.table, plots.steps),
    "growth-cpu": ("Growth", "growth", report.growth_table, plots.growth),
    "step-cuda": ("Training steps", "step --device cuda", report.table, plots.steps),
    "growth-cuda": ("Growth", "growth --device cuda", report.growth_table, plots.growth),
}
"""File without its suffix -> title, command, how rows are shown and drawn, in the order they are shown."""


def section(folder: Path, name: str) -> str:
    """One file with its origin and plot; empty: nothing to say."""
    title, module, show, draw = SECTIONS[name]
    path, plot = folder / f"{name}.jsonl", folder / f"{name}.png"
    title += " on a GPU" if name.endswith("cuda") else " on the CPU"
    rows = [r for r in newest(read_rows(path)) if not r.get("emulated") and not r.get("dry")]
    if not rows:
        return "" if name.endswith("cuda") else f"{title}: no {path}; `python -m benchmarks.{module}` makes it"
    draw(rows, plot)
    head = [f"{title}, by `python -m benchmarks.{module}`", *(f"  {where}" for where in report.origins(rows))]
    return "\n".join([*head, "", show(rows), "", f"plot: {plot}"])


def show_rows(rows: list[Row], as_markdown: bool) -> None:
    """Every measured row, kind by kind."""
    measured = [row for row in rows if not row.get("emulated")]
    for kind in report.COLUMNS:
        own = [row for row in measured if report.kind_of(row) == kind]
        if own:
            lines = [*map(report.text_row, own), report.summary(own)]
            print(report.table(own) if as_markdown else "\n".join(lines))
    if len(measured) < len(rows):
        left_out = len(rows) - len(measured)
        print(f"left out: {left_out} emulated records, which are no measurements", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Prints the sections that there are, and names the others; or the rows of the files that are named."""
    options = parse(
        "summary", __doc__, arguments, native=False,
        results=(RESULTS, "folder of the JSON lines; plots go there, too"),
        files=([""], "JSON lines of benchmark runs, instead of the sections"),
        markdown=(False, "with --files: Markdown tables"),
        plot=(None, "with --files: draw the operators' roofline plot into this file"),
    )  # fmt: skip
    if options.files == [""]:
        print("\n\n".join(filter(None, (section(options.results, name) for name in SECTIONS))))
        return
    rows = [row for path in options.files for row in read_rows(Path(path))]
    show_rows(rows, options.markdown)
    if options.plot:
        plots.roofline(rows, Path(options.plot))


if __name__ == "__main__":
    main()
