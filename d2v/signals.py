"""Signals of N channels over time, such as ECG, EEG and sensors: `.npy`, `.csv`, `.wav`, EDF.

Everything but decoding and normalisation is that of speech: stem, positions, masks, crops, padding, pieces. An array is
(time, channels) where its last axis has `stem.channels` entries, else (channels, time) where its first one has.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.decoding.sound import find_cut
from d2v.data.index import FileSource
from d2v.data.sources import MAX_ENCODED_BYTES, Kind, Rejected, Source, decode_text, describe_error
from d2v.data.speech import Speech
from d2v.model.stems.speech import WaveformStem

_EDF = (".edf", ".bdf") if importlib.util.find_spec("pyedflib") else ()
SIGNALS = Kind(
    "signals", frozenset([".npy", ".csv", ".wav", *_EDF]),
    "a folder of .npy, .csv, .wav or EDF files, a .tsv list or shards", lists=True,
    readers=dict.fromkeys((".edf", ".bdf"), "pip install pyedflib reads them"),
)  # fmt: skip
LARGEST = 1e100
"""Values beyond this count as infinite: their squares have no sum."""


def decode_signal(data: bytes) -> tuple[np.ndarray, float | None]:
    """Encoded bytes -> (values (a,b), floating, Hz or None where the format does not say it); `ValueError` otherwise.

    The first bytes tell the format. CSV: a row a sample, columns separated by comma, semicolon or tab; a first line
    that does not begin with a number names them.
    """
    rate: float | None = None
    if data.startswith(b"\x93NUMPY"):
        values = np.load(io.BytesIO(data), allow_pickle=False)
    elif data[:4] in (b"RIFF", b"RIFX", b"RF64"):
        import soundfile

        if reason := find_cut(data):
            raise ValueError(reason)
        values, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    elif data[:8] in (b"0       ", b"\xffBIOSEMI"):
        values, rate = _read_edf(data)
    else:
        values = _read_csv(decode_text(data))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise ValueError(f"expected real numbers (time, channels), got {values.dtype} of shape {values.shape}")
    values = values.astype(np.float64, copy=False)
    if not (finite := np.abs(values) <= LARGEST).all():  # NaN is not, either
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"expected finite values, got {values[row, column]} in row {row}, column {column}")
    return values, rate


def _read_csv(text: str) -> np.ndarray:
    lines = text.splitlines()
    mark = next((mark for mark in ";\t" if mark in text), ",")
    if lines and not re.match(r"\s*([-+.\d]|nan|inf)", lines[0], re.IGNORECASE):
        del lines[0]
    return np.loadtxt(lines, delimiter=mark, ndmin=2, comments=None) if lines else np.empty((0, 0))


def _read_edf(data: bytes) -> tuple[np.ndarray, float]:
    import pyedflib

    with tempfile.NamedTemporaryFile(suffix=".edf") as file:  # the library reads files by name only
        file.write(data)
        file.flush()
        with pyedflib.EdfReader(file.name) as edf:
            rates = {float(rate) for rate in edf.getSampleFrequencies()}
            if len(rates) != 1:
                raise ValueError(f"EDF: expected channels of one sample rate, got {sorted(rates)} Hz")
            return np.stack([edf.readSignal(i) for i in range(edf.signals_in_file)], axis=1), rates.pop()


def measure_signal(file: BinaryIO) -> tuple[int, int, float | None]:
    """Shape and rate of an encoded signal: what does not depend on settings."""
    values, rate = decode_signal(file.read(MAX_ENCODED_BYTES + 1))
    return *values.shape, rate


class Signals(Speech):
    """Recordings (S,N) float32 at stem.sample_rate, each channel with zero mean and unit variance over the whole."""

    name, noun, words = "signals", "recordings", frozenset({"waveform", "channels"})
    baselines = ("power_spectrum",)

    @staticmethod
    def make_stem(config: Config) -> WaveformStem:
        """Convolutions of all channels together."""
        over_padding = "statistics-over-padding" in config.published
        return WaveformStem(config.stem, config.encoder.width, config.stem.channels, over_padding)

    def __init__(self, config: Config) -> None:
        self.rate = config.stem.sample_rate
        super().__init__(config)

    def open(self, path: str | Sequence[str], *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder, with class folders where labelled, a `.tsv` list, or .tar shards; all are decoded once for their
        lengths. Those of other channels count as damaged."""
        source = self.open_encoded(path, SIGNALS, labelled, option, measure=measure_signal)
        lengths = source.read_lengths(measure_signal) if isinstance(source, FileSource) else source.lengths
        assert lengths is not None
        for index, (*shape, rate) in source.measured.items():
            try:
                turned, ratio = self._find_layout(shape, rate)
                lengths[index] = math.ceil(shape[turned] * ratio)
            except ValueError as error:
                lengths[index] = -1
                source.rejected.append(Rejected(source.describe(index), describe_error(error)))
        source.lengths = lengths
        return self.leave_out_short(source, option)

    def _find_layout(self, shape: Sequence[int], rate: float | None) -> tuple[bool, Fraction]:
        """Whether channels come first, and what the number of samples is multiplied by."""
        channels, asked = self.config.stem.channels, Fraction(self.rate)
        if channels not in shape:
            raise ValueError(f"expected stem.channels {channels} in one axis, got an array {tuple(shape)}")
        return shape[1] != channels, asked / Fraction(rate or asked).limit_denominator(1000)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """A normalised signal (S,N), resampled where its file has another rate; a channel without change becomes 0."""
        values, rate = decode_signal(source.read(index))
        turned, ratio = self._find_layout(values.shape, rate)
        values, converted = values.T if turned else values, tuple[str, ...]()
        if ratio != 1:
            from scipy.signal import resample_poly

            values = resample_poly(values, ratio.numerator, ratio.denominator, axis=0)
            converted = (f"{rate:g} Hz to {self.rate} Hz",)
        if len(values) < self.shortest:
            raise ValueError(f"{len(values) / self.rate:.3f} s, expected at least {self.shortest / self.rate:g}")
        deviation = values.std(axis=0)
        deviation[deviation <= np.abs(values).max(axis=0) * 1e-9] = np.inf  # rounding
        return ((values - values.mean(axis=0)) / deviation).astype(np.float32), converted

    def sum_up(self, waveform: Tensor) -> Tensor:
        """power_spectrum: log power of each channel in the frequencies of pieces of 64 samples, averaged."""
        size = min(64, self.shortest)
        pieces = waveform.unfold(0, size, size) * torch.hann_window(size)
        return (torch.fft.rfft(pieces).abs().square().mean(dim=0) + 1e-3).log().flatten()
