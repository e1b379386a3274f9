"""What differs between kinds of input: the stem, the positions, and the geometry of the masks."""

from .vision import PatchStem, SinCosPositions, sincos_positions

__all__ = ["PatchStem", "SinCosPositions", "sincos_positions"]
