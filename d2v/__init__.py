"""Pre-training and fine-tuning of data2vec models."""

import importlib
from typing import TYPE_CHECKING, Any

from d2v import recipes
from d2v.config import Config

if TYPE_CHECKING:
    from d2v.data import register_modality
    from d2v.data.dataset import Modality
    from d2v.model.data2vec import Data2Vec
    from d2v.model.finetuned import FineTuned
    from d2v.model.stems import InputStem
    from d2v.model.targets import Output
    from d2v.model.teacher import Encoded

__version__ = "0.1.0"

__all__ = [
    "Config", "Data2Vec", "Encoded", "FineTuned", "InputStem", "Modality", "Output", "__version__", "recipes",
    "register_modality",
]  # fmt: skip

_MODULES = {
    "Data2Vec": "model.data2vec", "Output": "model.targets", "FineTuned": "model.finetuned",
    "Encoded": "model.teacher", "InputStem": "model.stems", "Modality": "data.dataset", "register_modality": "data",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports the model, and torch with it, where it is first used: the help of commands needs neither."""
    if name not in _MODULES:
        raise AttributeError(f"module 'd2v' has no attribute {name!r}")
    return getattr(importlib.import_module(f"d2v.{_MODULES[name]}"), name)
