"""`make gpu`: all that only an NVIDIA GPU can show, in one command of under nine minutes.

    python -m benchmarks.gpu [--output FOLDER] [--dry] [--stages ...]

Builds the libraries in place for the GPU found, runs the GPU tests, compute-sanitizer, the CUDA graph tests, the
benchmarks of operators and of whole training steps, and writes a report. Nothing is installed; what is missing is
named, and what depends on it left out. Every stage has a time budget and its record on disk before the next one begins;
the same command again goes on where the last one stopped, as long as sources, GPU and torch are the same (`--fresh`
begins anew).

Results, at most six files: gpu.jsonl (all records), gpu-build.log, gpu-tests.log, gpu-sanitizer.log, gpu.md, gpu.png.

`--dry` (`make gpu-dry`) needs no GPU: every stage on tiny shapes, Triton in its interpreter, the CUDA sources compiled
for the CPU. It writes gpu-dry.* with the same records, marked "emulated": nothing of it is a measurement.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds a stage may take; the whole run ends by TOTAL, the report included.
BUDGETS = {
    "build": 130.0, "tests": 130.0, "sanitizer": 80.0, "graphs": 45.0, "benchmarks": 200.0, "steps": 75.0,
    "report": 25.0,
}  # fmt: skip
TOTAL = 510.0
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


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the result files")
    parser.add_argument("--dry", action="store_true", help="without a GPU: emulated, tiny shapes, no measurement")
    parser.add_argument("--stages", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), help="stages to run")
    parser.add_argument("--only", default="", help="tests and benchmark cases with this text in their name")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier run has finished")
    return parser.parse_args(arguments)


def run_stages(run: Any, stages: list[str], total_s: float, done: set[str]) -> dict[str, dict[str, Any]]:
    """Runs the stages in order; a record for each goes to the file as soon as it is known."""
    from . import gpu_report, gpu_stages
    from .gpu_record import gpu_machine, gpu_state

    begin, records = time.monotonic(), {}
    for number, name in enumerate(stages):
        if name in done and name != "report":
            print(f"{name:<11} done by an earlier run", flush=True)
            continue
        work: Callable[..., dict[str, Any]] = getattr(gpu_report if name == "report" else gpu_stages, name)
        left = total_s - (time.monotonic() - begin)
        reserve = BUDGETS["report"] if "report" in stages[number + 1 :] else 0.0
        limit, start = min(BUDGETS[name], left - reserve), time.monotonic()
        if limit < 3.0 and name != "report":
            record: dict[str, Any] = {"status": "not reached", "reason": "the time for the whole run is used up"}
        else:
            try:
                record = work(run, limit)
            except Exception as error:  # a stage that breaks must not take the others' results with it
                record = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        record = {
            "kind": "stage",
            "stage": name,
            **record,
            "seconds": time.monotonic() - start,
            "budget_s": BUDGETS[name],
            "missing": dict(run.missing),
            "gpu_state_after": {} if run.emulated else gpu_state(),
            "emulated": run.emulated,
            "key": run.key,
            "machine": gpu_machine(run.emulated),
        }
        records[name] = record
        with run.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        reason = f": {record['reason']}" if "reason" in record else ""
        print(f"{name:<11} {record['status']} in {record['seconds']:.0f} s{reason}", flush=True)
    return records


def main(arguments: list[str] | None = None) -> None:
    """Exit status 1 where a stage failed, 2 where nothing can run."""
    options = _parse(arguments)
    missing = find_missing()
    import torch

    from . import gpu_record
    from .gpu_stages import Run

    if not options.dry and not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.gpu: torch {torch.__version__} sees no NVIDIA GPU (`make gpu-dry` needs none)")
    options.output.mkdir(parents=True, exist_ok=True)
    key, stem = gpu_record.run_key(options.dry), "gpu-dry" if options.dry else "gpu"
    run = Run(options.output.resolve(), stem, key, options.dry, options.only, missing)
    for name, use in missing.items():
        print(f"missing: {name}; left out: {use}", flush=True)
    kept = gpu_record.keep_records(run.records, "" if options.fresh else key)
    done = {r["stage"] for r in kept if r["kind"] == "stage" and r["status"] == "done"}
    records = run_stages(run, [s for s in BUDGETS if s in options.stages], options.total, done)
    print(f"results: {options.output}/{stem}.*")
    raise SystemExit(any(r["status"] == "failed" for r in records.values()))


if __name__ == "__main__":
    main()
