"""Speech: recordings and their lengths, random speed, random crops or padding."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v.config import Config
from d2v.data.dataset import STREAM_CROP, STREAM_SPEED, Batch, Modality, Sample, random_stream
from d2v.data.decoding.recording import LONG, Level, Recording, Utterance, measure_recording
from d2v.data.decoding.sound import (
    AV_HINT,
    cut_recording,
    decode_audio,
    describe_conversion,
    normalise_waveform,
    resample,
)
from d2v.data.index import FileSource, is_command
from d2v.data.sources import Kind, Source, Subset, for_example
from d2v.model.stems import LogMelStem
from d2v.model.stems.speech import SAMPLE_RATE, SpeechStem, make_stem


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


AV_ENDINGS = frozenset({
    ".3gp", ".aac", ".ac3", ".amr", ".ape", ".asf", ".awb", ".m4a", ".m4b", ".m4r", ".mka", ".mov", ".mp4", ".tta",
    ".webm", ".wma", ".wmv", ".wv",
})  # fmt: skip
"""What PyAV (FFmpeg's libraries) decodes where it is installed; of videos their sound."""
_HAS_AV = importlib.util.find_spec("av") is not None

SPEECH = Kind(
    "audio files", _audio_suffixes() | (AV_ENDINGS if _HAS_AV else frozenset()),
    "a folder of audio files, a .tsv manifest or shards", lists=True,
    beside=frozenset({".txt", ".tsv", ".ltr", ".wrd"}), readers=dict.fromkeys(AV_ENDINGS, AV_HINT), cut=cut_recording,
)  # fmt: skip
MIN_TOKENS = 4
"""Shortest utterance in tokens of the stem, whatever data.min_seconds says: less cannot be masked."""
PROBES = 8
"""Files whose lengths are compared with what a manifest says."""
Waveform = np.ndarray | Utterance | Recording
"""Of one length, and sliced to an array (S,), or of several channels (S,N)."""
NORMAL = 100
"""Percent: the speed of an utterance that is played as it was recorded."""


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

    name, noun, words = "speech", "utterances", frozenset({"waveform"})
    baselines = ("log_mel",)
    rate = SAMPLE_RATE
    make_stem = staticmethod(make_stem)
    stem: SpeechStem

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        data = config.data
        if not 0.0 <= data.min_seconds < data.max_seconds:
            raise ValueError(
                f"data.min_seconds: expected 0 or more and less than data.max_seconds {data.max_seconds}, "
                f"got {data.min_seconds}"
            )
        self.longest = round(data.max_seconds * self.rate)
        self.shortest = max(round(data.min_seconds * self.rate), self._samples_of(MIN_TOKENS))
        if self.longest < self.shortest:
            needed = self.shortest / self.rate
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

    def open(self, path: str | Sequence[str], *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder of audio files, of class folders, a `.tsv` manifest, .tar shards or .parquet files; or such files.

        Files are measured for lengths; a manifest gives its own, unless a few files say otherwise, and only long ones
        are measured. What is damaged is rejected, what is too short is left out and counted.
        """
        source = self.open_encoded(path, SPEECH, labelled, option, measure=measure_recording)
        if isinstance(source, FileSource) and not trust_counts(source):
            source.lengths = source.read_lengths(measure_recording)
        elif isinstance(source, FileSource):
            assert source.counts is not None
            source.lengths = source.counts.copy()
            if long := np.flatnonzero(source.counts > LONG).tolist():
                source.lengths[long] = source.read_lengths(measure_recording, long)
        return self.leave_out_short(source, option)

    def leave_out_short(self, source: Source, option: str) -> Subset:
        """Those of a source whose lengths are known, -1 for damaged ones, that are long enough; `ValueError` where none
        is. Lengths become those that training sees."""
        lengths = source.lengths
        assert lengths is not None
        damaged, short = lengths < 0, (lengths >= 0) & (lengths < self.shortest)
        rows = np.flatnonzero(~damaged & ~short)
        if short.any():
            reason = f"shorter than {self.shortest / self.rate:g} s"
            source.left_out[reason] = int(short.sum())
        if not len(rows):
            left = "".join(f", {n} {reason} (--data.min-seconds)" for reason, n in source.left_out.items())
            first = for_example(source.rejected)
            raise ValueError(f"{option}: expected {self.noun}, got {int(damaged.sum())} unreadable{left}{first}")
        source.lengths = np.minimum(lengths, self.longest if self.speed is None else self.speed.recorded)
        return Subset(source, rows)

    def load(self, source: Source, index: int) -> tuple[Waveform, tuple[str, ...]]:
        """A waveform (S,) at 16 kHz; of more than a minute one that is decoded where it is sliced."""
        if (known := source.measured.get(index)) is not None:
            level = Level(*known)
            opened = functools.partial(source.open_file, index)
            return Recording(opened, level), describe_conversion(level.channels, level.rate)
        values, converted = decode_audio(source.read(index))
        if len(values) < self.shortest:
            raise ValueError(f"{len(values) / SAMPLE_RATE:.3f} s, expected at least {self.shortest / SAMPLE_RATE:g}")
        return Utterance(values), converted

    def speed_perturb(self, value: Waveform, epoch: int, sample_id: int) -> Waveform:
        """Played at a random speed (data.speed), normalised again: what is played faster loses its highest tones."""
        if self.speed is None:
            return value
        percent = int(self.speed.percents(np.array([len(value)]), epoch, sample_id)[0])
        if percent == NORMAL:
            return value
        return normalise_waveform(resample(value[:], SAMPLE_RATE * percent // NORMAL))

    def perturbed_lengths(self, lengths: np.ndarray, epoch: int) -> np.ndarray:
        """Samples at 16 kHz of the played utterances, at most those of the longest crop."""
        return lengths if self.speed is None else np.minimum(self.speed.lengths(lengths, epoch), self.longest)

    def longest_perturbed(self, length: int) -> int:
        """Samples at 16 kHz, at most those of the longest crop."""
        return length if self.speed is None else self.speed.longest_of(length)

    def read_crop(self, value: Waveform, rng: np.random.Generator, length: int | None) -> Waveform:
        """Of a long recording what `stack` would crop it to; what is short is cropped there."""
        if not isinstance(value, Recording):
            return value
        length = min(len(value), self.longest if length is None else length)
        start = int(rng.integers(len(value) - length + 1))
        return value[start : start + length]

    def train_transform(self, value: Waveform, rng: np.random.Generator) -> Any:
        """As it is: `stack` crops it, and so normalises no more than the crop."""
        return value

    def eval_transform(self, value: Waveform) -> np.ndarray:
        """The first data.max_seconds."""
        return value[: self.longest]

    def placeholder(self) -> np.ndarray:
        """Silence."""
        return np.zeros((self.shortest, *self.stem.shape), dtype=np.float32)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, Tensor | None]:
        """Waveforms (B,S), of N channels (B,S,N), cropped to the shortest of their group (data.unequal crop, training)
        or padded to the longest."""
        lengths = [min(len(s.value), self.longest) for s in samples]
        if training and self.config.data.unequal == "crop":
            # The group may be on several ranks: its length comes with the samples.
            crops = [s.group.crop for s in samples if s.group is not None and s.group.crop is not None]
            lengths = [min(lengths + crops)] * len(samples)
        inputs = torch.zeros(len(samples), max(lengths), *self.stem.shape)
        for row, sample, length in zip(inputs, samples, lengths, strict=True):
            row[:length] = torch.from_numpy(self._crop(sample, length) if training else sample.value[:length])
        return inputs, None if min(lengths) == max(lengths) else torch.tensor(lengths)

    def _crop(self, sample: Sample, length: int) -> np.ndarray:
        """A crop at a place that is a function of (seed, epoch, sample id) and of what there is to choose from."""
        rng = random_stream(self.config.run.seed, sample.epoch, sample.sample_id, STREAM_CROP)
        start = int(rng.integers(len(sample.value) - length + 1))
        return sample.value[start : start + length]

    def longest_piece(self) -> int:
        """Tokens of data.max_seconds."""
        return self.count_tokens(self.longest)

    def lift_limits(self) -> Config:
        """Longer than recordings that are read; none is played at another speed."""
        return self.config.change(data=dict(max_seconds=1e9, speed=0.0))

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """Of the samples before the padding of each row."""
        lengths = batch.lengths.tolist() if batch.lengths is not None else [batch.inputs.shape[1]] * len(batch)
        rows = zip(batch.inputs, lengths, strict=True)
        return torch.stack([self.sum_up(waveform[:length]) for waveform, length in rows])

    def sum_up(self, waveform: Tensor) -> Tensor:
        """log_mel: mean and standard deviation over time of each of 40 log-mel bands."""
        if self._mel is None:
            self._mel = LogMelStem(self.config.stem, width=1)
        bands = self._mel.make_bands(waveform[None])[0]
        return torch.cat([bands.mean(0), bands.std(0, correction=0)])


def trust_counts(source: FileSource) -> bool:
    """Whether the lengths of a list are used.

    Manifests count frames at the rate of the file, and by its header. Where a few files have other lengths at 16 kHz,
    the counts are of no use: what is cropped together must have the length that the index says.
    """
    if source.counts is None:
        return False
    for index in np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int)).tolist():
        if is_command(source.names[index]):
            continue
        try:
            with source.open_file(index) as file:
                measured = measure_recording(file)
                found = measured if isinstance(measured, int) else measured.samples
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
