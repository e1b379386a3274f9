"""What is wrong with labels ends the command before anything is trained, with a count and a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.families import make_config
from support.images import write_tar

from d2v.cli import main
from d2v.config.finetune import HeadSettings
from d2v.data.sources import is_header, read_transcripts
from d2v.interop.tokenizer import write_tokenizer
from d2v.model.data2vec import Data2Vec, strip_pretraining
from d2v.model.finetuned import FineTuned
from d2v.model.saving import write_folder
from d2v.model.task_heads import make_head

from .conftest import WORDS, make_tones, write_images, write_speech, write_spoken_classes, write_table

HEAD = HeadSettings("pooled", 3, norm_eps=1e-6)


def refuse(capsys: pytest.CaptureFixture[str], run: Path, *command: str) -> str:
    """Runs a command that must end with exit code 2, one sentence and no run folder; returns the sentence."""
    capsys.readouterr()
    assert main(["finetune", *command, "--run.dir", str(run), "--run.steps", "2", "--data.workers", "0"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert not run.exists() and lines[-1].startswith("d2v: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def test_class_that_only_the_test_set_has(
    tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_images(tmp_path / "train", 4, 0, ("dark", "light"))
    test = write_images(tmp_path / "test", 3, 1, ("dark", "striped"))
    command = ["vision-classify", "--checkpoint", str(image_model), "--train", str(train), "--test", str(test)]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "test: expected the classes of the training data, got 3 of 6 of classes" in said
    assert "(striped)" in said and "striped/0.png" in said


def test_one_class(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_images(tmp_path / "train", 4, 0, ("dark",))
    said = refuse(capsys, tmp_path / "run", "vision-classify", "--checkpoint", str(image_model), "--train", str(train))
    assert "train: expected at least 2 classes, got 4 samples of ['dark']" in said


def test_files_without_a_label(
    tmp_path: Path, image_model: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In class folders, shards and tables."""
    train = write_images(tmp_path / "train", 4, 0)
    for i in range(2):
        (train / "dark" / f"{i}.png").rename(train / f"loose{i}.png")
    command = ["vision-classify", "--checkpoint", str(image_model), "--train"]
    said = refuse(capsys, tmp_path / "run", *command, str(train))
    assert "expected class folders" in said and "got 'loose0.png' (2 of 12 images outside any)" in said
    members = {f"{i}.png": (train / "light" / f"{i}.png").read_bytes() for i in range(4)} | {"0.cls": b"1"}
    said = refuse(capsys, tmp_path / "run", *command, str(write_tar(tmp_path / "x.tar", members)))
    assert "expected 1.cls in" in said and "(3 of 4 without a label)" in said
    table = tmp_path / "table.tsv"
    write_speech(tmp_path / "speech", 4, 0)
    table.write_text("speech\n0.wav\tae\n1.wav\t\n2.wav\teo\n3.wav\toa\n")
    said = refuse(
        capsys, tmp_path / "run", "speech-classify", "--checkpoint", str(speech_model), "--train", str(table)
    )  # fmt: skip
    assert "'1.wav\\t' in" in said and "table.tsv:3 (1 of 4 without a label)" in said


def test_missing_and_empty_transcripts(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_speech(tmp_path / "train", 6, 0)
    (train / "3.txt").unlink()
    (train / "4.txt").unlink()
    command = ["speech-ctc", "--checkpoint", str(speech_model), "--train", str(train)]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "train: expected a transcript for each, got 2 of 6 without a transcript" in said and "3.wav" in said
    (train / "3.txt").write_text("ae")
    (train / "4.txt").write_text(" \n")
    said = refuse(capsys, tmp_path / "run", *command)
    assert "got 1 of 6 that are empty" in said and "4.wav" in said


def test_characters_outside_the_alphabet(
    tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = write_speech(tmp_path / "train", 6, 0), write_speech(tmp_path / "test", 4, 1)
    (test / "2.txt").write_text("ae! öa")
    command = ["speech-ctc", "--checkpoint", str(speech_model), "--train", str(train), "--test", str(test)]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "got 1 of 4 with characters outside the alphabet ('!ö')" in said and "2.wav" in said


def test_left_out_where_asked_for(tmp_path: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = write_speech(tmp_path / "train", 6, 0), write_speech(tmp_path / "test", 4, 1)
    (train / "3.txt").unlink()
    (test / "2.txt").write_text("ae!")
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train), "--test", str(test)]
    command += ["--run.dir", str(tmp_path / "run"), "--run.steps", "2", "--data.workers", "0"]
    assert main([*command, "--task.bad-labels", "skip", "--data.global-batch", "4"]) == 0
    said = capsys.readouterr()
    assert "left out 1 without a transcript" in said.err and '"samples": 3' in said.out


def test_labels_that_are_no_numbers(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_table(tmp_path / "train.tsv", 20, 0, numbers=True)
    lines = train.read_text().splitlines()
    lines[7] = "a film\tmuch"
    train.write_text("\n".join(lines))
    command = ["text-classify", "--checkpoint", str(text_model), "--train", str(train), "--task.regression"]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "train: expected numbers as labels, got 1 of 20" in said and "train.tsv:8" in said


@pytest.mark.parametrize("pairs", [False, True])
def test_lines_without_a_text_or_a_label(
    tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str], pairs: bool
) -> None:
    """In any of the sets, before a run folder is there; left out and counted where asked for."""
    whole, broken = (write_table(tmp_path / f"{name}.tsv", 40, 0, pairs=pairs) for name in ("whole", "broken"))
    lines = broken.read_text().splitlines()
    lines[2], lines[5], lines[30] = lines[2].rpartition("\t")[0] + "\t ", "\t" + lines[5].partition("\t")[2], "a film"
    broken.write_text("\n".join(lines) + "\n")
    command = ["text-classify", "--checkpoint", str(text_model)]
    for sets in (("--train", broken), ("--train", whole, "--valid", broken), ("--train", whole, "--test", broken)):
        said = refuse(capsys, tmp_path / "run", *command, *map(str, sets))
        assert f"{sets[-2][2:]}: expected a text and a label in every line, got 3 of 40 without" in said
        assert "broken.tsv:3: an empty column (--task.bad-labels skip" in said
    skip = ["--task.bad-labels", "skip", "--run.dir", str(tmp_path / "run"), "--run.steps", "1", "--data.workers", "0"]
    sets = ["--train", str(broken), "--test", str(broken), "--data.global-batch", "4"]
    assert main(["finetune", *command, *sets, *skip]) == 0
    said = capsys.readouterr()
    place = f"without a text or a label, first {broken}:3: an empty column"
    assert f"test: left out 3 lines {place}" in said.err.split("update 1/1")[0]
    result = json.loads(said.out.splitlines()[-1])
    assert result["samples"] == 37
    assert result["left_out"] == {f"lines {place}": 3}


def write_manifest(folder: Path, count: int, rate: int = 16_000) -> Path:
    """A fairseq manifest of tones."""
    import soundfile

    folder.mkdir(parents=True)
    lines = [str(folder)]
    for i in range(count):
        values = make_tones([WORDS[i % 3]] * (1 + i % 4), i)
        soundfile.write(folder / f"{i}.wav", values, rate)
        lines.append(f"{i}.wav\t{len(values)}")
    (folder / "all.tsv").write_text("\n".join(lines) + "\n")
    return folder / "all.tsv"


@pytest.mark.parametrize("suffix", [".ltr", ".wrd"])
@pytest.mark.parametrize("lines", [5, 7])
def test_transcripts_of_another_number_of_lines(
    tmp_path: Path, speech_model: Path, suffix: str, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "data", 6)
    file = manifest.with_suffix(suffix)
    file.write_text("a e |\n" * lines)
    command = ["speech-ctc", "--checkpoint", str(speech_model), "--train", str(manifest)]
    said = refuse(capsys, tmp_path / "run", *command)
    assert f"expected 6 lines in '{file}', as in '{manifest}', got {lines}" in said


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("x.ltr", "H E L L O | Y O U |", "HELLO YOU"), ("x.ltr", "H E L L O", "HELLO"),
        ("x.ltr", "HELLO NEW  WORLD", "HELLO NEW WORLD"), ("x.wrd", "I AM", "I AM"), ("x.wrd", "I", "I"),
    ],
)  # fmt: skip
def test_words_keep_their_spaces(tmp_path: Path, name: str, line: str, text: str) -> None:
    (tmp_path / "x.tsv").write_text("root\na.wav\t1\nb.wav\t1\n")
    (tmp_path / name).write_text(f"{line}\n{line}\n\n")
    assert read_transcripts(tmp_path / "x.tsv") == [text, text]


def test_a_line_of_column_names_is_no_sample(
    tmp_path: Path, text_model: Path, speech_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In tables of text and of speech; said, and left out."""
    table = write_table(tmp_path / "train.tsv", 24, 0)
    table.write_text("sentence\tlabel\n" + table.read_text())
    few = ["--run.steps", "1", "--data.workers", "0", "--data.global-batch", "4", "--run.dir"]
    command = ["finetune", "text-classify", "--checkpoint", str(text_model), "--train", str(table), "--test"]
    assert main([*command, str(table), *few, str(tmp_path / "text")]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert result["classes"] == 2 and result["samples"] == 24
    assert f"test: left out 1 line of column names, {table}:1" in said.err
    write_spoken_classes(tmp_path / "spoken", 4, 0)
    rows = [f"spoken/{word}/{i}.wav\t{word}" for word in WORDS for i in range(4)]
    spoken = tmp_path / "spoken.tsv"
    spoken.write_text("\n".join(["path\tlabel", *rows]) + "\n")
    command = ["finetune", "speech-classify", "--checkpoint", str(speech_model), "--train", str(spoken), "--test"]
    assert main([*command, str(spoken), *few, str(tmp_path / "speech")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["classes"] == 3 and result["samples"] == 12
    assert not is_header(["a good film", "label"]) and not is_header(["sentence", "yes"])


@pytest.mark.parametrize("written", ["--data.tokenizer FOLDER", "--data.tokenizer=FOLDER"])
def test_a_given_tokenizer_is_the_one_that_is_checked(
    tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str], written: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(text_model, model)
    given = shutil.move(model / "tokenizer", tmp_path / "elsewhere")
    table = write_table(tmp_path / "train.tsv", 24, 0)
    command = ["text-classify", "--checkpoint", str(model), "--train", str(table), "--run.steps", "1"]
    command += ["--data.workers", "0", "--data.global-batch", "4"]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "checkpoint: expected its tokenizer in one of" in said and "--data.tokenizer" in said
    options = written.replace("FOLDER", str(given)).split(" ")
    assert main(["finetune", *command, *options, "--run.dir", str(tmp_path / "run")]) == 0
    kept = tmp_path / "run" / "best" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tmp_path / "elsewhere" / "tokenizer.json").read_bytes()
    capsys.readouterr()
    # One that does not fit the model is refused, though a fitting one lies beside the weights.
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} and {i * i}" for i in range(400)))
    write_tokenizer(tmp_path / "larger", str(tmp_path / "text.txt"), vocabulary=300, gpt2=None)
    command[2] = str(text_model)
    said = refuse(capsys, tmp_path / "other", *command, "--data.tokenizer", str(tmp_path / "larger"))
    assert "stem.vocabulary: expected at least 300" in said


def test_one_sample_of_a_class_is_said(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "train.tsv", 24, 0)
    table.write_text(table.read_text() + "a film\tyess\n")
    command = ["finetune", "text-classify", "--checkpoint", str(text_model), "--train", str(table), "--run.steps", "1"]
    assert main([*command, "--data.workers", "0", "--data.global-batch", "4", "--run.dir", str(tmp_path / "r")]) == 0
    before = capsys.readouterr().err.split("update 1/1")[0]
    assert f"note: 1 of 3 classes have one sample: 'yess' ({table}:25)" in before


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_numbers_of_samples_are_no_classes(
    tmp_path: Path, speech_model: Path, rate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "data", 8, rate)
    command = ["speech-classify", "--checkpoint", str(speech_model), "--train", str(manifest)]
    said = refuse(capsys, tmp_path / "run", *command)
    assert "train: expected labels, got numbers of samples: " in said and "0.wav has the label" in said


def test_as_many_classes_as_samples(tmp_path: Path, text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "train.tsv"
    table.write_text("".join(f"a film\t{i}.5\n" for i in range(12)))
    said = refuse(capsys, tmp_path / "run", "text-classify", "--checkpoint", str(text_model), "--train", str(table))
    assert "train: expected several samples of a class, got 12 samples of 12 classes, for example '0.5'" in said


def test_names_of_outputs_that_occur_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("a\nb\na\n")
    model = FineTuned(strip_pretraining(Data2Vec(make_config("vision-base"))), make_head(HEAD, 32), ("a", "b", "c"))
    write_folder(model, tmp_path / "m")
    command = ["evaluate", "model", "--checkpoint", str(tmp_path / "m"), "--test", "x", "--labels"]
    assert main([*command, str(tmp_path / "names.txt")]) == 2
    assert "labels: expected another name for each output, got 'a' twice in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["vision-clasify"], "did you mean 'vision-classify'"),
        (["vision-classify"], "checkpoint: expected a path, got nothing"),
        (["text-classify", "--checkpoint", "MODEL", "--train", "x"], "task: expected vision-classify for a model of"),
        (["vision-classify", "--checkpoint", "MODEL", "--train", "absent"], "train: expected"),
        (["vision-classify", "--checkpoint", "MODEL", "--train", "x", "--task.mixp", "1"], "mean '--task.mixup"),
        (
            ["vision-classify", "--checkpoint", "MODEL", "--train", "DATA", "--decode.method", "beam"],
            "decode: expected nothing but for speech-ctc",
        ),
        (
            ["vision-classify", "--checkpoint", "MODEL", "--train", "DATA", "--task.erasing", "2"],
            "task.erasing: expected 0 to 1, got 2.0",
        ),
    ],
)  # fmt: skip
def test_command_lines(
    tmp_path: Path, image_model: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", 4, 0)
    replaced = {"MODEL": str(image_model), "DATA": str(data)}
    said = refuse(capsys, tmp_path / "run", *(replaced.get(a, a) for a in arguments))
    assert text in said


def test_pre_trained_models_have_no_scores(
    tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", 2, 0)
    assert main(["evaluate", "model", "--checkpoint", str(image_model), "--test", str(data)]) == 2
    assert "expected a fine-tuned model, got a pre-trained one" in capsys.readouterr().err
