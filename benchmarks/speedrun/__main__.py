"""What small real data teach, against an honest clock: `python -m benchmarks.speedrun TASK [--data DIR]`.

Tasks: cifar (40,000 images of CIFAR-10), digits (spoken digits of a speaker never heard), waveforms (the same without a
filter bank), textures (crops of photographs; no data needed), sentences (SST-2).

For each: raw features, the untrained network, the same network supervised from scratch, a masked autoencoder,
data2vec 1.0 and 2.0, and 2.0 fine-tuned like the one from scratch. Every pre-training has the FLOPs of data2vec 2.0's
and the learning rate that was best for it on held-out data; its model is measured on test data after each quarter, too.
Jobs are processes of one thread; each leaves its result in OUTPUT, and a repeated command does only what is missing.
Table and picture go to RESULTS, all records to PAGE. `--verify`, in another clone and with another OUTPUT, runs them a
second time and notes in the record how far apart the two are.

`--choose` tries other settings, `--set mask.copies=4` for all methods or `--rates 0.5 1 2`, on the held-out part of the
training data with seed 0: it prints accuracies and stores nothing in RESULTS. Test data play no part in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..harness.record import RESULTS, parse
from . import records
from .methods import METHODS, Job, result_file, run_apart, run_job
from .table import table
from .tasks import TASKS


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    options = parse(
        "speedrun", __doc__, arguments, first=("task", TASKS),
        data=(Path(), "folder with spoken-digits, cifar10-train, sst2, ..."),
        methods=(list(METHODS), "what to train"),
        seeds=([0, 1, 2], "seeds of the final measurements"),
        jobs=(1, "processes at a time"),
        share=(1.0, "share of the task's updates"),
        choose=(False, "compare settings on held-out data"),
        rates=([0.0], "with --choose: factors over the recipe's learning rate (default: the task's)"),
        set=([""], "with --choose: settings SECTION.FIELD=VALUE (JSON) of all methods"),
        verify=(False, "compare with the kept record, which keeps the differences"),
        output=(Path("runs/speedrun"), "folder for runs and results"),
        results=(RESULTS, "folder for records and pictures"),
        page=(records.PAGE, "page that shows the records"),
    )  # fmt: skip
    if unknown := [m for m in options.methods if m not in METHODS]:
        raise SystemExit(f"--methods: expected some of {', '.join(METHODS)}; got {unknown[0]!r}")
    if not options.choose and (options.set != [""] or options.rates != [0.0] or options.share != 1.0):
        raise SystemExit("--set, --rates, --share: expected --choose with them: records have the task's own settings")
    return options


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """What is to be measured, in an order in which fine-tuning comes after its pre-training."""
    task = TASKS[options.task]
    methods = [m for m in task.methods if m in options.methods]
    if not options.choose:
        return [Job(task.name, m, seed, task.rate(m)) for m in methods for seed in options.seeds]
    changes = tuple(filter(None, options.set))
    rates = {m: options.rates if options.rates != [0.0] else [task.rate(m)] for m in methods}
    return [Job(task.name, m, 0, rate, options.share, changes) for m in methods for rate in rates[m]]


def main(arguments: list[str] | None = None) -> None:
    """Measures on test data and writes table and plot; or compares settings on held-out data."""
    options = parse_options(arguments)
    jobs, results = plan_jobs(options), []
    for late in (False, True):  # fine-tuning begins with what data2vec 2.0 has learned
        calls = [
            (job, options.choose, options.output, options.data, result_file(job, options.choose, options.output))
            for job in jobs if (job.method == "finetuned") == late
        ]  # fmt: skip
        results += run_apart(run_job, calls, options.jobs)
    if options.choose:
        for result in results:
            name = "pretrained" if "pretrained" in result["scores"] else result["method"]
            words = " ".join(f"{probe} {100 * score:.1f}" for probe, score in result["scores"][name].items())
            print(f"{Path(result['folder']).name:<60} {words}, {result['cpu_seconds']:.0f} CPU seconds")
        return
    if options.verify:
        record = records.verify(options.task, results, options.seeds, options.results)
        for title, points in record["verified"]["differences"].items():
            print(f"{title}: at most {points:.2f} points from the record")
    else:
        record = records.store(options.task, results, options.results)
        print(f"\n{record['title']}\n{table(record)}")
    records.write_page(options.results, options.page)


if __name__ == "__main__":
    main()
