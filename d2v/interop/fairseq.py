"""Models of the published fairseq code: configurations, parameter names, checkpoint files."""

from .fairseq_file import load, save
from .fairseq_model import build, gradients, parameters, teacher_parameters

__all__ = ["build", "gradients", "load", "parameters", "save", "teacher_parameters"]
