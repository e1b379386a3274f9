"""Pre-training and fine-tuning of data2vec models."""

from d2v import recipes
from d2v.config import Config
from d2v.model.data2vec import Data2Vec, Output
from d2v.model.finetuned import FineTuned
from d2v.model.teacher import Encoded

__version__ = "0.1.0"

__all__ = ["Config", "Data2Vec", "Encoded", "FineTuned", "Output", "__version__", "recipes"]
