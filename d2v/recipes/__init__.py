"""Named configurations, one function each; their fields can be overridden on the command line."""

from __future__ import annotations

from collections.abc import Callable

from d2v.config import Config
from d2v.config.fields import find_nearest
from d2v.recipes.spectrograms import eat_base, eat_large, spectrograms_tiny
from d2v.recipes.speech import (
    signals_tiny,
    speech1_base,
    speech1_tiny,
    speech_base,
    speech_large,
    speech_small,
    speech_tiny,
)
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

RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        speech_base, speech_large, vision_base, vision_large, vision_huge14, text_base, text_large,
        speech1_base, vision1_base, vision1_large, text1_base, eat_base, eat_large,
        speech_small, vision_small, text_small,
        speech_tiny, vision_tiny, text_tiny, speech1_tiny, vision1_tiny, text1_tiny, signals_tiny,
        spectrograms_tiny,
    )
}  # fmt: skip


def get(name: str) -> Config:
    """The configuration of a recipe by its command-line name.

    Raises:
        ValueError: unknown name; the text gives the nearest valid one.
    """
    if name not in RECIPES:
        nearest = find_nearest(name.replace("_", "-"), RECIPES)
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}; did you mean {nearest!r}?")
    return RECIPES[name]()
