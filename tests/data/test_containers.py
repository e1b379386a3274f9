"""Recordings that PyAV decodes where it is installed, and what is said where it is not."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.images import write_tar
from support.sounds import encode_by_av, encode_sound, make_sound

from d2v import recipes
from d2v.config import Config
from d2v.data import speech
from d2v.data.dataset import TrainSamples
from d2v.data.decoding import sound
from d2v.data.decoding.recording import measure_recording
from d2v.data.decoding.sound import decode_audio, find_container, normalise_waveform
from d2v.data.index import open_source
from d2v.data.loader import train_updates
from d2v.data.speech import AV_ENDINGS, SPEECH, Speech

CODECS = {
    ".m4a": ("ipod", "aac", "fltp"), ".aac": ("adts", "aac", "fltp"), ".wma": ("asf", "wmav2", "fltp"),
    ".mka": ("matroska", "aac", "fltp"), ".ac3": ("ac3", "ac3", "fltp"), ".webm": ("webm", "libopus", "s16"),
    ".mp4": ("mp4", "alac", "s16p"), ".wv": ("wv", "wavpack", "s16p"), ".tta": ("tta", "tta", "s16"),
}  # fmt: skip
"""Muxer, codec and sample format by ending."""
WITH_AV = SPEECH._replace(suffixes=SPEECH.suffixes | AV_ENDINGS)
WITHOUT_AV = SPEECH._replace(suffixes=SPEECH.suffixes - AV_ENDINGS)


def encode(values: np.ndarray, rate: int, ending: str) -> bytes:
    """float32 (S,C) as a recording of that kind."""
    return encode_by_av(values, rate, *CODECS[ending])


def tones(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    return make_sound(3, seconds, rate, channels).reshape(-1, channels)


@pytest.mark.parametrize("ending", CODECS)
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 2), (16_000, 1)])
def test_formats_of_pyav_are_read(ending: str, rate: int, channels: int) -> None:
    if rate == 16_000 and ending in (".ac3", ".webm"):
        pytest.skip("has no such rate")
    values = tones(1.5, rate, channels)
    data = encode(values, rate, ending)
    found, converted = decode_audio(data)
    assert abs(len(found) - 24_000) < 2_100  # codecs fill their first and last block
    assert converted == (("2 channels to mono", "48000 Hz to 16000 Hz") if channels == 2 else ())
    assert measure_recording(io.BytesIO(data)) == len(found)
    expected = sound.resample(values.mean(axis=1), rate)
    spectra = [np.abs(np.fft.rfft(v, 32_768))[100:6_000] for v in (found, expected)]
    assert np.corrcoef(*spectra)[0, 1] > 0.98


@pytest.mark.parametrize("ending", [".mp4", ".wv", ".tta"])
def test_lossless_formats_give_the_values(ending: str) -> None:
    values = (tones(1.0, 16_000) * 0.9).astype(np.float32)
    found, _ = decode_audio(encode(values, 16_000, ending))
    assert len(found) == 16_000
    assert np.abs(found - values[:, 0]).max() <= 1.01 / 32_768


@pytest.mark.parametrize("ending", [".m4a", ".mka", ".wma", ".mp4", ".webm"])
def test_recordings_that_are_cut_off_are_refused(ending: str) -> None:
    data = encode(tones(4.0, 48_000), 48_000, ending)
    with pytest.raises(ValueError, match=r"cut off: \d\.\d\d of \d\.\d\d s|Invalid data"):
        decode_audio(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"\w"):
        decode_audio(data[:60])


def test_absurd_lengths_are_refused_while_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(np.zeros((160_000, 1), np.float32), 16_000, ".wv")
    monkeypatch.setattr(sound, "SURE_VALUES", 32_000)
    monkeypatch.setattr(sound, "VALUES_PER_BYTE", 1)
    with pytest.raises(ValueError, match=r"frames of 1 channels at 16000 Hz in \d+ bytes, expected at most 32000"):
        decode_audio(data)


def config() -> Config:
    base = recipes.speech_tiny()
    data = dataclasses.replace(base.data, global_batch=2, micro_batch=2, workers=0, min_seconds=0.0, max_seconds=1.0)
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, steps=4))


@pytest.mark.parametrize("place", ["folder", "manifest", "shard"])
def test_crops_are_slices_of_the_whole(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{i}{end}": encode(tones(1.2 + 0.3 * i, 16_000), 16_000, end) for i, end in enumerate((".m4a", ".aac"))}
    files |= {"2.wav": encode_sound(make_sound(2, 1.4))}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path
    if place == "manifest":
        path = tmp_path / "m.tsv"
        path.write_text("\n".join([str(tmp_path), *(f"{name}\t1" for name in files)]))
    elif place == "shard":
        path = write_tar(tmp_path / "s.tar", files)
    monkeypatch.setattr(speech, "SPEECH", WITH_AV)
    modality = Speech(config())
    source = modality.open(str(path))
    assert len(source) == 3 and not source.rejected and not source.left_out
    whole = [normalise_waveform(decode_audio(source.read(i))[0]) for i in range(3)]
    assert source.lengths is not None
    assert source.lengths.tolist() == [min(len(values), 16_000) for values in whole]
    samples = TrainSamples(source, modality, 0)
    assert all(np.array_equal(samples[i, 0].value[:], whole[i]) for i in range(3))
    for (batch,) in train_updates(modality.config, source, 0, sys.modules["torch"].device("cpu")):
        assert not [note for note in batch.notes if note.kind == "bad"]
        for row in batch.inputs.numpy():
            assert any(row.tobytes() in values.tobytes() for values in whole)


# ---- without it -----------------------------------------------------------------------------------------------------


def test_endings_are_named_with_what_would_read_them(tmp_path: Path) -> None:
    for number in range(9):  # many other endings do not hide them
        for copy in range(3):
            (tmp_path / f"{copy}.x{number}").write_bytes(b"x")
    (tmp_path / "a.M4A").write_bytes(b"x")
    (tmp_path / "b.amr").write_bytes(b"x")
    hint = r"\(pip install 'd2v\[av\]' reads them\)"
    with pytest.raises(ValueError, match=rf"1 files that end in \.amr {hint}, 1 files that end in \.m4a {hint}"):
        open_source(str(tmp_path), WITHOUT_AV)
    (tmp_path / "c.wav").write_bytes(encode_sound(make_sound(0, 0.5)))
    left = open_source(str(tmp_path), WITHOUT_AV).left_out
    assert left["files that end in .m4a (pip install 'd2v[av]' reads them)"] == 1
    write_tar(tmp_path / "s.tar", {"c.wav": encode_sound(make_sound(0, 0.5)), "d.wma": b"x"})
    left = open_source(str(tmp_path / "s.tar"), WITHOUT_AV).left_out
    assert left == {"members that end in .wma (pip install 'd2v[av]' reads them)": 1}


@pytest.mark.parametrize(
    ("start", "container"),
    [
        (b"\0\0\0\x20ftypM4A ", "mov"), (b"\xff\xf1\x50\x80", "aac"), (b"#!AMR\n", "amr"),
        (b"\x30\x26\xb2\x75\x8e\x66", "asf"), (b"\x1a\x45\xdf\xa3", "matroska"),
    ],
)  # fmt: skip
def test_a_listed_file_says_what_is_missing(start: bytes, container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    data = start + bytes(200)
    assert find_container(data) == container
    for read in (decode_audio, lambda data: measure_recording(io.BytesIO(data))):
        with pytest.raises(ValueError, match=rf"^no decoder for '{container}' is installed: pip install 'd2v\[av\]'"):
            read(data)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64", "NIST", "VOC"])
def test_what_libsndfile_reads_stays_with_it(kind: str) -> None:
    assert find_container(encode_sound(make_sound(0, 0.5), kind=kind)) is None


def test_a_playlist_opens_no_other_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """FFmpeg's lists of other files are not recordings, whatever they are called."""
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / "other.wav").write_bytes(encode_sound(make_sound(0, 0.5)))
    for text in (f"ffconcat version 1.0\nfile {tmp_path}/other.wav\n", f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/other.wav\n"):
        for start in (b"", b"\0\0\0\x20ftypM4A ", b"#!AMR\n"):
            with pytest.raises(ValueError, match=r"\w"):
                decode_audio(start + text.encode())


def test_another_decoder_is_another_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no decoder could read is looked at again once there is one."""
    from d2v.data.cache import IndexCache

    data = encode(tones(1.0, 16_000), 16_000, ".m4a")
    (tmp_path / "a.m4a").write_bytes(data)
    (tmp_path / "m.tsv").write_text(f"{tmp_path}\na.m4a\tunknown\n")
    cache = IndexCache(tmp_path / "cache", shared=True)

    def lengths(kind: Any) -> list[int]:
        source: Any = open_source(str(tmp_path / "m.tsv"), kind, cache=cache)
        found: list[int] = source.read_lengths(measure_recording).tolist()
        return found

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        assert lengths(WITHOUT_AV) == [-1]
    assert lengths(WITH_AV) == [len(decode_audio(data)[0])]
