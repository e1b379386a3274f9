"""A kind of input of one's own, here ECG of 12 leads: `python examples/own_modality.py [FOLDER [STEPS]]`.

Writes generated recordings of three rhythms below FOLDER, pre-trains on them without labels, and compares a linear
probe of the features with that of an untrained network: about a minute on one core.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import d2v
from d2v.config import Config, Data, Decoder, Ema, Encoder, Mask, Optim, Run, Stem, Target
from d2v.data.dataset import Sample
from d2v.data.sources import Source
from d2v.evaluate.probe import probe
from d2v.train.pretraining import pretrain

RATE, SAMPLES, LEADS, PATCH = 100, 600, 12, 10
"""Hz, samples of a recording, channels, samples of a token."""


class EcgStem(d2v.InputStem):
    """Pieces of 100 ms of all leads, each a token by one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(PATCH * LEADS), nn.Linear(PATCH * LEADS, width)

    def measure(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[int, Tensor | None]:
        if lengths is not None or inputs.shape[1:] != (SAMPLES, LEADS):  # all are as long: there is no padding
            raise ValueError(f"inputs: expected (B, {SAMPLES}, {LEADS}) without lengths, got {tuple(inputs.shape)}")
        return SAMPLES // PATCH, None

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        features: Tensor = self.proj(self.norm(inputs.reshape(-1, SAMPLES // PATCH, PATCH * LEADS)))
        return features


@d2v.register_modality
class Ecg(d2v.Modality):
    """Recordings (samples, leads), one a `.npy` file."""

    name, noun, suffixes = "ecg", "recordings", (".npy",)

    @staticmethod
    def make_stem(config: Config) -> EcgStem:
        return EcgStem(config.encoder.width)

    def load(self, source: Source, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
        values = np.load(io.BytesIO(source.read(index)), allow_pickle=False)
        if values.shape != (SAMPLES, LEADS) or not np.isfinite(values).all():
            raise ValueError(f"expected finite values ({SAMPLES}, {LEADS}), got shape {values.shape}")
        return values.astype(np.float32), ()  # the second: what was converted, in words

    def train_transform(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another gain for each lead, as electrodes have; `rng` depends on seed, epoch and sample only."""
        scaled: np.ndarray = value * rng.uniform(0.7, 1.4, LEADS).astype(np.float32)
        return scaled

    def placeholder(self) -> np.ndarray:
        return np.zeros((SAMPLES, LEADS), dtype=np.float32)

    def stack(self, samples: list[Sample], training: bool) -> tuple[Tensor, None]:
        return torch.from_numpy(np.stack([s.value for s in samples])), None


def recipe() -> Config:
    """A tiny model; spans of 200 ms are masked."""
    return Config(
        recipe="ecg-tiny",
        stem=Stem(modality="ecg", positions="sincos", position_scale=0.1),
        encoder=Encoder(width=64, heads=4, depth=3, norm_order="pre", norm_eps=1e-6, init_std=None),
        decoder=Decoder(layers=3, width=64, kernel=3, groups=16),
        mask=Mask(kind="block", ratio=0.6, span=2, copies=4),
        target=Target(source="block", top_k=3, norm="instance", out_norm="layer"),
        ema=Ema(start=0.98, end=0.999),
        optim=Optim(learning_rate=2e-3, weight_decay=0.05, clip=3.0, warmup_steps=50),
        data=Data(global_batch=32, workers=0),
        run=Run(steps=400, log_every=100, checkpoint_every=400, threads=1),
    )


WAVES = np.array(
    [[-0.18, 0.025, 0.15], [-0.03, 0.012, -0.15], [0.0, 0.012, 1.0], [0.03, 0.014, -0.3], [0.28, 0.05, 0.3]]
)
"""Place, width (s) and height of P, Q, R, S, T."""


def make_recording(rng: np.random.Generator, rhythm: str) -> np.ndarray:
    """(SAMPLES, LEADS) float32: beats as sums of bell curves in three directions, seen by 12 leads.

    sinus: regular, each beat with a P wave. fibrillation: irregular, ripples in place of P. ectopic: some beats come
    early and wide, without P.
    """
    time, period = np.arange(SAMPLES) / RATE, rng.uniform(0.6, 1.0)
    body = np.random.default_rng(0)  # what all patients have in common
    directions = body.standard_normal((5, 3)) + 0.3 * rng.standard_normal((5, 3))
    heart, beat = np.zeros((SAMPLES, 3)), rng.uniform(0.0, period)
    while beat < time[-1] + 1.0:
        early = rhythm == "ectopic" and rng.random() < 0.3
        beat -= 0.3 * period if early else 0.0
        for (place, width, height), direction in zip(WAVES, directions, strict=True):
            if place < -0.1 and (early or rhythm == "fibrillation"):
                continue
            width *= 2.2 if early and abs(place) < 0.1 else 1.0
            bell = np.exp(-0.5 * ((time - beat - place * np.sqrt(period)) / width) ** 2)
            heart += height * bell[:, None] * direction
        spread = 0.22 if rhythm == "fibrillation" else 0.03
        beat += period * (1.35 if early else 1.0) * np.exp(spread * rng.standard_normal())
    if rhythm == "fibrillation":
        phase = 2 * np.pi * rng.uniform(4.5, 7.5) * time + np.cumsum(rng.normal(0, 0.15, SAMPLES))
        heart += 0.06 * np.sin(phase + rng.uniform(0, 6))[:, None] * directions[0]
    leads = heart @ (body.standard_normal((3, LEADS)) + 0.2 * rng.standard_normal((3, LEADS)))
    breath = np.sin(2 * np.pi * rng.uniform(0.1, 0.4) * time[:, None] + rng.uniform(0, 6, LEADS))
    leads += 0.2 * rng.standard_normal(LEADS) * breath + rng.uniform(0.05, 0.2) * rng.standard_normal(leads.shape)
    return (leads / leads.std(axis=0)).astype(np.float32)


def write_recordings(folder: Path, count: int, seed: int) -> Path:
    """`count` recordings of each rhythm, in a folder each."""
    rng = np.random.default_rng(seed)
    for rhythm in ("sinus", "fibrillation", "ectopic"):
        (folder / rhythm).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            np.save(folder / rhythm / f"{i:04}.npy", make_recording(rng, rhythm))
    return folder


def main(folder: Path, steps: int = 400, count: int = 300) -> dict[str, float]:
    """Accuracies of linear probes, 0 to 1."""
    train, labelled, test = (
        write_recordings(folder / name, number, seed)
        for seed, (name, number) in enumerate({"unlabelled": count, "train": count // 2, "test": 150}.items())
    )
    config = recipe().change(data=dict(path=str(train)), run=dict(dir=str(folder / "run"), steps=steps))
    run = pretrain(config)
    scores: dict[str, float] = probe(str(run), str(labelled), str(test), baselines=["random_init"], pool="mean-std")[
        "linear_probe"
    ]
    return scores


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary), *map(int, sys.argv[2:3]))
