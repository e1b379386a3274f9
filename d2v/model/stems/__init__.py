"""What differs between kinds of input: the stem, the positions, and the geometry of the masks."""

from __future__ import annotations

from torch import Tensor, nn

from d2v.config import Config
from d2v.model.stems.positions import Positions, SequencePositions, valid_positions
from d2v.model.stems.speech import ConvPositions, LogMelStem, WaveformStem
from d2v.model.stems.text import PADDING, TextStem
from d2v.model.stems.vision import PatchStem, RelativePositions, SinCosPositions, relative_index, sincos_positions


def make_stem(config: Config) -> nn.Module:
    """The stem of a configuration.

    `measure(inputs, lengths)` checks both and returns T and the token lengths; `forward(inputs, token_lengths)` returns
    features (B,T,C).
    """
    stem, width = config.stem, config.encoder.width
    if stem.modality == "vision":
        return PatchStem(stem, width)
    if stem.modality == "text":
        return TextStem(stem, width, zero_padding=config.version == 1)
    return LogMelStem(stem, width) if stem.kind == "log-mel" else WaveformStem(stem, width)


def prepare_inputs(stem: nn.Module, inputs: Tensor, lengths: Tensor | None) -> Tensor:
    """Inputs that `measure` took, after what a stem does to them without weights, so that student and teacher share it;
    stems take both."""
    return stem.prepare(inputs, lengths) if isinstance(stem, LogMelStem) else inputs


def make_positions(config: Config) -> Positions:
    """The positions of a configuration."""
    stem, encoder = config.stem, config.encoder
    if stem.positions == "relative":
        return RelativePositions(encoder, stem.grid)
    if stem.positions == "conv":
        seen = "positions-see-padding" in config.published
        return ConvPositions(stem, encoder, zero_input=config.version == 1 or not seen, zero_between=not seen)
    if stem.positions == "none":
        return Positions(encoder)
    if stem.modality == "vision":
        return SinCosPositions(encoder, stem.grid, stem.position_scale)
    return SequencePositions(encoder, stem.position_scale)


__all__ = [
    "PADDING",
    "ConvPositions",
    "LogMelStem",
    "PatchStem",
    "Positions",
    "RelativePositions",
    "SequencePositions",
    "SinCosPositions",
    "TextStem",
    "WaveformStem",
    "make_positions",
    "make_stem",
    "prepare_inputs",
    "relative_index",
    "sincos_positions",
    "valid_positions",
]
