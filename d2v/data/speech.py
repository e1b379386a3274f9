"""Speech: decoding, resampling to 16 kHz, normalisation, random speed, random crops or padding.

Resampling is polyphase filtering (`scipy.signal.resample_poly`: a Kaiser-windowed low-pass, zero phase).
"""

from __future__ import annotations

import io
import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.dataset import STREAM_CROP, STREAM_SPEED, Batch, Modality, Sample, random_stream
from d2v.data.index import FileSource, is_command
from d2v.data.sources import Kind, Source, Subset, for_example
from d2v.model.stems import LogMelStem
from d2v.model.stems.speech import SAMPLE_RATE


def _audio_suffixes() -> frozenset[str]:
    """Endings of what the installed soundfile decodes."""
    names = {
        "AIFF": ".aif .aiff .aifc", "AU": ".au .snd", "CAF": ".caf", "MP3": ".mp3 .mp2 .mpga", "NIST": ".sph .nist",
        "OGG": ".oga .opus", "RF64": ".rf64", "VOC": ".voc", "W64": ".w64",
    }  # fmt: skip
    try:
        import soundfile

        formats = soundfile.available_formats()
    except (ImportError, OSError):  # no library: said where it is needed
        formats = {}
    return frozenset([".wav", ".flac", ".ogg", *" ".join(v for k, v in names.items() if k in formats).split()])


SPEECH = Kind(
    "audio files", _audio_suffixes(), "a folder of audio files, a .tsv manifest or shards", lists=True,
    beside=frozenset({".txt", ".tsv", ".ltr", ".wrd"}),
)  # fmt: skip
RATES = (1_000, 768_000)
"""Sample rates that speech can have; others count as damaged headers."""
MAX_VALUES = 1 << 28
"""Frames times channels of the longest recording, and its samples at 16 kHz: 4.6 hours."""
SURE_VALUES, VALUES_PER_BYTE = 1 << 25, 64
"""So many values (35 minutes at 16 kHz) any file may have; more only at so many to a byte: speech never needs fewer
bytes, but a file made to fill the memory does."""
BLOCK = 1 << 16
"""Frames that are decoded at a time where the header leaves their number open."""
OPEN = 1 << 62
"""libsndfile's number of frames, or more, where a header leaves it open."""
MIN_TOKENS = 4
"""Shortest utterance in tokens of the stem, whatever data.min_seconds says: less cannot be masked."""
PROBES = 8
"""Files whose headers are compared with what a manifest says."""
SLACK = 16
"""Bytes that a WAV header may promise too many: some writers do."""
KAISER_BETA = 5.0
"""Of the window of the resampling's low-pass."""
KEPT_RATIO = 1_000
"""Largest term of a resampling ratio whose low-pass is kept: 80 kB of coefficients."""
NORMAL = 100
"""Percent: the speed of an utterance that is played as it was recorded."""
_NORM_EPS = 1e-5
_SIZES: tuple[tuple[bytes, int, int, Literal["big", "little"], int], ...] = (
    (b"FORM", 4, 8, "big", 8), (b".snd", 8, 12, "big", 24), (b"RF64", 20, 28, "little", 8),
    (b"riff\x2e\x91\xcf\x11", 16, 24, "little", 0),
)  # fmt: skip
"""Where AIFF, AU, RF64 and W64 say how long they are, and what that leaves out."""
_UNKNOWN_SIZE = 0x7FFF_0000
"""WAV files that were written to a pipe have such a size, or more, in their header."""


def decode_audio(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encoded bytes -> (float32 mono waveform at 16 kHz, what was converted).

    Channels are averaged. Raises `ValueError` with the reason for what cannot be decoded: not audio, cut off, no
    samples, samples that are not finite.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            expected, rate = file.frames, file.samplerate
            values = read_frames(file, len(data))
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None
    if reason := find_cut(data) or (len(values) < expected < OPEN and f"cut off: {len(values)} of {expected} frames"):
        raise ValueError(reason)
    _check_header(len(values), rate, values.shape[1], len(data))
    if not np.isfinite(values).all():
        raise ValueError("samples that are not finite")
    converted = []
    if values.shape[1] > 1:
        converted.append(f"{values.shape[1]} channels to mono")
    if rate != SAMPLE_RATE:
        converted.append(f"{rate} Hz to {SAMPLE_RATE} Hz")
    return resample(values.mean(axis=1), rate), tuple(converted)


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
    """Why an encoded file is not read to its end, where its decoder would not say so, or None."""
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
    """Zero mean and unit variance over the whole utterance, as published; silence stays 0."""
    centred = values - values.mean(dtype=np.float64)
    deviation = math.sqrt(float(np.mean(np.square(centred, dtype=np.float64))) + _NORM_EPS)
    return (centred / deviation).astype(np.float32)


@dataclass(frozen=True)
class RandomSpeed:
    """Random speed of utterances, by which pitch and length change together (Ko et al. 2015, "Audio augmentation for
    speech recognition"): e^u with u uniform in [-spread, spread], a function of (seed, epoch, sample id) only.

    A speed is a whole number of percent, so that playing at it is resampling by a ratio of small numbers, and so that
    the length of what is played is known before anything is decoded. No utterance is played so slowly that it would
    have to be cropped where it was not before, or so fast that it would be too short: transcripts stay those of the
    whole, and masks find their tokens.
    """

    seed: int
    spread: float
    """s of data.speed, above 0."""
    shortest: int
    """Samples of the shortest utterance."""
    longest: int
    """Samples of the longest crop."""

    @property
    def slowest(self) -> int:
        """Percent."""
        return int(np.rint(NORMAL * np.exp(-self.spread)))

    @property
    def fastest(self) -> int:
        """Percent."""
        return int(np.rint(NORMAL * np.exp(self.spread)))

    def draw(self, epoch: int, first: int, count: int) -> np.ndarray:
        """(count,) int64: percents of the samples `first` to `first + count - 1` in an epoch.

        Sample i has block i of one stream per epoch: those of a whole epoch cost little, and any of them alone, too.
        """
        rng = random_stream(self.seed, epoch, 0, STREAM_SPEED)
        assert isinstance(rng.bit_generator, np.random.Philox)
        rng.bit_generator.advance(first)
        place = rng.random(4 * count)[::4]  # Philox makes four numbers at a time, of which one is used
        return np.rint(NORMAL * np.exp(self.spread * (2.0 * place - 1.0))).astype(np.int64)

    def percents(self, lengths: np.ndarray, epoch: int, first: int = 0) -> np.ndarray:
        """(n,) int64: speeds of the samples from `first` on, whose lengths (n,) in samples are these."""
        fast = np.maximum(lengths * NORMAL // self.shortest, NORMAL)
        slow = np.where(lengths <= self.longest, -(-lengths * NORMAL // self.longest), 1)
        return np.clip(self.draw(epoch, first, len(lengths)), slow, fast)

    def lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """(n,) int64: samples of the first n utterances as they are played in an epoch, of the lengths (n,) that they
        were recorded with."""
        return -(-lengths * NORMAL // self.percents(lengths, epoch))

    def longest_of(self, length: int) -> int:
        """Most samples that an utterance of at most `length` gives a batch."""
        return min(-(-length * NORMAL // self.slowest), self.longest)

    @property
    def recorded(self) -> int:
        """Samples from which on an utterance fills the longest crop at any speed."""
        return -(-self.longest * self.fastest // NORMAL)


class Speech(Modality):
    """Utterances as float32 waveforms at 16 kHz, each normalised as a whole."""

    noun = "utterances"
    baselines = ("log_mel",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        data = config.data
        if not 0.0 <= data.min_seconds < data.max_seconds:
            raise ValueError(
                f"data.min_seconds: expected 0 or more and less than data.max_seconds {data.max_seconds}, "
                f"got {data.min_seconds}"
            )
        self.longest = round(data.max_seconds * SAMPLE_RATE)
        self.shortest = max(round(data.min_seconds * SAMPLE_RATE), self._samples_of(MIN_TOKENS))
        if self.longest < self.shortest:
            needed = self.shortest / SAMPLE_RATE
            raise ValueError(
                f"data.max_seconds: expected at least {needed:g}, {MIN_TOKENS} tokens, got {data.max_seconds}"
            )
        given = (config.run.seed, data.speed, self.shortest, self.longest)
        self.speed = RandomSpeed(*given) if data.speed > 0.0 else None
        self._mel: LogMelStem | None = None

    def _samples_of(self, tokens: int) -> int:
        """Fewest samples that give so many tokens."""
        low, high = self.stem.samples_needed(), self.stem.samples_needed() * (tokens + 1)
        while self.stem.count_tokens(high) < tokens:
            high *= 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.stem.count_tokens(middle) >= tokens else (middle + 1, high)
        return low

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder of audio files, of class folders, a `.tsv` manifest, or .tar shards.

        Headers are read for lengths; a manifest gives its own, unless a few headers say otherwise. What has a damaged
        header is rejected, what is too short is left out and counted.
        """
        source = self.open_encoded(path, SPEECH, labelled, option, measure=read_header)
        if isinstance(source, FileSource):
            source.lengths = source.counts if trust_counts(source) else source.read_lengths(read_header)
        lengths = source.lengths
        assert lengths is not None
        damaged, short = lengths < 0, (lengths >= 0) & (lengths < self.shortest)
        rows = np.flatnonzero(~damaged & ~short)
        if short.any():
            reason = f"shorter than {self.shortest / SAMPLE_RATE:g} s"
            source.left_out[reason] = int(short.sum())
        if not len(rows):
            left = "".join(f", {n} {reason} (--data.min-seconds)" for reason, n in source.left_out.items())
            first = for_example(source.rejected)
            raise ValueError(f"{option}: expected {self.noun}, got {int(damaged.sum())} unreadable{left}{first}")
        source.lengths = np.minimum(lengths, self.longest if self.speed is None else self.speed.recorded)
        return Subset(source, rows)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """A normalised waveform (S,) at 16 kHz."""
        values, converted = decode_audio(source.read(index))
        if len(values) < self.shortest:
            raise ValueError(f"{len(values) / SAMPLE_RATE:.3f} s, expected at least {self.shortest / SAMPLE_RATE:g}")
        return normalise_waveform(values), converted

    def speed_perturb(self, value: np.ndarray, epoch: int, sample_id: int) -> np.ndarray:
        """Played at a random speed (data.speed), normalised again: what is played faster loses its highest tones."""
        if self.speed is None:
            return value
        percent = int(self.speed.percents(np.array([len(value)]), epoch, sample_id)[0])
        if percent == NORMAL:
            return value
        return normalise_waveform(resample(value, SAMPLE_RATE * percent // NORMAL))

    def perturbed_lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """Samples at 16 kHz of the played utterances, at most those of the longest crop."""
        return lengths if self.speed is None else np.minimum(self.speed.lengths(lengths, epoch), self.longest)

    def longest_perturbed(self, length: int) -> int:
        """Samples at 16 kHz, at most those of the longest crop."""
        return length if self.speed is None else self.speed.longest_of(length)

    def eval_transform(self, value: np.ndarray) -> np.ndarray:
        """The first data.max_seconds."""
        return value[: self.longest]

    def placeholder(self) -> np.ndarray:
        """Silence."""
        return np.zeros(self.shortest, dtype=np.float32)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B,S), cropped to the shortest of their group (data.unequal crop, training) or padded to the
        longest."""
        lengths = [min(len(s.value), self.longest) for s in samples]
        if training and self.config.data.unequal == "crop":
            # The group may be on several ranks: its length comes with the samples.
            crops = [s.group.crop for s in samples if s.group is not None and s.group.crop is not None]
            lengths = [min(lengths + crops)] * len(samples)
        inputs = torch.zeros(len(samples), max(lengths))
        for row, sample, length in zip(inputs, samples, lengths, strict=True):
            row[:length] = torch.from_numpy(self._crop(sample, length) if training else sample.value[:length])
        return inputs, None if min(lengths) == max(lengths) else torch.tensor(lengths)

    def _crop(self, sample: Sample, length: int) -> np.ndarray:
        """A crop at a place that is a function of (seed, epoch, sample id) and of what there is to choose from."""
        rng = random_stream(self.config.run.seed, sample.epoch, sample.sample_id, STREAM_CROP)
        start = int(rng.integers(len(sample.value) - length + 1))
        return sample.value[start : start + length]

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """log_mel: mean and standard deviation over time of each of 40 log-mel bands."""
        if self._mel is None:
            self._mel = LogMelStem(self.config.stem, width=1)
        lengths = batch.lengths.tolist() if batch.lengths is not None else [batch.inputs.shape[1]] * len(batch)
        rows = []
        for waveform, length in zip(batch.inputs, lengths, strict=True):
            bands = self._mel.make_bands(waveform[None, :length])[0]
            rows.append(torch.cat([bands.mean(0), bands.std(0, correction=0)]))
        return torch.stack(rows)


def read_header(file: BinaryIO) -> int:
    """Samples at 16 kHz by the header of a recording; `ValueError` where it has none."""
    import soundfile

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as header:
            frames, rate, channels = header.frames, header.samplerate, header.channels
            if frames >= OPEN:
                frames = len(read_frames(header, size))
    except soundfile.SoundFileError as error:
        raise ValueError(_explain(error)) from None
    _check_header(frames, rate, channels, size)
    return count_resampled(frames, rate)


def trust_counts(source: FileSource) -> bool:
    """Whether the lengths of a list are used.

    Manifests count frames at the rate of the file. Where the headers of a few files tell other lengths at 16 kHz, the
    counts are of no use: what is cropped together must have the length that the index says.
    """
    if source.counts is None:
        return False
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist():
        if is_command(source.names[index]):
            continue
        try:
            with source.open_file(index) as file:
                found = read_header(file)
        except Exception:  # said where the sample is read
            continue
        if found != source.counts[index]:
            print(
                f"note: {source.file} says {source.counts[index]} samples for {source.describe(index)}, which has "
                f"{found} at {SAMPLE_RATE} Hz: lengths are read from the files",
                file=sys.stderr,
            )
            return False
    return True
