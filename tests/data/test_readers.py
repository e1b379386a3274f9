"""What is in a folder, an archive or a list beside sound samples: counted, refused or left with its sample."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import socket
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from support.images import encode, make_image, write_tar
from support.sounds import encode_sound, make_sound, open_length

from d2v import recipes
from d2v.config import Config
from d2v.data import dataset, shards
from d2v.data.cache import IndexCache
from d2v.data.dataset import EvaluationSamples, TrainSamples
from d2v.data.decoding import sound
from d2v.data.decoding.recording import measure_recording
from d2v.data.decoding.sound import decode_audio
from d2v.data.index import IMAGES, open_source
from d2v.data.loader import BadSamples
from d2v.data.pack import PackSettings, pack
from d2v.data.sources import count_endings, decode_text, find_files, printable
from d2v.data.speech import SPEECH, Speech
from d2v.data.tokenizer import find_texts


def config() -> Config:
    base = recipes.speech_tiny()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, min_seconds=0.0))


@pytest.fixture
def picture() -> bytes:
    return encode(make_image(0), "JPEG")


# ---- names ------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds_beside_images_is_counted_by_ending(tmp_path: Path, picture: bytes) -> None:
    names = ["a.jpg", "b.JFIF", "c.heic", "d.heic", "e", "f.json", ".hidden.jpg", ".git/x.jpg", "s/deep.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(tmp_path / "s.jpg"))
        source = open_source(str(tmp_path))
    assert [Path(source.describe(i)).name for i in range(len(source))] == ["a.jpg", "b.JFIF"]
    assert source.left_out == {
        "hidden names": 2, "pipes, sockets and devices": 3, "files that end in .heic": 2, "files without an ending": 1,
        "files that end in .json": 1, "files that end in .mp4": 1,
    }  # fmt: skip


def test_many_endings_are_summed_up() -> None:
    counted = count_endings(Counter({f".x{i}": i for i in range(1, 10)}), "files")
    assert counted == {**{f"files that end in .x{i}": i for i in range(9, 3, -1)}, "files with 3 other endings": 6}


def test_an_empty_result_says_what_counts_and_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.xyz").write_bytes(b"x")
    write_tar(tmp_path / "s.tar", {"a.heic": b"x", "a.json": b"{}"})
    with pytest.raises(ValueError, match=r"in 1 files, 1 files that end in \.xyz; audio files end in \..*\.wav"):
        open_source(str(tmp_path / "f"), SPEECH)
    with pytest.raises(ValueError, match=r"found none, 1 members that end in \.heic, .*images end in .*\.jpg"):
        open_source(str(tmp_path / "s.tar"))
    with pytest.raises(ValueError, match=r"found none in 1 files under .* 1 files that end in \.xyz"):
        find_texts(str(tmp_path / "f"), "data.path")


def test_dotted_keys_are_samples_and_other_views_are_not(tmp_path: Path, picture: bytes) -> None:
    plain = {"0.jpg": picture, "0.cls": b"x", "0.json": b"{}"}
    dotted = {"scene.3.jpg": picture, "scene.3.cls": b"y", "set/a.left.jpg": picture, "set/a.cls": b"z"}
    write_tar(tmp_path / "a.tar", {**plain, **dotted, "._0.jpg": b"resource fork"})
    source = open_source(str(tmp_path / "a.tar"), labelled=True)
    names = [source.describe(i).rpartition(":")[2] for i in range(len(source))]
    assert names == ["0.jpg", "scene.3.jpg", "set/a.left.jpg"]
    assert source.labels is not None and source.classes is not None
    assert [source.classes[label] for label in source.labels] == ["x", "y", "z"]
    assert source.left_out == {"hidden names": 1, "members that end in .json": 1}
    views = {f"{i}{end}": picture for i in range(3) for end in (".jpg", ".mask.jpg")}
    write_tar(tmp_path / "b.tar", {**views, "9.mask.jpg": picture})
    source = open_source(str(tmp_path / "b.tar"))
    assert len(source) == 3
    assert source.left_out == {"members that end in .mask.jpg": 4}


def test_other_endings_are_another_index(tmp_path: Path, picture: bytes) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": picture, "1.new": picture})
    cache = IndexCache(tmp_path / "cache", shared=True)
    newer = IMAGES._replace(suffixes=IMAGES.suffixes | {".new"})
    for kind, count in ((IMAGES, 1), (newer, 2), (IMAGES, 1)):
        source = open_source(str(tmp_path / "a.tar"), kind, cache=cache)
        assert len(source) == count
        assert sum(source.left_out.values()) == 2 - count


def test_a_path_that_exists_is_no_pattern(tmp_path: Path, picture: bytes) -> None:
    root = tmp_path / "set[1]{a,b}"
    root.mkdir()
    for name in ("x-0.tar", "x-1.tar", "y[0].tar", "z{0..9}.tar"):
        write_tar(root / name, {f"{name}.jpg": picture})
    (root / "c.txt").write_text("text")
    for path, count in {"x-{0..1}.tar": 2, "x-*.tar": 2, "x-[1].tar": 1, "y[0].tar": 1, "z{0..9}.tar": 1}.items():
        assert len(open_source(str(root / path))) == count, path
    assert find_texts(str(root / "c.txt"), "data.path") == [root / "c.txt"]
    with pytest.raises(ValueError, match="found nothing at"):
        find_files(str(root / "gone-*.tar"), "shards", "data.path")
    with pytest.raises(ValueError, match=r"4 \.tar shards pass") as error:
        open_source(str(root))
    assert len(open_source(str(error.value).rpartition("pass ")[2].strip("'"))) == 4


def test_names_in_another_encoding(tmp_path: Path, picture: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    folder = os.fsencode(tmp_path / "set") + b"/caf\xe9"
    Path(os.fsdecode(folder)).mkdir(parents=True)
    for i in range(3):
        Path(os.fsdecode(folder + b"/\xff%d.jpg" % i)).write_bytes(picture if i else b"broken")
    source = open_source(str(tmp_path / "set"), labelled=True)
    assert source.classes == ["caf\\xe9"]
    assert source.describe(0).endswith("caf\\xe9/\\xff0.jpg")
    text = pack(str(tmp_path / "set"), tmp_path / "out", PackSettings("images", labelled=True))
    assert text.encode()
    assert "\\xff0.jpg" in text
    assert open_source(str(tmp_path / "out" / "shard-000000.tar"), labelled=True).classes == source.classes
    assert printable("ü") == "ü"


def test_pipes_in_lists_and_beside_samples_do_not_block(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encode_sound(make_sound(0, 0.5)))
    for name in ("b.wav", "a.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.wav\t8000\nb.wav\t8000\nc\0.wav\t8000\n")
    source = open_source(str(tmp_path / "m.tsv"), SPEECH)
    for index, reason in ((1, "not a regular file"), (2, "null byte")):
        with pytest.raises(ValueError, match=reason):
            source.read(index)
    lengths = source.read_lengths(measure_recording)  # type: ignore[attr-defined]
    assert lengths.tolist() == [8000, -1, -1]
    with pytest.raises(ValueError, match="not a regular file"):
        open_source(str(tmp_path), SPEECH).read_transcript(0)
    assert [r.reason for r in source.rejected] == ["not a regular file", "embedded null byte"]


# ---- speech -----------------------------------------------------------------------------------------------------

FORMATS = [
    ("MP3", None, 16_000, ".mp3"), ("OGG", "OPUS", 48_000, ".opus"), ("AIFF", None, 16_000, ".aiff"),
    ("AU", None, 16_000, ".au"), ("CAF", None, 16_000, ".caf"), ("W64", None, 16_000, ".w64"),
    ("RF64", None, 16_000, ".rf64"), ("NIST", None, 16_000, ".sph"), ("WAV", "GSM610", 8_000, ".wav"),
    ("WAV", "G721_32", 8_000, ".wav"), ("WAV", "ULAW", 8_000, ".wav"), ("WAV", "MS_ADPCM", 8_000, ".wav"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype", "rate", "suffix"), FORMATS)
def test_formats_of_the_decoder_are_read(kind: str, subtype: str | None, rate: int, suffix: str) -> None:
    assert suffix in SPEECH.suffixes
    data = encode_sound(make_sound(0, 1.0, rate), rate, kind, subtype)
    values, _ = decode_audio(data)
    assert 16_000 <= len(values) < 16_800  # codecs fill their last block
    assert measure_recording(io.BytesIO(data)) == len(values)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "MP3", "CAF"])
def test_cut_recordings_are_refused(kind: str) -> None:
    data = encode_sound(make_sound(0, 1.0), kind=kind)
    with pytest.raises(ValueError, match=r"\w"):
        decode_audio(data[: len(data) // 2])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_ogg_streams_behind_the_first_are_not_lost_silently(subtype: str) -> None:
    one, two = (encode_sound(make_sound(i, 1.0), kind="OGG", subtype=subtype) for i in range(2))
    assert len(decode_audio(one)[0]) == 16_000
    with pytest.raises(ValueError, match="2 Ogg streams one after the other, of which only the first"):
        decode_audio(one + two)


@pytest.mark.parametrize("samples", [16_000, 4096 * 4, 100_000])
def test_open_length(samples: int) -> None:
    sound = make_sound(0, samples / 16_000)
    whole = encode_sound(sound, kind="FLAC")
    values, _ = decode_audio(open_length(whole))
    assert np.array_equal(values, decode_audio(whole)[0])
    assert measure_recording(io.BytesIO(open_length(whole))) == samples


def test_claims_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short file may have many samples, but not after resampling, and none beyond what any speech has."""
    slow = encode_sound(np.zeros((4096 * 64, 1), np.float32), 1_000, "FLAC")
    monkeypatch.setattr(sound, "SURE_VALUES", 4096 * 64)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    for read in (decode_audio, lambda data: measure_recording(io.BytesIO(data))):
        with pytest.raises(ValueError, match=r"262144 frames of 1 channels at 1000 Hz in \d+ bytes, expected at most"):
            read(slow)
    monkeypatch.undo()
    monkeypatch.setattr(sound, "SURE_VALUES", 4096 * 64 - 1)
    with pytest.raises(ValueError, match="frames"):
        decode_audio(open_length(encode_sound(np.zeros((4096 * 64, 1), np.float32), 16_000, "FLAC")))


# ---- one bad item -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), OverflowError("long"), KeyError("name")])
def test_whatever_a_sample_raises_stays_with_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 0.5)))
    modality = Speech(config())
    source = modality.open(str(tmp_path))
    original = modality.load

    def load(source: object, index: int) -> object:
        if index == 2:
            raise error
        return original(source, index)  # type: ignore[arg-type]

    monkeypatch.setattr(modality, "load", load)
    account = BadSamples(source, 0.5, None)
    account.add(TrainSamples(source, modality, 0)[2, 0].notes)
    assert account.entries[0]["path"].endswith("2.wav")
    assert type(error).__name__ in account.entries[0]["reason"]
    (note,) = EvaluationSamples(source, modality)[2].notes
    assert note.kind == "bad" and type(error).__name__ in note.text
    assert dataset.describe_error(error) == note.text


def test_members_of_archives_by_odd_numbers(tmp_path: Path) -> None:
    sound = encode_sound(make_sound(0, 0.5))
    (tmp_path / "a.zip").write_bytes(sound)
    rows = [
        f"a.zip:0:{len(sound)}",
        f"a.zip:{10**30}:40",
        f"a.zip:0:{10**30}",
        f"a.zip:9:{len(sound)}",
        f"a.zip:{'9' * 5000}:1",
    ]
    (tmp_path / "m.tsv").write_text("\n".join([str(tmp_path), *(f"{row}\t{'9' * 30}" for row in rows)]))
    source = Speech(config()).open(str(tmp_path / "m.tsv"))
    assert len(source) == 1
    assert len(source.rejected) == 4
    assert source.lengths is not None and source.lengths[0] == 8000


def headers(picture: bytes) -> Iterator[tuple[str, bytes, str]]:
    """(what, a shard that begins with one good member, what is said about the rest)."""
    good = tarfile.TarInfo("a.jpg")
    good.size = len(picture)
    first = good.tobuf() + picture + b"\0" * (-len(picture) % 512)
    for what, size in (("negative", b"\xff" * 12), ("absurd", b"\x80" + b"\x7f" * 11)):
        info = bytearray(tarfile.TarInfo("b.jpg").tobuf())
        info[124:136], info[148:156] = size, b" " * 8
        info[148:156] = b"%06o\0 " % sum(info)
        yield what, first + bytes(info) + b"\0" * 1024, "bytes|cut off|damaged"
    extended = tarfile.TarInfo("b")
    extended.type = tarfile.XHDTYPE
    fields = b"".join(b"%d %s\n" % (len(text) + 4, text) for text in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0"))
    extended.size = len(fields)
    sparse = tarfile.TarInfo("c.jpg")
    sparse.size = 512
    body = fields + b"\0" * (-len(fields) % 512) + sparse.tobuf() + b"999999999999\n".ljust(512, b"1")
    yield "sparse", first + extended.tobuf() + body, "damaged|not a regular"


def test_damaged_members_do_not_end_the_scan(tmp_path: Path, picture: bytes) -> None:
    for what, data, reason in headers(picture):
        (tmp_path / f"{what}.tar").write_bytes(data)
        source = open_source(str(tmp_path / f"{what}.tar"))
        assert len(source) == 1, what
        assert source.rejected, what
        assert re.search(reason, source.rejected[0].reason), (what, source.rejected)


def test_sparse_files_are_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", 1 << 40)
    with pytest.raises(ValueError, match="larger than"):
        open_source(str(tmp_path)).read(0)
    assert shards.MAX_LABEL_BYTES < 1 << 20


# ---- text -------------------------------------------------------------------------------------------------------


def test_byte_order_marks(tmp_path: Path) -> None:
    assert decode_text("\ufeffü".encode()) == "ü"
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        mark = b"" if encoding == "utf-16" else "\ufeff".encode(encoding)
        with pytest.raises(ValueError, match=r"UTF-16, expected UTF-8 \(`iconv"):
            decode_text(mark + "text".encode(encoding))
    sound = encode_sound(make_sound(0, 0.5))
    (tmp_path / "a.wav").write_bytes(sound)
    (tmp_path / "a.txt").write_bytes("\ufeffhello\r\n".encode())
    (tmp_path / "m.tsv").write_bytes(f"\ufeff{tmp_path}\na.wav\t8000\n".encode())
    write_tar(tmp_path / "s.tar", {"a.wav": sound, "a.txt": "\ufeffhello".encode(), "a.cls": "\ufeffx".encode()})
    assert open_source(str(tmp_path), SPEECH).read_transcript(0) == "hello"
    assert open_source(str(tmp_path / "m.tsv"), SPEECH).read(0) == sound
    source = open_source(str(tmp_path / "s.tar"), SPEECH, labelled=True)
    assert (source.read_transcript(0), source.classes) == ("hello", ["x"])
    (tmp_path / "m.tsv").write_bytes(f"{tmp_path}\na.wav\t8000\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"data\.path: expected a list in UTF-8, got .*m\.tsv': UTF-16"):
        open_source(str(tmp_path / "m.tsv"), SPEECH)


def test_packing_does_not_lose_transcripts_without_a_word(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "in" / f"{name}.wav").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.wav").write_bytes(encode_sound(make_sound(0, 0.5)))
    (tmp_path / "in" / "a.txt").write_bytes("text".encode("utf-16"))
    (tmp_path / "in" / "b.txt").write_text("text")
    (tmp_path / "in" / "d.xyz").write_bytes(b"x")
    text = pack(str(tmp_path / "in"), tmp_path / "out", PackSettings("speech"))
    assert "2 samples" in text and "UTF-16" in text and "1 files that end in .xyz" in text


def test_a_length_that_cannot_be_packed() -> None:
    """What `struct` cannot hold is an error of the sample, too."""
    with pytest.raises(ValueError, match=r"\w"):
        decode_audio(b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEdata" + struct.pack("<I", 0xFFFFFFFF))
