"""`make gpu`: all that only an NVIDIA GPU can show, in one command of under nine minutes.

    python -m benchmarks.gpu [--output FOLDER] [--dry] [--stages ...]

Builds the libraries in place for the GPU found, runs the GPU tests, the benchmarks of the moving average, the layer
average and the gathers, whole training steps, and then what is left: CUDA graphs, compute-sanitizer, all other cases.
Nothing is installed; what is missing is named, and what depends on it left out. Every stage says how long it may take
and has its record on disk before the next one begins. Records are kept in build/gpu-records and copied to the output
folder after each stage, so that the same command again goes on where the last one was stopped, in the middle of a stage
too, as long as sources, GPU and torch are the same (`--fresh` begins anew). Three commands should be enough (estimate).
What to look at, and what to change then: docs/gpu-first-run.md.

Results, at most six files: gpu.jsonl (all records), gpu-build.log, gpu-tests.log, gpu-sanitizer.log, gpu.md, gpu.png.

`--dry` (`make gpu-dry`) needs no GPU: every stage on tiny shapes, Triton in its interpreter, the CUDA sources compiled
for the CPU. It writes gpu-dry.* with the same records, marked "emulated": nothing of it is a measurement.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds a stage may take, in the order of their worth; one command ends by TOTAL, the report included.
BUDGETS = {
    "build": 150.0, "tests": 150.0, "bandwidth": 100.0, "steps": 150.0, "graphs": 60.0, "sanitizer": 120.0,
    "benchmarks": 400.0, "report": 25.0,
}  # fmt: skip
TOTAL = 510.0
LEAST = 20.0
"""Seconds without which no stage begins: the next command has more."""
PACKAGES = {
    "triton": "the Triton operators",
    "pybind11": "the plan of the moving average and the mask sampler in C++",
    "pytest": "the tests",
    "matplotlib": "the roofline plot",
}
TOOLS = {"cmake": "the native operators", "ninja": "the native operators", "nvcc": "the CUDA operators"}


def find_missing() -> dict[str, str]:
    """What this Python and this machine lack -> what is therefore left out. Exits where nothing would be left."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("numpy") is None:
        raise SystemExit(f"benchmarks.gpu: {sys.executable} has no torch or no numpy; choose another with PYTHON=")
    version = importlib.metadata.version("torch")
    if tuple(int(p) for p in version.split("+")[0].split(".")[:2]) < (2, 10):
        raise SystemExit(f"benchmarks.gpu: expected torch 2.10 or newer, got {version}; choose another with PYTHON=")
    missing = {name: use for name, use in PACKAGES.items() if importlib.util.find_spec(name) is None}
    for name, use in TOOLS.items():
        if not (shutil.which(name) or shutil.which(name, path=f"/usr/local/cuda/bin:{Path(sys.executable).parent}")):
            missing[name] = use
    return missing


def run_stage(work: Callable[..., dict[str, Any]], run: Any, limit: float, needed: bool) -> dict[str, Any]:
    """The record of a stage."""
    if limit < LEAST and not needed:
        return {"status": "not reached", "reason": "the time of this command is used up; the same command goes on here"}
    try:
        return work(run, limit)
    except Exception as error:  # a stage that breaks must not take the others' results with it
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}


def run_stages(run: Any, names: list[str], total_s: float, done: set[str]) -> list[str]:
    """Runs the stages in order; a record for each goes to the file as soon as it is known. Returns how they ended."""
    from ..harness.record import gpu_machine, gpu_state, store
    from . import stages

    begin, ends = time.monotonic(), []
    for number, name in enumerate(names):
        if name in done and name != "report":
            print(f"{name:<11} done by an earlier run", flush=True)
            continue
        left, start = total_s - (time.monotonic() - begin), time.monotonic()
        reserve = BUDGETS["report"] if "report" in names[number + 1 :] else 0.0
        limit = min(BUDGETS[name], left - reserve)
        print(f"{name:<11} begins, at most {max(limit, 0.0):.0f} s", flush=True)
        record = run_stage(getattr(stages, name), run, limit, name == "report")
        seconds, reason = time.monotonic() - start, f": {record['reason']}" if "reason" in record else ""
        store(run.records, {
            "kind": "stage", "stage": name, **record, "seconds": seconds, "budget_s": BUDGETS[name],
            "missing": dict(run.missing), "gpu_state_after": {} if run.emulated else gpu_state(),
            "emulated": run.emulated, "key": run.key, "machine": gpu_machine(run.emulated),
        })  # fmt: skip
        run.deliver()
        ends.append(record["status"])
        print(f"{name:<11} {record['status']} in {seconds:.0f} s{reason}", flush=True)
    return ends


def main(arguments: list[str] | None = None) -> None:
    """Exit status 1 where a stage failed, 2 where nothing can run."""
    missing = find_missing()
    import torch

    from ..harness.record import RESULTS, keep_rows, parse, read_rows, run_key, write_rows
    from .stages import KEPT, Run

    options = parse(
        "gpu", __doc__, arguments, native=False,
        output=(RESULTS, "folder that the result files are copied to after each stage"),
        records=(KEPT, "folder in which they are made and kept from one command to the next"),
        dry=(False, "without a GPU: emulated, tiny shapes, no measurement"),
        stages=(list(BUDGETS), "stages to run"),
        only=("", "tests and benchmark cases with this text in their name"),
        total=(TOTAL, "seconds for everything"),
        fresh=(False, "run again what an earlier run has finished"),
    )  # fmt: skip
    unknown = [name for name in options.stages if name not in BUDGETS]
    if unknown:
        raise SystemExit(f"--stages: expected some of {', '.join(BUDGETS)}; got {unknown[0]!r}")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.gpu: torch {torch.__version__} sees no NVIDIA GPU (`make gpu-dry` needs none)")
    gpu = "emulated" if options.dry else torch.cuda.get_device_name(0)
    key, stem = run_key(gpu, torch.__version__), "gpu-dry" if options.dry else "gpu"
    records = options.records.resolve() / stem
    for folder in (options.output, records):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(records, options.output.resolve(), stem, key, options.dry, options.only, missing)
    for name, use in missing.items():
        print(f"missing: {name}; left out: {use}", flush=True)
    if not options.only and options.stages == list(BUDGETS):
        keep_rows(run.records, "" if options.fresh else key)
    elif options.fresh:  # a part of a run lets the other rows stay, but none counts as done
        write_rows(run.records, [{**row, "key": "earlier"} for row in read_rows(run.records)])
    done = {r["stage"] for r in read_rows(run.records)
            if r["kind"] == "stage" and r["status"] == "done" and r["key"] == key}  # fmt: skip
    ends = run_stages(run, [s for s in BUDGETS if s in options.stages], options.total, done)
    print(f"results: {options.output}/{stem}.*")
    raise SystemExit("failed" in ends)


if __name__ == "__main__":
    main()
