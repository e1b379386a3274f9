"""The tables of what was learned, and which model fine-tuning begins with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import methods
from benchmarks.learning.methods import find_pretrained, linear, scaled, supervised_job, updates_for, write_untrained
from benchmarks.learning.table import draw, summarise, table
from benchmarks.learning.tasks import TASKS, Splits, choose_few


def result(method: str, seed: int, value: float, rate: float = 1.0) -> dict[str, Any]:
    scores = {"linear_probe": value, "knn": value - 0.1, "few_label": float("nan")}
    name = "pretrained" if method.startswith("data2vec") else method
    rows = {name: scores}
    if method == "data2vec2":
        rows["random_init"] = {"linear_probe": 0.2, "knn": 0.3, "few_label": 0.1}
    return {"task": "digits", "method": method, "seed": seed, "rate": rate, "scores": rows, "cpu_seconds": 60.0}


MACHINE = {"cpu": "none", "torch": "0", "date": "2000-01-01"}
RESULTS = [result("data2vec2", 0, 0.7), result("data2vec2", 1, 0.8), result("scratch", 0, 0.5)]


def test_table() -> None:
    rows = summarise(RESULTS)
    assert [row["name"] for row in rows] == ["data2vec2", "random_init", "scratch"]
    lines = table({"rows": rows, "title": "digits", "machine": MACHINE}).splitlines()
    assert lines[2].startswith("| data2vec 2.0 | 75.0 (70.0–80.0) | 65.0 (60.0–70.0) |  | 60 |")
    assert lines[4].startswith("| supervised from scratch | 50.0 |")


def test_plot(tmp_path: Path) -> None:
    draw({"rows": summarise(RESULTS), "title": "digits", "machine": MACHINE}, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_fine_tuning_begins_with_the_rate_that_was_chosen(tmp_path: Path) -> None:
    task = TASKS["digits"]
    with pytest.raises(ValueError, match="finetuned: expected results of data2vec2"):
        find_pretrained(task, 0, tmp_path)
    for rate, value in ((0.5, 0.3), (2.0, 0.6), (1.0, 0.4)):
        file = tmp_path / "digits" / f"data2vec2-x{rate}-seed0" / "result-choose.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(result("data2vec2", 0, value, rate)))
    assert find_pretrained(task, 2, tmp_path).parent.name == "data2vec2-x2-seed2"
    assert linear(result("scratch", 0, 0.5)) == 0.5


@pytest.mark.parametrize("name", ["digits", "waveforms"])
def test_every_method_has_the_same_samples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random speed given to a task's pre-trainings is given to its training from labels, too."""
    changes = {**TASKS[name].changes, "data": {"speed": 0.3}}
    task, splits = replace(TASKS[name], changes=changes), Splits("pretrain", "train", "valid", "test", "few")
    for version in (1, 2):
        assert scaled(task.config(version), 10, 0, 1.0, splits, tmp_path).data.speed == 0.3
    given: list[float] = []

    def catch(*_: Any, data: Any, **__: Any) -> dict[str, Any]:
        given.append(data.speed)
        return {"accuracy": 0.5}

    monkeypatch.setattr(methods, "finetune", catch)
    start = write_untrained(task, 0, splits, tmp_path)
    assert supervised_job(task, "scratch", 0, 1.0, splits, "test", tmp_path, start)["scores"]["scratch"]["knn"] == 0.5
    assert given == [0.3, 0.3], "with all labels and with few"


def test_equal_work() -> None:
    """A method without a teacher gets more updates, in the ratio of the FLOPs."""
    task = TASKS["textures"]
    assert updates_for(task, "data2vec2") == task.steps
    assert updates_for(task, "autoencoder") > task.steps > updates_for(task, "data2vec1") > 0


def test_few_labels_are_as_many_of_every_class(tmp_path: Path) -> None:
    for name, count in (("a", 30), ("b", 12)):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(b"")
    choose_few(tmp_path / "train", tmp_path / "few", seed=0)
    assert [len(list((tmp_path / "few" / name).iterdir())) for name in "ab"] == [10, 10]
