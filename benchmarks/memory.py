"""Peak memory of whole training steps at published model sizes: `python -m benchmarks.memory [--only TEXT]`.

The time of such a step says little on a CPU, its memory does: each form of `benchmarks.step` makes two steps of the
recipe (float32, with all dropout) in a process of its own; the figure is that process's peak resident memory less what
was resident before its model was built. Keeps JSON lines.
"""

from __future__ import annotations

import dataclasses
import os

from .harness.record import RESULTS, machine_record, parse, store
from .harness.report import STEP_GOALS
from .step import ask_for_memory
from .training.cases import StepCase

CASES = (StepCase("vision-base", 16), StepCase("speech-base", 1, 20.0), StepCase("text-base", 2, 512))


def main(arguments: list[str] | None = None) -> None:
    """Measures every case; a line each."""
    options = parse(
        "memory", __doc__, arguments,
        only=("", "measure the cases whose name contains this text"),
        output=(RESULTS / "memory-cpu.jsonl", "JSON lines that keep the rows"),
    )  # fmt: skip
    machine, order = machine_record(), {"device": "cpu", "forms": ["plain", "d2v"], "threads": os.cpu_count() or 1}
    for case in (c for c in CASES if options.only in c.name):
        peak = ask_for_memory(case, order, steps=2)
        ratio, goal = peak["d2v"] / peak["plain"], STEP_GOALS.get(f"memory {case.modality}")
        store(options.output, {
            "kind": "memory", **dataclasses.asdict(case), "case": case.name, "bytes": peak, "ratio": ratio,
            "machine": machine, "command": "python -m benchmarks.memory",
        })  # fmt: skip
        sizes = ", ".join(f"{form} {size / 1e9:.2f} GB" for form, size in peak.items())
        print(f"{case.name}: {sizes}; {ratio:.2f} of plain{f' (goal {goal})' if goal else ''}", flush=True)


if __name__ == "__main__":
    main()
