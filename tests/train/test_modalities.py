"""Speech and text through the whole trainer: files, exact resume, probes, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support.sounds import encode_sound, write_sounds, write_text

from d2v import recipes
from d2v.cli import main
from d2v.config import Config
from d2v.evaluate.features import extract
from d2v.evaluate.probe import probe
from d2v.model.stems import positions
from d2v.train.logging import read_metrics
from d2v.train.pretraining import pretrain
from d2v.train.trainer import Trainer
from d2v_kernels import pack_lengths

from .test_train import assert_same_run

RECIPES = ("speech-tiny", "speech1-tiny", "text-tiny", "text1-tiny")
Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("text-tiny", "run", data={...}) -> a small configuration with data and its run folder in tmp_path."""
    sounds = write_sounds(tmp_path / "sounds")
    text = write_text(tmp_path / "text.txt")

    def build(recipe: str, folder: str = "run", **sections: dict[str, Any]) -> Config:
        base = recipes.get(recipe)
        path = sounds if recipe.startswith("speech") else text
        changes: dict[str, dict[str, Any]] = {
            "encoder": {"width": 16, "heads": 2, "depth": 2, "dropout": 0.1},
            "mask": {"copies": 2},
            "target": {"top_k": 2},
            "optim": {"warmup_steps": 2},
            "data": {"path": str(path), "valid": str(path), "global_batch": 4, "micro_batch": 2, "workers": 0},
            "run": {
                "dir": str(tmp_path / folder), "steps": 7, "log_every": 3, "checkpoint_every": 2, "threads": 1,
                "device": "cpu",
            },
        }  # fmt: skip
        if base.version == 2:
            changes["decoder"] = {"layers": 1, "width": 16, "groups": 2}
        if recipe.startswith("text"):
            changes["stem"] = {"vocabulary": 300, "max_tokens": 32, "mask_token": 299 if base.version == 1 else None}
        for name, values in sections.items():
            changes[name] = {**changes.get(name, {}), **values}
        parts = {n: dataclasses.replace(getattr(base, n), **values) for n, values in changes.items()}
        return dataclasses.replace(base, **parts)

    return build


@pytest.mark.parametrize(("recipe", "packed"), [*((r, "auto") for r in RECIPES), ("speech1-tiny", "always")])
def test_stopping_anywhere_and_resuming_is_exact(recipe: str, packed: str, make: Make, tmp_path: Path) -> None:
    with mock.patch.object(positions, "pack_lengths", side_effect=pack_lengths) as packing:
        folder = pretrain(make(recipe, "whole", data={"workers": 1}, run={"packed": packed}))
    assert (packing.call_count > 0) == (packed == "always")
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert all(math.isfinite(v) for line in lines for v in line.values() if v is not None)
    assert lines[-1]["valid_step"] == 7
    parts = make(recipe, "parts", run={"packed": packed})
    original = Trainer.run_update

    def then_stop(self: Trainer, batches: Any) -> Any:
        out = original(self, batches)
        if self.update in (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_update", then_stop)
        for _ in range(2):
            with pytest.raises(SystemExit):
                pretrain(parts)
    pretrain(parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    report = json.loads((folder / "data.json").read_text())
    assert report["bad"] == 0
    expected = {"8000 Hz to 16000 Hz": 3, "44100 Hz to 16000 Hz": 3} if recipe.startswith("speech") else {}
    assert report["converted"] == expected
    allowed = {".files", ".json", ".jsonl", ".safetensors", ".bin", ""}
    assert {p.suffix for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts} <= allowed


def test_probe_of_speech(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, sounds = str(pretrain(make("speech-tiny"))), str(tmp_path / "sounds")
    first = next((tmp_path / "sounds").rglob("*.*"))
    (short := first.with_name("short.wav")).write_bytes(encode_sound(np.zeros(160, np.float32), 16_000))
    (first.parent / "notes.pdf").touch()
    names = ["random_init", "log_mel"]
    result = probe(run, sounds, sounds, baselines=names, labels_per_class=2, draws=2, device="cpu", batch=5)
    assert set(result["knn"]) == {"pretrained", *names}
    assert (result["classes"], result["train_samples"]) == (3, 12)
    said = capsys.readouterr().out
    assert "12 training and 12 test utterances" in said
    assert [line for line in said.splitlines() if line.startswith("train: left out ")] == [
        "train: left out 1 files that end in .pdf", f"train: left out 1: {short}: shorter than 0.135 s",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="baselines: expected of random_init, log_mel for utterances, got pixels"):
        probe(run, sounds, sounds, baselines=["pixels"])


def test_probe_of_text(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pretrain(make("text1-tiny"))
    table = tmp_path / "t.tsv"
    lines = [f"{'kan sota' if i % 2 else 'meer tor lis'} {'nar ' * (i % 5)}\t{i % 2}\n" for i in range(30)]
    table.write_text("".join(lines))
    names = ["random_init", "bag_of_words"]
    result = probe(str(folder), str(table), str(table), baselines=names, draws=2, device="cpu", batch=7)
    assert result["linear_probe"]["bag_of_words"] == 1.0
    assert result["test_samples"] == 30
    broken = tmp_path / "broken.tsv"
    broken.write_text("".join([*lines[:20], "\t1\n", "kan sota\t\n"]))
    with pytest.raises(ValueError, match=r"test: expected decodable samples, got 2 of 22 .*broken\.tsv:21: an empty"):
        probe(str(folder), str(table), str(broken), draws=1, device="cpu")
    inside = next((folder / "checkpoints").iterdir())
    assert probe(str(inside), str(table), str(table), draws=1, device="cpu")["classes"] == 2
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="checkpoint: expected its tokenizer in one of"):
        probe(str(folder), str(table), str(table))
    capsys.readouterr()


def test_a_dry_run_leaves_nothing(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    path = str(tmp_path / "text.txt")
    options = ["--data.path", path, "--data.workers", "0", "--data.global-batch", "2", "--run.device", "cpu"]
    assert main(["pretrain", "text1-tiny", *options, "--dry-run"]) == 0
    assert "texts" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_is_not_taken_for_the_same_run(make: Make, tmp_path: Path) -> None:
    for recipe in ("speech-tiny", "text-tiny"):
        pretrain(make(recipe, recipe, run={"steps": 2}))
    sounds = sorted((tmp_path / "sounds" / "ant").iterdir())
    sounds[0].write_bytes(sounds[1].read_bytes())
    write_text(tmp_path / "text.txt", seed=9)
    for recipe in ("speech-tiny", "text-tiny"):
        with pytest.raises(ValueError, match=r"data\.path: expected the files that .* got 1 of \d+ of another size"):
            pretrain(make(recipe, recipe, run={"steps": 2}))


def test_what_of_the_held_out_data_is_not_seen_is_said(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_sounds(tmp_path / "held-out")
    broken, damaged = held_out / "ant" / "00.wav", held_out / "bee" / "x.wav"
    broken.write_bytes(encode_sound(np.full(9_000, np.nan, np.float32), subtype="FLOAT"))
    damaged.write_bytes(b"nothing")
    (held_out / "bee" / "notes.pdf").write_bytes(b"x")
    capsys.readouterr()
    pretrain(make("speech-tiny", "run", data={"valid": str(held_out)}, run={"steps": 6, "checkpoint_every": 2}))
    said = [line for line in capsys.readouterr().err.splitlines() if "data.valid" in line]
    assert said[0] == "note: data.valid: left out 1 files that end in .pdf"
    assert said[1].startswith(f"note: data.valid: 1 of 13 cannot be used, for example {damaged}: ")
    cannot = "1 of 12 cannot be read and count as blank samples, for example"
    assert said[2:] == [f"note: data.valid: {cannot} {broken}: samples that are not finite"]


def test_nothing_is_written_for_input_that_cannot_be_used(make: Make, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("speech-tiny", {"path": missing}),
        ("speech-tiny", {"path": str(tmp_path / "text.txt")}),
        ("speech-tiny", {"min_seconds": 5.0}),
        ("text-tiny", {"path": missing}),
        ("text-tiny", {"path": str(tmp_path / "sounds")}),
        ("text-tiny", {"valid": missing}),
        ("text-tiny", {"tokenizer": missing}),
        ("text-tiny", {"block_tokens": 4}),
    ]
    for recipe, data in cases:
        with pytest.raises(ValueError, match="expected"):
            pretrain(make(recipe, data=data))
    assert not (tmp_path / "run").exists()


def test_files_that_are_not_text_are_counted(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    write_text(folder / "a.txt")
    (folder / "b.txt").write_bytes(b"\xff\n")
    (folder / "c.txt").write_bytes(b"")
    run = pretrain(make("text-tiny", data={"path": str(folder), "valid": None}, run={"steps": 2}))
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [(Path(e["path"]).name, e["reason"]) for e in listed] == [
        ("b.txt:1", "not UTF-8 from byte 0"),
        ("c.txt", "no text"),
    ]
    assert "note: 2 of 42 cannot be used; for example" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data\.bad_fraction: .* got 2 of 42"):
        pretrain(make("text-tiny", "other", data={"path": str(folder), "valid": None, "bad_fraction": 0.01}))


@pytest.mark.parametrize("recipe", ["speech1-tiny", "text-tiny"])
def test_features_of_whole_samples(recipe: str, make: Make, tmp_path: Path) -> None:
    folder = pretrain(make(recipe, run={"steps": 1}))
    path = tmp_path / ("sounds" if recipe.startswith("speech") else "text.txt")
    found = []
    for batch in (1, 5):
        output = tmp_path / f"{batch}.npy"
        summary = extract(str(folder), str(path), str(output), batch=batch, device="cpu")
        rows = [line.split("\t") for line in Path(f"{output}.index.tsv").read_text().splitlines()[1:]]
        found.append((np.load(output), rows))
        assert f"of {len(rows)} " in summary
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == (12 if recipe.startswith("speech") else 40)
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5 * np.abs(found[0][0]).max())
