"""The tables of what was learned, and which model fine-tuning begins with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.harness.record import RESULTS as RESULTS_FOLDER
from benchmarks.harness.record import ROOT
from benchmarks.speedrun import curve, methods, records
from benchmarks.speedrun.__main__ import parse_options, plan_jobs
from benchmarks.speedrun.methods import (
    Job,
    after_quarters,
    find_pretrained,
    scaled,
    supervised_job,
    updates_for,
    write_untrained,
)
from benchmarks.speedrun.table import PROBES, draw, show, summarise, table
from benchmarks.speedrun.tasks import SPEAKERS, TASKS, Fold, Splits, choose_few, prepare_digits


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


def test_plot_after_each_quarter(tmp_path: Path) -> None:
    points = [{"linear_probe": 0.1 * n, "knn": 0.1 * n, "few_label": float("nan")} for n in (1, 2, 3)]
    results = [{**result("data2vec2", seed, 0.7), "quarters": [9.0, 18.0, 27.0], "during": points} for seed in (0, 1)]
    rows = summarise(results)
    assert [p["cpu_seconds"] for p in rows[0]["during"][1]] == [9.0, 18.0, 27.0]
    draw({"rows": rows, "title": "digits", "machine": MACHINE}, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_models_are_kept_after_each_quarter() -> None:
    updates: list[int] = []
    kept: list[int] = []
    objective = SimpleNamespace(end_update=lambda update, applied: updates.append(update))
    after_quarters(objective, 10, kept.append)  # type: ignore[arg-type]
    for update in range(1, 11):
        objective.end_update(update, None)
        assert len(kept) == (update >= 2) + (update >= 5) + (update >= 8)
    assert kept == [1, 2, 3] and updates == list(range(1, 11))


def test_fine_tuning_begins_with_the_rate_that_was_chosen(tmp_path: Path) -> None:
    task = replace(TASKS["digits"], rates={"data2vec2": 2.0})
    with pytest.raises(ValueError, match="finetuned: expected a model of data2vec2"):
        find_pretrained(task, 1, tmp_path, "")
    model = tmp_path / "digits" / "data2vec2,x2,seed1" / "model"
    model.mkdir(parents=True)
    assert find_pretrained(task, 1, tmp_path, "") == model


def test_settings_that_are_tried() -> None:
    task = TASKS["cifar"].with_changes(["mask.copies=4", "data.crop_scale=[0.2, 1.0]"])
    for method in ("data2vec2", "data2vec1", "autoencoder"):
        config = task.config(method)
        assert (config.mask.copies, config.data.crop_scale, config.data.grey) == (4, (0.2, 1.0), False)
    assert updates_for(task, "data2vec2") < TASKS["cifar"].steps, "equal FLOPs, not equal updates"
    with pytest.raises(ValueError, match=r"set: expected SECTION.FIELD=VALUE in JSON, got 'mask.copies'"):
        task.with_changes(["mask.copies"])
    with pytest.raises(SystemExit, match="expected --choose with them"):
        parse_options(["cifar", "--set", "mask.copies=4"])
    jobs = plan_jobs(
        parse_options(["cifar", "--choose", "--rates", "1", "2", "--methods", "data2vec2", "--share", "0.5"])
    )
    assert jobs == [Job("cifar", "data2vec2", 0, rate, 0.5) for rate in (1.0, 2.0)]
    assert jobs[0].folder(Path()) == Path("cifar/data2vec2,x1,seed0,share0.5")


@pytest.mark.parametrize("name", ["digits", "waveforms"])
def test_every_method_has_the_same_samples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random speed given to a task's pre-trainings is given to its training from labels, too."""
    changes = {**TASKS[name].changes, "data": {"speed": 0.3}}
    task, fold = replace(TASKS[name], changes=changes), Fold("pretrain", "train", "few", "test")
    for method in ("data2vec2", "data2vec1"):
        assert scaled(task.config(method), 10, 0, 1.0, fold, tmp_path).data.speed == 0.3
    given: list[float] = []

    def catch(*_: Any, data: Any, **__: Any) -> dict[str, Any]:
        given.append(data.speed)
        return {"accuracy": 0.5}

    monkeypatch.setattr(methods, "finetune", catch)
    start = write_untrained(task, 0, fold, tmp_path)
    job = Job(name, "scratch", 0, 1.0)
    assert supervised_job(task, job, fold, tmp_path, start)["scores"]["scratch"]["knn"] == 0.5
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


def test_a_share_of_the_unlabelled_samples(tmp_path: Path) -> None:
    source = tmp_path / "all"
    for i in range(200):
        (source / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (source / str(i % 2) / f"{i}.wav").write_bytes(b"")
    fold = Fold(str(source), "train", "few", "test")
    for share, count in ((0.5, 100), (0.03, TASKS["digits"].config().data.global_batch)):
        found = curve.choose_share(TASKS["digits"], fold, share, tmp_path / f"{share}", seed=0)
        assert len(list(Path(found.pretrain).iterdir())) == count
        assert found.train == "train"


def test_curves(tmp_path: Path) -> None:
    rows = [
        dict(start=start, kind=kind, share=share, seed=seed, labels=n, accuracy=(1 + seed) / 10 + share / 2)
        for start, kind, share in (
            ("random", "all", 0.0), ("given", "all", 0.0), ("pretrained", "all", 1.0), ("pretrained", "probe", 1.0),
            ("pretrained", "all", 0.1), ("pretrained", "probe", 0.1),
        )
        for seed in (0, 1) for n in ((10, 30) if share in (0.0, 1.0) else (10,))
    ]  # fmt: skip
    lines = curve.tables(rows).splitlines()
    alone, whole, part = "15.0 (10.0–20.0)", "65.0 (60.0–70.0)", "20.0 (15.0–25.0)"
    assert lines[0].startswith("| labels a class | random weights: all weights trained | pre-trained here: all")
    assert lines[2] == f"| 10 | {alone} | {whole} | {whole} | {alone} |"
    assert lines[-2:] == [
        f"| 0.1 | {alone} | {part} | {part} | {alone} |",
        f"| 1 | {alone} | {whole} | {whole} | {alone} |",
    ]
    curve.draw({"title": "digits", "machine": MACHINE, "rows": rows}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_processes_leave_results_and_are_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [(value, tmp_path / str(value) / "result.json") for value in (2, 3)]
    assert methods.run_apart(math.factorial, calls, 2) == [2, 6]
    assert "3 " in capsys.readouterr().out
    calls[0][-1].write_text("7")
    assert methods.run_apart(math.factorial, calls, 1) == [7, 6]
    with pytest.raises(ValueError, match="factorial"):
        methods.run_apart(math.factorial, [(-1, tmp_path / "bad" / "result.json")], 1)


def test_records_are_kept_verified_and_shown(tmp_path: Path) -> None:
    records.store("digits", RESULTS, tmp_path)
    records.store("digits", [result("autoencoder", 0, 0.6)], tmp_path)  # the rows of another call stay
    again = [result("data2vec2", 0, 0.7), result("data2vec2", 1, 0.79)]
    record = records.verify("digits", again, [0, 1], tmp_path)
    found = record["verified"]["differences"]
    assert found == pytest.approx({"data2vec 2.0": 1.0, "the same network, untrained": 0.0})
    with pytest.raises(ValueError, match=r"verify: expected methods and seeds of the record, got 'supervised"):
        records.verify("digits", [result("scratch", 0, 0.5), result("scratch", 1, 0.5)], [0, 1], tmp_path)
    with pytest.raises(ValueError, match=r"verify: expected --seeds 0 1 ... as in the record, got \[1\]"):
        records.verify("digits", [], [1], tmp_path)
    records.write_page(tmp_path, tmp_path / "records.md")
    page = (tmp_path / "records.md").read_text()
    assert "| data2vec 2.0 | 75.0 (70.0–80.0) |" in page and "| masked autoencoder | 60.0 |" in page
    assert "seed 0, 1): at most 1.0 points apart" in page and "cifar" not in page.split("## ")[1]
    assert (tmp_path / "speedrun-digits.png").stat().st_size > 1000


def test_settings_of_speech_are_chosen_by_speakers_never_heard(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "spoken-digits").mkdir()
    for speaker in (*SPEAKERS, "nicolas"):
        for number in range(2):
            soundfile.write(tmp_path / "spoken-digits" / f"7_{speaker}_{number}.wav", [0.0] * 800, 8000)
    final, folds = prepare_digits(tmp_path, tmp_path / "out", 0)
    names = [{p.name.split("_")[1] for p in Path(path).rglob("*.wav")} for path in (final.pretrain, final.test)]
    assert names == [set(SPEAKERS), {"nicolas"}]
    for fold, speaker in zip(folds, SPEAKERS, strict=True):
        for path in (fold.pretrain, fold.train, fold.few):
            assert {p.name.split("_")[1] for p in Path(path).rglob("*.wav")} == set(SPEAKERS) - {speaker}
        assert {p.name.split("_")[1] for p in Path(fold.test).rglob("*.wav")} == {speaker}


def test_data_that_were_begun_are_made_again(tmp_path: Path) -> None:
    def prepare(data: Path, folder: Path, seed: int) -> Splits:
        made = not folder.exists()
        folder.mkdir(exist_ok=True)
        if made:
            (folder / "first").touch()
            if not data.exists():
                raise KeyboardInterrupt
            (folder / "last").touch()
        return Splits(Fold("all", "train", "few", "test"), ())

    task, folder = replace(TASKS["digits"], prepare=prepare), tmp_path / "data"
    with pytest.raises(KeyboardInterrupt):
        task.splits(tmp_path / "missing", folder, 0)
    for _ in range(2):
        task.splits(tmp_path, folder, 0)
        assert sorted(p.name for p in folder.iterdir()) == ["first", "last"]


def test_scores_are_means_over_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folds = tuple(Fold(f"pretrain-{n}", "train", "few", "test") for n in range(2))
    task = replace(TASKS["digits"], prepare=lambda *_: Splits(Fold("all", "train", "few", "test"), folds))
    monkeypatch.setitem(methods.TASKS, "digits", task)
    seen: list[tuple[str, str]] = []

    def train(task: Any, job: Any, fold: Fold, folder: Path) -> dict[str, Any]:
        seen.append((fold.pretrain, folder.name))
        return {"steps": 1, "cpu_seconds": 5.0}

    values = iter((0.2, 0.6))
    monkeypatch.setattr(methods, "pretrain_job", train)
    monkeypatch.setattr(methods, "probe", lambda *_: {"pretrained": {"knn": next(values)}})
    found = methods.run_job(Job("digits", "data2vec1", 0, 1.0), True, tmp_path, tmp_path)
    assert seen == [("pretrain-0", "fold-0"), ("pretrain-1", "fold-1")]
    assert found["scores"] == {"pretrained": {"knn": pytest.approx(0.4)}} and found["cpu_seconds"] == 10.0


def test_the_pages_show_the_records(tmp_path: Path) -> None:
    records.write_page(RESULTS_FOLDER, tmp_path / "records.md")
    assert (tmp_path / "records.md").read_text() == records.PAGE.read_text(), "python -m benchmarks.speedrun writes it"
    rows = {row["name"]: row["scores"] for row in records.read("textures", RESULTS_FOLDER)["rows"]}
    readme = (ROOT / "README.md").read_text()
    for name in ("data2vec2", "autoencoder", "random_init"):
        assert " | ".join(show(rows[name][key]) for key in PROBES) in readme, name
