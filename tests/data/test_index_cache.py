"""The index of shards and the lengths of speech are looked up once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.images import encode, make_image, write_tar
from support.sounds import encode_sound, make_sound, write_sounds

from d2v import recipes
from d2v.data import shards, speech
from d2v.data.cache import CACHE
from d2v.data.sources import Source
from d2v.data.speech import Speech
from d2v.data.vision import Images


def config(recipe: str, cache: Path | None = None, run: Path | None = None) -> Any:
    base = recipes.get(recipe)
    data = dataclasses.replace(base.data, cache=None if cache is None else str(cache), min_seconds=0.0)
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, dir=str(run or "")))


def write_shard(path: Path, first: int, count: int = 4) -> Path:
    members = {f"{i}.png": encode(make_image(i)) for i in range(first, first + count)}
    members |= {f"{i}.cls": str(i % 3).encode() for i in range(first, first + count)}
    members |= {f"{i}.txt": f"text {i}".encode() for i in range(first, first + count, 2)}
    return write_tar(path, members)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that were scanned and of the samples whose headers were read."""
    done: list[str] = []

    def watch(module: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(label(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watch(shards, "scan_shard", lambda shard, *_: shard.name)
    watch(speech, "measure_recording", lambda file: Path(file.name).name)
    return done


def content(source: Source) -> list[Any]:
    texts = []
    for i in range(len(source)):
        try:
            texts.append(source.read_transcript(i))
        except ValueError:
            texts.append("none")
    data = [source.read(i) for i in range(len(source))]
    labels = None if source.labels is None else source.labels.tolist()
    return [source.digest(), data, labels, texts, source.rejected, source.shards is not None and source.shards.tolist()]


def test_shards_are_scanned_once_and_again_where_they_changed(tmp_path: Path, scans: list[str]) -> None:
    paths = [write_shard(tmp_path / f"{s}.tar", 4 * s) for s in range(3)]
    paths[2].write_bytes(paths[2].read_bytes()[:-12_000])  # cut off: something to reject
    pattern = str(tmp_path / "*.tar")
    plain = content(Images(config("vision-tiny")).open(pattern))
    assert len(plain[4]) == 1
    shared = Images(config("vision-tiny", cache=tmp_path / "shared"))
    scans.clear()
    for expected in (["0.tar", "1.tar", "2.tar"], []):
        assert content(shared.open(pattern)) == plain
        assert sorted(scans) == expected
        scans.clear()
    write_shard(paths[1], 40, count=5)
    changed = shared.open(pattern)
    assert scans == ["1.tar"]
    assert content(changed) == content(Images(config("vision-tiny")).open(pattern))
    assert len(changed) == len(plain[1]) + 1
    scans.clear()
    paths[2].unlink()
    labelled = shared.open(pattern, labelled=True)
    assert sorted(scans) == ["0.tar", "1.tar"], "labels are another index"
    assert labelled.classes == ["0", "1", "2"]
    scans.clear()
    assert content(shared.open(pattern, labelled=True)) == content(labelled)
    assert scans == []


@pytest.mark.parametrize("damage", ["flip", "cut", "text", "empty"])
def test_a_damaged_index_is_made_again(
    tmp_path: Path, scans: list[str], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "a.tar", 0)
    images = Images(config("vision-tiny", cache=tmp_path / "shared"))
    plain = content(images.open(str(tmp_path / "a.tar")))
    (file,) = (tmp_path / "shared").iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 0x40
    file.write_bytes({"cut": bytes(data[: len(data) // 2]), "text": b"nonsense", "empty": b""}.get(damage, bytes(data)))
    scans.clear()
    capsys.readouterr()
    for expected in (["a.tar"], []):
        assert content(images.open(str(tmp_path / "a.tar"))) == plain
        assert scans == expected
        assert ("is damaged" in capsys.readouterr().err) == bool(expected)
        scans.clear()


def test_the_index_of_a_run_is_written_when_the_run_begins(
    tmp_path: Path, scans: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "a.tar", 0)
    run = tmp_path / "run"
    images = Images(config("vision-tiny", run=run))
    source = images.open(str(tmp_path / "a.tar"))
    assert not run.exists(), "opening reads only"
    source.prepare(run, fresh=True)
    assert len(list((run / CACHE).iterdir())) == 1
    scans.clear()
    assert content(images.open(str(tmp_path / "a.tar"))) == content(source)
    assert scans == []
    (tmp_path / "file").write_text("in the way")
    blocked = Images(config("vision-tiny", cache=tmp_path / "file"))
    assert content(blocked.open(str(tmp_path / "a.tar"))) == content(source)
    assert "note: cannot write the index" in capsys.readouterr().err


def test_lengths_of_speech_are_read_once_and_again_where_files_changed(tmp_path: Path, scans: list[str]) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    (sounds / "ant" / "broken.wav").write_bytes(b"nothing")
    modality = Speech(config("speech-tiny", cache=tmp_path / "shared"))
    first = modality.open(str(sounds))
    assert len(scans) == 13
    scans.clear()
    again = modality.open(str(sounds))
    assert scans == []
    assert again.digest() == first.digest()
    assert again.rejected == first.rejected
    assert len(again.rejected) == 1
    assert np.array_equal(again.lengths, first.lengths)  # type: ignore[arg-type]
    changed = Path(first.describe(3))
    changed.write_bytes(encode_sound(make_sound(1, 0.7)))
    (sounds / "bee" / "added.wav").write_bytes(encode_sound(make_sound(2, 0.6)))
    third = modality.open(str(sounds))
    assert sorted(scans) == sorted([changed.name, "added.wav"])
    fresh = Speech(config("speech-tiny")).open(str(sounds))
    assert third.digest() == fresh.digest()
    assert third.rejected == fresh.rejected


def test_lengths_in_shards_and_labelled_tables(tmp_path: Path, scans: list[str]) -> None:
    for s in range(2):
        members = {f"{i}.wav": encode_sound(make_sound(i, 0.4 + 0.1 * i)) for i in range(3 * s, 3 * s + 3)}
        write_tar(tmp_path / f"{s}.tar", members)
    run = tmp_path / "run"
    modality = Speech(config("speech-tiny", run=run))
    source = modality.open(str(tmp_path / "*.tar"))
    source.prepare(run, fresh=True)
    assert len(scans) == 2 + 6
    scans.clear()
    again = modality.open(str(tmp_path / "*.tar"))
    assert again.digest() == source.digest()
    assert scans == []
    write_tar(tmp_path / "1.tar", {"9.wav": encode_sound(make_sound(9, 0.5))})
    assert len(modality.open(str(tmp_path / "*.tar"))) == 4
    assert sorted(scans) == ["1.tar", "1.tar"], "the shard, and the header of its one member"
    sounds = write_sounds(tmp_path / "sounds", count=3)
    files = sorted(os.path.relpath(p, tmp_path) for p in sounds.rglob("*") if p.is_file())
    (tmp_path / "table.tsv").write_text("".join(f"{name}\tyes\n" for name in files))
    for expected in (3, 0):
        scans.clear()
        table = modality.open(str(tmp_path / "table.tsv"), labelled=True)
        assert len(scans) == expected
        table.prepare(run, fresh=False)
