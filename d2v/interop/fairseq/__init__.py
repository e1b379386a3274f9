"""Models of the published fairseq code: configurations, parameter names, checkpoint files."""

from d2v.interop.fairseq.file import load, save
from d2v.interop.fairseq.model import build, gradients, parameters, teacher_parameters

__all__ = ["build", "gradients", "load", "parameters", "save", "teacher_parameters"]
