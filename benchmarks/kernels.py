"""CPU kernel benchmark: `python -m benchmarks.kernels [--only OP] [--threads 1 2] [--processes 1]`.

Every contender's output is compared before timing; contenders are timed in turn in one process; each case runs in a
process of its own, several times with `--processes`. Writes JSON lines, prints one table, draws the roofline plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_kernels import _native, registry

from . import report
from .cases import Case, all_cases
from .machine import ROOT, machine_record
from .timing import time_interleaved

# Without these, glibc returns every large output to the system and the page faults of the next allocation, the same
# for all contenders, take several times longer than the kernels.
KEEP_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
RESULTS = ROOT / "benchmarks" / "results"


def check_equal(case: Case, contenders: dict[str, Any]) -> None:
    """Every contender's output equals ours; `AssertionError` names the one that differs."""
    wanted = [t.float().clone() for t in case.compare(contenders["d2v"]())]
    for name, call in contenders.items():
        if name.startswith("floor"):
            continue
        got: Sequence[Tensor] = case.compare(call())
        if name == "d2v":
            continue  # an operator that works in place has moved on; it was the first call that counted
        for a, b in zip(got, wanted, strict=True):
            message = f"{case.op} {case.name}: {name} differs from d2v"
            tolerance = max(case.tolerance, 1e-2) if a.dtype == torch.bfloat16 and case.tolerance else case.tolerance
            torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance, msg=message)


def backend_of(op: str, dtype: torch.dtype) -> str:
    """The backend that the operator takes for this case."""
    if op == "MaskSampler":
        return "native" if not _native.load_errors().get("_native") else "reference"
    name = op.removesuffix(" forward + backward").replace(" backward", "_backward")
    name = "gelu" if name == "gelu_linear" else name  # made of GELU and products of PyTorch
    dtypes = (dtype, torch.float32) if name in ("average_layers", "masked_regression_loss") else (dtype,)
    traits = ("instance", "none") if name == "average_layers" else ()
    return registry.choose(registry.Case(name, "cpu", dtypes, traits)).name


def run_case(case: Case, threads: int) -> dict[str, Any]:
    """Times one case; one JSON-able row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    contenders = case.build()
    check_equal(case, contenders)
    timings = time_interleaved(contenders)
    floor = min((t.minimum for name, t in timings.items() if name.startswith("floor")), default=None)
    ours = timings["d2v"]
    rivals = {name: t for name, t in timings.items() if not name.startswith(("floor", "d2v"))}
    return {
        "op": case.op,
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": threads,
        "backend": backend_of(case.op, case.dtype),
        "bytes": case.bytes,
        "seconds": {name: dataclasses.asdict(t) for name, t in timings.items()},
        "floor_s": floor,
        "over_floor": ours.minimum / floor if floor else None,
        "ratios": {name: t.minimum / ours.minimum for name, t in rivals.items()},
        "median_ratios": {name: t.median / ours.median for name, t in rivals.items()},
        "goals": case.goals,
    }


def merge_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the process with the median ratio to the first rival, with every process's ratios beside it."""

    def key(row: dict[str, Any]) -> float:
        return next(iter(row["ratios"].values()))

    chosen = sorted(rows, key=key)[len(rows) // 2]
    return {**chosen, "ratios_by_process": [row["ratios"] for row in rows]}


def run_in_process(number: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kernels", "--worker", str(number), str(threads)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **KEEP_PAGES})
    if run.returncode != 0:
        raise SystemExit(f"benchmark case {number} failed:\n{run.stdout}{run.stderr}")
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose operator or name contains this text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes per case")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.jsonl", help="JSON lines file to write")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs the cases and reports; see the module's text."""
    options = _parse(arguments)
    cases = all_cases()
    if options.worker:
        number, threads = options.worker
        print(json.dumps(run_case(cases[number], threads)))
        return
    numbers = [i for i, c in enumerate(cases) if options.only in f"{c.op} {c.name} {c.dtype}"]
    if not numbers:
        raise SystemExit(f"--only: expected part of a case's name, got {options.only!r}")
    machine = machine_record()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with options.output.open("w") as file:
        for i in numbers:
            for threads in options.threads:
                row = merge_rows([run_in_process(i, threads) for _ in range(options.processes)])
                row["machine"] = machine
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
                print(report.text_row(row), flush=True)
    print(report.summary(rows))
    report.roofline_plot(rows, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
