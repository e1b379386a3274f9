"""When pre-training pays, by labels and by unlabelled data: `python -m benchmarks.speedrun.curve digits --data DIR`.

Labels: the network of data2vec 2.0 is trained on N labelled samples a class, from weights pre-trained on all unlabelled
samples and from random ones, and a linear probe reads the frozen pre-trained features. Unlabelled data: the same with
`FEW` labels a class after pre-training on a share of the samples, with the same updates. Accuracies are of the task's
test data; learning rates are those of the speedrun. Each measurement is a process of its own and leaves its result in
OUTPUT; table and picture go to RESULTS.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from ..harness.plots import figure
from ..harness.record import RESULTS, machine_basics, parse
from ..harness.report import markdown
from .methods import Job, fine_tune, pretrain_job, probe, run_apart, write_untrained
from .table import plot_range, show
from .tasks import FEW, TASKS, Fold, Task, choose_few, link

FOLDERS = ("digits", "textures")
"""Tasks whose samples are files in a folder a class."""
UPDATES = 800
"""Of a training from labels, whatever their number."""
KINDS = {"scratch": "from random weights", "finetuned": "from pre-trained weights", "probe": "linear probe, frozen"}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    return parse(
        "speedrun.curve", __doc__, arguments, first=("task", FOLDERS),
        data=(Path(), "folder with spoken-digits"),
        labels=([2, 5, 10, 30, 100], "labelled samples a class"),
        shares=([0.03, 0.1, 0.3], "of the unlabelled samples"),
        seeds=([0, 1, 2], "seeds"),
        jobs=(1, "processes at a time"),
        output=(Path("runs/curve"), "folder for runs and results"),
        results=(RESULTS, "folder for the table and the picture"),
    )  # fmt: skip


def choose_share(task: Task, fold: Fold, share: float, folder: Path, seed: int) -> Fold:
    """With a share of the unlabelled samples, drawn at random."""
    files = sorted(p for p in Path(fold.pretrain).rglob("*") if p.is_file())
    count = max(task.config().data.global_batch, round(share * len(files)))
    for i in np.random.default_rng([seed, 2]).permutation(len(files))[:count]:
        link(files[i], folder / f"{i}{files[i].suffix}")
    return fold._replace(pretrain=str(folder))


def measure(task: Task, share: float, seed: int, labels: list[int], data: Path, root: Path) -> list[dict[str, Any]]:
    """A pre-training on a share of the samples, and what N labels a class then give; share 0: from random weights."""
    folder = root / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was stopped
    fold = task.prepare(data, folder / "data", seed).final
    job = Job(task.name, "data2vec2", seed, task.rate("data2vec2"))
    kind = "finetuned" if share else "scratch"
    if kind == "scratch":
        start = write_untrained(task, seed, fold, folder)
    else:
        unlabelled = fold if share == 1.0 else choose_share(task, fold, share, folder / "unlabelled", seed)
        cost, start = pretrain_job(task, job, unlabelled, folder), folder / "model"
    found = []
    for count in labels:
        few = folder / f"labels-{count}"
        choose_few(Path(fold.train), few, seed, count)
        given = (task, task.rate(kind), seed, start, str(few), fold.test, few.with_suffix(".run"))
        score, seconds = fine_tune(*given, steps=UPDATES)
        row = {"share": share, "seed": seed, "labels": count}
        found.append({**row, "kind": kind, "accuracy": score, "cpu_seconds": seconds})
        if share:
            score = probe(task, job, fold._replace(train=str(few)), start)["pretrained"]["linear_probe"]
            found.append({**row, "kind": "probe", "accuracy": score, "cpu_seconds": cost["cpu_seconds"]})
    shutil.rmtree(folder)
    return found


def pick(rows: list[dict[str, Any]], kind: str, share: float, labels: int) -> list[float]:
    """Accuracies of all seeds."""
    return [r["accuracy"] for r in rows if (r["kind"], r["share"], r["labels"]) == (kind, share, labels)]


def tables(rows: list[dict[str, Any]]) -> str:
    """Accuracy by labels a class after pre-training on everything, and by the share of unlabelled samples."""
    counts, shares = (sorted({r[key] for r in rows}) for key in ("labels", "share"))
    of_kind = {k: 0.0 if k == "scratch" else 1.0 for k in KINDS}
    by_labels = [(n, *(show(pick(rows, k, u, n)) for k, u in of_kind.items())) for n in counts]
    by_share = [(f"{u:g}", *(show(pick(rows, k, u, FEW)) for k in KINDS)) for u in shares]
    first = markdown(("labels a class", *KINDS.values()), by_labels)
    return first + "\n\n" + markdown((f"share of unlabelled samples, {FEW} labels a class", *KINDS.values()), by_share)


def draw(record: dict[str, Any], path: Path) -> None:
    """Both tables as curves, with the range over seeds."""
    rows, machine = record["rows"], record["machine"]
    title = f"{record['title']}; {machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}"
    with figure(path, title, (11, 4.2), 1, 2, sharey=True) as (axes,):
        for axis, key, fixed in ((axes[0], "labels", {}), (axes[1], "share", {"labels": FEW})):
            for i, (kind, words) in enumerate(KINDS.items()):
                at = {"share": 0.0 if kind == "scratch" else 1.0, **fixed}
                xs = sorted({r[key] for r in rows if r["kind"] == kind})
                all_seeds = {x: [100 * v for v in pick(rows, kind, **{**at, key: x})] for x in xs}
                points = {x: values for x, values in all_seeds.items() if values}
                if key == "share" and kind == "scratch":
                    axis.axhline(statistics.mean(points[0.0]), color=f"C{i}", linestyle=":", label=words)
                else:
                    plot_range(axis, list(points), list(points.values()), color=f"C{i}", label=words)
            axis.set(xscale="log", xlabel="labels a class" if key == "labels" else "share of the unlabelled samples")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("test accuracy, %")
        axes[0].legend(fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, prints both tables, writes rows and picture."""
    options = parse_options(arguments)
    task, root = TASKS[options.task], options.output / options.task
    calls = []
    for share in (0.0, 1.0, *options.shares):
        labels = options.labels if share in (0.0, 1.0) else [FEW]
        for seed in options.seeds:
            place = root / f"share{share:g},seed{seed}"
            calls.append((task, share, seed, labels, options.data, place, place / "result.json"))
    rows = [row for found in run_apart(measure, calls, options.jobs) for row in found]
    record = {"title": task.title, "machine": machine_basics(), "rows": rows}
    file = options.results / f"curve-{task.name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, file.with_suffix(".png"))
    print(tables(rows))


if __name__ == "__main__":
    main()
