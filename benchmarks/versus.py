"""Pre-training in two checkouts, as a user runs it: `python -m benchmarks.versus --other FOLDER [--recipe NAME] [...]`.

Processes of `d2v pretrain` take turns, this checkout's and the other's, on the same generated data with the same
options; the seconds of each update are those of its `metrics.jsonl`. The other needs its native library built in place.
Prints the ratio of the fastest updates and of the medians, other / this; above 1, this checkout is faster.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from d2v import recipes

from .harness.record import ROOT, parse
from .loader import VOCABULARY, write_documents, write_images, write_recordings

WARM_UP = 2
WRITERS = {"vision": write_images, "speech": write_recordings, "text": write_documents}
BATCHES = {"vision-small": 8, "speech-small": 2, "text-small": 4, "speech-tiny": 32}


def command_of(recipe: str, data: str, run: Path, precision: str, steps: int, threads: int) -> list[str]:
    """`d2v pretrain` with one line of metrics an update, and neither checkpoints nor workers in between."""
    options = {
        "data.path": data, "run.dir": run, "run.precision": precision, "run.steps": steps, "run.threads": threads,
        "run.log-every": 1, "run.checkpoint-every": steps, "data.workers": 1,
        "data.global-batch": BATCHES.get(recipe, 16),
    }  # fmt: skip
    options |= {"text": {"stem.vocabulary": VOCABULARY}, "speech": {"data.max-seconds": 5}}.get(
        recipes.get(recipe).stem.modality, {}
    )
    return ["pretrain", recipe, *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def update_seconds(checkout: Path, command: list[str], run: Path, threads: int) -> list[float]:
    """Seconds of every update but the first ones, of one process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        [sys.executable, "-m", "d2v", *command], env=environment, cwd=run.parent, capture_output=True, text=True
    )
    if process.returncode:
        raise SystemExit(
            f"{checkout}: d2v {' '.join(command)}: exit status {process.returncode}\n{process.stderr[-800:]}"
        )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines if "step_seconds" in line][WARM_UP:]


def main(arguments: list[str] | None = None) -> None:
    """Measures one recipe and prints one line."""
    options = parse(
        "versus", __doc__, arguments,
        other=(Path(), "the other checkout"),
        recipe=("vision-small", "recipe to train"),
        precision=(("bf16", "fp32"), "of the run"),
        steps=(8, "updates of a process"),
        turns=(3, "processes of each checkout"),
        threads=(1, "CPU threads"),
    )  # fmt: skip
    if not (options.other / "d2v_kernels" / "lib" / "libd2v_cpu.so").is_file():
        raise SystemExit(f"--other: expected a checkout with its native library built in place, got {options.other}")
    with TemporaryDirectory(prefix="d2v-versus-") as folder:
        data = WRITERS[recipes.get(options.recipe).stem.modality](Path(folder) / "data")
        seconds: dict[Path, list[float]] = {ROOT: [], options.other.resolve(): []}
        for turn in range(options.turns):
            for number, (checkout, found) in enumerate(seconds.items()):
                run = Path(folder) / f"run-{turn}-{number}"
                command = command_of(options.recipe, data, run, options.precision, options.steps, options.threads)
                found += update_seconds(checkout, command, run, options.threads)
    (ours, others) = seconds.values()
    fastest, median = (f(others) / f(ours) for f in (min, statistics.median))
    print(
        f"{options.recipe} {options.precision} threads {options.threads}: other / this {fastest:.2f} (fastest update),"
        f" {median:.2f} (median), {len(ours)} updates each; this {min(ours) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
