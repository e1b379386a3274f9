"""Tiny pre-trained models and labelled data, made on the spot."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.families import make_config

from d2v.config import Config
from d2v.model.data2vec import Data2Vec
from d2v.model.saving import write_folder

TONES = {"a": 300.0, "e": 900.0, "o": 2000.0}
WORDS = ("ae", "eo", "oa")
"""Words of generated speech; each letter is a tone."""


def export(config: Config, folder: Path) -> Path:
    """An exported model with random weights."""
    torch.manual_seed(0)
    write_folder(Data2Vec(config), folder)
    return folder


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data2vec 2.0 for 16 x 16 images."""
    config = make_config("vision-base")
    config = dataclasses.replace(config, stem=dataclasses.replace(config.stem, image_size=16, patch_size=4))
    return export(config, tmp_path_factory.mktemp("models") / "images")


@pytest.fixture(scope="session")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data2vec 2.0 for waveforms, with a log-mel stem: it learns tones in a few updates."""
    config = make_config("speech-tiny")
    return export(config, tmp_path_factory.mktemp("models") / "speech")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data2vec 1.0 for text, with its tokenizer."""
    from d2v.interop.tokenizer import write_tokenizer

    place = tmp_path_factory.mktemp("models")
    (place / "text.txt").write_text("\n\n".join(f"a good film {i} and a bad film" for i in range(60)))
    config = make_config("text1-tiny")
    folder = place / "text"
    stem = dataclasses.replace(config.stem, vocabulary=265, mask_token=264)
    export(dataclasses.replace(config, stem=stem), folder)
    write_tokenizer(place / "tokenizer", str(place / "text.txt"), vocabulary=265, gpt2=None)
    shutil.copytree(place / "tokenizer", folder / "tokenizer")
    return folder


def write_images(root: Path, count: int, seed: int, classes: tuple[str, ...] = ("dark", "light", "striped")) -> Path:
    """Class folders of images that differ in brightness or pattern."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (16, 16, 3)) + {"dark": 0, "light": 190}.get(name, 90)
            if name == "striped":
                pixels[::4] = 250
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def make_tones(words: list[str], seed: int) -> np.ndarray:
    """0.15 s of a tone for each letter, 0.1 s of silence after each word."""
    rng = np.random.default_rng(seed)
    time = np.arange(2400) / 16_000
    parts = []
    for word in words:
        for letter in word:
            tone = np.sin(2 * np.pi * TONES[letter] * rng.uniform(0.95, 1.05) * time)
            parts.append(tone * rng.uniform(0.3, 0.6))
        parts.append(np.zeros(1600))
    wave = np.concatenate(parts)
    return (wave + 0.003 * rng.standard_normal(len(wave))).astype(np.float32)


def write_speech(root: Path, count: int, seed: int, words: int = 2) -> Path:
    """Recordings of random words with their transcripts beside them."""
    import soundfile

    root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        said = rng.choice(WORDS, size=words).tolist()
        soundfile.write(root / f"{i}.wav", make_tones(said, seed * 1000 + i), 16_000)
        (root / f"{i}.txt").write_text(" ".join(said) + "\n")
    return root


def write_spoken_classes(root: Path, count: int, seed: int) -> Path:
    """Class folders of recordings of one word."""
    import soundfile

    for number, word in enumerate(WORDS):
        (root / word).mkdir(parents=True)
        for i in range(count):
            soundfile.write(root / word / f"{i}.wav", make_tones([word], seed + 100 * number + i), 16_000)
    return root


def write_table(path: Path, count: int, seed: int, *, pairs: bool = False, numbers: bool = False) -> Path:
    """Lines of text (or two) and a label, that one word of the text decides."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        good = bool(rng.integers(2))
        text = f"a {'good' if good else 'bad'} film {int(rng.integers(50))}"
        label = (f"{2.5 + 2 * good + 0.1 * float(rng.standard_normal()):.3f}") if numbers else ("yes" if good else "no")
        lines.append("\t".join([text, f"film {i}", label] if pairs else [text, label]))
    path.write_text("\n".join(lines) + "\n")
    return path
