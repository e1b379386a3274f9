"""What differs between kinds of input: how samples become tokens, and the positions of those."""

from __future__ import annotations

from d2v.config import Config
from d2v.config.inputs import build_part, find_kind
from d2v.model.stems.base import InputStem
from d2v.model.stems.positions import (
    ConvPositions,
    Positions,
    RelativePositions,
    SequencePositions,
    SinCosPositions,
)
from d2v.model.stems.speech import LogMelStem, WaveformStem
from d2v.model.stems.text import PADDING

__all__ = ["PADDING", "InputStem", "LogMelStem", "SinCosPositions", "WaveformStem", "make_positions", "make_stem"]


def make_stem(config: Config) -> InputStem:
    """The stem of a configuration."""
    stem: InputStem = build_part(find_kind(config.stem.modality).stem, config)
    return stem


def make_positions(config: Config) -> Positions:
    """The positions of a configuration."""
    positions = _make_positions(config)
    # Compiled blocks would be compiled for every batch; drop path is drawn a row; published statistics read padding.
    reads_padding = {"statistics-over-padding", "loss-on-padding", "norms-over-batch"} & config.published
    if not (config.run.compile or config.encoder.drop_path > 0.0 or reads_padding):
        positions.packed = config.run.packed
    return positions


def _make_positions(config: Config) -> Positions:
    stem, encoder = config.stem, config.encoder
    if stem.positions == "relative":
        assert config.grid is not None
        return RelativePositions(encoder, config.grid)
    if stem.positions == "conv":
        seen = "positions-see-padding" in config.published
        zero_input, choice = config.version == 1 or not seen, config.run.convolution
        return ConvPositions(stem, encoder, zero_input=zero_input, zero_between=not seen, convolution=choice)
    if stem.positions == "none":
        return Positions(encoder)
    if config.grid is not None:
        return SinCosPositions(encoder, config.grid, stem.position_scale)
    return SequencePositions(encoder, stem.position_scale)
