"""Models of other programs, in and out."""

from d2v.interop import fairseq, huggingface

__all__ = ["fairseq", "huggingface"]
