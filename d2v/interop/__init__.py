"""Models of other programs, in and out."""

from . import fairseq

__all__ = ["fairseq"]
