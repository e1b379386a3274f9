"""Tiny speech-like sounds and texts made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile


def make_sound(seed: int, seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """float32 (S,) or (S,channels): a word of a few syllables, each a vowel-like sum of harmonics, and some noise."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * rate)
    time = np.arange(samples) / rate
    values = 0.02 * rng.standard_normal(samples)
    pitch = rng.uniform(90, 220)
    edges = np.sort(rng.uniform(0, seconds, 2 * max(2, round(4 * seconds))))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        formants = rng.uniform(300, 900), rng.uniform(1000, 2600)
        envelope = np.clip(np.minimum(time - start, end - time) / 0.03, 0.0, 1.0)
        for harmonic in range(1, 16):
            near = sum(np.exp(-(((harmonic * pitch - f) / 150) ** 2)) for f in formants)
            values += envelope * near * np.sin(2 * np.pi * harmonic * pitch * time)
    mono = (0.2 * values / max(1.0, np.abs(values).max())).astype(np.float32)
    return mono if channels == 1 else np.stack([mono * (1.0 - 0.1 * c) for c in range(channels)], axis=1)


def encode_sound(values: np.ndarray, rate: int = 16_000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, values, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def encode_by_av(
    values: np.ndarray, rate: int, form: str, codec: str, sample_format: str, *, quality: float | None = None,
    options: dict[str, str] | None = None,
) -> bytes:  # fmt: skip
    """float32 (S,C) as FFmpeg's `form` encodes it; `quality`: of a variable bit rate. Skips where PyAV lacks it."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    file, layout = io.BytesIO(), {1: "mono", 2: "stereo"}[values.shape[1]]
    with av.open(file, "w", format=form, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, format=sample_format, bit_rate=64_000)
        if quality is not None:
            stream.codec_context.qscale, stream.codec_context.global_quality = True, round(118 * quality)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(values.T), format="fltp", layout=layout)
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        for part in av.AudioResampler(sample_format, layout, rate).resample(frame):
            fifo.write(part)
        while (part := fifo.read(stream.codec_context.frame_size or 1024, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


def open_length(data: bytes) -> bytes:
    """A FLAC file whose header leaves its number of samples open, as an encoder writes it into a pipe."""
    number = int.from_bytes(data[18:26], "big") >> 36 << 36
    return data[:18] + number.to_bytes(8, "big") + data[26:]


def write_sounds(root: Path, count: int = 12, shortest: float = 0.3, longest: float = 0.9) -> Path:
    """Three classes of sounds of different lengths, formats and rates."""
    for i in range(count):
        folder = root / ("ant", "bee", "cat")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        kind, rate = (("WAV", 16_000), ("FLAC", 8_000), ("OGG", 16_000), ("WAV", 44_100))[i % 4]
        seconds = shortest + (longest - shortest) * (i * 7 % count) / count
        data = encode_sound(make_sound(i, seconds, rate), rate, kind)
        (folder / f"{i:02d}.{kind.lower()}").write_bytes(data)
    return root


def write_text(path: Path, documents: int = 40, seed: int = 0) -> Path:
    """Documents of words with a little grammar, between blank lines."""
    rng = np.random.default_rng(seed)
    words = [f"{a}{b}{c}" for a in "kmnst" for b in ("a", "o", "ee") for c in ("n", "r", "lis", "to")]
    lines = []
    for _ in range(documents):
        sentences = [" ".join(rng.choice(words, rng.integers(3, 9))) + "." for _ in range(rng.integers(1, 6))]
        lines.append("\n".join(sentences))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path
