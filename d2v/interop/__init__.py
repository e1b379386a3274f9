"""Models of other programs, in and out."""

from . import fairseq, huggingface

__all__ = ["fairseq", "huggingface"]
