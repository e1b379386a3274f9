"""Samples with several labels: scores, fine-tuning, probes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v.cli import main
from d2v.config.finetune import FineTuneConfig
from d2v.evaluate.multilabel import average_precision, mean_average_precision, name_labels, split_labels
from d2v.evaluate.probe import probe
from d2v.finetune.predict import predict
from d2v.finetune.scores import score_each_label, score_labels

from .conftest import TONES
from .test_tasks import QUIET, last_object


def naive_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision by its definition, threshold by threshold."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = float((truth & taken).sum() / truth.sum())
        total += (recall - before) * float((truth & taken).sum() / taken.sum())
        before = recall
    return total


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision(levels: int) -> None:
    """Also of equal scores; as scikit-learn computes it."""
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(levels)
    truth, scores = rng.random((60, 7)) < 0.3, rng.integers(levels, size=(60, 7)) / levels
    found = average_precision(truth, scores)
    np.testing.assert_allclose(found, [naive_precision(truth[:, k], scores[:, k]) for k in range(7)], rtol=1e-12)
    np.testing.assert_allclose(found, average_precision_score(truth, scores, average=None), rtol=1e-12)
    truth[:, 3] = False
    assert np.isnan(average_precision(truth, scores)[3])
    assert mean_average_precision(truth, scores) == pytest.approx(np.delete(found, 3).mean())
    assert np.isnan(mean_average_precision(truth[:, 3:4], scores[:, 3:4]))
    each = score_each_label(truth, scores, list("abcdefg"))
    assert each[3] == {
        "label": "d", "samples": 0, "predicted": int((scores[:, 3] >= 0.5).sum()), "average_precision": None,
    }  # fmt: skip
    whole = score_labels(truth, scores)
    assert whole["map_low"] < whole["map"] < whole["map_high"]


def test_names_of_labels() -> None:
    assert split_labels(["a,b", "b , a,b", "c", ","]) == [("a", "b"), ("b", "a"), ("c",), ()]
    assert split_labels(["Speech, male;Music", "Speech, male"]) == [("Speech, male", "Music"), ("Speech, male",)]
    assert split_labels(["Speech, male", "a,b"], known=["Speech, male"]) == [("Speech, male",), ("a", "b")]
    assert name_labels(np.array([0.7, 0.1, 0.5]), "abc") == "a; c" and name_labels((1, 2), "abc") == "b; c"


def write_chords(root: Path, count: int, seed: int, mark: str = ",") -> Path:
    """A .tsv of recordings of one to three tones at the same time."""
    root.mkdir(parents=True)
    rng, lines = np.random.default_rng(seed), []
    for i in range(count):
        names = [name for name in TONES if rng.random() < 0.5] or ["a"]
        time = np.arange(8000) / 16_000
        wave = sum(np.sin(2 * np.pi * TONES[n] * rng.uniform(0.95, 1.05) * time + rng.uniform(0, 6)) for n in names)
        soundfile.write(root / f"{i}.wav", 0.2 * wave + 0.003 * rng.standard_normal(8000), 16_000)
        lines.append(f"{i}.wav\t{mark.join(names)}\n")
    (root / "list.tsv").write_text("".join(lines))
    return root / "list.tsv"


def test_chords(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (write_chords(tmp_path / n, c, s) for n, c, s in (("train", 64, 0), ("test", 24, 1)))
    command = ["finetune", "speech-classify", "--checkpoint", str(speech_model), "--train", str(train), *QUIET]
    command += ["--test", str(test), "--run.dir", str(tmp_path / "run"), "--data.global-batch", "16"]
    command += ["--task.multi-label", "--optim.learning-rate", "3e-3", "--task.epochs", "15", "--task.no-freeze-stem"]
    assert main([*command, "--task.time-mask", "0"]) == 0
    said = capsys.readouterr()
    result = last_object(said.out)
    assert result["task"] == "multi-label" and result["classes"] == 3 and result["map"] > 0.9
    assert "valid_map" in (tmp_path / "run" / "metrics.jsonl").read_text()
    folder = tmp_path / "run" / "test"
    stored = json.loads((folder / "result.json").read_text())
    with (folder / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["a", "e", "o"]
    each = [row["average_precision"] for row in stored["per_class"]]
    assert np.mean(each) == pytest.approx(stored["map"], abs=1e-5)
    counts = [sum(name in line.split("\t")[1] for line in test.read_text().splitlines()) for name in "aeo"]
    assert [row["samples"] for row in stored["per_class"]] == counts
    assert "; " in (folder / "worst.tsv").read_text()
    config = FineTuneConfig.from_json((tmp_path / "run" / "best" / "config.json").read_text())
    assert config.finetune.labels == ("a", "e", "o") and config.finetune.head.task == "multi-label"
    assert main(["evaluate", "model", "--checkpoint", str(tmp_path / "run"), "--test", str(test)]) == 0
    assert last_object(capsys.readouterr().out)["map"] == pytest.approx(result["map"], abs=1e-6)
    answers = {Path(p.name).name: p.answer for p in predict(str(tmp_path / "run"), str(test.parent), device="cpu")}
    true = dict(line.split("\t") for line in test.read_text().splitlines())
    assert sum(answers[name] == "; ".join(names.split(",")) for name, names in true.items()) > 12
    # A label that the training data lacks.
    test.write_text(test.read_text().replace("0.wav\t", "0.wav\tx,", 1))
    assert main(["evaluate", "model", "--checkpoint", str(tmp_path / "run"), "--test", str(test)]) == 2
    assert "1 of 24 of classes that the training data lacks (x)" in capsys.readouterr().err


def test_images_of_a_table(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixing and smoothing are those of the published images."""
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        bright, striped = rng.random(2) < 0.5
        pixels = rng.integers(0, 60, (16, 16, 3)) + 120 * bright
        pixels[:: 4 if striped else 99] = 250
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
        labels = [name for name, on in (("bright", bright), ("striped", striped)) if on] or ["plain"]
        rows.append(json.dumps({"file_name": f"{i}.png", "label": labels}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(rows))
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(tmp_path), *QUIET]
    command += ["--run.dir", str(tmp_path / "run"), "--run.steps", "3", "--data.global-batch", "8"]
    assert main([*command, "--task.multi-label", "--test", str(tmp_path)]) == 0
    result = last_object(capsys.readouterr().out)
    assert result["classes"] == 3 and result["samples"] == 24 and 0 < result["map"] <= 1
    command[command.index("vision-classify")] = "vision-classify"
    assert main([*command[:-6], "--run.dir", str(tmp_path / "b"), "--task.multi-label", "--task.regression"]) == 2
    assert "task.multi-label: expected nothing with --task.regression, got both" in capsys.readouterr().err


@pytest.mark.parametrize("layer", [None, "0,1"])
def test_probe(tmp_path: Path, speech_model: Path, layer: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    train, test = (write_chords(tmp_path / n, c, s, ";") for n, c, s in (("train", 64, 0), ("test", 24, 1)))
    result = probe(
        str(speech_model), str(train), str(test), baselines=["log_mel"], multi_label=True, draws=2, layer=layer,
        device="cpu", output=str(tmp_path / "probe.json"),
    )  # fmt: skip
    assert result["classes"] == 3 and 0.3 < result["chance"] < 0.7
    assert result["linear_probe"]["log_mel"] > 0.95 and result["knn"]["log_mel"] > 0.8
    assert result["few_label"]["log_mel"] > 0.8
    assert "test mean average precision in %, 3 classes" in capsys.readouterr().out
    test.write_text(test.read_text().replace(";", ","))  # each set has its own separator
    other = probe(str(speech_model), str(train), str(test), multi_label=True, draws=2, layer=layer, device="cpu")
    assert other["linear_probe"]["pretrained"] == result["linear_probe"]["pretrained"]
    test.write_text(test.read_text() + "0.wav\tx,a\n")
    with pytest.raises(ValueError, match="test: expected the labels a, e, o, got 'x'"):
        probe(str(speech_model), str(train), str(test), multi_label=True, device="cpu")
