"""Signals of N channels over time, such as ECG, EEG and sensors: `.npy`, `.csv`, `.wav`, EDF.

Everything but decoding and normalisation is that of speech: stem, positions, masks, crops, padding, pieces. An array is
(time, channels) where its last axis has `stem.channels` entries, else (channels, time) where its first one has.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from fractions import Fraction
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.dataset import Batch
from d2v.data.decoding.sound import read_whole
from d2v.data.index import FileSource
from d2v.data.sources import Kind, Rejected, Source, check_size, decode_text, describe_error
from d2v.data.speech import Speech
from d2v.model.stems.speech import WaveformStem

_EDF, _HINT = (".edf", ".bdf"), "pip install pyedflib reads them"
_HAS_EDF = importlib.util.find_spec("pyedflib") is not None
SIGNALS = Kind(
    "signals", frozenset([".npy", ".csv", ".wav", *(_EDF if _HAS_EDF else ())]),
    "a folder of .npy, .csv, .wav or EDF files, a .tsv list or shards", lists=True, beside=frozenset({".tsv"}),
    readers=dict.fromkeys(_EDF, _HINT),
)  # fmt: skip
WINDOW = 64
"""Samples of a spectrum of the baseline."""


def decode_signal(data: bytes) -> tuple[np.ndarray, float | None]:
    """Encoded bytes -> (values (a,b), floating, Hz or None where the format does not say it); `ValueError` otherwise.

    The first bytes tell the format. CSV: a row a sample, columns separated by comma, semicolon or tab; a first line
    that is not of numbers names them.
    """
    rate: float | None = None
    if data.startswith(b"\x93NUMPY"):
        values = np.load(io.BytesIO(data), allow_pickle=False)
    elif data[:4] in (b"RIFF", b"RIFX", b"RF64"):
        values, rate = read_whole(data)
    elif data[:8] in (b"0       ", b"\xffBIOSEMI"):
        values, rate = _read_edf(data)
    else:
        values = _read_csv(decode_text(data))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise ValueError(f"expected real numbers (time, channels), got {values.dtype} of shape {values.shape}")
    if not (finite := np.isfinite(values)).all():
        row, column = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"expected finite values, got {values[row, column]} in row {row}, column {column}")
    return values.astype(np.float64, copy=False), rate


def _read_csv(text: str) -> np.ndarray:
    lines = text.splitlines()
    first = lines[0] if lines else ""
    mark = next((mark for mark in ";\t," if mark in first), ",")
    try:
        named = not [float(cell) for cell in first.split(mark)]
    except ValueError:
        named = True
    if len(lines) <= named:
        raise ValueError("expected rows of numbers, found none")
    return np.loadtxt(lines, delimiter=mark, skiprows=int(named), ndmin=2, comments=None)


def _read_edf(data: bytes) -> tuple[np.ndarray, float]:
    if not _HAS_EDF:
        raise ValueError(f"EDF: {_HINT}")
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
    data = file.read()
    check_size(len(data), "file")
    values, rate = decode_signal(data)
    return *values.shape, rate


def make_stem(config: Config) -> WaveformStem:
    """Convolutions of all channels together."""
    return WaveformStem(config.stem, config.encoder.width, config.stem.channels)


class Signals(Speech):
    """Recordings (S,N) float32 at stem.sample_rate, each channel with zero mean and unit variance over the whole."""

    name, noun, words = "signals", "recordings", ("waveform", "channels")
    baselines = ("power_spectrum",)
    make_stem = staticmethod(make_stem)

    def __init__(self, config: Config) -> None:
        self.rate = config.stem.sample_rate
        super().__init__(config)

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder, with class folders where labelled, a `.tsv` list, or .tar shards; all are decoded once for their
        lengths. Those of other channels count as damaged."""
        source = self.open_encoded(path, SIGNALS, labelled, option, measure=measure_signal)
        lengths = source.read_lengths(measure_signal) if isinstance(source, FileSource) else source.lengths
        assert lengths is not None
        for index, (rows, columns, rate) in source.measured.items():
            try:
                lengths[index] = self._count_samples(columns if self._is_turned(rows, columns) else rows, rate)
            except ValueError as error:
                lengths[index] = -1
                source.rejected.append(Rejected(source.describe(index), describe_error(error)))
        source.lengths = lengths
        return self.leave_out_short(source, option)

    def _is_turned(self, rows: int, columns: int) -> bool:
        """Whether channels come first."""
        channels = self.config.stem.channels
        if channels not in (rows, columns):
            raise ValueError(f"expected stem.channels {channels} in one axis, got an array ({rows}, {columns})")
        return columns != channels

    def _ratio(self, rate: float | None) -> Fraction:
        return Fraction(1) if rate is None else Fraction(self.rate) / Fraction(rate).limit_denominator(1000)

    def _count_samples(self, samples: int, rate: float | None) -> int:
        return -int(-samples * self._ratio(rate) // 1)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """A normalised signal (S,N), resampled where its file has another rate; a channel without change becomes 0."""
        values, rate = decode_signal(source.read(index))
        values = values.T if self._is_turned(*values.shape) else values
        ratio, converted = self._ratio(rate), tuple[str, ...]()
        if ratio != 1:
            from scipy.signal import resample_poly

            values = resample_poly(values, ratio.numerator, ratio.denominator, axis=0)
            converted = (f"{rate:g} Hz to {self.rate} Hz",)
        if len(values) < self.shortest:
            raise ValueError(f"{len(values) / self.rate:.3f} s, expected at least {self.shortest / self.rate:g}")
        centred = values - values.mean(axis=0)
        deviation = np.sqrt(np.square(centred).mean(axis=0))
        still = deviation <= np.abs(values).max(axis=0) * 1e-9  # rounding
        return np.where(still, 0.0, centred / np.where(still, 1.0, deviation)).astype(np.float32), converted

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """power_spectrum: log power of each channel in the frequencies of pieces of WINDOW samples, averaged."""
        size = min(WINDOW, self.shortest)
        lengths = batch.lengths.tolist() if batch.lengths is not None else [batch.inputs.shape[1]] * len(batch)
        rows = []
        for signal, length in zip(batch.inputs, lengths, strict=True):
            pieces = signal[:length].unfold(0, size, size) * torch.hann_window(size)
            rows.append((torch.fft.rfft(pieces).abs().square().mean(dim=0) + 1e-3).log().flatten())
        return torch.stack(rows)
