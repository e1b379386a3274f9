"""What small real data teach: `python -m benchmarks.learning --data DIR [--only digits] [--seeds 0 1 2] [--jobs 2]`.

For each data set: raw features, the untrained network, the same network supervised from scratch, a masked autoencoder,
data2vec 1.0 and 2.0, and 2.0 fine-tuned like the one from scratch. Every pre-training has the FLOPs of data2vec 2.0's;
every method may choose among three learning rates by its linear probe (or accuracy) on held-out data of seed 0; then
three seeds are measured on test data. Jobs are processes of one thread; each leaves its result in OUTPUT, and a
repeated command does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..machine import ROOT, machine_basics
from .methods import METHODS, RATES, linear, result_file, run_job
from .table import draw, markdown, summarise
from .tasks import TASKS

Job = tuple[str, str, int, float, str]
"""Task, method, seed, rate, stage."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(), help="folder with spoken-digits, cifar10-train, sst2, ...")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="data sets")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="what to train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the final measurements")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="folder for runs and results")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the tables")
    parser.add_argument("--job", nargs=5, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_child(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The result of a job, stored or from a process of its own, whose output goes to a log."""
    task, method, seed, rate, stage = job
    file = result_file(options.output, *job)
    if file.is_file():
        stored: dict[str, Any] = json.loads(file.read_text())
        return stored
    log = options.output / task / f"{method}-x{rate:g}-seed{seed}-{stage}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.learning", "--data", str(options.data), "--output",
               str(options.output), "--job", *map(str, job)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    print(f"{' '.join(map(str, job)):<50} {time.monotonic() - begin:6.0f} s", flush=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, job))}: exit code {done.returncode}, see {log}")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def choose_and_measure(
    methods: dict[str, list[str]], options: argparse.Namespace, pool: ThreadPoolExecutor
) -> list[dict[str, Any]]:
    """Results on test data of each task's methods, with the rates that are best on held-out data."""
    wanted = [(t, m, 0, r, "choose") for t, names in methods.items() for m in names for r in RATES]
    chosen = list(pool.map(lambda job: run_child(job, options), wanted))
    final = []
    for task, names in methods.items():
        for method in names:
            tried = [r for r in chosen if (r["task"], r["method"]) == (task, method)]
            rate = max(tried, key=linear)["rate"]
            final += [(task, method, seed, rate, "test") for seed in options.seeds]
    return list(pool.map(lambda job: run_child(job, options), final))


def main(arguments: list[str] | None = None) -> None:
    """Chooses settings, measures, writes tables and plots."""
    options = parse(arguments)
    if options.job is not None:
        task, method, seed, rate, stage = options.job
        run_job(TASKS[task], method, int(seed), float(rate), stage, options.output, options.data)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted = {t: [m for m in TASKS[t].methods if m in options.methods] for t in options.only}
        # Fine-tuning begins with what data2vec 2.0 has learned.
        results = choose_and_measure({t: [m for m in w if m != "finetuned"] for t, w in wanted.items()}, options, pool)
        results += choose_and_measure({t: [m for m in w if m == "finetuned"] for t, w in wanted.items()}, options, pool)
    machine = machine_basics()
    for task in options.only:
        rows = summarise([r for r in results if r["task"] == task])
        record = {"task": task, "title": TASKS[task].title, "machine": machine, "rows": rows}
        file = options.results / f"learning-{task}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
        draw(record, file.with_suffix(".png"))
        print(f"\n{TASKS[task].title}\n{markdown(record)}")


if __name__ == "__main__":
    main()
