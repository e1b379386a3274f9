"""`make bench-check`: ratios of this machine against the stored ones; absolute times are never compared.

A row fails when its ratio to a rival, or the floor's share of its time, falls below `--allow` of the stored value in
every one of three attempts (timings of a shared machine drift by a third).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import report
from .cases import all_cases
from .kernels import RESULTS, run_in_process

Row = dict[str, Any]


def ratios_of(row: Row) -> dict[str, float]:
    """Ratios where more is better."""
    floor = {"floor": 1.0 / row["over_floor"]} if row["over_floor"] else {}
    return {**row["ratios"], **floor}


def worse(row: Row, stored: Row, allow: float) -> list[str]:
    """Ratios that fell below the allowed share of the stored ones, as text."""
    new, old = ratios_of(row), ratios_of(stored)
    return [
        f"{name}: stored {old[name]:.2f}, got {new[name]:.2f}"
        for name in row["goals"]
        if name in new and name in old and new[name] < allow * old[name]
    ]


def main() -> None:
    """Exit code 1 when a row is worse in every attempt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--stored", type=Path, default=RESULTS / "cpu.jsonl", help="JSON lines to compare with")
    parser.add_argument("--only", default="", help="check the cases whose operator or name contains this text")
    parser.add_argument("--allow", type=float, default=0.65, help="share of a stored ratio that still passes")
    options = parser.parse_args()
    stored = {(r["op"], r["case"], r["dtype"]): r for r in report.read_rows(options.stored) if r["threads"] == 1}
    failed = []
    for number, case in enumerate(all_cases()):
        before = stored.get((case.op, case.name, str(case.dtype).removeprefix("torch.")))
        if before is None or options.only not in f"{case.op} {case.name} {case.dtype}":
            continue
        problems: list[str] = []
        for _ in range(3):
            problems = worse(run_in_process(number, 1), before, options.allow)
            if not problems:
                break
        print(
            f"{'worse' if problems else 'ok':<6} {case.op} {case.name} {case.dtype}  {'; '.join(problems)}", flush=True
        )
        failed += problems
    if failed:
        raise SystemExit(f"{len(failed)} ratios fell below {options.allow:g} of the stored ones")


if __name__ == "__main__":
    main()
