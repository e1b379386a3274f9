"""Quick start: pre-train `vision-tiny` on texture crops, probe it, draw a report. Calls `d2v` commands only.

    python scripts/quickstart.py [--output runs/quickstart] [--seed 0] [--threads 1] [--steps N]

Writes OUTPUT/result.json and OUTPUT/report.png; OUTPUT/data and OUTPUT/run hold the images and the run. The same seed
gives the same numbers on the same machine. No network, no GPU needed; a GPU is used when there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from d2v.cli import main as d2v

BASELINES = ("random_init", "pixels", "sorted_pixels", "power_spectrum")
NOTES = """
What the table says, and what it does not:
- The task: from which of {classes} photographs does a 32 x 32 grey crop come? Train and test crops share no pixel. One
  photograph per class, so nothing is claimed about new photographs.
- All rows are probed alike. random_init is the same network before training, same seed, same pooling. Raw pixels are at
  a disadvantage by design (random turns, mirrors and places); the power spectrum is the strong simple baseline.
- vision-tiny is not a published data2vec recipe: `d2v recipes` and d2v/recipes/vision.py name what differs.
"""


def call(*arguments: str) -> None:
    """Runs one `d2v` command in this process; leaves with its exit code where that is not 0."""
    print(f"\n$ d2v {' '.join(arguments)}", flush=True)
    if code := d2v(arguments):
        sys.exit(code)


def prepare(output: Path) -> None:
    """Removes an earlier quick start; refuses a folder that holds anything else."""
    known = {"data", "run", "result.json", "report.png"}
    if output.exists() and (not output.is_dir() or {p.name for p in output.iterdir()} - known):
        sys.exit(f"quickstart: --output: expected an absent folder or an earlier quick start, got {str(output)!r}")
    shutil.rmtree(output, ignore_errors=True)


def read_speed(run: Path) -> float:
    """Median samples per second over the lines of metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(line["samples_per_second"] for line in lines)
    return float(rates[len(rates) // 2])


def make_result(run: Path, seed: int, seconds: float) -> dict[str, Any]:
    """The probe's result with the quick start's own figures."""
    probe = json.loads((run / "probe.json").read_text())
    return {**probe, "seed": seed, "seconds": round(seconds, 1), "samples_per_second": round(read_speed(run), 1)}


def print_summary(result: dict[str, Any]) -> None:
    """Test accuracies in percent, as a table, and what they mean."""
    probes = ("linear_probe", "knn", "few_label")
    print(f"\ntest accuracy, %{'linear':>12}{'kNN':>8}{'few-label':>12}   (chance {100 / result['classes']:.1f})")
    for name in ("pretrained", *BASELINES):
        values = [100 * result[probe][name] for probe in probes]
        print(f"{name:<16}{values[0]:>12.1f}{values[1]:>8.1f}{values[2]:>12.1f}")
    print(NOTES.format(classes=result["classes"]))


def main() -> None:
    """Runs the quick start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--seed", type=int, default=0, help="seed of crops, weights, masks and order")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch; a loader process runs beside")
    parser.add_argument("--steps", type=int, default=None, help="updates, for a shorter trial; default: the recipe's")
    options = parser.parse_args()
    output, data, run = options.output, options.output / "data", options.output / "run"
    start = time.monotonic()
    prepare(output)
    call("data", "textures", "--output", str(data), "--seed", str(options.seed), "--pretrain-crops", "2000")
    training = ["--data.path", str(data / "pretrain"), "--run.dir", str(run), "--run.seed", str(options.seed)]
    training += ["--run.threads", str(options.threads)]
    if options.steps is not None:
        training += ["--run.steps", str(options.steps)]
    call("pretrain", "vision-tiny", *training)
    splits = ["--train", str(data / "train"), "--test", str(data / "test")]
    call("evaluate", "probe", "--checkpoint", str(run), *splits, "--baselines", *BASELINES)
    call("plot", str(run), "--images", str(data / "test"), "--output", str(output / "report.png"))
    result = make_result(run, options.seed, time.monotonic() - start)
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print_summary(result)
    print(f"{result['seconds']:.0f} s, {result['samples_per_second']:.0f} samples/s in pre-training")
    print(f"wrote {output / 'result.json'} and {output / 'report.png'}")


if __name__ == "__main__":
    main()
