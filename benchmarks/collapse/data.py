"""Small data for every kind of input, made of installed packages or on the spot: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from d2v.tools.textures import write_textures

COUNT = 200
"""Sounds and signals."""


def write_images(folder: Path, rng: np.random.Generator) -> Path:
    """Crops of photographs inside the scikit-image package."""
    write_textures(folder, seed=int(rng.integers(1 << 31)), size=32, counts={"pretrain": COUNT})
    return folder / "pretrain"


def write_sounds(folder: Path, rng: np.random.Generator) -> Path:
    """Words of a few vowels: harmonics of a pitch under two moving formants, with pauses and noise."""
    import soundfile

    rate = 16_000
    for number in range(COUNT):
        time = np.arange(round(rng.uniform(0.4, 0.8) * rate)) / rate
        knots = np.linspace(0.0, time[-1], 5)
        bands = ((300.0, 900.0), (1000.0, 2600.0), (-0.5, 1.0))
        moving = [np.interp(time, knots, rng.uniform(low, high, 5)) for low, high in bands]
        harmonics = np.arange(1, 16)[:, None] * rng.uniform(90, 220)
        weights = sum(np.exp(-(((harmonics - formant) / 150) ** 2)) for formant in moving[:2])
        values = (weights * np.sin(2 * np.pi * harmonics * time)).sum(axis=0) * moving[2].clip(0.0)
        values += 0.02 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{number:03d}.wav", 0.2 * values / np.abs(values).max(), rate)
    return folder


def write_signals(folder: Path, rng: np.random.Generator) -> Path:
    """Twelve channels of 3 s at 100 Hz: mixtures of four rhythms whose rate and strength change, and noise."""
    for number in range(COUNT):
        time, knots = np.arange(300) / 100, np.linspace(0.0, 3.0, 4)
        rates = np.stack([np.interp(time, knots, rng.uniform(1.0, 20.0, 4)) for _ in range(4)])
        strengths = np.stack([np.interp(time, knots, rng.uniform(0.0, 1.0, 4)) for _ in range(4)])
        sources = strengths * np.sin(2 * np.pi * rates.cumsum(axis=1) / 100)
        values = sources.T @ rng.standard_normal((4, 12)) + 0.1 * rng.standard_normal((300, 12))
        np.save(folder / f"{number:03d}.npy", values.astype(np.float32))
    return folder


def write_text(folder: Path, rng: np.random.Generator) -> Path:
    """A part of Python's manual, as `help()` has it."""
    from pydoc_data.topics import topics

    for name in sorted(topics)[: COUNT // 4]:
        (folder / f"{name.replace('/', '-')}.txt").write_text(topics[name], encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[[Path, np.random.Generator], Path]] = {
    "vision": write_images, "speech": write_sounds, "spectrograms": write_sounds, "signals": write_signals,
    "text": write_text,
}  # fmt: skip


def write_data(kind: str, folder: Path) -> Path:
    """The data of a kind of input in a new folder; returns what `data.path` takes. The same at every call."""
    folder.mkdir(parents=True, exist_ok=kind != "vision")
    return WRITERS[kind](folder, np.random.default_rng(0))
