"""Kinds of input: what settings, model, data and training know of each. Five are built in; `d2v.register_modality`
adds others.

An entry names its stem and its data as "module:name": they lie to the right of the settings and need libraries that
other kinds do not, so they are imported where they are first used.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d2v.config.fields import shorten

Grid = tuple[int, int]


@dataclass(frozen=True)
class InputKind:
    """One kind of input, by its name in `stem.modality`."""

    stem: str | Callable[[Any], Any]
    """Config -> `d2v.model.stems.base.InputStem`, or where such a function is."""
    modality: str | Callable[[Any], Any]
    """Config -> `d2v.data.dataset.Modality`, or where such a class is."""
    words: frozenset[str] = frozenset()
    """For `Config.traits`, besides the name: settings apply by them. "waveform": a sequence that convolutions
    make tokens of (seconds, crops); "channels": `stem.channels` counts; "patches": tokens are square patches; "ids":
    token ids of a tokenizer; "pixels": the stem has `raw_tokens`; "projected": `stem.width` counts."""
    describe: Callable[[Any], str] = lambda stem: stem.modality
    """`Stem` -> the input in a few words."""
    grid: Callable[[Any], Grid | None] = lambda stem: None
    """`Stem` -> rows and columns of a sample's tokens, masked in 2-D blocks; None: a sequence, masked in spans."""
    example: str = "inputs = ...  # a batch, as the training saw it"
    """A line of Python that makes the input of a model; braces hold fields of `Stem`."""
    tokens: str = "one a token"
    """What a token is, in a few words."""


KINDS: dict[str, InputKind] = {
    "speech": InputKind(
        "d2v.model.stems.speech:make_stem", "d2v.data.speech:Speech", frozenset({"waveform"}),
        lambda s: "log-mel spectrogram" if s.kind == "log-mel" else f"waveform, {len(s.convolutions)} convolutions",
        example="inputs = torch.randn(1, 16_000)  # waveform at 16 kHz, zero mean and unit variance",
        tokens="a frame each 20 ms"),
    "vision": InputKind(
        "d2v.model.stems.vision:make_stem", "d2v.data.vision:Images",
        frozenset({"channels", "patches", "pixels", "projected"}),
        lambda s: f"{s.image_size} px, patch {s.patch_size}", lambda s: s.grid,
        "inputs = torch.randn(1, {channels}, {image_size}, {image_size})  # normalised pixels", "patches row by row"),
    "text": InputKind(
        "d2v.model.stems.text:make_stem", "d2v.data.text:Texts", frozenset({"ids", "projected"}),
        lambda s: f"{s.vocabulary} token ids, at most {s.max_tokens} tokens",
        example="inputs = torch.tensor([[0, 5, 6, 7, 2]])  # token ids: <s> ... </s>", tokens="a token each"),
    "signals": InputKind(
        "d2v.signals:Signals.make_stem", "d2v.signals:Signals", frozenset({"waveform", "channels"}),
        lambda s: f"{s.channels} channels at {s.sample_rate} Hz, {len(s.convolutions)} convolutions",
        example="inputs = torch.randn(1, 10 * {sample_rate}, {channels})  # 10 s, each channel normalised",
        tokens="a frame each"),
    "spectrograms": InputKind(
        "d2v.spectrograms:Spectrograms.make_stem", "d2v.spectrograms:Spectrograms",
        frozenset({"patches", "pixels", "projected"}),
        lambda s: f"log-mel spectrogram, {s.frames} frames of 10 ms, patch {s.patch_size}",
        lambda s: (s.frames // s.patch_size, 128 // s.patch_size),
        "inputs = torch.randn(1, 1, {frames}, 128)  # normalised log-mel spectrogram",
        "patches row by row: time, then frequency"),
}  # fmt: skip


def find_kind(name: str) -> InputKind:
    """The entry of a name; `ValueError` where there is none."""
    if name not in KINDS:
        hint = "one of your own has to be registered first (d2v.register_modality)"
        raise ValueError(f"stem.modality: expected one of {', '.join(KINDS)}, got {shorten(name)!r}; {hint}")
    return KINDS[name]


def build_part(part: str | Callable[[Any], Any], config: Any) -> Any:
    """What the function or class that an entry names makes of a `Config`."""
    return (pkgutil.resolve_name(part) if isinstance(part, str) else part)(config)
