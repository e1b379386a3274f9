"""Every task on real data in a tiny form: a few updates on a part of it. And the examples."""

from __future__ import annotations

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
from support.datasets import find_dataset
from support.images import write_tar

from d2v.cli import main

from .conftest import write_images, write_speech, write_table

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEW = ["--run.steps", "4", "--data.global-batch", "8", "--data.workers", "0", "--run.device", "cpu"]
FEW += ["--run.threads", "1"]


def few_updates(task: str, model: Path, train: Path, test: Path, run: Path, *more: str) -> None:
    command = ["finetune", task, "--checkpoint", str(model), "--train", str(train), "--test", str(test)]
    assert main([*command, "--run.dir", str(run), *FEW, *more]) == 0


def link_digits(root: Path, speaker: str, count: int, *, transcripts: bool) -> Path:
    """Links to recordings of a speaker, in class folders or with transcripts beside them."""
    folder = find_dataset("spoken-digits")
    for digit, name in enumerate(NAMES):
        place = root if transcripts else root / name
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob(f"{digit}_{speaker}_*.wav"))[:count]:
            (place / file.name).symlink_to(file)
            if transcripts:
                (place / file.name).with_suffix(".txt").write_text(name)
    return root


@pytest.mark.parametrize("task", ["speech-classify", "speech-ctc"])
def test_spoken_digits(tmp_path: Path, speech_model: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (("train", "george", 3), ("test", "nicolas", 2))
    spelled = task == "speech-ctc"
    train, test = (link_digits(tmp_path / n, speaker, c, transcripts=spelled) for n, speaker, c in parts)
    few_updates(task, speech_model, train, test, tmp_path / "run", "--task.time-span", "2", "--task.channel-span", "4")
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["samples"] == 20
    # Words too many count as errors too, so there may be more errors than words.
    assert result["wer"] >= 0.0 if spelled else 0.0 <= result["accuracy"] <= 1.0


def test_cifar(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = find_dataset("cifar10-train")
    parts = []
    for number in (0, 9):
        with tarfile.open(shards / f"cifar10-train-{number:04d}.tar") as archive:
            members = [archive.next() for _ in range(160)]
            data = {m.name: archive.extractfile(m).read() for m in members if m is not None}  # type: ignore[union-attr]
        parts.append(write_tar(tmp_path / f"part-{number}.tar", data))
    few_updates("vision-classify", image_model, *parts, tmp_path / "run")
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["samples"] == 80 and result["classes"] == 10


def test_sst2(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = find_dataset("sst2")
    parts = []
    for name, count in (("train", 60), ("dev", 30)):
        lines = (folder / f"{name}.tsv").read_text().splitlines()[:count]
        parts.append(tmp_path / f"{name}.tsv")
        parts[-1].write_text("\n".join(lines))
    few_updates("text-classify", text_model, *parts, tmp_path / "run")
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["samples"] == 30 and result["classes"] == 2


# ---- examples ---------------------------------------------------------------------------------------------------


class Examples:
    """Runs examples as programs, in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run(self, name: str, *arguments: Path) -> list[list[str]]:
        """Fields of the lines that an example prints; it is short."""
        file = ROOT / "examples" / f"{name}.py"
        assert len([line for line in file.read_text().split('"""')[2].splitlines() if line.strip()]) <= 16
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        runpy.run_path(str(file), run_name="__main__")
        return [line.split("\t") for line in self.capsys.readouterr().out.splitlines()]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Examples:
    return Examples(monkeypatch, capsys)


def test_image_features(tmp_path: Path, image_model: Path, examples: Examples) -> None:
    """The nearest of dark and light images is one of the same kind, even with random weights."""
    lines = examples.run("image_features", image_model, write_images(tmp_path / "x", 4, 0, ("dark", "light")))
    assert len(lines) == 8 and all(Path(a).parent == Path(b).parent for a, b in lines)


def test_transcribe(tmp_path: Path, speech_model: Path, examples: Examples) -> None:
    data = write_speech(tmp_path / "x", 8, 0)
    few_updates("speech-ctc", speech_model, data, data, tmp_path / "run", "--task.time-mask", "0")
    lines = examples.run("transcribe", tmp_path / "run", data)
    assert len(lines) == 8 and lines[0][0].endswith("0.wav")


def test_classify_text(tmp_path: Path, text_model: Path, examples: Examples) -> None:
    data = write_table(tmp_path / "x.tsv", 40, 0)
    few_updates("text-classify", text_model, data, data, tmp_path / "run")
    (tmp_path / "texts.txt").write_text("a good film\n\na bad film\n")
    lines = examples.run("classify_text", tmp_path / "run", tmp_path / "texts.txt")
    assert len(lines) == 2 and all(label in ("yes", "no") and 0.5 <= float(p) <= 1.0 for _, label, p in lines)
