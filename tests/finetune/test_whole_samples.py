"""Samples that are longer than a fine-tuned model was trained on, transcripts that do not fit, and what is said of
both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from support.families import make_config

from d2v.config.finetune import FineTune, FineTuneConfig, HeadSettings, TaskOptions
from d2v.evaluate.pieces import Uncut
from d2v.finetune.predict import predict
from d2v.finetune.run import evaluate_model
from d2v.finetune.spelling import SPACE, SPECIALS
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.saving import write_folder
from d2v.model.task_heads import make_head
from d2v.saved import load_any

from .conftest import write_table

LABELS = (*SPECIALS, SPACE, "a", "b")


def write_tuned(folder: Path, recipe: str, kind: str, task: str, labels: tuple[str, ...], **sections: object) -> str:
    """A fine-tuned model with random weights."""
    head = HeadSettings(kind, len(labels), task=task)  # type: ignore[arg-type]
    tune = FineTune("speech-ctc" if task == "ctc" else "text-classify", head, labels, TaskOptions())
    config = FineTuneConfig.of(make_config(recipe).change(**sections), finetune=tune)
    torch.manual_seed(1)
    write_folder(FineTuned(strip_pretraining(Data2Vec(config)), make_head(head, config.encoder.width), labels), folder)
    return str(folder)


def write_spoken(folder: Path, *seconds: float, text: str = "ab ba") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, length in enumerate(seconds):
        values = np.random.default_rng(i).standard_normal(round(16_000 * length))
        soundfile.write(folder / f"{i}.wav", 0.1 * values, 16_000, subtype="FLOAT")
        (folder / f"{i}.txt").write_text(text)
    return folder


def test_transcripts_of_long_recordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All are scored; cut, that is left out, where a limit is given; alone and beside others the same is found."""
    model = write_tuned(tmp_path / "m", "speech-base", "tokens", "ctc", LABELS, data={"max_seconds": 0.5})
    data = write_spoken(tmp_path / "in", 0.4, 1.7, 0.3)
    result = evaluate_model(model, str(data), device="cpu")
    assert result["samples"] == 3 and result["left_out"] == {} and np.isfinite(result["loss"])
    found = {p.name: p for p in predict(model, str(data), device="cpu")}
    (alone,) = predict(model, str(write_spoken(tmp_path / "one", 0.4)), device="cpu")
    again = found[str(data / "0.wav")]
    assert len(found) == 3 and (again.answer, again.confidence) == (alone.answer, pytest.approx(alone.confidence))
    assert len(str(found[str(data / "1.wav")].answer)) > len(str(again.answer))
    capsys.readouterr()
    result = evaluate_model(model, str(data), device="cpu", max_seconds=1.0)
    assert result["samples"] == 2 and "utterances of 1 s or more" in str(result["left_out"])
    list(predict(model, str(data), device="cpu", max_seconds=1.0))
    assert f"path: cut 1: {data / '1.wav'}: cut to 1 of 1.7 s" in capsys.readouterr().err


def test_a_model_is_evaluated_in_float32(tmp_path: Path) -> None:
    """Whatever it was trained in, unless asked otherwise."""
    data, results = write_spoken(tmp_path / "in", 0.4, 0.6), []
    for name, trained, asked in (("a", "fp32", "fp32"), ("b", "bf16", "fp32"), ("c", "bf16", "bf16")):
        model = write_tuned(tmp_path / name, "speech-base", "tokens", "ctc", LABELS, run={"precision": trained})
        results.append(evaluate_model(model, str(data), device="cpu", precision=asked)["loss"])
        assert load_any(model, "cpu")[1].run.precision == "fp32"
    assert results[0] == results[1] != results[2] and results[2] == pytest.approx(results[0], rel=0.05)


def test_recordings_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tuned(tmp_path / "m", "speech-base", "tokens", "ctc", LABELS)
    data = write_spoken(tmp_path / "in", 0.4, 0.5, 0.001)
    (data / "1.wav").write_bytes(b"broken")
    assert [Path(p.name).name for p in predict(model, str(data), device="cpu")] == ["0.wav"]
    said = capsys.readouterr().err
    assert "path: left out 2: " in said and "1.wav: " in said and "2.wav: shorter than" in said
    assert evaluate_model(model, str(data), device="cpu")["samples"] == 1
    said = capsys.readouterr().err
    assert "test: left out 2: " in said and "1.wav: " in said


def test_transcripts_longer_than_their_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named before the training and by the evaluation; the mean loss is that of the others."""
    from d2v.cli import main

    model = write_tuned(tmp_path / "m", "speech-base", "tokens", "ctc", LABELS)
    data = write_spoken(tmp_path / "in", 0.4, 0.4, 0.4, 0.4)
    alone = evaluate_model(model, str(data), device="cpu")
    (data / "2.txt").write_text("ab" * 400)
    capsys.readouterr()
    result = evaluate_model(model, str(data), device="cpu")
    said = capsys.readouterr()
    assert f"test: no loss for 1: {data / '2.wav'}: its transcript is longer than its frames" in said.err
    assert json.loads(said.out.splitlines()[-1]) == result and result["samples"] == 4
    assert result["loss"] == pytest.approx(alone["loss"], rel=0.1)
    command = ["finetune", "speech-ctc", "--checkpoint", model, "--train", str(data), "--run.steps", "1", "--valid"]
    command += [str(data), "--data.global-batch", "2", "--data.workers", "0", "--run.dir", str(tmp_path / "run")]
    assert main(command) == 0
    said = capsys.readouterr()
    before = said.err.split("update 1/1")[0]
    for name in ("train", "valid"):
        expected = f"{name}: transcripts longer than their frames teach nothing: 1: {data / '2.wav'}: 801 frames needed"
        assert expected in before


def test_long_texts(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every token counts, unless the text is cut."""
    tokenizer = str(text_model.parent / "tokenizer")
    model = write_tuned(
        tmp_path / "m", "text1-tiny", "sentence", "classification", ("no", "yes"), data={"tokenizer": tokenizer},
        stem={"vocabulary": 265, "mask_token": 264, "max_tokens": 32},
    )  # fmt: skip
    table = write_table(tmp_path / "test.tsv", 6, 0)
    lines = table.read_text().splitlines()
    lines[2] = " ".join(["a good film"] * 40) + "\tyes"
    table.write_text("\n".join(lines) + "\n")
    whole = evaluate_model(model, str(table), device="cpu", output=str(tmp_path / "a"))
    cut = evaluate_model(model, str(table), device="cpu", output=str(tmp_path / "b"), max_tokens=32)
    assert f"test: cut 1: {table}:3: cut to 32 of" in capsys.readouterr().err
    assert whole["samples"] == cut["samples"] == 6 and whole["loss"] != cut["loss"]
    rows = [dict.fromkeys((tmp_path / n / "worst.tsv").read_text().splitlines()) for n in "ab"]
    assert len(rows[0].keys() & rows[1].keys()) == 6  # the header, and all texts but the long one


def test_what_training_cuts_is_said(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from d2v.cli import main

    table = write_table(tmp_path / "train.tsv", 12, 0)
    lines = table.read_text().splitlines()
    lines[4] = " ".join(["film"] * 400) + "\tyes"
    table.write_text("\n".join(lines) + "\n")
    command = ["finetune", "text-classify", "--checkpoint", str(text_model), "--train", str(table), "--run.steps", "1"]
    command += ["--valid", str(table), "--data.workers", "0", "--data.global-batch", "4", "--run.dir"]
    assert main([*command, str(tmp_path / "run")]) == 0
    before = capsys.readouterr().err.split("update 1/1")[0]
    assert all(f"{name}: cut 1: {table}:5: cut to" in before for name in ("train", "valid"))


def test_pieces_cover_every_token_once() -> None:
    """Of texts of any length, with what the model saw at their ends."""
    config = dataclasses.replace(make_config("text1-tiny"), stem=dataclasses.replace(make_config("text1-tiny").stem))
    uncut = Uncut(config)
    assert uncut.longest is not None
    for length in (2, uncut.longest, uncut.longest + 1, 5 * uncut.longest + 7):
        value = np.arange(10, 10 + length)
        value[0], value[-1] = 0, 2
        pieces = uncut.split(value)
        assert all(len(v) <= uncut.longest and v[0] == 0 and v[-1] == 2 for v, _, _ in pieces)
        assert np.concatenate([v[first:last] for v, first, last in pieces]).tolist() == value.tolist()
