"""Recordings: decoding, the checks of what a file claims, resampling to 16 kHz, normalisation.

libsndfile (soundfile) decodes; what it does not know, PyAV where it is installed. Resampling is polyphase filtering
(`scipy.signal.resample_poly`: a Kaiser-windowed low-pass, zero phase).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np

from d2v.model.stems.speech import SAMPLE_RATE

AV_HINT = "pip install 'd2v[av]' reads them"
RATES = (1_000, 768_000)
"""Sample rates that speech can have; others count as damaged headers."""
MAX_VALUES = 1 << 28
"""Frames times channels of the longest recording, and its samples at 16 kHz: 4.6 hours."""
SURE_VALUES, VALUES_PER_BYTE = 1 << 25, 64
"""So many values (35 minutes at 16 kHz) any file may have; more only at so many to a byte: speech never needs fewer
bytes, but a file made to fill the memory does."""
PIECE = 1 << 15
"""Samples that are normalised at a time, 2 seconds: 262 kB in float64, which a core's own cache holds."""
BLOCK = 1 << 16
"""Frames that are decoded at a time where their number is open, or where they are passed over."""
OPEN = 1 << 62
"""libsndfile's number of frames, or more, where a header leaves it open."""
PLAIN = frozenset({"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})
"""libsndfile's names of codes whose headers give the number of frames, and which can be read from any frame on; FLAC is
called by its number of bits."""
SLACK = 16
"""Bytes that a WAV header may promise too many: some writers do."""
KAISER_BETA = 5.0
"""Of the window of the resampling's low-pass."""
REACH = 10
"""Of that window to each side, in samples of the lower of the two rates."""
KEPT_RATIO = 1_000
"""Largest term of a resampling ratio whose low-pass is kept: 80 kB of coefficients."""
_NORM_EPS = 1e-5
_SIZES: tuple[tuple[bytes, int, int, Literal["big", "little"], int], ...] = (
    (b"FORM", 4, 8, "big", 8), (b".snd", 8, 12, "big", 24), (b"RF64", 20, 28, "little", 8),
    (b"riff\x2e\x91\xcf\x11", 16, 24, "little", 0),
)  # fmt: skip
"""Where AIFF, AU, RF64 and W64 say how long they are, and what that leaves out."""
_CONTAINERS: tuple[tuple[int, bytes, bytes, str], ...] = (
    (4, b"ftyp", b"\xff\xff\xff\xff", "mov"), (0, b"\xff\xf0", b"\xff\xf6", "aac"),
    (0, b"\x30\x26\xb2\x75", b"\xff\xff\xff\xff", "asf"), (0, b"#!AMR", b"\xff\xff\xff\xff\xff", "amr"),
    (0, b"\x1a\x45\xdf\xa3", b"\xff\xff\xff\xff", "matroska"), (0, b"\x0b\x77", b"\xff\xff", "ac3"),
    (0, b"MAC ", b"\xff\xff\xff\xff", "ape"), (0, b"wvpk", b"\xff\xff\xff\xff", "wv"),
    (0, b"TTA1", b"\xff\xff\xff\xff", "tta"),
)  # fmt: skip
"""(place, bytes, mask, FFmpeg's name) of what begins a file for PyAV. FFmpeg is told the name: left to guess, it would
take a list of other files, or of addresses, for a recording, and open them."""
_RATES = b"".join(re.escape(bytes([byte])) for byte in range(0x10, 0xF0) if byte & 0b1100 != 0b1100)
_MPEG_FRAME = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][" + _RATES + rb"].", re.DOTALL)
"""Beginning of an MP3 frame: eleven bits of ones, a version, the third layer, a bit rate and a sample rate."""
_MPEG_TAG = re.compile(rb"(?:Xing|Info)...(.)(....)(....)", re.DOTALL)
"""The header of an MP3's length: which of these it has, frames, bytes."""
_TAG_BYTES = 64
"""It stands within so many bytes of the first frame."""
_SHORTEST_MPEG = 24
"""Bytes of the shortest MP3 frame: 8 kbit/s at 24 kHz."""
_CUT_SECONDS = 0.25
"""What a recording may lack of the duration that its container says: codecs begin and end with parts of frames."""
_UNKNOWN_SIZE = 0x7FFF_0000
"""WAV files that were written to a pipe have such a size, or more, in their header."""


def decode_audio(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encoded bytes -> (float32 mono waveform at 16 kHz, what was converted).

    Channels are averaged. Raises `ValueError` with the reason for what cannot be decoded: not audio, cut off, no
    samples, samples that are not finite.
    """
    values, rate = read_whole(data)
    return to_waveform(values, rate), describe_conversion(values.shape[1], rate)


def read_whole(data: bytes) -> tuple[np.ndarray, int]:
    """Encoded bytes -> (all frames (S, channels) float32, their rate); `ValueError` as from `decode_audio`."""
    values, rate = read_frames(io.BytesIO(data))
    if reason := find_cut(data):
        raise ValueError(reason)
    _check_header(len(values), rate, values.shape[1], len(data))
    if not all(np.isfinite(values[start : start + PIECE]).all() for start in range(0, len(values), PIECE)):
        raise ValueError("samples that are not finite")
    return values, rate


def to_waveform(values: np.ndarray, rate: int) -> np.ndarray:
    """Frames (S, channels) -> the mean of their channels at 16 kHz, float32."""
    return resample(values[:, 0] if values.shape[1] == 1 else values.mean(axis=1), rate)


def describe_conversion(channels: int, rate: int) -> tuple[str, ...]:
    """What `to_waveform` changes."""
    mono = (f"{channels} channels to mono",) if channels > 1 else ()
    return (*mono, f"{rate} Hz to {SAMPLE_RATE} Hz") if rate != SAMPLE_RATE else mono


def read_frames(file: BinaryIO, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, int]:
    """Frames `start` to `stop` of an encoded file (None: to its end) -> ((S, channels) float32, their rate).

    The same bits as that slice of the whole. What libsndfile can read from any frame on is read there (`PLAIN`);
    everything else is decoded from its beginning, a block at a time, because decoders of lossy codecs give other values
    behind a seek, and some the wrong place.
    """
    import soundfile

    size, container = _look_at(file)
    if container is not None:
        return read_container(file, container, size, start, stop)
    try:
        with _open_sound(file) as (sound, frames):
            return _read_sound(sound, frames, size, start, stop), sound.samplerate
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None


def cut_recording(file: BinaryIO, start: int, length: int) -> bytes:
    """`length` frames of an encoded recording from frame `start` on, at its own rate, as a WAV file of the float32
    values that decoding the whole gives; `ValueError` where it ends before."""
    import soundfile

    values, rate = read_frames(file, start, start + length)
    if len(values) != length:
        raise ValueError(f"expected {length} frames from frame {start} on, got {len(values)}")
    wav = io.BytesIO()
    soundfile.write(wav, values, rate, format="WAV", subtype="FLOAT")
    return wav.getvalue()


def _look_at(file: BinaryIO) -> tuple[int, str | None]:
    """Bytes of a file, which is then at its beginning, and what `find_container` says."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    container = find_container(file.read(16))
    file.seek(0)
    return size, container


def find_container(data: bytes) -> str | None:
    """FFmpeg's name of the format of a recording that libsndfile does not read, by its first bytes."""
    for place, expected, mask, name in _CONTAINERS:
        start = data[place : place + len(mask)]
        if len(start) == len(mask) and bytes(a & b for a, b in zip(start, mask, strict=True)) == expected:
            return name
    return None


def read_container(
    file: BinaryIO, container: str, size: int, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, int]:
    """Frames `start` to `stop` (S, channels) float32 of the first audio stream, and their rate; `size` in encoded
    bytes."""
    try:
        import av
    except ImportError:
        raise ValueError(f"no decoder for {container!r} is installed: {AV_HINT}") from None
    blocks: list[np.ndarray] = []
    frames, form = 0, (0, 0)
    try:
        with av.open(file, format=container) as opened:
            if not opened.streams.audio:
                raise ValueError("no sound in it")
            stream = opened.streams.audio[0]
            for frame in opened.decode(stream):
                form = form if frames else (frame.sample_rate, len(frame.layout.channels))
                if form != (frame.sample_rate, len(frame.layout.channels)):
                    raise ValueError("rate or channels change within it")
                skipped, frames = max(start - frames, 0), frames + frame.samples
                _check_header(frames, *form, size)
                if frames > start:
                    blocks.append(_frame_values(frame)[skipped:])
                if stop is not None and frames >= stop:
                    return np.concatenate(blocks)[: stop - start], form[0]
            seconds = 0.0
            if stream.duration and container == "mov":
                seconds = float(stream.duration * stream.time_base)
            elif container in ("matroska", "asf") and not opened.streams.video:  # elsewhere it is a guess
                seconds = (opened.duration or 0) / 1e6
    except av.FFmpegError as error:
        raise ValueError(str(error.strerror or error)) from None
    if not blocks:
        raise ValueError("no samples")
    if frames / form[0] < seconds - _CUT_SECONDS:
        raise ValueError(f"cut off: {frames / form[0]:.2f} of {seconds:.2f} s")
    return np.concatenate(blocks), form[0]


def _frame_values(frame: Any) -> np.ndarray:
    """(samples, channels) float32 of a frame of PyAV; whole numbers become -1 to 1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if values.dtype.kind == "f":
        return np.asarray(values, dtype=np.float32)
    half = 2.0 ** (8 * values.dtype.itemsize - 1)
    return ((values - half if values.dtype.kind == "u" else values) / half).astype(np.float32)


def _explain(error: Exception) -> str:
    text = str(error)
    return text.split(">: ", 1)[-1] if ">: " in text else text


@contextlib.contextmanager
def _open_sound(file: BinaryIO) -> Iterator[tuple[Any, int | None]]:
    """A recording for libsndfile, and its number of frames; None: only its end tells."""
    import soundfile

    with soundfile.SoundFile(file) as sound:
        if not sound.subtype.startswith("MPEG_LAYER_"):
            yield sound, sound.frames if sound.frames < OPEN else None
            return
        kind, layer = sound.format, sound.subtype
    file.seek(0)
    data = file.read()
    if kind == "WAV":  # nothing but MPEG frames in its data chunk, behind no header of their number
        data = next((data[start : start + n] for name, start, n in _chunks(data) if name == b"data"), data)
    tagged = tag_mpeg(data) if layer == "MPEG_LAYER_III" else None
    with soundfile.SoundFile(io.BytesIO(tagged or data)) as sound:
        known = tagged is None and layer == "MPEG_LAYER_III"
        yield sound, sound.frames if known else None


def tag_mpeg(data: bytes) -> bytes | None:
    """MP3 that does not say how many frames it has, with a header that promises more than it can have; None: it says.

    libsndfile stops reading at the number of frames, and estimates that by the bit rate of the first ones: of a
    variable rate that begins loudly most would be lost. The header is that of Xing: a frame without sound. Of several
    MP3s in one file the header of the first counts only its own.
    """
    if (found := _MPEG_FRAME.search(data, _pass_titles(data, 0))) is None:
        return None
    place, head = found.start(), found[0]
    first, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    tag = _MPEG_TAG.search(data, place, place + _TAG_BYTES)
    if tag is not None and tag[1][0] & 1 and tag[2].strip(b"\0"):
        behind = _pass_titles(data, place + int.from_bytes(tag[3], "big"))  # bytes that it counts, where it does
        if not tag[1][0] & 2 or not _MPEG_TAG.search(data, behind, behind + _TAG_BYTES):
            return None
    rate = (44_100, 48_000, 32_000)[head[2] >> 2 & 3] >> {3: 0, 2: 1, 0: 2}[head[1] >> 3 & 3]
    size, index = (144 * 128_000 // rate, 9) if first else (72 * 64_000 // rate, 8)
    side = (17 if mono else 32) if first else (9 if mono else 17)
    header = bytes([255, head[1] | 1, index << 4 | head[2] & 0b1100, head[3]])
    most = len(data) // _SHORTEST_MPEG + 1
    return (header + bytes(side) + b"Xing" + struct.pack(">II", 1, most)).ljust(size, b"\0") + data[place:]


def _pass_titles(data: bytes, place: int) -> int:
    """The place behind titles of songs (ID3) that begin at a place."""
    while (kind := data[place : place + 3]) in (b"ID3", b"TAG"):
        size = data[place + 6 : place + 10]  # 7 bits to a byte
        place += 128 if kind == b"TAG" else 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(size))
    return place


def _read_sound(sound: Any, frames: int | None, size: int, start: int, stop: int | None) -> np.ndarray:
    """Frames `start` to `stop` (S, channels) float32 of an open recording of `size` encoded bytes and, None: an open
    number of, frames."""
    _check_header(1 if frames is None else max(frames, 1), sound.samplerate, sound.channels, size)
    place = 0
    if start and frames is not None and sound.subtype in PLAIN:
        place = sound.seek(start)
    # soundfile seeks behind every read: MP3 has other values behind that, FLAC of unknown length and GSM an error.
    sound.seekable = lambda: False
    while place < start and (count := len(sound.read(min(BLOCK, start - place), dtype="float32"))):
        place += count
    if stop is not None or frames is not None:
        expected = max(min(n for n in (stop, frames) if n is not None) - start, 0)
        values: np.ndarray = sound.read(expected, dtype="float32", always_2d=True)
        if stop is None and len(values) < expected:
            raise ValueError(f"cut off: {len(values)} of {expected} frames")
        return values
    blocks = [np.zeros((0, sound.channels), np.float32)]
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
        place += len(block)
        _check_header(place, sound.samplerate, sound.channels, size)
    return np.concatenate(blocks)


def _check_header(frames: int, rate: int, channels: int, size: int) -> None:
    """Refuses, before anything is allocated, what no recording of `size` bytes has."""
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"sample rate {rate} Hz is not within {RATES[0]} to {RATES[1]}")
    allowed = min(MAX_VALUES, max(SURE_VALUES, VALUES_PER_BYTE * size))
    if max(frames * channels, count_resampled(frames, rate)) > allowed:
        raise ValueError(
            f"{frames} frames of {channels} channels at {rate} Hz in {size} bytes, expected at most {allowed} values "
            f"and as many samples at {SAMPLE_RATE} Hz"
        )
    if frames < 1:
        raise ValueError("no samples")


def find_cut(data: bytes) -> str | None:
    """Why an encoded file is cut off, where its decoder would not say so, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        for name, place, size in _chunks(data):
            if name == b"data":
                missing = place + size - len(data)
                return f"cut off: {missing} bytes are missing" if missing > SLACK and size < _UNKNOWN_SIZE else None
        return "cut off: no data chunk"
    for magic, start, stop, order, more in _SIZES:
        if data.startswith(magic):
            size = int.from_bytes(data[start:stop], order) + more
            missing = size - len(data)
            return f"cut off: {missing} bytes are missing" if missing > SLACK and size < _UNKNOWN_SIZE else None
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        if not data[last + 5 : last + 6] or not data[last + 5] & 4:
            return "cut off: no last page"
        if (links := _count_links(data)) > 1:
            return f"{links} Ogg streams one after the other, of which only the first can be read: expected one"
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of the content of each chunk of a WAV file, as far as it goes."""
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        yield name, place + 8, size
        place += 8 + size + size % 2


def _count_links(data: bytes) -> int:
    """Ogg streams that follow one another (RFC 3533, "chaining"); libsndfile reads the first and says nothing of the
    others. Streams that begin together count once."""
    links, beginning, place = 0, False, 0
    while data[place : place + 4] == b"OggS" and place + 27 <= len(data):
        first = bool(data[place + 5] & 2)
        links += first and not beginning
        beginning = first
        segments = data[place + 26]
        place += 27 + segments + sum(data[place + 27 : place + 27 + segments])
    return links


def resample(values: np.ndarray, rate: int) -> np.ndarray:
    """Waveform (S,) at `rate` Hz -> float32 waveform at 16 kHz, ceil(S * 16000 / rate) samples."""
    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(values, dtype=np.float32)
    from scipy.signal import resample_poly

    factor = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // factor, rate // factor
    # To design the low-pass takes longer than to apply it to a short utterance.
    window = design_low_pass(up, down) if max(up, down) <= KEPT_RATIO else ("kaiser", KAISER_BETA)
    return np.asarray(resample_poly(values, up, down, window=window), dtype=np.float32)


@lru_cache(maxsize=512)
def design_low_pass(up: int, down: int) -> np.ndarray:
    """Coefficients, float32, of the filter that `scipy.signal.resample_poly` designs for a ratio."""
    from scipy.signal import firwin

    largest = max(up, down)
    taps = firwin(2 * REACH * largest + 1, 1.0 / largest, window=("kaiser", KAISER_BETA)).astype(np.float32)
    taps.setflags(write=False)
    return np.asarray(taps)


def count_resampled(frames: int, rate: int) -> int:
    """Samples of `frames` frames after resampling."""
    return -(-frames * SAMPLE_RATE // rate)


def find_level(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of an utterance; the deviation is that of a signal with 1e-5 more variance, as published.
    In float64."""
    pieces = [values[p : p + PIECE] for p in range(0, len(values), PIECE)]
    mean = math.fsum(piece.astype(np.float64).sum() for piece in pieces) / max(len(values), 1)
    squares = math.fsum(np.square(piece - np.float64(mean)).sum() for piece in pieces)
    return mean, math.sqrt(squares / max(len(values), 1) + _NORM_EPS)


def normalise_waveform(values: np.ndarray, level: tuple[float, float] | None = None) -> np.ndarray:
    """Zero mean and unit variance over the whole utterance, as published; silence stays 0. `level`: of the whole that
    the values (S,) are a part of."""
    mean, deviation = find_level(values) if level is None else level
    result = np.empty(len(values), dtype=np.float32)
    for start in range(0, len(values), PIECE):  # in float64
        result[start : start + PIECE] = (values[start : start + PIECE] - np.float64(mean)) / deviation
    return result


def read_header(file: BinaryIO) -> int | None:
    """Samples at 16 kHz by the header of a recording, where that is certain: see `PLAIN`; None elsewhere. `ValueError`
    for what is no recording."""
    import soundfile

    size, container = _look_at(file)
    if container is not None:
        return None
    try:
        with soundfile.SoundFile(file) as header:
            frames, rate, channels = header.frames, header.samplerate, header.channels
            if frames >= OPEN or header.subtype not in PLAIN:
                return None
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None
    _check_header(frames, rate, channels, size)
    return count_resampled(frames, rate)
