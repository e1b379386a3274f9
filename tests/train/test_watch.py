"""A probe while a run goes on: what it measures, and that the run is the same with and without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.images import write_class_folders
from support.ranks import run_d2v

from d2v import cli, recipes
from d2v.config import Config
from d2v.evaluate import watch
from d2v.evaluate.probe import probe
from d2v.evaluate.watch import RunProbe
from d2v.folder import read_tensors
from d2v.tools.plot import choose_panels
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain

from .conftest import tiny_options


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "labelled")


def probed(config: Config, labelled: Path, **more: Any) -> Config:
    return config.change(probe={"train": str(labelled), "test": str(labelled), **more})


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return read_tensors(folder / "checkpoints" / f"step-{step:08d}", "")


def assert_equal(one: Path, other: Path, step: int = 6) -> None:
    a, b = checkpoint(one, step), checkpoint(other, step)
    assert a.keys() == b.keys() and any(name.startswith("rng.") for name in a)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


def test_a_run_is_the_same_with_a_probe(
    make_config: Callable[..., Config], tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = pretrain(make_config(run={"dir": str(tmp_path / "plain")}))
    config = make_config(run={"dir": str(tmp_path / "probed")})
    # The third probe comes between two lines and two checkpoints.
    folder = pretrain(probed(config, labelled, every=1), probe=RunProbe)
    assert_equal(plain, folder)
    assert_equal(plain, folder, step=3)
    assert losses(plain) == losses(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["probe_step"] for line in lines] == [2, 4, 6]
    said = capsys.readouterr().err
    assert said.count("note: probe: the first took ") == 1 and ", probe " in said and ", kNN " in said
    assert ("probes, accuracy", ("probe_linear", "probe_knn")) in choose_panels(lines)
    found = probe(str(folder), str(labelled), str(labelled), draws=1, labels_per_class=1, device="cpu")
    assert lines[-1]["probe_linear"] == pytest.approx(found["linear_probe"]["pretrained"], abs=1e-6)
    assert lines[-1]["probe_knn"] == pytest.approx(found["knn"]["pretrained"], abs=1e-6)
    counts = json.loads((folder / "data.json").read_text())
    assert counts == json.loads((plain / "data.json").read_text())


def test_a_disturbance_would_be_seen(
    make_config: Callable[..., Config], tmp_path: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain(make_config(run={"dir": str(tmp_path / "plain")}))
    monkeypatch.setattr(RunProbe, "_measure", lambda self: torch.rand(1) and {"linear": 0.0, "knn": 0.0})
    config = probed(make_config(run={"dir": str(tmp_path / "probed")}), labelled, every=1)
    assert_equal(plain, pretrain(config, probe=RunProbe))
    monkeypatch.setattr(watch, "keep_random_state", lambda device: torch.no_grad())
    shutil.rmtree(tmp_path / "probed")
    with pytest.raises(AssertionError):
        assert_equal(plain, pretrain(config, probe=RunProbe))


def test_resuming_with_and_without(
    make_config: Callable[..., Config], tmp_path: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pretrain(make_config(run={"dir": str(tmp_path / "plain"), "steps": 9}))
    config = make_config(run={"dir": str(tmp_path / "probed"), "steps": 9})
    folder, whole = tmp_path / "probed", Config.to_json

    def run_to_6(config: Config) -> None:
        """As if it was killed after update 6."""
        pretrain(config, probe=RunProbe)
        shutil.rmtree(folder / "checkpoints" / "step-00000009")

    def as_before(self: Config) -> str:
        values = json.loads(whole(self))
        del values["probe"], values["run"]["track"]
        return json.dumps(values)

    run_to_6(probed(config, labelled, every=2))
    shutil.rmtree(folder)
    with monkeypatch.context() as older:
        older.setattr(Config, "to_json", as_before)
        run_to_6(config)
    run_to_6(probed(config, labelled, every=2))
    run_to_6(config)
    pretrain(probed(config, labelled, every=5), probe=RunProbe)
    assert_equal(plain, folder, step=9)
    assert read_metrics(folder / "metrics.jsonl")[-1]["probe_step"] == 9


def test_a_probe_that_fails_is_said_once(
    make_config: Callable[..., Config], tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = pretrain(make_config(run={"dir": str(tmp_path / "plain")}))
    config = probed(make_config(run={"dir": str(tmp_path / "probed")}), labelled, every=1)
    whole = RunProbe.__call__

    def vanish(self: RunProbe, update: int, say: Any) -> dict[str, float]:
        if update == 4:
            shutil.rmtree(labelled)
        return whole(self, update, say)

    monkeypatch.setattr(RunProbe, "__call__", vanish)
    capsys.readouterr()
    folder = pretrain(config, probe=RunProbe)
    assert_equal(plain, folder)
    assert [line.get("probe_step") for line in read_metrics(folder / "metrics.jsonl")] == [2, 3, None]
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("; the run goes on")]
    assert len(said) == 1 and said[0].startswith("note: probe.train: expected decodable samples, got ")
    # Taken up again it says so, too, and trains; a new run is refused, before anything is written.
    pretrain(config.change(run={"extend": 2}), probe=RunProbe)
    assert "; the run goes on" in capsys.readouterr().err
    new = config.change(run={"dir": str(tmp_path / "new")})
    with pytest.raises(ValueError, match=r"probe\.train: .*labelled"):
        pretrain(new, probe=RunProbe)
    assert not (tmp_path / "new").exists()


def test_bad_samples_of_the_probe_are_not_the_runs(
    make_config: Callable[..., Config], tmp_path: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = next(labelled.rglob("*.*"))
    broken.write_bytes(b"no image")
    config = probed(make_config(data={"bad_fraction": 0.5}), labelled, every=1)
    folder = pretrain(config, probe=RunProbe)
    said = capsys.readouterr().err
    assert said.count("note: probe.train: left out 1: ") == 1 and broken.name in said
    assert json.loads((folder / "data.json").read_text())["bad"] == 0
    assert not (folder / "bad_samples.jsonl").read_text()


def test_samples_are_bounded(
    make_config: Callable[..., Config], labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    whole = watch.score_all_labels

    def count(train: Any, test: Any) -> dict[str, float]:
        seen.append((len(train[1]), len(test[1])))
        return whole(train, test)

    monkeypatch.setattr(watch, "score_all_labels", count)
    pretrain(probed(make_config(), labelled, samples=7), probe=RunProbe)
    assert seen == [(7, 7)] * 2


def test_slow_probes_are_said_once(
    make_config: Callable[..., Config], labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(probed(make_config(), labelled, every=1), probe=RunProbe)
    assert capsys.readouterr().err.count("of the run's time so far is spent on it; a larger --probe.every") == 1


def test_what_has_to_be_given(make_config: Callable[..., Config], labelled: Path) -> None:
    with pytest.raises(ValueError, match=r"expected pretrain\(config, probe=d2v\.evaluate\.watch\.RunProbe\)"):
        pretrain(probed(make_config(), labelled))
    with pytest.raises(ValueError, match=r"probe\.test: expected data to go with probe\.train"):
        make_config().change(probe={"train": "x"})
    with pytest.raises(ValueError, match=r"probe\.pool: expected another than class"):
        make_config().replace({"probe.pool": "class", "encoder.extra_tokens": 0, "loss.class_weight": 0.0})


def test_the_command(tmp_path: Path, images: Path, labelled: Path) -> None:
    base = ["pretrain", "vision-tiny", *tiny_options(), "--data.path", str(images), "--run.dir", str(tmp_path / "run")]
    assert cli.main([*base, "--probe.train", str(labelled), "--probe.test", str(labelled), "--probe.every", "5"]) == 0
    assert [line.get("probe_step") for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [None, None, 6]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks(parallel: str, tmp_path: Path, images: Path, labelled: Path) -> None:
    def run(name: str, *more: str) -> Path:
        options = ["pretrain", "vision-tiny", *tiny_options(), "--run.parallel", parallel, "--data.path", str(images)]
        run_d2v([*options, "--run.dir", str(tmp_path / name), *more], 2)
        return tmp_path / name

    # 5 samples in batches of 2: one rank has a batch more.
    sets = [f"--probe.{name}={labelled}" for name in ("train", "test")] + ["--probe.every=1", "--probe.samples=5"]
    plain, folder = run("plain"), run("probed", *sets)
    assert_equal(plain, folder)
    assert losses(plain) == losses(folder)
    assert [line["probe_step"] for line in read_metrics(folder / "metrics.jsonl")] == [2, 4, 6]


def test_text_with_the_tokenizer_that_the_run_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (["cat", "dog", "bird", "fish"], ["car", "bus", "train", "ship"])
    lines = [" ".join(words[i % 2][(i // 2 + j) % 4] for j in range(100 if i == 0 else 12)) for i in range(60)]
    (tmp_path / "plain.txt").write_text("\n\n".join(lines))
    (tmp_path / "t.tsv").write_text("".join(f"{line}\t{'ab'[i % 2]}\n" for i, line in enumerate(lines)))
    config = recipes.text_tiny().change(
        data={"path": str(tmp_path / "plain.txt"), "global_batch": 2, "workers": 0},
        run={"dir": str(tmp_path / "run"), "steps": 1, "threads": 1, "device": "cpu"},
    )
    folder = pretrain(probed(config, tmp_path / "t.tsv"), probe=RunProbe)
    assert read_metrics(folder / "metrics.jsonl")[-1]["probe_linear"] > 0.9
    assert "note: probe.train: cut 1: " in capsys.readouterr().err
