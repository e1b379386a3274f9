"""Planted collapses: `python -m benchmarks.collapse [--recipes vision-tiny ...] [--seeds 2 3 4 5] [--jobs 2]`.

Trains tiny recipes on a CPU with a fault each, and healthy ones; says after how many updates each monitor has left the
band of the healthy runs, and when the product stops the run. Every run leaves its result in OUTPUT, and a repeated
command does only what is missing. The product's thresholds were chosen on seeds 0 and 1; the table is of others.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from d2v import recipes

from ..harness.record import RESULTS, machine_basics, parse
from .data import write_data
from .faults import FAULTS, Job, run_job
from .table import draw, table

RECIPES = ["vision-tiny", "speech-tiny", "text-tiny", "signals-tiny", "spectrograms-tiny"]


def main(arguments: list[str] | None = None) -> None:
    """Trains, stores, draws and prints."""
    options = parse(
        "collapse", __doc__, arguments,
        recipes=(RECIPES, "what to train"),
        faults=(list(FAULTS), "what to plant"),
        seeds=([2, 3, 4, 5], "seeds of the healthy runs"),
        planted=([2], "seeds of the runs with a fault"),
        updates=(400, "of a healthy run"),
        limit=(200, "most updates of a run with a fault"),
        jobs=(2, "processes of one thread at a time"),
        output=(Path("runs/collapse"), "folder for data, runs and results"),
        results=(RESULTS / "collapse.json", "file for the results"),
        picture=(Path("docs/collapse.png"), "file for the monitors of the first recipe"),
    )  # fmt: skip
    for kind in {recipes.get(recipe).stem.modality for recipe in options.recipes}:
        if not (options.output / "data" / kind).exists():
            write_data(kind, options.output / "data" / kind)
    jobs: list[Job] = [(r, f, s, options.limit, options.output)
                       for f in options.faults for r in options.recipes for s in options.planted]  # fmt: skip
    jobs += [(r, "", s, options.updates, options.output) for s in options.seeds for r in options.recipes]
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(run_job, jobs):
            rows.append(row)
            about = f"{row['recipe']}, {row['fault'] or 'healthy'}, seed {row['seed']}"
            print(f"{about:<50} stop {row['stop']}, {row['cpu_seconds']} s of CPU", flush=True)
    record = {"machine": machine_basics(), "rows": rows}
    options.results.write_text(json.dumps(record) + "\n")
    draw(rows, options.recipes[0], options.picture, f"{options.recipes[0]}, seed {options.planted[0]}")
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
