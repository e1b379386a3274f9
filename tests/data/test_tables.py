"""Transcripts and labels in tables beside the samples, and samples in parquet files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.images import encode, make_image
from support.sounds import encode_sound, make_sound

from d2v.data.decoding.sound import decode_audio
from d2v.data.index import IMAGES, open_source
from d2v.data.pack import PackSettings, pack
from d2v.data.sources import Source
from d2v.data.speech import SPEECH
from d2v.finetune.data import open_transcripts

from .test_manifest import Speech, config


def write_sounds(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode_sound(make_sound(i, 0.4), kind="FLAC" if name.endswith("flac") else "WAV"))
    return folder


def texts_of(path: Path, skip: bool = True) -> tuple[Source, dict[str, str]]:
    source = open_transcripts(Speech(config()), str(path), "train", case="keep", longest=160_000, skip=skip)
    return source, {Path(source.describe(i)).name: text for i, text in enumerate(source.targets)}


def test_transcripts_of_librispeech(tmp_path: Path) -> None:
    """A line for each ID; what has none, and lines without audio, are counted."""
    root = write_sounds(tmp_path, "84/1/84-1-0000.flac", "84/1/84-1-0001.wav", "84/2/84-2-0000.flac", "own.wav")
    (root / "84/1/84-1.trans.txt").write_text("84-1-0000 GO ON\n84-1-0001  YOU  THERE\n84-1-0001 AGAIN\n84-1-0009 X\n")
    (root / "84/2/84-2.trans.txt").write_text("84-1-0000 WRONG FOLDER\n")
    (root / "own.txt").write_text("beside it")
    source, texts = texts_of(root)
    assert texts == {"84-1-0000.flac": "GO ON", "84-1-0001.wav": "YOU THERE", "own.wav": "beside it"}
    counted = {reason.split(",")[0].split(" (")[0]: count for reason, count in source.left_out.items()}
    assert counted["lines of *.trans.txt without a file"] == 2
    assert counted["lines of *.trans.txt second ones of a file"] == counted["without a transcript"] == 1
    assert any("84/1/84-1.trans.txt: 84-1-0009" in reason for reason in source.left_out)
    with pytest.raises(ValueError, match=r"got 1 of 4 without a transcript .*84-2-0000"):
        texts_of(root, skip=False)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_hugging_face(tmp_path: Path, kind: str) -> None:
    """Paths that lead out of the folder name nothing in it."""
    root = write_sounds(tmp_path / "in", "a.wav", "sub/b.wav", "c.wav")
    write_sounds(tmp_path, "out.wav")
    rows = [("a.wav", "one, two", "yes"), ("./sub/b.wav", "three", "no"), ("../out.wav", "no", "no")]
    rows += [(str(tmp_path / "out.wav"), "no", "no"), ("gone.wav", "no", "yes")]
    named = [dict(zip(("file_name", "sentence", "label"), row, strict=True)) for row in rows]
    lines = [json.dumps(row) for row in named]
    if kind == "csv":
        lines = ["file_name,sentence,label", *('"' + '","'.join(row) + '"' for row in rows)]
    (root / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    source, texts = texts_of(root)
    assert texts == {"a.wav": "one, two", "b.wav": "three"}
    assert source.left_out[f"lines of metadata.{kind} without a file, first metadata.{kind}: ../out.wav"] == 3
    labelled = open_source(str(root), SPEECH, labelled=True)
    assert labelled.classes is not None and labelled.labels is not None
    assert [labelled.classes[i] for i in labelled.labels] == ["yes", "no"]
    assert [Path(entry.name).name for entry in labelled.incomplete] == ["c.wav"]
    assert len(open_source(str(root), SPEECH)) == 3


def test_metadata_that_cannot_be_read(tmp_path: Path) -> None:
    root = write_sounds(tmp_path, "a.wav", "b.wav")
    (root / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "x"}\n{"text": "y"}\n')
    source, texts = texts_of(root)
    assert texts == {"a.wav": "x"}
    assert any("expected a file_name in every line, got none in sample 2" in reason for reason in source.left_out)


def test_images_with_metadata(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(make_image(i)))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n2.png,cat\n")
    source = open_source(str(tmp_path), IMAGES, labelled=True)
    assert source.classes == ["cat", "dog"] and source.labels is not None and source.labels.tolist() == [0, 1, 0]
    assert source.left_out == {} and len(open_source(str(tmp_path), IMAGES)) == 3


def test_named_files(tmp_path: Path) -> None:
    write_sounds(tmp_path, "a.wav", "b.flac", "c.wav")
    assert len(open_source(str(tmp_path / "a.wav"), SPEECH)) == 1
    source = open_source(str(tmp_path / "*.wav"), SPEECH)
    assert [source.describe(i) for i in range(2)] == [str(tmp_path / "a.wav"), str(tmp_path / "c.wav")]
    with pytest.raises(ValueError, match=r"expected \.tar shards, \.parquet files or one folder"):
        open_source(str(tmp_path / "a.wav"), SPEECH, labelled=True)


# ---- parts of recordings ----------------------------------------------------------------------------------------


def test_segments_of_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of the file, read by seeking, as a slice of the whole."""
    import soundfile

    values = make_sound(1, 4.0, rate=8000, channels=2)
    soundfile.write(tmp_path / "a.wav", values, 8000, subtype="FLOAT")
    (tmp_path / "list.tsv").write_text(".\na.wav:8000:6000\na.wav:20000:12000\na.wav:30000:4000\na.wav\n")
    (tmp_path / "list.ltr").write_text("A |\nB |\nC |\nD |\n")
    read = list[int]()
    inner = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n=-1, *a, **k: read.append(n) or inner(self, n, *a, **k)
    )
    source = Speech(config()).open(str(tmp_path / "list.tsv"))
    assert source.lengths is not None and source.lengths.tolist() == [12_000, 24_000, 64_000]
    assert [source.read_transcript(i) for i in range(3)] == ["A", "B", "D"]
    assert "expected 4000 frames from frame 30000 on, got 2000" in str(source.rejected)
    read.clear()
    first = source.read(0)
    assert read == [6000]
    soundfile.write(tmp_path / "cut.wav", values[8000:14_000], 8000, subtype="FLOAT")
    np.testing.assert_array_equal(decode_audio(first)[0], decode_audio((tmp_path / "cut.wav").read_bytes())[0])
    said = pack(str(tmp_path / "list.tsv"), tmp_path / "packed", PackSettings(kind="speech"))
    assert "3 samples in 1 shards" in said and "1 left out" in said
    packed = Speech(config()).open(str(tmp_path / "packed" / "*.tar"))
    assert sorted(packed.read_transcript(i) for i in range(3)) == ["A", "B", "D"]


# ---- parquet ----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, column: str, data: list[bytes | None], group: int = 2, **columns: Any) -> Path:
    """As `datasets` writes it; classes of `label` are named."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    encoded = [{"bytes": d, "path": f"../{i}.bin"} for i, d in enumerate(data)]
    table = arrow.table({column: encoded, **columns})
    info = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    return path


def test_speech_in_parquet(tmp_path: Path) -> None:
    sounds: list[bytes | None] = [encode_sound(make_sound(i, 0.4 + 0.1 * i)) for i in range(5)]
    texts = [f"text {i}" for i in range(4)] + [None]
    file = write_parquet(
        tmp_path / "a.parquet", "audio", [*sounds[:3], None, sounds[4]], text=texts, label=[0, 1] * 2 + [None]
    )
    source = Speech(config()).open(str(tmp_path))
    assert source.lengths is not None and source.lengths.tolist() == [6400, 8000, 9600, 12_800]
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i) for i in (3, 0, 2, 1)] == [sounds[i] for i in (4, 0, 2, 1)]
    assert source.shards is not None and source.shards.tolist() == [0, 0, 1, 2]
    assert "no bytes in its row" in str(source.rejected) and source.describe(3) == str(tmp_path / "a.parquet:4:4.bin")
    assert source.read_transcript(2) == "text 2"
    _, found = texts_of(file)
    assert list(found.values()) == ["text 0", "text 1", "text 2"]
    labelled = Speech(config()).open(str(file), labelled=True)
    assert labelled.classes == ["no", "yes"] and labelled.labels is not None and labelled.labels.tolist() == [0, 1, 0]
    assert [entry.reason for entry in labelled.incomplete] == ["no label"]


def test_images_in_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures: list[bytes | None] = [encode(make_image(i)) for i in range(4)]
    write_parquet(tmp_path / "train-0.parquet", "image", pictures[:2], label=[1, 0])
    write_parquet(tmp_path / "train-1.parquet", "image", [*pictures[2:], b"broken"], label=[1, 1, 0])
    source = open_source(str(tmp_path / "train-*.parquet"), IMAGES, labelled=True)
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1, 1, 0]
    assert source.read(3) == pictures[3]
    said = pack(str(tmp_path), tmp_path / "packed", PackSettings(kind="images", labelled=True))
    assert "4 samples in 1 shards" in said and "1 left out" in said
    assert {p.name for p in tmp_path.glob("[!.]*")} == {"packed", "train-0.parquet", "train-1.parquet"}


def test_parquet_with_a_damaged_group(tmp_path: Path) -> None:
    """The others are read; numbers of rows stay those of the file."""
    pictures: list[bytes | None] = [encode(make_image(i)) for i in range(6)]
    file = write_parquet(tmp_path / "a.parquet", "image", pictures, label=[0, 1, 0, 1, 0, 1])
    import pyarrow.parquet

    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(2)
    assert column.path_in_schema == "label"
    data = bytearray(file.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    source = open_source(str(file), IMAGES, labelled=True)
    assert [Path(source.describe(i)).name for i in (1, 2)] == ["a.parquet:1:1.bin", "a.parquet:4:4.bin"]
    assert [entry.name for entry in source.rejected] == [f"{file}: row group 1"] and not source.incomplete
    assert source.read(3) == pictures[5]
    plain = open_source(str(file), IMAGES)
    assert len(plain) == 6 and plain.read(2) == pictures[2]


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    sounds = [encode_sound(make_sound(i, 0.4)) for i in range(3)]
    table = arrow.table({"sound": sounds, "labels": [["a", "b"], ["b"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(open_source(str(tmp_path / "a.parquet"), SPEECH)) == 3
    source = open_source(str(tmp_path / "a.parquet"), SPEECH, labelled=True)
    assert source.classes == ["a;b;", "b;"] and source.read(1) == sounds[1] and len(source.incomplete) == 1


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "image", [b"x"])
    with pytest.raises(ValueError, match=r"train: .*a\.parquet: expected a column label or labels, got \['image'\]"):
        open_source(str(tmp_path / "a.parquet"), IMAGES, labelled=True, option="train")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"data\.path: .*expected a parquet file"):
        open_source(str(tmp_path / "b.parquet"), IMAGES)
    write_parquet(tmp_path / "c.parquet", "photo", [b"x"], other=[b"y"])
    with pytest.raises(ValueError, match=r"expected one column of bytes of images, got \['photo', 'other'\]"):
        open_source(str(tmp_path / "c.parquet"), IMAGES)
