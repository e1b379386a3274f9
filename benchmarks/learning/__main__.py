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

from ..harness.record import RESULTS, ROOT, machine_basics, parse
from .methods import METHODS, RATES, linear, result_file, run_job
from .table import draw, summarise, table
from .tasks import TASKS

Job = tuple[str, str, int, float, str]
"""Task, method, seed, rate, stage."""


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    options = parse(
        "learning", __doc__, arguments,
        data=(Path(), "folder with spoken-digits, cifar10-train, sst2, ..."),
        only=(list(TASKS), "data sets"),
        methods=(list(METHODS), "what to train"),
        seeds=([0, 1, 2], "seeds of the final measurements"),
        jobs=(2, "processes at a time"),
        output=(Path("runs/learning"), "folder for runs and results"),
        results=(RESULTS, "folder for the tables"),
        job=([""], ""),
    )  # fmt: skip
    for name, known in (("only", TASKS), ("methods", METHODS)):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            raise SystemExit(f"--{name}: expected some of {', '.join(known)}; got {unknown[0]!r}")
    return options


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


def store_table(task: str, results: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The table of a data set in its file, with a plot. Rows take the places of those of the same name, others stay."""
    file = folder / f"learning-{task}.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = {row["name"]: row for row in (*before, *summarise(results))}
    record = {"task": task, "title": TASKS[task].title, "machine": machine_basics(), "rows": list(rows.values())}
    file.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, file.with_suffix(".png"))
    return record


def main(arguments: list[str] | None = None) -> None:
    """Chooses settings, measures, writes tables and plots."""
    options = parse_options(arguments)
    if options.job != [""]:
        task, method, seed, rate, stage = options.job
        run_job(TASKS[task], method, int(seed), float(rate), stage, options.output, options.data)
        return
    with ThreadPoolExecutor(options.jobs) as pool:
        wanted = {t: [m for m in TASKS[t].methods if m in options.methods] for t in options.only}
        # Fine-tuning begins with what data2vec 2.0 has learned.
        results = choose_and_measure({t: [m for m in w if m != "finetuned"] for t, w in wanted.items()}, options, pool)
        results += choose_and_measure({t: [m for m in w if m == "finetuned"] for t, w in wanted.items()}, options, pool)
    for task in options.only:
        record = store_table(task, [r for r in results if r["task"] == task], options.results)
        print(f"\n{record['title']}\n{table(record)}")


if __name__ == "__main__":
    main()
