"""What differs between kinds of input: how samples become tokens, and the positions of those."""

from __future__ import annotations

from typing import Any

from d2v.config import Config
from d2v.model.stems.positions import (
    ConvPositions,
    Positions,
    RelativePositions,
    SequencePositions,
    SinCosPositions,
)
from d2v.model.stems.speech import LogMelStem, WaveformStem
from d2v.model.stems.text import PADDING, TextStem
from d2v.model.stems.vision import PatchStem

__all__ = ["PADDING", "LogMelStem", "SinCosPositions", "TextStem", "WaveformStem", "make_positions", "make_stem"]


def make_stem(config: Config) -> Any:
    """The stem of a configuration, a module.

    `measure(inputs, lengths)` checks both and returns T and the token lengths; `forward(inputs, token_lengths)` returns
    features (B,T,C).
    """
    stem, width = config.stem, config.encoder.width
    if stem.modality == "vision":
        return PatchStem(stem, width)
    if stem.modality == "text":
        return TextStem(stem, width, zero_padding=config.version == 1)
    return LogMelStem(stem, width) if stem.kind == "log-mel" else WaveformStem(stem, width)


def make_positions(config: Config) -> Positions:
    """The positions of a configuration."""
    stem, encoder = config.stem, config.encoder
    if stem.positions == "relative":
        return RelativePositions(encoder, stem.grid)
    if stem.positions == "conv":
        seen = "positions-see-padding" in config.published
        zero_input, choice = config.version == 1 or not seen, config.run.convolution
        return ConvPositions(stem, encoder, zero_input=zero_input, zero_between=not seen, convolution=choice)
    if stem.positions == "none":
        return Positions(encoder)
    if stem.modality == "vision":
        return SinCosPositions(encoder, stem.grid, stem.position_scale)
    return SequencePositions(encoder, stem.position_scale)
