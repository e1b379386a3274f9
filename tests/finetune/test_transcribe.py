"""`d2v transcribe`: text and times of words; long recordings in pieces."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from d2v.cli import main
from d2v.config.finetune import Decoding
from d2v.evaluate.pieces import Piece, PieceBatch
from d2v.finetune.decoding import Decoder, find_seam, find_words
from d2v.finetune.spelling import SPECIALS, Letters, Pieces

from .conftest import WORDS, make_tones, write_images, write_speech
from .test_tasks import QUIET

LETTERS = Letters([*SPECIALS, "|", "a", "b", "c"])


def emit(path: list[int], labels: int = 8) -> Tensor:
    """(T,K) log-probabilities whose best path this is."""
    return (6.0 * torch.nn.functional.one_hot(torch.tensor(path), labels)).log_softmax(-1)


@pytest.mark.parametrize("method", ["greedy", "beam", "lexicon"])
def test_words_and_their_frames(tmp_path: Path, method: str) -> None:
    path = [4, 0, 5, 5, 0, 5, 6, 0, 4, 4, 0, 0, 7, 7, 0]
    settings = Decoding()
    if method != "greedy":
        pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
        (tmp_path / "words").write_text("aab\nc\n")
        settings = Decoding(method="beam", lexicon=str(tmp_path / "words") if method == "lexicon" else None)
    text, found = Decoder(settings, LETTERS, 0).search(emit(path))
    words = find_words(found, LETTERS, 0)
    assert text == "aab c" and [tuple(word) for word in words] == [("aab", 2, 7), ("c", 12, 14)]


def test_words_spell_the_transcript() -> None:
    """Whatever the labels, those of pieces of words, too."""
    rng = np.random.default_rng(0)
    pieces = Pieces([*SPECIALS, "Ġa", "b", "Ġ", "Ã", "©"])
    for _ in range(300):
        path = rng.integers(0, 8, size=12).tolist()
        for spelling in (LETTERS, pieces):
            text, found = Decoder(Decoding(), spelling, 0).search(emit(path, 9))
            words = find_words(found, spelling, 0)
            assert text.replace("�", "") == " ".join(w.text for w in words).replace("�", "")
            assert all(a.first < a.last <= b.first for a, b in pairwise(words))


def test_pieces_are_joined_where_they_agree() -> None:
    """Two pieces place their labels a frame apart at the middle of what they share."""
    rng = np.random.default_rng(1)
    lost = 0
    for _ in range(200):
        path = [0] * 64
        for place in range(4, 60, 4):
            path[place] = int(rng.integers(4, 8))
        whole = Decoder(Decoding(), LETTERS, 0).decode(emit(path))
        late = [0] * 64
        for place in range(4, 60, 4):
            late[place + int(rng.integers(-1, 2)) * (abs(place - 32) < 4)] = path[place]
        rows = [emit(path)[:44], emit(late)[20:]]
        batch = PieceBatch(
            torch.zeros(2, 1), None, None, None, None, (), (object(),), (Piece(0, 0, 32), Piece(0, 12, 44)), 2
        )
        decode = Decoder(Decoding(), LETTERS, 0).decode
        joined = batch.run(lambda *_: rows, lambda a, b: find_seam(a, b, 0))  # noqa: B023
        assert [len(one) for one in joined] == [64] and decode(joined[0]) == whole
        lost += decode(batch.run(lambda *_: rows)[0]) != whole  # noqa: B023
    assert lost


@pytest.fixture(scope="module")
def spoken_model(tmp_path_factory: pytest.TempPathFactory, speech_model: Path) -> Path:
    """Fine-tuned on tones of 3 words."""
    place = tmp_path_factory.mktemp("spoken")
    train = write_speech(place / "train", 48, 0, words=3)
    command = ["finetune", "speech-ctc", "--checkpoint", str(speech_model), "--train", str(train), *QUIET]
    command += ["--run.dir", str(place / "run"), "--data.global-batch", "16", "--optim.learning-rate", "1e-2"]
    command += ["--optim.clip", "3", "--run.steps", "120", "--task.time-mask", "0", "--task.channel-mask", "0"]
    assert main([*command, "--task.freeze-encoder", "2", "--data.max-seconds", "2"]) == 0
    return place / "run"


def test_long_recordings(tmp_path: Path, spoken_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In pieces of 2 s as the whole; words stand where they were said."""
    said = np.random.default_rng(3).choice(WORDS, size=50).tolist()
    soundfile.write(tmp_path / "long.wav", make_tones(said, 5), 16_000)
    soundfile.write(tmp_path / "short.wav", make_tones(said[:3], 5), 16_000)
    shutil.copytree(spoken_model / "best", tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    config["data"]["max_seconds"] = 1000.0
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    files = [str(tmp_path / "long.wav"), str(tmp_path / "short.wav")]
    capsys.readouterr()
    texts = []
    for model in (str(spoken_model), str(tmp_path / "whole")):
        assert main(["transcribe", "--checkpoint", model, *files, "--device", "cpu"]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [line[0] for line in lines] == files
        texts.append([line[1].split() for line in lines])
    assert texts[0] == texts[1] and len(texts[0][0]) == 50
    assert sum(a != b for a, b in zip(texts[0][0], said, strict=True)) <= 5
    assert main(["transcribe", "--checkpoint", str(spoken_model), *files, "--words", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [word["word"] for word in first["words"]] == texts[0][0] and second["text"] == " ".join(texts[0][1])
    starts = np.arange(50) * 0.4  # two letters of 0.15 s, 0.1 s of silence
    found = np.array([[word["start"], word["end"]] for word in first["words"]])
    assert np.abs(found[:, 0] - starts).max() < 0.2 and (found[:, 1] > found[:, 0]).all()
    assert main(["transcribe", "--checkpoint", str(spoken_model), files[1], "--words"]) == 0
    assert [line.split("\t")[3] for line in capsys.readouterr().out.splitlines()] == texts[0][1]


def test_what_cannot_be_transcribed(
    tmp_path: Path, spoken_model: Path, image_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.wav", make_tones(["ae"], 5), 16_000)
    (tmp_path / "b.wav").write_bytes(b"broken")
    (tmp_path / "c.txt").write_text("text")
    cases = {
        (str(image_model), "a.wav"): "expected a fine-tuned model, got a pre-trained one",
        (str(spoken_model), "b.wav"): "files: expected utterances, got 1 unreadable",
        (str(spoken_model), "c.txt"): "files: expected .tar shards, .parquet files or one folder, got",
        (str(spoken_model), "d.wav"): "found nothing at",
    }
    for (model, file), text in cases.items():
        assert main(["transcribe", "--checkpoint", model, str(tmp_path / file)]) == 2
        said = capsys.readouterr()
        assert text in said.err and len(said.err.strip().splitlines()) == 1 and said.out == ""
    assert main(["transcribe", "--checkpoint", str(spoken_model)]) == 2
    assert "files: expected recordings, or folders" in capsys.readouterr().err
    both = [str(tmp_path / name) for name in ("a.wav", "b.wav", "e.wav", "f.wav", "g.wav")]
    for name in both[2:]:
        Path(name).write_bytes(b"broken")
    assert main(["transcribe", "--checkpoint", str(spoken_model), *both]) == 0
    said = capsys.readouterr()
    assert "files: left out 4: " in said.err and all(name in said.err for name in both[1:])
    assert said.out.startswith(f"{both[0]}\t") and said.out.count("\n") == 1


def test_classifiers_write_no_text(tmp_path: Path, image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_images(tmp_path / "train", 4, 0)
    command = ["finetune", "vision-classify", "--checkpoint", str(image_model), "--train", str(train), *QUIET]
    assert main([*command, "--run.dir", str(tmp_path / "run"), "--run.steps", "1", "--data.global-batch", "4"]) == 0
    capsys.readouterr()
    assert main(["transcribe", "--checkpoint", str(tmp_path / "run"), "a.wav"]) == 2
    assert "checkpoint: expected a model of speech-ctc, got classification of vision" in capsys.readouterr().err
