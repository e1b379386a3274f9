"""Every format that is read: its length is that of decoding, and every crop is the slice of the whole, bit for bit.

`python tests/data/test_formats.py` writes the table of the formats in docs/data.md.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "tests")) if p not in sys.path]  # also for the program below

from support.images import write_tar  # noqa: E402
from support.sounds import encode_by_av, encode_sound, make_sound, open_length  # noqa: E402

from d2v.config import Config  # noqa: E402
from d2v.data.dataset import EvaluationSamples, TrainSamples  # noqa: E402
from d2v.data.decoding import recording, sound  # noqa: E402
from d2v.data.decoding.recording import Level, Recording, measure_recording  # noqa: E402
from d2v.data.decoding.sound import decode_audio, find_container, normalise_waveform, read_frames  # noqa: E402
from d2v.data.loader import train_updates  # noqa: E402
from d2v.data.speech import Speech  # noqa: E402

SECONDS = 3
DOCUMENT = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- formats -->", "<!-- end of formats -->"


def noise(rate: int, channels: int, first: float = 0.3, second: float = 0.3) -> np.ndarray:
    """float32 (S,C): a half of each loudness; the channels are not alike."""
    values = np.random.default_rng(0).standard_normal((SECONDS * rate, channels)).astype(np.float32)
    values[: len(values) // 2] *= first
    values[len(values) // 2 :] *= second
    return values


def by_libsndfile(kind: str, subtype: str | None = None) -> Callable[[int, int], bytes]:
    return lambda rate, channels: encode_sound(noise(rate, channels), rate, kind, subtype)


def by_av(form: str, codec: str, sample_format: str, loudness: tuple[float, float] = (0.3, 0.3), **how: Any) -> Any:
    def make(rate: int, channels: int) -> bytes:
        return encode_by_av(noise(rate, channels, *loudness), rate, form, codec, sample_format, **how)

    return make


def vary_rate(rate: int, channels: int) -> bytes:
    file = io.BytesIO()
    how: dict[str, Any] = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.3}
    with soundfile.SoundFile(file, "w", rate, channels, **how) as opened:
        opened.write(noise(rate, channels, 0.3, 1e-5))
    return file.getvalue()


UNTAGGED: dict[str, Any] = {"options": {"write_xing": "0", "id3v2_version": "0"}}
"""MP3 without a header of its length."""
QUIET_THEN = {"MP3, no length, quiet first"}
THEN_QUIET = {"MP3, no length, loud first", "MP3, variable rate", "WAV, MP3 inside"}
TWO_RATES, NARROW = ((16_000, 1), (44_100, 2)), ((8_000, 1),)
FORMATS: dict[str, tuple[Callable[[int, int], bytes], tuple[tuple[int, int], ...]]] = {
    "WAV, 16 bits": (by_libsndfile("WAV", "PCM_16"), TWO_RATES),
    "WAV, 24 bits": (by_libsndfile("WAV", "PCM_24"), TWO_RATES),
    "WAV, float": (by_libsndfile("WAV", "FLOAT"), TWO_RATES),
    "WAV, u-law": (by_libsndfile("WAV", "ULAW"), NARROW),
    "WAV, MS ADPCM": (by_libsndfile("WAV", "MS_ADPCM"), TWO_RATES),
    "WAV, IMA ADPCM": (by_libsndfile("WAV", "IMA_ADPCM"), TWO_RATES),
    "WAV, GSM": (by_libsndfile("WAV", "GSM610"), NARROW),
    "WAV, G.721": (by_libsndfile("WAV", "G721_32"), NARROW),
    "WAV, MP3 inside": (by_av("wav", "libmp3lame", "fltp", (0.3, 1e-5), quality=2), TWO_RATES),
    "AIFF, 16 bits": (by_libsndfile("AIFF", "PCM_16"), TWO_RATES),
    "AIFF, DWVW": (by_libsndfile("AIFF", "DWVW_16"), ((16_000, 1),)),
    "AU, 16 bits": (by_libsndfile("AU", "PCM_16"), TWO_RATES),
    "CAF, 16 bits": (by_libsndfile("CAF", "PCM_16"), TWO_RATES),
    "CAF, ALAC": (by_libsndfile("CAF", "ALAC_16"), TWO_RATES),
    "W64, 16 bits": (by_libsndfile("W64", "PCM_16"), TWO_RATES),
    "RF64, 16 bits": (by_libsndfile("RF64", "PCM_16"), TWO_RATES),
    "NIST, 16 bits": (by_libsndfile("NIST", "PCM_16"), TWO_RATES),
    "VOC, 16 bits": (by_libsndfile("VOC", "PCM_16"), TWO_RATES),
    "FLAC": (by_libsndfile("FLAC", "PCM_16"), TWO_RATES),
    "FLAC, length open": (lambda rate, channels: open_length(by_libsndfile("FLAC")(rate, channels)), TWO_RATES),
    "Ogg Vorbis": (by_libsndfile("OGG", "VORBIS"), TWO_RATES),
    "Ogg Opus": (by_libsndfile("OGG", "OPUS"), ((16_000, 1), (48_000, 2))),
    "MP3, constant rate": (by_libsndfile("MP3"), TWO_RATES),
    "MP3, variable rate": (vary_rate, TWO_RATES),
    "MP3, constant rate, no length": (by_av("mp3", "libmp3lame", "fltp", **UNTAGGED), TWO_RATES),
    "MP3, no length, quiet first": (
        by_av("mp3", "libmp3lame", "fltp", (1e-5, 0.3), quality=2, **UNTAGGED), TWO_RATES,
    ),
    "MP3, no length, loud first": (
        by_av("mp3", "libmp3lame", "fltp", (0.3, 1e-5), quality=2, **UNTAGGED), TWO_RATES,
    ),
    "MP2": (by_av("mp2", "mp2", "s16"), TWO_RATES),
    "AAC": (by_av("adts", "aac", "fltp"), TWO_RATES),
    "M4A, AAC": (by_av("ipod", "aac", "fltp"), TWO_RATES),
    "MP4, ALAC": (by_av("mp4", "alac", "s16p"), TWO_RATES),
    "Matroska, AAC": (by_av("matroska", "aac", "fltp"), TWO_RATES),
    "WebM, Opus": (by_av("webm", "libopus", "s16"), ((48_000, 2),)),
    "WMA": (by_av("asf", "wmav2", "fltp"), TWO_RATES),
    "AC-3": (by_av("ac3", "ac3", "fltp"), ((44_100, 2),)),
    "WavPack": (by_av("wv", "wavpack", "s16p"), TWO_RATES),
    "TTA": (by_av("tta", "tta", "s16"), TWO_RATES),
}  # fmt: skip
"""By name: how it is made of a rate and channels, and which of these it is tried with."""
CASES = [(name, *form) for name, (_, forms) in FORMATS.items() for form in forms]


@functools.lru_cache(maxsize=len(CASES))
def make(name: str, rate: int, channels: int) -> bytes:
    return FORMATS[name][0](rate, channels)


def as_long(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """The recording as those above a minute are read."""
    monkeypatch.setattr(recording, "LONG", 0)
    level = measure_recording(io.BytesIO(data))
    assert isinstance(level, Level)
    return Recording(lambda: io.BytesIO(data), level)


@pytest.mark.parametrize(("name", "rate", "channels"), CASES)
def test_a_length_is_that_of_decoding(name: str, rate: int, channels: int) -> None:
    data = make(name, rate, channels)
    values, _ = decode_audio(data)
    assert measure_recording(io.BytesIO(data)) == len(values)
    assert -0.05 < len(values) / 16_000 - SECONDS < 0.15  # codecs begin and end with parts of blocks
    halves = [np.sqrt(np.square(half).mean()) for half in np.split(values[: len(values) // 2 * 2], 2)]
    loudness = np.array([0.3, 0.3]) / np.sqrt(channels) * min(1.0, np.sqrt(16_000 / rate))
    loudness *= [name not in QUIET_THEN, name not in THEN_QUIET]
    assert np.allclose(halves, loudness, rtol=0.35, atol=0.02), (halves, loudness)


@pytest.mark.parametrize(("name", "rate", "channels"), CASES)
def test_crops_are_slices_of_the_whole(name: str, rate: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(name, rate, channels)
    monkeypatch.setattr(sound, "BLOCK", 5_000)
    values, converted = decode_audio(data)
    whole, long, count = normalise_waveform(values), as_long(data, monkeypatch), 4_000
    assert len(long) == len(whole)
    assert sound.describe_conversion(long.level.channels, long.level.rate) == converted
    end = len(whole)
    places = [(0, end), (0, 1), (0, count), (1, 1 + count), (4_999, 5_001), (end // 2, end // 2 + count)]
    places += [(start, min(start + count, end)) for start in (end - count, end - 700, end - 128, end - 1)]
    for start, stop in places:
        assert long[start:stop].tobytes() == whole[start:stop].tobytes(), (start, stop)


@pytest.mark.parametrize(("rate", "count"), [(44_100, 2), (8_000, 1), (22_050, 3), (16_001, 1), (48_000, 5)])
def test_resampled_crops_begin_anywhere(rate: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the ratio has large terms. The channels are averaged, however many there are."""
    values = noise(rate, count)[:rate]
    data = encode_sound(values, rate, "WAV", "FLOAT")
    decoded, _ = decode_audio(data)
    mean = values.mean(axis=1) if count > 1 else values[:, 0]
    assert np.array_equal(decoded, sound.resample(mean, rate))
    whole, long = normalise_waveform(decoded), as_long(data, monkeypatch)
    for start in (*range(0, 40), *range(7_000, 7_200, 7), *range(len(whole) - 60, len(whole))):
        stop = min(start + 55, len(whole))
        assert long[start:stop].tobytes() == whole[start:stop].tobytes(), start


def test_only_what_a_crop_needs_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WAV, 16 bits", "FLAC", "MP3, variable rate"):
        data = make(name, 16_000, 1)
        long = as_long(data, monkeypatch)
        read: list[int] = []
        original = soundfile.SoundFile.read

        def count(self: Any, frames: int, original: Any = original, read: Any = read, **how: Any) -> Any:
            read.append(frames)
            return original(self, frames, **how)

        with monkeypatch.context() as patch:
            patch.setattr(soundfile.SoundFile, "read", count)
            long[40_000:41_000]
        assert sum(read) == (41_000 if name.startswith("MP3") else 1_000)


@pytest.mark.parametrize(
    ("name", "code"),
    [("MP3, no length, quiet first", "MPEG_LAYER_III"), ("MP3, no length, loud first", "MPEG_LAYER_III"),
     ("MP3, constant rate, no length", "MPEG_LAYER_III"), ("WAV, MP3 inside", "MPEG_LAYER_III")],
)  # fmt: skip
def test_a_trusted_header_would_be_seen(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(name, 16_000, 1)
    monkeypatch.setattr(sound, "PLAIN", sound.PLAIN | {code})
    assert measure_recording(io.BytesIO(data)) != len(decode_audio(data)[0])


@pytest.mark.parametrize(("name", "code"), [("Ogg Vorbis", "VORBIS"), ("MP3, variable rate", "MPEG_LAYER_III")])
def test_a_seek_in_a_lossy_format_would_be_seen(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sound, "PLAIN", sound.PLAIN | {code})
    with pytest.raises((AssertionError, ValueError)):
        test_crops_are_slices_of_the_whole(name, 16_000, 1, monkeypatch)


def test_soundfile_by_blocks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its seek behind every read changes what MP3 gives."""
    data = make("MP3, variable rate", 16_000, 1)
    whole, _ = read_frames(io.BytesIO(data))
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        blocks = np.concatenate(list(file.blocks(5_000, dtype="float32", always_2d=True)))
    assert not np.array_equal(blocks, whole)


def test_titles_around_an_mp3_are_no_sound() -> None:
    front = b"ID3\x03\0\0" + bytes([0, 0, 2, 10]) + b"\xff\xfb\x90\x00" * 66 + b"ab"  # with what looks like frames
    for name in ("MP3, variable rate", "MP3, no length, loud first"):
        data = make(name, 16_000, 1)
        expected, _ = decode_audio(data)
        assert np.array_equal(decode_audio(front + data + b"TAG" + b"title".ljust(125, b"\0"))[0], expected)


@pytest.mark.parametrize("between", [b"", b"TAG" + bytes(125), b"ID3\x03\0\0" + bytes(4)])
def test_of_several_mp3s_in_one_file_all_are_read(between: bytes) -> None:
    data = make("MP3, variable rate", 16_000, 1)
    with soundfile.SoundFile(io.BytesIO(data + between + data)) as file:
        assert file.frames == SECONDS * 16_000, "the second is not counted"
    values, _ = decode_audio(data + between + data)
    assert len(values) >= 2 * SECONDS * 16_000
    assert measure_recording(io.BytesIO(data + between + data)) == len(values)
    loud = [np.sqrt(np.square(part[6_000:18_000]).mean()) for part in np.split(values[:96_000], 4)]
    assert np.allclose(loud, [0.3, 0, 0.3, 0], atol=0.05)


# ---- in training ----------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Config:
    import dataclasses

    from d2v import recipes

    base = recipes.speech_tiny()
    data = dataclasses.replace(
        base.data, global_batch=4, micro_batch=2, workers=0, min_seconds=0.0, max_seconds=1.0, **changes
    )
    return dataclasses.replace(base, data=data, run=dataclasses.replace(base.run, steps=6))


@pytest.mark.parametrize("unequal", ["crop", "pad"])
@pytest.mark.parametrize("place", ["folder", "manifest", "shard"])
def test_training_sees_the_same_crops_of_long_recordings(
    place: str, unequal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    kinds = (("WAV", 16_000), ("FLAC", 44_100), ("OGG", 16_000), ("MP3", 24_000), ("WAV", 16_000))
    files = {
        f"{i}.{kind.lower()}": encode_sound(make_sound(i, 0.5 + 0.7 * i, rate), rate, kind)
        for i, (kind, rate) in enumerate(kinds)
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path
    if place == "manifest":
        lengths = {name: len(decode_audio(data)[0]) for name, data in files.items()}
        path = tmp_path / "m.tsv"
        path.write_text("\n".join([str(tmp_path), *(f"{name}\t{count}" for name, count in lengths.items())]))
    elif place == "shard":
        path = write_tar(tmp_path / "s.tar", files)
    found = []
    for long in (1 << 40, 16_000):
        for module in (recording, sys.modules[Speech.__module__]):
            monkeypatch.setattr(module, "LONG", long)
        modality = Speech(config(unequal=unequal, cache=str(tmp_path / f"cache-{long}")))
        for _ in range(2):  # the second time from the cache
            source = modality.open(str(path))
            assert sorted(source.measured) == ([] if long > 16_000 else [1, 2, 3, 4])
        batches = [b for update in train_updates(modality.config, source, 0, torch.device("cpu")) for b in update]
        assert not [note for batch in batches for note in batch.notes if note.kind == "bad"]
        evaluated = EvaluationSamples(source, modality)
        found.append((
            [batch.inputs for batch in batches], [n for batch in batches for n in batch.notes],
            [torch.from_numpy(evaluated[i].value) for i in range(len(source))], source.digest(),
        ))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(found[0][0] + found[0][2], found[1][0] + found[1][2], strict=True))
    assert found[0][1] == found[1][1]
    assert found[0][3] == found[1][3]


def test_a_long_recording_that_changed_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recording, sys.modules[Speech.__module__]):
        monkeypatch.setattr(module, "LONG", 16_000)
    for i in range(3):
        (tmp_path / f"{i}.wav").write_bytes(encode_sound(make_sound(i, 2.0)))
    modality = Speech(config())
    source = modality.open(str(tmp_path))
    (tmp_path / "1.wav").write_bytes(encode_sound(make_sound(1, 2.0, 8_000), 8_000))
    (note, *_) = TrainSamples(source, modality, 0)[1, 0].notes
    assert note.kind == "bad" and note.text.startswith("changed since it was indexed")
    source.base.stamps[:] = -1  # type: ignore[attr-defined]  # what the reading sees
    (note, *_) = TrainSamples(source, modality, 0)[1, 0].notes
    assert note.kind == "bad" and "as when it was indexed" in note.text


# ---- the table ------------------------------------------------------------------------------------------------------


def describe_header(data: bytes, rate: int) -> str:
    """What a header says, in frames."""
    if (container := find_container(data)) is None:
        frames = soundfile.info(io.BytesIO(data)).frames
        return f"{frames:,}" if frames < sound.OPEN else "open"
    import av

    with av.open(io.BytesIO(data), format=container) as opened:
        stream = opened.streams.audio[0]
        return f"{round(stream.duration * stream.time_base * rate):,}" if stream.duration else "none"


def make_row(name: str) -> str:
    rate, channels = FORMATS[name][1][0]
    data = make(name, rate, channels)
    values, found_rate = read_frames(io.BytesIO(data))
    assert found_rate == rate
    container = find_container(data)
    plain = container is None and soundfile.info(io.BytesIO(data)).subtype in sound.PLAIN and "open" not in name
    decoder, crop = "libsndfile" if container is None else "PyAV", "by seeking" if plain else "from the beginning"
    length = "header" if plain else "decoding"
    header = describe_header(data, rate)
    return f"| {name} | {decoder} | {SECONDS * rate:,} | {header} | {len(values):,} | {length} | {crop} |"


def versions() -> str:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    return f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__}, PyAV {av.__version__}"


def table_in(text: str) -> list[str]:
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def test_the_table_is_current() -> None:
    head, *table = table_in(DOCUMENT.read_text(encoding="utf-8"))
    if versions() not in head:
        pytest.skip(f"the table was made by other versions than {versions()}")
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in table if " | " in row}
    assert set(rows) - {"recording"} == set(FORMATS)
    for name in FORMATS:
        try:
            assert rows[name] == make_row(name), "python tests/data/test_formats.py makes the table again"
        except pytest.skip.Exception:
            continue


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    head = f"Recordings of {SECONDS} s, encoded and decoded by {versions()}:"
    names = ("recording", "decoder", "frames put in", "by the header", "decoded", "length from", "a crop is decoded")
    lines = [head, "", f"| {' | '.join(names)} |", "|" + "---|" * len(names), *map(make_row, FORMATS)]
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    DOCUMENT.write_text("\n".join([before, *lines, after]), encoding="utf-8")
