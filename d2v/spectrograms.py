"""Spectrograms: recordings as one-channel images of log-mel frames, tokens of square patches.

The input of EAT (Chen et al. 2024, "EAT: Self-Supervised Pre-Training with Efficient Audio Transformer"), a data2vec
2.0 of images whose picture is a spectrogram; what makes tokens of it is that of images.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from d2v.config import Config, Stem
from d2v.config.inputs import Grid, find_kind
from d2v.data.dataset import Batch, Modality, Sample
from d2v.data.decoding.sound import decode_audio
from d2v.data.sources import Source
from d2v.data.speech import SPEECH
from d2v.model.stems.speech import SAMPLE_RATE
from d2v.model.stems.vision import PatchStem

BANDS = 128
WINDOW, HOP, _FFT = 400, 160, 512
"""Samples at 16 kHz: 25 ms every 10 ms, padded to a power of two."""
_LOWEST, _PRE_EMPHASIS = 20.0, 0.97


@functools.cache
def mel_weights() -> Tensor:
    """(257,128) float32: Kaldi's triangles, equally wide on the scale mel = 1127 ln(1 + f / 700), 20 Hz to 8 kHz."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    low, high = mel(torch.tensor([_LOWEST, SAMPLE_RATE / 2], dtype=torch.float64))
    hertz = torch.arange(_FFT // 2, dtype=torch.float64) * (SAMPLE_RATE / _FFT)
    place = (mel(hertz) - low) / ((high - low) / (BANDS + 1))
    weights = (1.0 - (place[:, None] - torch.arange(1, BANDS + 1)).abs()).clamp_min(0.0)
    return functional.pad(weights, (0, 0, 0, 1)).float()  # the highest frequency is in no band


def log_mel_frames(waveform: Tensor) -> Tensor:
    """(F,128) float32: Kaldi's filterbank of a waveform (S,) at 16 kHz in -1 to 1, F = (S - 400) // 160 + 1.

    As `torchaudio.compliance.kaldi.fbank` with a Hann window and without dither and energy: each frame less its mean,
    pre-emphasis .97, power, log of at least float32's epsilon.
    """
    frames = waveform.float().unfold(0, WINDOW, HOP)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = functional.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    frames = (frames - _PRE_EMPHASIS * before) * torch.hann_window(WINDOW, periodic=False)
    spectrum = torch.fft.rfft(frames, _FFT)
    power = (spectrum.real.square() + spectrum.imag.square()) @ mel_weights()
    return power.clamp_min(torch.finfo(torch.float32).eps).log()


class SpectrogramStem(PatchStem):
    """Patch embedding of spectrograms (B,1,F,128), F = stem.frames."""

    def __init__(self, config: Stem, width: int) -> None:
        super().__init__(replace(config, channels=1, image_size=config.patch_size), width)
        self.image_shape = (1, config.frames, BANDS)


class Spectrograms(Modality):
    """Sound files of any rate as (1,F,128) float32: log-mel frames of the waveform less its mean, padded with zeros or
    cut to F = stem.frames, then (x - stem.frame_mean) / (2 stem.frame_deviation)."""

    name, noun, words = "spectrograms", "recordings", ("patches", "pixels", "projected")
    baselines = ("log_mel",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.longest = WINDOW + (config.stem.frames - 1) * HOP

    @staticmethod
    def make_stem(config: Config) -> SpectrogramStem:
        """Patches row by row: time, then frequency."""
        return SpectrogramStem(config.stem, config.encoder.width)

    @staticmethod
    def grid(stem: Stem) -> Grid | None:
        """Patches along time and along frequency."""
        return find_kind("spectrograms").grid(stem)

    def open(self, path: str, *, labelled: bool = False, option: str = "data.path") -> Source:
        """A folder of audio files, of class folders, a `.tsv` manifest, or .tar shards."""
        return self.open_encoded(path, SPEECH, labelled, option, measure=None)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        """A waveform (S,) at 16 kHz without its mean."""
        values, converted = decode_audio(source.read(index))
        if len(values) < WINDOW:
            raise ValueError(f"{len(values)} samples at 16 kHz, expected at least {WINDOW}")
        return values - values.mean(dtype=np.float64).astype(np.float32), converted

    def train_transform(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random crop of longer ones."""
        start = int(rng.integers(max(0, len(value) - self.longest) + 1))
        return self._make_spectrogram(value[start : start + self.longest])

    def eval_transform(self, value: np.ndarray) -> np.ndarray:
        """The beginning."""
        return self._make_spectrogram(value[: self.longest])

    def _make_spectrogram(self, value: np.ndarray) -> np.ndarray:
        stem, frames = self.config.stem, log_mel_frames(torch.from_numpy(value))
        padded = functional.pad(frames, (0, 0, 0, stem.frames - len(frames)))
        return ((padded - stem.frame_mean) / (2.0 * stem.frame_deviation))[None].numpy()

    def describe_cut(self, value: np.ndarray) -> str | None:
        """What lies behind stem.frames."""
        if len(value) < self.longest + HOP:
            return None
        return f"cut to {self.longest / SAMPLE_RATE:g} of {len(value) / SAMPLE_RATE:g} s (stem.frames)"

    def placeholder(self) -> np.ndarray:
        """The means."""
        return np.zeros((1, self.config.stem.frames, BANDS), dtype=np.float32)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, None]:
        """(B,1,F,128)."""
        return torch.from_numpy(np.stack([s.value for s in samples])), None

    def measure(self, inputs: Tensor, lengths: Tensor | None) -> tuple[None, None]:
        """The grid of the stem says it all."""
        return None, None

    def raw_features(self, name: str, batch: Batch) -> Tensor:
        """log_mel: mean and standard deviation over time of each band."""
        frames = batch.inputs[:, 0]
        return torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)], dim=1)
