"""Named configurations, one function each; their fields can be overridden on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from d2v.config import Config
from d2v.recipes.speech import speech1_base, speech1_tiny, speech_base, speech_large, speech_small, speech_tiny
from d2v.recipes.text import text1_base, text1_tiny, text_base, text_large, text_small, text_tiny
from d2v.recipes.vision import (
    vision1_base,
    vision1_large,
    vision1_tiny,
    vision_base,
    vision_huge14,
    vision_large,
    vision_small,
    vision_tiny,
)

__all__ = [
    "RECIPES",
    "get",
    "speech1_base",
    "speech1_tiny",
    "speech_base",
    "speech_large",
    "speech_small",
    "speech_tiny",
    "text1_base",
    "text1_tiny",
    "text_base",
    "text_large",
    "text_small",
    "text_tiny",
    "vision1_base",
    "vision1_large",
    "vision1_tiny",
    "vision_base",
    "vision_huge14",
    "vision_large",
    "vision_small",
    "vision_tiny",
]

RECIPES: dict[str, Callable[[], Config]] = {
    "speech-base": speech_base,
    "speech-large": speech_large,
    "vision-base": vision_base,
    "vision-large": vision_large,
    "vision-huge14": vision_huge14,
    "text-base": text_base,
    "text-large": text_large,
    "speech1-base": speech1_base,
    "vision1-base": vision1_base,
    "vision1-large": vision1_large,
    "text1-base": text1_base,
    "speech-small": speech_small,
    "vision-small": vision_small,
    "text-small": text_small,
    "speech-tiny": speech_tiny,
    "vision-tiny": vision_tiny,
    "text-tiny": text_tiny,
    "speech1-tiny": speech1_tiny,
    "vision1-tiny": vision1_tiny,
    "text1-tiny": text1_tiny,
}


def get(name: str) -> Config:
    """The configuration of a recipe by its command-line name.

    Raises:
        ValueError: unknown name; the text gives the nearest valid one.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name.replace("_", "-"), RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}; did you mean {nearest!r}?")
    return RECIPES[name]()
