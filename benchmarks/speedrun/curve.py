"""When pre-training pays, by labels and by unlabelled data: `python -m benchmarks.speedrun.curve digits --data DIR`.

Labels: the network of data2vec 2.0 is trained on N labelled samples a class, from weights pre-trained on all unlabelled
samples and from random ones, and a linear probe reads the frozen pre-trained features. Unlabelled data: the same with
`FEW` labels a class after pre-training on a share of the samples, with the same updates. `--given MODEL`, a model
or run that stands for a published model, is measured as it is, too, and pre-trained further on the same samples.
Accuracies are of the task's test data; learning rates are those of the speedrun. Each measurement is a process of its
own and leaves its result in OUTPUT; table and picture go to RESULTS.
"""

from __future__ import annotations

import argparse
import json
import shutil
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
STARTS = {
    "random": "random weights", "pretrained": "pre-trained here", "given": "the given model",
    "continued": "the given model, trained on here",
}  # fmt: skip
KINDS = {"all": "all weights trained", "probe": "linear probe"}
CURVES = [(start, kind) for start in STARTS for kind in KINDS if (start, kind) != ("random", "probe")]
Row = dict[str, Any]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    return parse(
        "speedrun.curve", __doc__, arguments, first=("task", FOLDERS),
        data=(Path(), "folder with spoken-digits"),
        labels=([5, 10, 30, 100], "labelled samples a class"),
        shares=([0.03, 0.1, 0.3], "of the unlabelled samples; all of them are always measured"),
        given=("", "model folder or run to begin with, too"),
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


def measure(
    task: Task, start: str, share: float, seed: int, labels: list[int], given: str, data: Path, root: Path
) -> list[Row]:
    """What N labels a class give to one of the `STARTS`, and a share of the unlabelled samples where one is used."""
    folder = root / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was stopped
    fold = task.splits(data, folder / "data", seed).final
    job, spent = Job(task.name, "data2vec2", seed, task.rate("data2vec2")), 0.0
    model = Path(given)
    if start == "random":
        model = write_untrained(task, seed, fold, folder)
    elif start != "given":
        unlabelled = fold if share == 1.0 else choose_share(task, fold, share, folder / "unlabelled", seed)
        begin = given if start == "continued" else None
        spent, model = pretrain_job(task, job, unlabelled, folder, begin)["cpu_seconds"], folder / "model"
    found = []
    rate = task.rate("scratch" if start == "random" else "finetuned")
    for count in labels:
        few = folder / f"labels-{count}"
        choose_few(Path(fold.train), few, seed, count)
        score, seconds = fine_tune(task, rate, seed, model, str(few), fold.test, few.with_suffix(".run"), steps=UPDATES)
        row = {"start": start, "share": share, "seed": seed, "labels": count}
        found.append({**row, "kind": "all", "accuracy": score, "cpu_seconds": seconds})
        if start != "random":
            score = probe(task, job, fold._replace(train=str(few)), model)["pretrained"]["linear_probe"]
            found.append({**row, "kind": "probe", "accuracy": score, "cpu_seconds": spent})
    shutil.rmtree(folder)
    return found


def pick(rows: list[Row], start: str, kind: str, labels: int, share: float | None = None) -> list[float]:
    """Accuracies of all seeds. share: None for all samples; starts that use none have the same for any."""
    wanted = 0.0 if start in ("random", "given") else 1.0 if share is None else share
    return [
        r["accuracy"] for r in rows if (r["start"], r["kind"], r["labels"], r["share"]) == (start, kind, labels, wanted)
    ]


def tables(rows: list[Row]) -> str:
    """Accuracy by labels a class after pre-training on everything, and by the share of unlabelled samples."""
    counts, shares = (sorted({r[key] for r in rows if r[key]}) for key in ("labels", "share"))
    curves = [c for c in CURVES if any((r["start"], r["kind"]) == c for r in rows)]
    titles = [f"{STARTS[start]}: {KINDS[kind]}" for start, kind in curves]
    by_labels = [(n, *(show(pick(rows, *c, n)) for c in curves)) for n in counts]
    by_share = [(f"{u:g}", *(show(pick(rows, *c, FEW, u)) for c in curves)) for u in shares]
    first = markdown(("labels a class", *titles), by_labels)
    if len(shares) < 2:
        return first
    return first + "\n\n" + markdown((f"share of unlabelled samples, {FEW} labels a class", *titles), by_share)


def draw(record: dict[str, Any], path: Path) -> None:
    """The tables as curves, with the range over seeds."""
    rows, machine = record["rows"], record["machine"]
    title = f"{record['title']}; {machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}"
    counts, shares = (sorted({r[key] for r in rows if r[key]}) for key in ("labels", "share"))
    panels = 2 if len(shares) > 1 else 1
    with figure(path, title, (4 + 4 * panels, 4.2), 1, panels, sharey=True) as (axes,):
        for i, (start, kind) in enumerate(CURVES):
            style = {"color": f"C{i}", "label": f"{STARTS[start]}: {KINDS[kind]}"}
            by_labels = {n: pick(rows, start, kind, n) for n in counts}
            by_share = {u: pick(rows, start, kind, FEW, u) for u in shares}
            for axis, values in zip(axes, (by_labels, by_share)[:panels], strict=True):
                points = {x: [100 * v for v in found] for x, found in values.items() if found}
                if points:
                    plot_range(axis, list(points), list(points.values()), **style)
        words = ("labels a class", f"share of the unlabelled samples; {FEW} labels a class")
        for axis, text in zip(axes, words[:panels], strict=True):
            axis.set(xscale="log", xlabel=text)
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("test accuracy, %")
        axes[0].legend(fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is missing, prints the tables, writes rows and picture."""
    options = parse_options(arguments)
    task, root = TASKS[options.task], options.output / options.task
    calls = []
    given = str(Path(options.given).resolve()) if options.given else ""
    for start in STARTS if given else ("random", "pretrained"):
        for share in (0.0,) if start in ("random", "given") else sorted({1.0, *options.shares}):
            labels = [FEW] if 0.0 < share < 1.0 else options.labels
            for seed in options.seeds:
                place = root / f"{start},share{share:g},seed{seed}"
                calls.append((task, start, share, seed, labels, given, options.data, place, place / "result.json"))
    found = [row for rows in run_apart(measure, calls, options.jobs) for row in rows]
    rows = [row for row in found if row["labels"] in (FEW, *options.labels)]  # an earlier call may have had others
    record = {"title": task.title, "machine": machine_basics(), "rows": rows}
    file = options.results / f"curve-{task.name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, file.with_suffix(".png"))
    print(tables(rows))


if __name__ == "__main__":
    main()
