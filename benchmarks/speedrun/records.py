"""The kept records of the speedrun: their files, a second run that verifies them, and the page that shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..harness.record import ROOT, machine_basics
from ..harness.report import origin
from .table import PROBES, draw, summarise, table
from .tasks import TASKS, Task

PAGE = ROOT / "benchmarks" / "records.md"
HEAD = """# Records of the speedrun

Written by `python -m benchmarks.speedrun TASK`, which measures them: accuracy on test data in %, mean and range over
seeds 0, 1 and 2. All pre-trainings of a task cost the same FLOPs (data2vec's teacher counts), each with the learning
rate that was best for it on held-out data. CPU seconds are of one thread, of the pre-training or of the training on
all labels, and longer where the machine had other work. kNN and linear probe read frozen features; the two supervised
rows train all weights: their kNN column repeats the accuracy. Attempts that did not help are in [LOG.md](LOG.md).
`DATA` is a folder with `spoken-digits`, `cifar10-train`, `sst2` and `wikitext`.
"""


def file_of(task: str, folder: Path) -> Path:
    """Where a record is kept."""
    return folder / f"speedrun-{task}.json"


def read(task: str, folder: Path) -> dict[str, Any]:
    """A record; without rows where there is none."""
    file = file_of(task, folder)
    return json.loads(file.read_text()) if file.is_file() else {"rows": []}


def write(record: dict[str, Any], folder: Path) -> None:
    """Into its file, in one form."""
    file_of(record["task"], folder).write_text(json.dumps(record, indent=1) + "\n")


def store(task: str, results: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The record of a task, with a picture. Rows take the places of those of the same name, others stay."""
    rows = {row["name"]: row for row in (*read(task, folder)["rows"], *summarise(results))}
    record = {"task": task, "title": TASKS[task].title, "machine": machine_basics(), "rows": list(rows.values())}
    write(record, folder)
    draw(record, file_of(task, folder).with_suffix(".png"))
    return record


def differences(record: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Titles of the rows of a second run with the largest difference of a score of any seed, in points.

    Raises:
        ValueError: a row or a seed that the record does not have.
    """
    rows = {row["name"]: row for row in record["rows"]}
    for again in summarise(results):
        kept = rows.get(again["name"])
        if kept is None or any(len(kept["scores"][k]) < len(again["scores"][k]) for k in PROBES):
            raise ValueError(f"verify: expected methods and seeds of the record, got {again['title']!r}")
        pairs = [p for k in PROBES for p in zip(kept["scores"][k], again["scores"][k], strict=False)]
        yield again["title"], max(100 * abs(a - b) for a, b in pairs if a == a)  # few labels may be NaN


def verify(task: str, results: list[dict[str, Any]], seeds: list[int], folder: Path) -> dict[str, Any]:
    """Notes in a record how far a second run is from it; returns it. `ValueError` for what cannot be compared."""
    if seeds != list(range(len(seeds))):
        raise ValueError(f"verify: expected --seeds 0 1 ... as in the record, got {seeds}")
    record = read(task, folder)
    found = dict(differences(record, results))
    record["verified"] = {"machine": machine_basics(), "seeds": seeds, "differences": found}
    write(record, folder)
    return record


def section(task: Task, record: dict[str, Any]) -> str:
    """A record: how it was reached, its table, where it was measured and verified."""
    lines = [f"## {record['title']}: `{task.name}`", task.reached, table(record)]
    command = f"python -m benchmarks.speedrun {task.name}" + ("" if task.name == "textures" else " --data DATA")
    lines.append(f"`{command}`; {origin(record['machine'])}.")
    if second := record.get("verified"):
        largest = max(second["differences"].values())
        rows = "all rows" if len(second["differences"]) == len(record["rows"]) else "; ".join(second["differences"])
        words = "the same accuracies" if largest == 0 else f"at most {largest:.1f} points apart"
        seeds = "seed " + ", ".join(map(str, second["seeds"]))
        lines.append(f"A second run ({rows}; {seeds}): {words}; {origin(second['machine'])}.")
    lines.append(f"![accuracy against compute](results/{file_of(task.name, Path()).with_suffix('.png')})")
    return "\n\n".join(lines)


def write_page(folder: Path, page: Path) -> None:
    """All records."""
    found = [(task, read(name, folder)) for name, task in TASKS.items()]
    page.write_text("\n".join([HEAD, *(section(task, record) + "\n" for task, record in found if record["rows"])]))
