"""Many short runs on the same ranks: each process starts once, which takes longer than the runs.

`run_all` starts the processes; this file is also the program that they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from soak.jobs import ROOT, Job, base_environment, find_port, finish_here, rank_environment


def run_all(runs: Sequence[Sequence[str]], ranks: int, folder: Path, *, timeout: float = 600) -> None:
    """`d2v pretrain *options` for each of `runs`, one after the other, on `ranks` ranks; one rank is this process.

    Raises `AssertionError` with what was printed where a run does not end with exit code 0.
    """
    if ranks == 1:
        for options in runs:
            finish_here(options)
        return
    folder.mkdir(parents=True, exist_ok=True)
    orders = folder / f"orders-{ranks}.json"
    orders.write_text(json.dumps([{"options": list(options), "port": find_port()} for options in runs]))
    mark = uuid.uuid4().hex
    environment = {**base_environment(mark), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes, logs = [], []
    for rank in range(ranks):
        logs.append(folder / f"ranks-{ranks}.{rank}.log")
        with logs[-1].open("wb") as file:
            command = [sys.executable, "-m", "soak.ranks", str(orders), str(rank), str(ranks)]
            processes.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
            )
    job = Job(mark, processes, logs)
    try:
        codes = job.codes(timeout)
        assert not any(codes), f"expected exit code 0, got {codes}:\n{job.tail()}"
    finally:
        job.kill()


def main(orders: str, rank: str, ranks: str) -> None:
    """One rank: every run in turn, with an address of its own each."""
    from d2v.cli import main as d2v

    for order in json.loads(Path(orders).read_text()):
        os.environ |= rank_environment(int(rank), int(ranks), order["port"])
        if code := d2v(["pretrain", *order["options"]]):
            sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
