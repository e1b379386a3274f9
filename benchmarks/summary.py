"""The closing table of `make bench`: `python -m benchmarks.summary [--results DIR]`.

Reads the stored JSON lines only and measures nothing: kernels (`benchmarks.kernels`), training steps
(`benchmarks.step`) and growth (`benchmarks.growth`), on the CPU and, where there are records, on a GPU. Draws the plots
of steps and growth. Every section says on what, from which commit and by which command it was measured; a file that is
missing is named with the command that makes it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import growth_report, report, step_report
from .gpu_record import read_records
from .kernels import RESULTS
from .tables import markdown, origins

Row = dict[str, Any]
RIVALS = ("eager", "compile")


def kernel_table(rows: list[Row]) -> str:
    """One line an operator: rows at their goals, median ratios to eager, compiled and all other rivals."""
    lines = []
    for op in dict.fromkeys(r["op"] for r in rows):
        own = [r for r in rows if r["op"] == op]
        with_goals = [r for r in own if r["goals"]]
        reached = sum(not report.missed_goals(r) for r in with_goals)
        others = sorted({name for r in own for name in r["ratios"]} - set(RIVALS))
        medians = {n: _median(r["ratios"].get(n) for r in own) for n in (*RIVALS, *others)}
        lines.append(
            (f"`{op}`", f"{reached} of {len(with_goals)}", *(medians[n] for n in RIVALS),
             ", ".join(f"{n} {medians[n]}" for n in others))
        )  # fmt: skip
    return markdown(("operator", "rows at their goals", "eager / ours", "compile / ours", "others / ours"), lines)


def _median(values: Any) -> str:
    found = [v for v in values if v is not None]
    return f"{statistics.median(found):.2f}x" if found else ""


def step_table(rows: list[Row]) -> str:
    """One line a case and thread count."""
    lines = []
    for row in rows:
        found = step_report.figures(row)
        cells = [f"{found[n]:.2f}x" if n in found else "" for n in ("faster", "compiled")]
        removed = f"{found['removed']:.0%}" if "removed" in found else ""
        memory = f"{found['memory']:.2f}" if "memory" in found else ""
        lines.append(
            (row["case"], row["threads"], f"{found['samples_per_second']:.1f}", *cells, removed, memory,
             "; ".join(step_report.missed_goals(row)))
        )  # fmt: skip
    head = ("step", "threads", "samples/s", "plain / d2v", "compiled plain / d2v all", "time outside products removed",
            "memory / plain", "missed goals")  # fmt: skip
    return markdown(head, lines)


def growth_table(rows: list[Row]) -> str:
    """One line a curve."""
    return "\n".join(f"- {line}" for line in growth_report.table(rows).splitlines())


class Section:
    """One file of records, how it is shown, and how it is made."""

    def __init__(
        self, file: str, title: str, command: str, show: Callable[[list[Row]], str],
        draw: Callable[[list[Row], Path], None] | None = None, needed: bool = True,
    ) -> None:  # fmt: skip
        self.file, self.title, self.command, self.show, self.draw = file, title, command, show, draw
        self.needed = needed
        """Named where it is missing."""

    def text(self, folder: Path) -> str | None:
        """The section with its origin and plot; None: nothing to say."""
        path = folder / self.file
        rows = [r for r in read_records(path) if not r.get("emulated") and not r.get("dry")]
        if not rows:
            return f"{self.title}: no {path}; `{self.command}` makes it" if self.needed else None
        lines = [f"{self.title}, by `{self.command}`", *[f"  {where}" for where in origins(rows)], "", self.show(rows)]
        if self.draw is not None:
            plot = path.with_suffix(".png")
            self.draw(rows, plot)
            lines += ["", f"plot: {plot}"]
        return "\n".join(lines)


def sections() -> list[Section]:
    """In the order they are shown."""
    found = [Section("cpu.jsonl", "Kernels on the CPU", "python -m benchmarks.kernels", kernel_table,
                     report.roofline_plot)]  # fmt: skip
    for device, words in (("cpu", "on the CPU"), ("cuda", "on a GPU")):
        more, needed = "" if device == "cpu" else f" --device {device}", device == "cpu"
        found += [
            Section(f"step-{device}.jsonl", f"Training steps {words}", f"python -m benchmarks.step{more}", step_table,
                    step_report.draw, needed),
            Section(f"growth-{device}.jsonl", f"Growth {words}", f"python -m benchmarks.growth{more}", growth_table,
                    growth_report.draw, needed),
        ]  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    """Prints the sections that there are, and names the others."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON lines; plots go there, too")
    options = parser.parse_args(arguments)
    texts = [section.text(options.results) for section in sections()]
    print("\n\n".join(text for text in texts if text is not None))


if __name__ == "__main__":
    main()
