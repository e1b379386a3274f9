"""Every setting of a run, as nested dataclasses."""

from d2v.config.fields import setting
from d2v.config.model import (
    PUBLISHED_BEHAVIOURS,
    SPEECH_CONVOLUTIONS,
    Config,
    Decoder,
    Encoder,
    Head,
    Loss,
    Mask,
    SharedDecoder,
    Stem,
    Target,
)
from d2v.config.run import Data, Ema, Optim, Probe, Run

__all__ = [
    "PUBLISHED_BEHAVIOURS", "SPEECH_CONVOLUTIONS", "Config", "Data", "Decoder", "Ema", "Encoder", "Head", "Loss",
    "Mask", "Optim", "Probe", "Run", "SharedDecoder", "Stem", "Target", "setting",
]  # fmt: skip
