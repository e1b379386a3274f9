"""`d2v data pack`: the same bytes again, whole shards, resumed packs, and packs that train like their folders."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.images import write_class_folders
from support.sounds import write_sounds, write_text

from d2v.cli import main
from d2v.data import pack as packing
from d2v.data.index import open_source
from d2v.data.pack import PackSettings, pack
from d2v.data.speech import SPEECH
from d2v.data.tokenizer import DocumentReader, find_texts


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_images_with_labels_and_bad_ones(tmp_path: Path) -> None:
    images = write_class_folders(tmp_path / "images")
    (images / "bee" / "9.png").write_bytes(b"nonsense")
    settings = PackSettings("images", labelled=True, shard_samples=5)
    text = pack(str(images), tmp_path / "a", settings, workers=1)
    assert "12 samples in 3 shards" in text
    assert "1 left out" in text
    assert f"{images}/bee/9.png: cannot identify" in text
    pack(str(images), tmp_path / "b", settings, workers=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b"), "the same bytes for any number of threads"
    assert sorted(tree(tmp_path / "a")) == ["contents.jsonl", "pack.json", *(f"shard-{i:06d}.tar" for i in range(3))]
    plain = open_source(str(images), labelled=True)
    packed = open_source(str(tmp_path / "a" / "*.tar"), labelled=True)
    assert packed.classes == plain.classes
    assert plain.labels is not None
    assert packed.labels is not None
    rows = [json.loads(line) for line in (tmp_path / "a" / "contents.jsonl").read_text().splitlines()]
    paths = {plain.describe(i): i for i in range(13)}
    assert [r["path"] for r in rows] != sorted(r["path"] for r in rows), "in random order"
    assert {r["path"] for r in rows} == {p for p in paths if not p.endswith("9.png")}
    for i, row in enumerate(rows):
        assert packed.describe(i) == str(tmp_path / "a" / f"{row['shard']}:{row['key']}.png")
        original = paths[row["path"]]
        assert packed.read(i) == plain.read(original)
        assert row["label"] == plain.classes[plain.labels[original]] == packed.classes[packed.labels[i]]  # type: ignore[index]
    other = PackSettings("images", labelled=True, shard_samples=5, seed=1)
    pack(str(images), tmp_path / "c", other)
    assert tree(tmp_path / "c")["shard-000000.tar"] != tree(tmp_path / "a")["shard-000000.tar"]
    ordered = PackSettings("images", labelled=True, in_order=True, unchecked=True)
    pack(str(images), tmp_path / "d", ordered)
    assert open_source(str(tmp_path / "d" / "*.tar")).read(5) == plain.read(5)
    assert len(open_source(str(tmp_path / "d" / "*.tar"))) == 13, "unchecked keeps what cannot be decoded"
    with tarfile.open(tmp_path / "a" / "shard-000001.tar") as archive:
        assert {(m.mtime, m.uid, m.mode) for m in archive} == {(0, 0, 0o644)}


def test_size_of_shards(tmp_path: Path) -> None:
    images = write_class_folders(tmp_path / "images")
    pack(str(images), tmp_path / "a", PackSettings("images", shard_bytes=6_000))
    shards = sorted((tmp_path / "a").glob("*.tar"))
    assert len(shards) > 3
    for shard in shards:
        with tarfile.open(shard) as archive:
            members = archive.getmembers()
        assert len(members) >= 1
        assert sum(512 + -(-m.size // 512) * 512 for m in members) <= 6_000
    pack(str(tmp_path / "a" / "*.tar"), tmp_path / "b", PackSettings("images", shard_samples=1, in_order=True))
    assert len(open_source(str(tmp_path / "b" / "*.tar"))) == 12, "shards can be packed anew"
    assert len(list((tmp_path / "b").glob("*.tar"))) == 12


def test_speech_keeps_transcripts(tmp_path: Path) -> None:
    sounds = write_sounds(tmp_path / "sounds")
    plain = open_source(str(sounds), SPEECH)
    Path(plain.describe(3)).with_suffix(".txt").write_text("hello\n")
    (sounds / "ant" / "broken.wav").write_bytes(b"RIFF")
    pack(str(sounds), tmp_path / "a", PackSettings("speech"))
    packed = open_source(str(tmp_path / "a" / "*.tar"), SPEECH)
    assert sorted(packed.read(i) for i in range(12)) == sorted(plain.read(i) for i in range(12))
    assert [t for i in range(12) if (t := packing.read_text(packed, i)) is not None] == ["hello"]
    pack(str(tmp_path / "a" / "*.tar"), tmp_path / "b", PackSettings("speech", in_order=True))
    assert tree(tmp_path / "b")["shard-000000.tar"] == tree(tmp_path / "a")["shard-000000.tar"]


def test_text_becomes_shuffled_lines(tmp_path: Path) -> None:
    write_text(tmp_path / "text" / "a.txt", 200)
    (tmp_path / "text" / "b.txt").write_bytes(b"caf\xe9\n")
    plain = list(DocumentReader(find_texts(str(tmp_path / "text"), "input")))
    settings = PackSettings("text", shard_bytes=4_000)
    text = pack(str(tmp_path / "text"), tmp_path / "a", settings)
    assert "200 samples in " in text
    assert "b.txt:1: not UTF-8" in text
    pack(str(tmp_path / "text"), tmp_path / "b", settings)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    packed = list(DocumentReader(find_texts(str(tmp_path / "a"), "input")))
    assert sorted(packed) == sorted(plain)
    assert packed != plain
    assert len(list((tmp_path / "a").glob("*.jsonl"))) > 3
    pack(str(tmp_path / "text"), tmp_path / "c", PackSettings("text", shard_bytes=4_000, in_order=True))
    assert list(DocumentReader(find_texts(str(tmp_path / "c"), "input"))) == plain


@pytest.mark.parametrize("stop", [3, 6, 11])
def test_an_interrupted_pack_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    images = write_class_folders(tmp_path / "images")
    (images / "ant" / "0.png").write_bytes(b"nonsense")
    settings = PackSettings("images", shard_samples=4)
    pack(str(images), tmp_path / "whole", settings)
    original = packing.read_ahead
    taken: list[int] = []

    def interrupted(source: Any, order: Any, *rest: Any) -> Iterator[Any]:
        for number, packed in enumerate(original(source, order, *rest)):
            if number == stop:
                raise KeyboardInterrupt
            taken.append(number)
            yield packed

    output = tmp_path / "output"
    monkeypatch.setattr(packing, "read_ahead", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(str(images), output, settings)
    assert not output.exists()
    partial = tmp_path / ".partial-output"
    assert not list(partial.glob(".partial-*")), "a shard that is not whole is removed"
    whole = len(list(partial.glob("*.tar")))
    assert whole <= stop // 4
    (partial / ".partial-shard-000009.tar").write_bytes(b"of a kill -9")
    with (partial / "contents.jsonl").open("a") as file:
        file.write("half a li")
    stop, taken = 100, []
    pack(str(images), output, settings)
    assert len(taken) <= 12 - 4 * whole
    assert tree(output) == tree(tmp_path / "whole")
    assert not partial.exists()
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        pack(str(images), tmp_path / "output2", settings)
    stop = 100
    other = PackSettings("images", shard_samples=3)
    pack(str(images), tmp_path / "output2", other)
    pack(str(images), tmp_path / "fresh", other)
    assert tree(tmp_path / "output2") == tree(tmp_path / "fresh"), "other settings begin anew"


def test_two_packs_of_one_name(tmp_path: Path) -> None:
    images = write_class_folders(tmp_path / "images")
    output = tmp_path / "o"
    command = ["data", "pack", "--input", str(images), "--output", str(output)]
    holder = (
        "import sys; from pathlib import Path; from d2v.data.pack import _alone\n"
        "with _alone(Path(sys.argv[1])):\n    print(1, flush=True)\n    input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".partial-o")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == b"1\n"
    assert main(command) == 2
    other.communicate(b"\n")
    assert main(command) == 0
    assert not list(tmp_path.glob(".partial*"))


def test_what_cannot_be_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_class_folders(tmp_path / "images")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    cases = [
        ([str(images), str(images)], r"output: expected an absent or empty folder"),
        (
            [str(tmp_path / "none"), str(tmp_path / "o")],
            r"input: expected a folder of images or .tar shards, found nothing",
        ),
        (
            [str(tmp_path / "bad"), str(tmp_path / "o")],
            r"input: expected images, got 1 that cannot be used, for example",
        ),
        ([str(images), str(tmp_path / "o"), "--shard-samples", "0"], "shard: expected at least 1 byte and 1 sample"),
        ([str(images), str(tmp_path / "o"), "--kind", "text"], "input: expected a .txt or .jsonl file"),
        ([str(images), str(tmp_path / "o"), "--kind", "text", "--labelled"], "labelled: expected images or speech"),
        (["pipe:cat x", str(tmp_path / "o")], "got the shell command"),
    ]
    for (source, output, *more), message in cases:
        assert main(["data", "pack", "--input", source, "--output", output, *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
    assert not (tmp_path / ".partial-o").exists()
    assert main(["data", "pack", "--input", str(images), "--output", str(tmp_path / "o"), "--shard-samples", "7"]) == 0
    assert "12 samples in 2 shards" in capsys.readouterr().out
