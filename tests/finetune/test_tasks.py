"""Each task from the command line on tiny generated data: it learns, writes what it promises, and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from d2v.cli import main
from d2v.evaluate import load_any
from d2v.finetuned import FineTuned

from .conftest import write_images, write_speech, write_spoken_classes, write_table

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
    assert {p.name for p in (run / "test").iterdir()} == {"result.json", "confusion.png", "worst.tsv"}
    assert json.loads((run / "test" / "result.json").read_text()) == result
    worst = (run / "test" / "worst.tsv").read_text().splitlines()
    assert worst[0].split("\t") == ["sample", "truth", "predicted", "loss", "confidence"] and len(worst) == 25
    lines = lines_of(run)
    assert any("valid_accuracy" in line for line in lines) and lines[-1]["loss"] < lines[0]["loss"]
    model, config, _ = load_any(str(run), "cpu")
    assert isinstance(model, FineTuned) and model.labels == ("dark", "light", "striped")
    # The test set is looked at once: the same command says again what was found.
    (run / "test" / "result.json").write_text(json.dumps({**result, "accuracy": 0.123}))
    assert main(command) == 0
    again = capsys.readouterr()
    assert last_object(again.out)["accuracy"] == 0.123 and "looked at before" in again.err
    assert main(["evaluate", "model", "--checkpoint", str(run), "--test", str(test), "--device", "cpu"]) == 0
    evaluated = last_object(capsys.readouterr().out)
    assert evaluated["accuracy"] == result["accuracy"] and evaluated["loss"] == pytest.approx(result["loss"], rel=1e-4)
    assert (run / "evaluation" / "confusion.png").stat().st_size > 1000


def test_transcripts(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = write_speech(tmp_path / "train", 48, 0), write_speech(tmp_path / "test", 12, 1)
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train)]
    command += ["--valid", str(test), "--test", str(test), "--run.dir", str(tmp_path / "run"), *QUIET]
    command += ["--data.global-batch", "16", "--optim.learning-rate", "5e-3", "--run.steps", "120"]
    command += ["--run.checkpoint-every", "60", "--task.time-mask", "0.1", "--task.time-span", "2"]
    command += ["--task.channel-mask", "0.1", "--task.channel-span", "4", "--task.freeze-encoder", "2"]
    assert main(command) == 0
    result = last_object(capsys.readouterr().out)
    assert result["wer"] <= 0.3 and result["cer"] <= result["wer"] + 0.05
    assert result["wer_low"] <= result["wer"] <= result["wer_high"]
    assert "worst.tsv" in {p.name for p in (tmp_path / "run" / "test").iterdir()}
    base = ["evaluate", "model", "--checkpoint", str(tmp_path / "run"), "--test", str(test), "--device", "cpu"]
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    assert main([*base, "--decode.method", "beam"]) == 0
    assert last_object(capsys.readouterr().out)["wer"] <= result["wer"] + 0.1
    (tmp_path / "words.txt").write_text("la\nme\nno\n")
    assert main([*base, "--decode.method", "beam", "--decode.lexicon", str(tmp_path / "words.txt")]) == 0
    assert last_object(capsys.readouterr().out)["wer"] <= result["wer"] + 0.1


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
    command += ["--optim.learning-rate", "2e-3", "--run.steps", "60", "--run.checkpoint-every", "30"]
    command += ["--task.regression"] if kind == "numbers" else []
    assert main(command) == 0
    result = last_object(capsys.readouterr().out)
    if kind == "numbers":
        assert result["pearson"] >= 0.7 and result["pearson_low"] <= result["pearson"] <= result["pearson_high"]
    else:
        assert result["accuracy"] >= 0.8 and result["matthews"] >= 0.6 and 0.6 <= result["f1"] <= 1.0
    assert (tmp_path / "run" / "best" / "tokenizer" / "tokenizer.json").is_file()
