"""Peak memory of whole training steps at published model sizes: `python -m benchmarks.memory [--only TEXT]`.

The time of such a step says little on a CPU, its memory does: each form of `benchmarks.step` makes two steps of the
recipe (float32, with all dropout) in a process of its own; the figure is that process's peak resident memory less what
was resident before its model was built. Writes JSON lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

from .kernels import RESULTS
from .machine import ROOT, machine_record
from .step import measure_memory
from .step_cases import StepCase
from .step_report import GOALS

CASES = (StepCase("vision-base", 16), StepCase("speech-base", 1, 20.0), StepCase("text-base", 2, 512))
FORMS = ("plain", "d2v")
COMMAND = "benchmarks.memory"


def run_child(number: int, form: str) -> int:
    """Peak bytes of one form, measured in a new process."""
    command = [sys.executable, "-m", COMMAND, "--child", str(number), form]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="measure the cases whose name contains this text")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory-cpu.jsonl", help="JSON lines")
    parser.add_argument("--child", nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures every case; a line each."""
    options = parse(arguments)
    if options.child is not None:
        number, form = options.child
        print(json.dumps(measure_memory(CASES[int(number)], form, torch.device("cpu"), steps=2)))
        return
    machine, rows = machine_record(), []
    for number, case in enumerate(CASES):
        if options.only not in case.name:
            continue
        peak = {form: run_child(number, form) for form in FORMS}
        ratio = peak["d2v"] / peak["plain"]
        goal = GOALS.get(f"memory {case.modality}")
        rows.append({"kind": "memory", **dataclasses.asdict(case), "case": case.name, "bytes": peak, "ratio": ratio,
                     "machine": machine, "command": f"python -m {COMMAND}"})  # fmt: skip
        sizes = ", ".join(f"{form} {size / 1e9:.2f} GB" for form, size in peak.items())
        print(f"{case.name}: {sizes}; {ratio:.2f} of plain{f' (goal {goal})' if goal else ''}", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
