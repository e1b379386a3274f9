"""`make bench-check`: ratios of this machine against the stored ones; absolute times are never compared.

A kernel fails when its ratio to a rival, or the floor's share of its time, falls below `--allow` of the stored value in
every one of three attempts (timings of a shared machine drift by a third); a training step of a tiny recipe when the
plain form's time or peak memory over this library's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from . import operators, step
from .harness.record import RESULTS, newest, parse, read_rows
from .harness.report import figures
from .training.cases import CPU

Row = dict[str, Any]
Ratios = dict[str, float]
ATTEMPTS = 3


def ratios_of(row: Row) -> Ratios:
    """Ratios of a kernel, where more is better."""
    floor = {"floor": 1.0 / row["over_floor"]} if row["over_floor"] else {}
    return {**row["ratios"], **floor}


def step_ratios(row: Row) -> Ratios:
    """Plain over d2v of a step, time and memory: more is better."""
    found = figures(row)
    ratios = {"plain time": found["faster"]} if "faster" in found else {}
    return {**ratios, **({"plain memory": 1.0 / found["memory"]} if "memory" in found else {})}


def worse(new: Ratios, old: Ratios, names: Iterable[str], allow: float) -> list[str]:
    """Ratios that fell below the allowed share of the stored ones, as text."""
    return [
        f"{name}: stored {old[name]:.2f}, got {new[name]:.2f}"
        for name in names
        if name in new and name in old and new[name] < allow * old[name]
    ]


def attempt(title: str, measure: Callable[[], Ratios], old: Ratios, names: Iterable[str], allow: float) -> list[str]:
    """Problems that every attempt had; prints a line."""
    problems: list[str] = []
    for _ in range(ATTEMPTS):
        problems = worse(measure(), old, names, allow)
        if not problems:
            break
    print(f"{'worse' if problems else 'ok':<6} {title}  {'; '.join(problems)}", flush=True)
    return problems


def check_kernels(path: Path, only: str, allow: float) -> list[str]:
    """Problems of the kernels whose operator or name contains `only`."""
    stored = {(r["op"], r["case"], r["dtype"]): r for r in newest(read_rows(path)) if r["threads"] == 1}
    failed = []
    for number, case in enumerate(operators.cpu_cases()):
        before, title = stored.get(case.key), f"{case.op} {case.name} {case.dtype}"
        if before is not None and only in title:
            measure = partial(lambda n: ratios_of(operators.ask_for_row(n, 1)), number)
            failed += attempt(title, measure, ratios_of(before), before["goals"], allow)
    return failed


def measure_step(case: str) -> Ratios:
    """Ratios of the tiny step of this name, measured in processes of their own."""
    found = next(c for c in CPU if c.name == case)
    order = {"device": "cpu", "forms": ["plain", "d2v"], "rounds": 15, "budget": 5.0, "threads": 1}
    return step_ratios(step.add_memory(step.ask_for_row(found, order), step.ask_for_memory(found, order)))


def check_steps(path: Path, only: str, allow: float, measure: Callable[[str], Ratios] = measure_step) -> list[str]:
    """Problems of the tiny recipes' steps whose name contains `only`; a line where there is nothing to compare with."""
    if not path.is_file():
        print(f"steps: not checked, there is no {path}; `python -m benchmarks.step` makes it", flush=True)
        return []
    known = {c.name for c in CPU}
    failed, found = [], 0
    for row in newest(read_rows(path)):
        name, old = row["case"], step_ratios(row)
        if row["threads"] != 1 or not row["recipe"].endswith("-tiny") or only not in f"step {name}":
            continue
        if name not in known:
            print(f"gone   step {name}  is stored and no longer a case", flush=True)
            continue
        found += 1
        failed += attempt(f"step {name}", partial(measure, name), old, old, allow)
    if not found and not only:
        print(f"steps: not checked, {path} has no tiny recipe with one thread", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Exit code 1 when a row is worse in every attempt."""
    options = parse(
        "check", __doc__, arguments,
        stored=(RESULTS / "cpu.jsonl", "kernels to compare with"),
        steps=(RESULTS / "step-cpu.jsonl", "steps to compare with"),
        only=("", "check what has this text in its name; steps begin with 'step '"),
        allow=(0.65, "share of a stored ratio that still passes"),
    )  # fmt: skip
    failed = check_kernels(options.stored, options.only, options.allow)
    failed += check_steps(options.steps, options.only, options.allow)
    if failed:
        raise SystemExit(f"{len(failed)} ratios fell below {options.allow:g} of the stored ones")


if __name__ == "__main__":
    main()
