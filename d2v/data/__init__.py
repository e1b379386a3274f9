"""Datasets and loaders. Every random choice about a sample is a function of (seed, epoch, sample id)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d2v.config import Config

if TYPE_CHECKING:
    from d2v.data.dataset import Modality


def make_modality(config: Config) -> Modality:
    """How the data of a configuration is found, decoded and stacked; `ValueError` for settings that do not fit it.

    A modality is imported where it is used: each needs libraries that the others do not.
    """
    if config.stem.modality == "speech":
        from d2v.data.speech import Speech

        return Speech(config)
    if config.stem.modality == "text":
        from d2v.data.text import Texts

        return Texts(config)
    from d2v.data.vision import Images

    return Images(config)
