"""Pre-training and fine-tuning of data2vec models."""

from . import recipes
from .config import Config
from .data2vec import Data2Vec, Output
from .finetuned import FineTuned
from .teacher import Encoded

__version__ = "0.1.0"

__all__ = ["Config", "Data2Vec", "Encoded", "FineTuned", "Output", "__version__", "recipes"]
