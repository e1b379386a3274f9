"""Models of the transformers library (data2vec 1.0): folders in and out."""

from d2v.interop.huggingface.model import load, save

__all__ = ["load", "save"]
