"""Each task from the command line on tiny generated data: it learns, writes what it promises, and resumes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v.cli import main
from d2v.folder import MODEL, load_tensors
from d2v.model.finetuned import FineTuned
from d2v.saved import load_any

from .conftest import write_images, write_speech, write_spoken_classes, write_table

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--data.workers", "0", "--run.device", "cpu", "--run.threads", "1", "--run.log-every", "5"]


def last_object(text: str) -> dict[str, Any]:
    """The JSON object in the last line that a command printed."""
    value: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return value


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_images(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = write_images(tmp_path / "train", 24, 0), write_images(tmp_path / "test", 8, 1)
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(train)]
    command += ["--test", str(test), "--run.dir", str(tmp_path / "run"), "--data.global-batch", "16", *QUIET]
    command += ["--optim.learning-rate", "3e-3", "--task.epochs", "8", "--task.mixup", "0.2"]
    assert main(command) == 0
    result = last_object(capsys.readouterr().out)
    assert result["accuracy"] >= 0.8 and result["accuracy_low"] < result["accuracy"] <= result["accuracy_high"]
    assert result["samples"] == 24 and result["classes"] == 3
    run = tmp_path / "run"
    assert {p.name for p in (run / "test").iterdir()} == {
        "result.json", "classes.csv", "confusion.csv", "confusion.png", "worst.tsv",
    }  # fmt: skip
    written = json.loads((run / "test" / "result.json").read_text())
    classes = written.pop("per_class")
    assert written == result
    assert [c["label"] for c in classes] == ["dark", "light", "striped"] and {c["samples"] for c in classes} == {8}
    with (run / "test" / "confusion.csv").open(newline="") as file:
        names, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], dtype=int)
    assert names == ["true class", "dark", "light", "striped"] and [row[0] for row in rows] == names[1:]
    assert counts.sum() == 24 and np.trace(counts) / 24 == pytest.approx(result["accuracy"], abs=1e-5)
    assert [c["recall"] for c in classes] == pytest.approx((np.diag(counts) / 8).tolist(), abs=1e-5)
    with (run / "test" / "classes.csv").open(newline="") as file:
        assert [{**row, "label": row["label"]} for row in csv.DictReader(file)] == [
            {name: str(value) for name, value in c.items()} for c in classes
        ]
    worst = (run / "test" / "worst.tsv").read_text().splitlines()
    assert worst[0].split("\t") == ["sample", "truth", "predicted", "loss", "confidence"] and len(worst) == 25
    lines = lines_of(run)
    assert any("valid_accuracy" in line for line in lines) and lines[-1]["loss"] < lines[0]["loss"]
    model, _, _ = load_any(str(run), "cpu")
    assert isinstance(model, FineTuned) and model.labels == ("dark", "light", "striped")
    # The test set is looked at once: the same command says again what was found.
    (run / "test" / "result.json").write_text(json.dumps({**result, "per_class": classes, "accuracy": 0.123}))
    assert main(command) == 0
    again = capsys.readouterr()
    assert last_object(again.out) == {**result, "accuracy": 0.123} and "looked at before" in again.err
    assert main(["evaluate", "model", "--checkpoint", str(run), "--test", str(test), "--device", "cpu"]) == 0
    evaluated = last_object(capsys.readouterr().out)
    assert evaluated["accuracy"] == result["accuracy"] and evaluated["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert (run / "evaluation" / "confusion.png").stat().st_size > 1000
    # The encoder of a fine-tuned model has features as any other.
    features = ["features", "--checkpoint", str(run), "--input", str(test), "--output", str(tmp_path / "f.npy")]
    assert main([*features, "--pool", "mean", "--device", "cpu"]) == 0
    assert np.load(tmp_path / "f.npy").shape == (24, 32)


@pytest.mark.parametrize("share", ["0", "0.2"])
def test_few_labels(
    tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    """Without held-out samples all of them train and the last checkpoint is taken; no more than so many are written."""
    monkeypatch.setattr("d2v.finetune.run.CHECKPOINTS", 5)
    train, run = write_images(tmp_path / "train", 4, 0), tmp_path / "run"
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(train)]
    command += ["--test", str(train), "--run.dir", str(run), "--run.steps", "20", "--task.valid-share", share]
    assert main([*command, "--run.keep-checkpoints", "20", "--data.global-batch", "16", *QUIET]) == 0
    said = capsys.readouterr().err
    assert len(list((run / "checkpoints").glob("step-*"))) == 5
    assert ("12 training, 0 held-out" in said) == ("chose step-00000020, the last" in said) == (share == "0")
    assert ("so few choose a checkpoint by chance" in said) == (share == "0.2")


def test_transcripts(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = write_speech(tmp_path / "train", 48, 0), write_speech(tmp_path / "test", 12, 1)
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train)]
    command += ["--valid", str(test), "--test", str(test), "--run.dir", str(tmp_path / "run"), *QUIET]
    command += ["--data.global-batch", "16", "--optim.learning-rate", "1e-2", "--optim.clip", "3", "--run.steps", "100"]
    command += ["--run.checkpoint-every", "50", "--task.time-mask", "0.1", "--task.time-span", "2"]
    command += ["--task.channel-mask", "0.1", "--task.channel-span", "4", "--task.freeze-encoder", "2"]
    assert main(command) == 0
    result = last_object(capsys.readouterr().out)
    assert result["wer"] <= 0.2 and result["cer"] <= 0.2
    assert result["wer_low"] <= result["wer"] <= result["wer_high"]
    assert "worst.tsv" in {p.name for p in (tmp_path / "run" / "test").iterdir()}
    base = ["evaluate", "model", "--checkpoint", str(tmp_path / "run"), "--test", str(test), "--device", "cpu"]
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    assert main([*base, "--decode.method", "beam"]) == 0
    assert last_object(capsys.readouterr().out)["wer"] <= result["wer"] + 0.1
    (tmp_path / "words.txt").write_text("ae\neo\noa\n")
    assert main([*base, "--decode.method", "beam", "--decode.lexicon", str(tmp_path / "words.txt")]) == 0
    assert last_object(capsys.readouterr().out)["wer"] <= result["wer"] + 0.1


@pytest.mark.long
def test_a_narrow_model_learns_letters_with_its_default_channel_mask(
    tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write_speech(tmp_path / "train", 96, 0), write_speech(tmp_path / "test", 24, 1)
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train), *QUIET]
    command += ["--test", str(test), "--run.dir", str(tmp_path / "run"), "--run.steps", "400", "--data.global-batch"]
    command += ["12", "--optim.learning-rate", "3e-3", "--task.time-mask", "0", "--task.freeze-encoder", "0"]
    assert main(command) == 0
    assert last_object(capsys.readouterr().out)["cer"] < 0.3


def test_transcripts_in_pieces(
    tmp_path: Path, speech_model: Path, text_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer goes with the chosen model."""
    train = write_speech(tmp_path / "train", 8, 0)
    shutil.copytree(text_model.parent / "tokenizer", tmp_path / "bpe")
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train), *QUIET]
    command += ["--test", str(train), "--run.dir", str(tmp_path / "run"), "--data.global-batch", "8"]
    command += ["--task.units", "bpe", "--task.bpe", str(tmp_path / "bpe"), "--run.steps", "2"]
    assert main([*command, "--task.time-span", "2", "--task.channel-span", "4"]) == 0
    result = last_object(capsys.readouterr().out)
    shutil.rmtree(tmp_path / "bpe")
    assert main(["evaluate", "model", "--checkpoint", str(tmp_path / "run"), "--test", str(train)]) == 0
    assert last_object(capsys.readouterr().out)["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_spoken_classes(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (write_spoken_classes(tmp_path / n, c, s) for n, c, s in (("train", 16, 0), ("test", 6, 5000)))
    command = ["finetune", "speech-classify", "--checkpoint", str(speech_model), "--train", str(train)]
    command += ["--test", str(test), "--run.dir", str(tmp_path / "run"), "--data.global-batch", "16", *QUIET]
    command += ["--optim.learning-rate", "3e-3", "--task.epochs", "15", "--task.no-freeze-stem"]
    assert main(command) == 0
    assert last_object(capsys.readouterr().out)["accuracy"] >= 0.8


@pytest.mark.parametrize("kind", ["pairs", "numbers"])
def test_texts(tmp_path: Path, text_model: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {kind: True}
    train = write_table(tmp_path / "train.tsv", 120, 0, **options)
    test = write_table(tmp_path / "test.tsv", 40, 1, **options)
    command = ["finetune", "text-classify", "--checkpoint", str(text_model), "--train", str(train)]
    command += ["--test", str(test), "--run.dir", str(tmp_path / "run"), "--data.global-batch", "16", *QUIET]
    command += ["--optim.learning-rate", "2e-3", "--run.steps", "120", "--run.checkpoint-every", "60"]
    command += ["--task.regression"] if kind == "numbers" else []
    assert main(command) == 0
    result = last_object(capsys.readouterr().out)
    if kind == "numbers":
        assert result["pearson"] >= 0.7 and result["pearson_low"] <= result["pearson"] <= result["pearson_high"]
    else:
        assert result["accuracy"] >= 0.8 and result["matthews"] >= 0.6 and 0.6 <= result["f1"] <= 1.0
    assert (tmp_path / "run" / "best" / "tokenizer" / "tokenizer.json").is_file()


def test_resumed_run_ends_at_the_same_weights(tmp_path: Path, image_model: Path) -> None:
    train = write_images(tmp_path / "train", 8, 0)
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(train), *QUIET]
    command += ["--run.steps", "6", "--run.checkpoint-every", "3", "--run.keep-checkpoints", "2"]
    command += ["--data.global-batch", "8", "--run.dir", str(tmp_path / "run")]
    assert main(command) == 0
    final = tmp_path / "run" / "checkpoints" / "step-00000006"
    tensors = load_tensors(final, MODEL)
    shutil.rmtree(final)
    shutil.rmtree(tmp_path / "run" / "best")
    assert main([*command, "--data.workers", "2"]) == 0
    again = load_tensors(final, MODEL)
    assert tensors.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in tensors.items())
    assert (tmp_path / "run" / "best" / "config.json").is_file()


def test_other_labels_are_another_run(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_images(tmp_path / "train", 8, 0)
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(train), *QUIET]
    command += ["--run.steps", "2", "--data.global-batch", "8", "--run.dir", str(tmp_path / "run")]
    assert main(command) == 0
    (train / "striped").rename(train / "spotted")
    capsys.readouterr()
    assert main(command) == 2
    assert "holds a run with other settings: finetune.labels" in capsys.readouterr().err


def test_two_ranks(tmp_path: Path, image_model: Path) -> None:
    """The same labels and the same start on both; rank 0 writes the result."""
    train, test = write_images(tmp_path / "train", 8, 0), write_images(tmp_path / "test", 3, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "d2v", "finetune", "vision-classify"]
    command += ["--checkpoint", str(image_model), "--train", str(train), "--test", str(test), *QUIET]
    command += ["--run.steps", "4", "--data.global-batch", "8", "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert last_object(done.stdout)["samples"] == 9
    assert lines_of(tmp_path / "run")[-1]["step"] == 4
