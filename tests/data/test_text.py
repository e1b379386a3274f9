"""Documents, cached tokens, blocks, labelled texts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sounds import write_text

from d2v import recipes, runtime
from d2v.config import Config
from d2v.data import tokenizer as documents
from d2v.data.dataset import Collate, EvaluationSamples
from d2v.data.loader import train_updates
from d2v.data.text import BlockSource, LabelledTexts, Texts, cut_documents, cut_stream, open_tokens
from d2v.data.tokenizer import BytePairs, DocumentReader, find_texts, save_tokenizer, train_tokenizer

CPU = torch.device("cpu")


def config(recipe: str = "text-tiny", steps: int = 3, **data: object) -> Config:
    base = recipes.get(recipe)
    settings = {"global_batch": 4, "workers": 0, **data}
    stem = dataclasses.replace(base.stem, vocabulary=300, mask_token=299 if base.version == 1 else None, max_tokens=32)
    return dataclasses.replace(
        base,
        stem=stem,
        data=dataclasses.replace(base.data, **settings),  # type: ignore[arg-type]
        run=dataclasses.replace(base.run, steps=steps),
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def tokenizer(text: Path, tmp_path: Path) -> Path:
    save_tokenizer(train_tokenizer(DocumentReader([text]), 300)[0], tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def read(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    reader = DocumentReader([path])
    return list(reader), [(r.name.removeprefix(str(path)), r.reason) for r in reader.rejected]


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\nline\r\n\n \t\n\ntwo \n\nbad \xff\xfe here\n\nthree")
    found, rejected = read(path)
    assert found == ["one\nline", "two", "three"]
    assert rejected == [(":8", "not UTF-8 from byte 4")]
    for empty in (b"", b"\n \n"):
        path.write_bytes(empty)
        assert read(path) == ([], [("", "no text")])


def test_documents_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['\ufeff{"text": "one\\n\\nstill one"}', "", "{broken", '{"txt": "x"}', '["text"]', '{"text": "\\ud800"}']
    path.write_text("\n".join([*lines, '{"text": " "}', '{"text": "two", "other": 3}']))
    found, rejected = read(path)
    assert found == ["one\n\nstill one", "two"]
    assert rejected == [
        (":3", "not JSON"),
        (":4", "expected a JSON object with text"),
        (":5", "expected a JSON object with text"),
        (":6", "not Unicode text: a surrogate by itself"),
    ]


def test_long_documents_are_cut_between_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("ä漢☃é" * 9, encoding="utf-8")
    found, rejected = read(path)
    assert rejected == []
    assert "".join(found) == "ä漢☃é" * 9
    assert all(len(d.encode()) <= 13 for d in found)
    monkeypatch.setattr(documents, "MAX_REJECTED", 3)
    path.write_bytes(b"\xff\n\n" * 50)
    assert len(read(path)[1]) == 4
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 50 + '"}\n{"text": "y"}\n')
    assert read(path) == (["y"], [(":1", "line is longer than 20 bytes")])


def test_paths_that_hold_no_text(tmp_path: Path, text: Path) -> None:
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / "deep" / "b.jsonl").write_text('{"text": "x"}\n')
    assert find_texts(str(tmp_path), "data.path") == [tmp_path / "more" / "deep" / "b.jsonl", text]
    assert find_texts(str(tmp_path / "*.txt"), "data.path") == [text]
    (tmp_path / "x.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path, message in {
        "": "got nothing",
        "x.bin": "x.bin",
        "empty": "found none in 0",
        "no": "found nothing",
    }.items():
        with pytest.raises(ValueError, match=rf"data\.path: expected a \.txt or .*{message}"):
            find_texts(str(tmp_path / path) if path else "", "data.path")


def test_tokens_are_made_once_and_whole(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    pairs, cache = BytePairs(tokenizer), tmp_path / "cache"
    tokens = open_tokens([text], pairs, cache)
    found = list(DocumentReader([text]))
    assert len(tokens.ends) == len(found) == 40
    assert tokens.ids.dtype == np.uint16
    starts = [0, *tokens.ends[:-1].tolist()]
    for document, start, end in zip(found, starts, tokens.ends.tolist(), strict=True):
        assert tokens.ids[end - 1] == 2
        assert pairs.decode(tokens.ids[start : end - 1].tolist()) == document
    (place,) = cache.iterdir()
    before = {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
    assert set(before) == {"tokens.bin", "ends.bin", "index.json"}
    assert open_tokens([text], pairs, cache).digest == tokens.digest
    assert {p.name: p.stat().st_mtime_ns for p in place.iterdir()} == before
    (place / "tokens.bin").write_bytes(b"\x00\x01" * 5)  # damaged: made again
    assert open_tokens([text], pairs, cache).digest == tokens.digest
    write_text(text, documents=3, seed=5)
    assert len(open_tokens([text], pairs, cache).ends) == 3
    assert len(list(cache.iterdir())) == 2
    assert not [p for p in cache.rglob("*") if p.name.startswith(".partial")]


def test_long_work_says_how_far_it_is(
    text: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_tokens([text], BytePairs(tokenizer), tmp_path / "quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(runtime, "INTERVAL", 0.0)
    open_tokens([text], BytePairs(tokenizer), tmp_path / "cache")
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"tokenising: 0 of 0 MB, [\d.]+ MB/s, 0:00 left", first)
    assert re.fullmatch(r"tokenising: 0 MB in 0:\d\d, [\d.]+ MB/s", last)


def test_cuts() -> None:
    starts, sizes = cut_stream(25, 10)
    assert (starts.tolist(), sizes.tolist()) == ([0, 10, 20], [10, 10, 5])
    starts, sizes = cut_documents(np.array([3, 13, 38]), 10)
    assert (starts.tolist(), sizes.tolist()) == ([0, 3, 13, 23, 33], [3, 10, 10, 10, 5])


def open_blocks(settings: Config, path: Path, folder: Path) -> BlockSource:
    source = Texts(settings).open(str(path))
    assert isinstance(source, BlockSource)
    source.prepare(folder, fresh=True)
    return source


def test_a_stream_of_full_blocks(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    source = open_blocks(config(tokenizer=str(tokenizer)), text, tmp_path / "run")
    tokens = open_tokens([text], BytePairs(tokenizer), tmp_path / "run" / "cache")
    joined = np.concatenate([source.block(i)[1:] for i in range(len(source))])
    assert np.array_equal(joined, tokens.ids[: len(joined)])
    assert {len(source.block(i)) for i in range(len(source))} == {32}
    assert {int(source.block(i)[0]) for i in range(len(source))} == {0}
    assert source.left_out == {"blocks shorter than 32 tokens": 1}
    kept = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_blocks_of_documents_are_padded(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings = config("text1-tiny", tokenizer=str(tokenizer))
    source = open_blocks(settings, text, tmp_path / "run")
    ends = 0
    for i in range(len(source)):
        block = source.block(i)
        assert 8 <= len(block) <= 32
        assert not (block[1:-1] == 2).any(), "a block never crosses documents"
        ends += block[-1] == 2
    assert 30 < ends <= 40
    for (batch,) in train_updates(settings, source, 0, CPU):
        assert batch.masks is not None
        assert batch.lengths is not None
        assert batch.noise_keys is None
        padding = torch.arange(batch.inputs.shape[1]) >= batch.lengths[:, None]
        assert torch.equal(batch.inputs == 1, padding)
        rows = padding.repeat_interleave(settings.mask.copies, dim=0)
        assert not (batch.masks.mask & rows).any()
        assert len(batch.masks.rows) > 0


def test_batches_depend_on_position_only(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings = config(tokenizer=str(tokenizer), steps=20)
    source = open_blocks(settings, text, tmp_path / "run")
    whole = list(train_updates(settings, source, 0, CPU))
    other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, workers=2))
    for (a,), (b,) in zip(whole[7:], train_updates(other, source, 7, CPU), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert a.masks is not None
        assert b.masks is not None
        assert torch.equal(a.masks.mask, b.masks.mask)
    again = open_blocks(config(tokenizer=str(tokenizer), cache=str(tmp_path / "shared")), text, tmp_path / "run2")
    assert again.digest() == source.digest()
    assert (tmp_path / "shared").is_dir()
    assert not (tmp_path / "run2" / "cache").exists()
    shorter = open_blocks(config(tokenizer=str(tokenizer), block_tokens=16), text, tmp_path / "run")
    assert shorter.digest() != source.digest()


def test_without_a_tokenizer_one_is_trained_and_kept(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_blocks(config("text1-tiny"), text, tmp_path / "run")
    assert "training one of 300 tokens" in capsys.readouterr().err
    assert BytePairs(tmp_path / "run" / "tokenizer").mask_token == 299
    held_out = Texts(config("text1-tiny")).open(str(text), option="data.valid")
    held_out.prepare(tmp_path / "run", fresh=False)
    assert "training" not in capsys.readouterr().err
    assert held_out.digest() == source.digest()


def test_a_tokenizer_has_to_fit_the_model(text: Path, tokenizer: Path) -> None:
    base = config(tokenizer=str(tokenizer))
    small = dataclasses.replace(base, stem=dataclasses.replace(base.stem, vocabulary=280))
    with pytest.raises(ValueError, match=r"stem\.vocabulary: expected at least 300, .* got 280; pass --stem\.vocab"):
        Texts(small).open(str(text))
    first = config("text1-tiny", tokenizer=str(tokenizer))
    wrong = dataclasses.replace(first, stem=dataclasses.replace(first.stem, mask_token=7))
    with pytest.raises(ValueError, match=r"stem\.mask_token: expected 299, .* got 7; pass .* --stem\.mask-token 299"):
        Texts(wrong).open(str(text))
    with pytest.raises(ValueError, match=r"data\.block_tokens: expected 8 to stem\.max_tokens 32, got 64"):
        Texts(config(block_tokens=64))


def test_text_that_is_too_short(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("k")
    with pytest.raises(ValueError, match=r"data\.path: expected a text of at least 8 tokens, got 2"):
        open_blocks(config(tokenizer=str(tokenizer)), tmp_path / "a.txt", tmp_path / "run")
    (tmp_path / "a.txt").write_text("\xff", encoding="latin-1")
    with pytest.raises(ValueError, match=r"expected text in 1 files, found none, for example .*a\.txt:1: not UTF-8"):
        open_blocks(config(tokenizer=str(tokenizer)), tmp_path / "a.txt", tmp_path / "run")
    assert [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".partial")] == []


def test_labelled_texts(tmp_path: Path, tokenizer: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_bytes(b"kan sota\t1\nmeer, tor!\t0\n\nbad\n\tx\n" + b"\xff\t1\n")
    texts = Texts(config(tokenizer=str(tokenizer)))
    source = texts.open(str(table), labelled=True, option="train")
    assert isinstance(source, LabelledTexts)
    assert source.classes == ["0", "1"]
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0]
    reasons = [r.reason for r in source.rejected]
    assert reasons == ["expected 2 columns, got 1", "an empty column", "not UTF-8 from byte 0"]
    data = EvaluationSamples(source, texts)
    batch = Collate(texts)([data[0], data[1]])
    assert batch.lengths is not None
    for row, length, (words,) in zip(batch.inputs, batch.lengths.tolist(), source.texts, strict=True):
        assert (int(row[0]), int(row[length - 1])) == (0, 2)
        assert texts.tokenizer.decode(row[:length].tolist()) == words
    bags = texts.raw_features("bag_of_words", batch)
    assert bags.shape == (2, 1024)
    assert [(row > 0).sum().item() for row in bags] == [2, 4]
    table.write_text("a\tb\t3.5\nkan\tsota\t1\n")
    pairs = texts.open(str(table), labelled=True)
    assert isinstance(pairs, LabelledTexts)
    assert (pairs.block(1) == 2).sum() == 3
    table.write_text("x " * 500 + "\t1\n")
    assert len(texts.open(str(table), labelled=True).block(0)) == 32  # type: ignore[attr-defined]
    table.write_text("nothing here\n")
    with pytest.raises(ValueError, match="train: expected text<TAB>label"):
        texts.open(str(table), labelled=True, option="train")
    assert json.loads((tokenizer / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_utf16_is_refused_by_name_and_other_files_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "set").mkdir()
    write_text(tmp_path / "set" / "a.txt")
    (tmp_path / "set" / "b.txt").write_text("other", encoding="utf-16")
    (tmp_path / "set" / "c.md").write_text("other")
    os.mkfifo(tmp_path / "set" / "d.txt")
    assert read(tmp_path / "set" / "b.txt") == (
        [], [("", "UTF-16, expected UTF-8 (`iconv -f UTF-16 -t UTF-8` converts it)")]
    )  # fmt: skip
    source = Texts(config(tokenizer=str(tokenizer))).open_whole(str(tmp_path / "set"), option="input")
    assert source.left_out == {"files that end in .md": 1, "pipes, sockets and devices": 1}
    table = tmp_path / "t.tsv"
    table.write_bytes("\ufeffgood\t1\nbad\t0\n".encode())
    labelled = Texts(config(tokenizer=str(tokenizer))).open(str(table), labelled=True)
    assert isinstance(labelled, LabelledTexts)
    assert labelled.texts == [("good",), ("bad",)]
    table.write_text("good\t1\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"data\.path: .*t\.tsv: UTF-16"):
        Texts(config(tokenizer=str(tokenizer))).open(str(table), labelled=True)
