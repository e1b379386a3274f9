"""Recordings: decoding, the checks of what a file claims, resampling to 16 kHz, normalisation.

libsndfile (soundfile) decodes; what it does not know, PyAV where it is installed. Resampling is polyphase filtering
(`scipy.signal.resample_poly`: a Kaiser-windowed low-pass, zero phase).
"""

from __future__ import annotations

import io
import math
import os
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
PIECE = 1 << 22
"""Samples that are normalised at a time, 4 minutes: 34 MB in float64."""
BLOCK = 1 << 16
"""Frames that are decoded at a time where the header leaves their number open."""
OPEN = 1 << 62
"""libsndfile's number of frames, or more, where a header leaves it open."""
SLACK = 16
"""Bytes that a WAV header may promise too many: some writers do."""
KAISER_BETA = 5.0
"""Of the window of the resampling's low-pass."""
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
_CUT_SECONDS = 0.25
"""What a recording may lack of the duration that its container says: codecs begin and end with parts of frames."""
_UNKNOWN_SIZE = 0x7FFF_0000
"""WAV files that were written to a pipe have such a size, or more, in their header."""


def decode_audio(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encoded bytes -> (float32 mono waveform at 16 kHz, what was converted).

    Channels are averaged. Raises `ValueError` with the reason for what cannot be decoded: not audio, cut off, no
    samples, samples that are not finite.
    """
    values, rate = _decode(data)
    _check_header(len(values), rate, values.shape[1], len(data))
    if not all(np.isfinite(values[start : start + PIECE]).all() for start in range(0, len(values), PIECE)):
        raise ValueError("samples that are not finite")
    converted = []
    if values.shape[1] > 1:
        converted.append(f"{values.shape[1]} channels to mono")
    if rate != SAMPLE_RATE:
        converted.append(f"{rate} Hz to {SAMPLE_RATE} Hz")
    mono = values[:, 0] if values.shape[1] == 1 else values.mean(axis=1)
    return resample(mono, rate), tuple(converted)


def _decode(data: bytes) -> tuple[np.ndarray, int]:
    """Encoded bytes -> (all frames (S, channels) float32, their rate)."""
    import soundfile

    if (container := find_container(data)) is not None:
        return read_container(io.BytesIO(data), container, len(data))
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            expected, rate = file.frames, file.samplerate
            values = read_frames(file, len(data))
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None
    if reason := find_cut(data) or (len(values) < expected < OPEN and f"cut off: {len(values)} of {expected} frames"):
        raise ValueError(reason)
    return values, rate


def find_container(data: bytes) -> str | None:
    """FFmpeg's name of the format of a recording that libsndfile does not read, by its first bytes."""
    for place, expected, mask, name in _CONTAINERS:
        start = data[place : place + len(mask)]
        if len(start) == len(mask) and bytes(a & b for a, b in zip(start, mask, strict=True)) == expected:
            return name
    return None


def read_container(file: BinaryIO, container: str, size: int) -> tuple[np.ndarray, int]:
    """All frames (S, channels) float32 of the first audio stream, and their rate; `size` in encoded bytes."""
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
                frames += frame.samples
                _check_header(frames, *form, size)
                blocks.append(_frame_values(frame))
            seconds = 0.0
            if stream.duration and container == "mov":
                seconds = float(stream.duration * stream.time_base)
            elif container in ("matroska", "asf") and not opened.streams.video:  # elsewhere it is a guess
                seconds = (opened.duration or 0) / 1e6
    except av.FFmpegError as error:
        raise ValueError(str(error.strerror or error)) from None
    if not frames:
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


def read_frames(file: Any, size: int) -> np.ndarray:
    """All frames (S, channels) float32 of an open recording of `size` encoded bytes.

    Where the header leaves the number of frames open (FLAC from a pipe), or the codec cannot be positioned (GSM), they
    are read in blocks to their end.
    """
    import soundfile

    known = file.frames < OPEN
    _check_header(max(file.frames, 1) if known else 1, file.samplerate, file.channels, size)
    if known and file.seekable():
        return np.asarray(file.read(dtype="float32", always_2d=True))
    blocks, frames = [np.zeros((0, file.channels), np.float32)], 0
    while True:
        block = np.full((BLOCK, file.channels), np.nan, dtype=np.float32)
        try:
            count = len(file.read(out=block))
        except soundfile.SoundFileError:
            # libsndfile calls the end that no header gave an error; what it had decoded is in the block.
            count = int(np.isfinite(block).all(axis=1).cumprod().sum())
            if known or not frames + count:
                raise
        blocks.append(block[:count])
        frames += count
        if count < BLOCK:
            return np.concatenate(blocks)
        _check_header(frames, file.samplerate, file.channels, size)


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
        place = 12
        while place + 8 <= len(data):
            name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
            if name == b"data":
                missing = place + 8 + size - len(data)
                return f"cut off: {missing} bytes are missing" if missing > SLACK and size < _UNKNOWN_SIZE else None
            place += 8 + size + size % 2
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
    taps = firwin(2 * 10 * largest + 1, 1.0 / largest, window=("kaiser", KAISER_BETA)).astype(np.float32)
    taps.setflags(write=False)
    return np.asarray(taps)


def count_resampled(frames: int, rate: int) -> int:
    """Samples of `frames` frames after resampling."""
    return -(-frames * SAMPLE_RATE // rate)


def normalise_waveform(values: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the whole utterance, as published; silence stays 0.

    In float64, a piece of a long recording at a time.
    """
    mean = values.mean(dtype=np.float64)
    pieces = [slice(start, start + PIECE) for start in range(0, len(values), PIECE)]
    squares = sum(float(np.square(values[piece] - mean).sum()) for piece in pieces)
    deviation = math.sqrt(squares / max(len(values), 1) + _NORM_EPS)
    result = np.empty(len(values), dtype=np.float32)
    for piece in pieces:
        result[piece] = (values[piece] - mean) / deviation
    return result


def read_header(file: BinaryIO) -> int:
    """Samples at 16 kHz by the header of a recording; `ValueError` where it has none."""
    import soundfile

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(16)
    file.seek(0)
    if (container := find_container(start)) is not None:  # none of them says it to the sample
        values, rate = read_container(file, container, size)
        return count_resampled(len(values), rate)
    try:
        with soundfile.SoundFile(file) as header:
            frames, rate, channels = header.frames, header.samplerate, header.channels
            if frames >= OPEN:
                frames = len(read_frames(header, size))
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None
    _check_header(frames, rate, channels, size)
    return count_resampled(frames, rate)
