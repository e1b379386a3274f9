"""Planted collapses: when a monitor has left the band of the healthy runs, and a run from end to end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.collapse.faults import MONITORS, run_job
from benchmarks.collapse.table import describe, left_band, table


def row(values: list[float], **more: object) -> dict[str, object]:
    """A run with the same values of all monitors."""
    lines = [{"step": 10 * (i + 1), **dict.fromkeys(MONITORS, v)} for i, v in enumerate(values)]
    return {"recipe": "r", "fault": "", "seed": 2, "stop": None, "lines": lines, **more}


HEALTHY = [row([1.0] * 9), row([1.2] * 9)]


def test_three_lines_outside_of_the_band_have_left_it() -> None:
    # 1.0 to 1.2, widened by 0.2 on either side.
    assert left_band(row([0.81, 1.39, 0.81, 1.39]), HEALTHY, "loss") is None
    assert left_band(row([1.1, 0.7, 0.7, 1.1, 0.7, 0.7]), HEALTHY, "loss") is None
    assert left_band(row([1.1, 0.7, 1.5, math.nan, 1.1]), HEALTHY, "loss") == 20
    # A run that was stopped has no more lines.
    assert left_band(row([1.1, 0.7, 0.7], stop=30), HEALTHY, "loss") == 20
    assert [describe(v) for v in ([None], [10, 10], [10, 30], [10, None])] == ["no", "10", "10 to 30", "10 (1 of 2)"]


def test_the_table_counts_runs() -> None:
    rows = [*HEALTHY, row([0.5, 0.4, 0.25], fault="dead teacher", stop=30), row([], fault="decay 1", stop=0)]
    lines = table(rows).splitlines()
    assert lines[2] == f"| dead teacher | 1 | x 0.50 | {' | '.join(['10'] * 7)} | 30 |"
    assert lines[3] == f"| decay 1 | 1 |  | {' | '.join(['no'] * 7)} | 0 |"
    assert lines[4].startswith("| none | 2 | x 1.00 |") and lines[4].endswith("| no |")


@pytest.mark.parametrize(("fault", "stop"), [("decay 1", 0), ("", None)])
def test_a_run(fault: str, stop: int | None, tmp_path: Path) -> None:
    from benchmarks.collapse.data import write_data

    write_data("signals", tmp_path / "data" / "signals")
    result = run_job(("signals-tiny", fault, 2, 20, tmp_path))
    assert result["stop"] == stop
    assert [line["step"] for line in result["lines"]] == ([] if fault else [10, 20])
    assert run_job(("signals-tiny", fault, 2, 20, tmp_path)) == result  # stored
