"""Sound as a grid of spectrogram patches with 2-D masks: `python examples/spectrograms.py FOLDER RUN [STEPS]`.

Another kind of input of one's own: 64 log-mel bands over 2.56 s, patches of 16 bands by 16 frames, a mask that leaves a
few square blocks visible, and a class token that predicts the mean target, as EAT has it (Chen et al. 2024, "EAT:
Self-Supervised Pre-Training with Efficient Audio Transformer"). Not its sizes, nor its training data.
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn

import d2v
from d2v.config import Config, Data, Decoder, Ema, Encoder, Loss, Mask, Optim, Run, Stem, Target
from d2v.data.dataset import Sample
from d2v.data.decoding.sound import decode_audio, normalise_waveform
from d2v.data.sources import Source
from d2v.model.stems import LogMelStem
from d2v.train.pretraining import pretrain

BANDS, FRAMES, PATCH = 64, 256, 16
SAMPLES = 160 * FRAMES + 240
"""Of a crop at 16 kHz: a frame of 400 samples every 160."""


class SpectrogramStem(d2v.InputStem):
    """Patches row by row: time, then frequency."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(PATCH**2, width)

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        if lengths is not None or inputs.shape[1:] != (FRAMES, BANDS):
            raise ValueError(f"inputs: expected (B, {FRAMES}, {BANDS}) without lengths, got {tuple(inputs.shape)}")
        return FRAMES // PATCH * (BANDS // PATCH), None

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        patches = inputs.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(2, 3)
        features: Tensor = self.proj(patches.flatten(3).flatten(1, 2))
        return features


@d2v.register_modality
class Spectrograms(d2v.Modality):
    """Sound files of any length and rate, as crops of a fixed length."""

    name, noun, suffixes = "spectrograms", "sounds", (".wav", ".flac", ".ogg", ".mp3")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.mel = LogMelStem(Stem(mel_bins=BANDS, mel_frames=1), width=1)

    @staticmethod
    def make_stem(config: Config) -> SpectrogramStem:
        return SpectrogramStem(config.encoder.width)

    @staticmethod
    def grid(stem: Stem) -> tuple[int, int]:
        return FRAMES // PATCH, BANDS // PATCH

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        values, converted = decode_audio(source.read(index))
        values = np.pad(normalise_waveform(values), (0, max(0, SAMPLES - len(values))))
        return values, converted

    def train_transform(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.integers(len(value) - SAMPLES + 1))
        return value[start : start + SAMPLES]

    def eval_transform(self, value: np.ndarray) -> np.ndarray:
        return value[:SAMPLES]

    def describe_cut(self, value: np.ndarray) -> str | None:
        return None if len(value) == SAMPLES else f"cut to {SAMPLES / 16_000:g} of {len(value) / 16_000:g} s"

    def placeholder(self) -> np.ndarray:
        return np.zeros(SAMPLES, dtype=np.float32)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, None]:
        return torch.from_numpy(np.stack([s.value for s in samples])), None

    def measure(self, inputs: Tensor, lengths: Tensor | None) -> tuple[None, None]:
        return None, None  # the grid says it all

    def prepare(self, inputs: Tensor) -> Tensor:
        """Waveforms (B, SAMPLES) to log power (B, FRAMES, BANDS) of about unit variance, on the device."""
        bands = self.mel.to(inputs.device).make_bands(inputs)
        return (bands - bands.mean(dim=(1, 2), keepdim=True)) / 4.0


def recipe() -> Config:
    return Config(
        recipe="spectrograms-tiny",
        stem=Stem(modality="spectrograms"),
        encoder=Encoder(width=64, heads=4, depth=3, norm_order="pre", norm_eps=1e-6, init_std=None, extra_tokens=1),
        decoder=Decoder(layers=3, width=64, kernel=3, groups=16),
        mask=Mask(kind="block", ratio=0.8, span=3, inverse=True, copies=8),
        target=Target(source="block", top_k=3, norm="instance", out_norm="layer"),
        loss=Loss(class_weight=0.01),
        ema=Ema(start=0.98, end=0.999),
        optim=Optim(learning_rate=2e-3, weight_decay=0.05, clip=3.0, warmup_steps=50),
        data=Data(global_batch=16, workers=1),
        run=Run(steps=400, log_every=50, checkpoint_every=400),
    )


if __name__ == "__main__":
    path, folder, *steps = sys.argv[1:]
    pretrain(recipe().change(data=dict(path=path), run=dict(dir=folder, steps=int(steps[0]) if steps else 400)))
